"""What systemd wants to know, and where log lines go. Nothing else in the daemon knows systemd.

Without systemd the daemon runs the same in the foreground: notifications go nowhere and log lines to standard error.

Fields of a log line in the journal (journalctl -o verbose): INSTANCE, IDENTITY, SESSION, CONNECTION, WORKER, PEER,
REASON.
"""

import logging
import os
import socket
import sys
import time

from systemd import journal

log = logging.getLogger(__name__)

FIELDS = ("INSTANCE", "IDENTITY", "SESSION", "CONNECTION", "WORKER", "PEER", "REASON")
RATE_BURST = 10
RATE_PERIOD = 50.0
"""At most RATE_BURST lines of one kind at once, and that many again in RATE_PERIOD seconds (choice)."""
KINDS_MAX = 16384
"""Kinds of line that are told apart, about 4 MiB; which came last the longest ago is forgotten first (choice)."""
REASON_MAX = 200
"""Characters of the reason for the end of a connection, which may quote the other end (choice)."""
NOTIFY_TIMEOUT = 1.0
"""Seconds to wait for room in systemd's socket, which holds 512 messages (choice)."""


def set_up_logging(instance, level):
    """instance: name for the INSTANCE field. level: debug, info, warning or error."""
    if _stderr_is_journal():
        handler = journal.JournalHandler(SYSLOG_IDENTIFIER="bulkvpnd", INSTANCE=instance)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s bulkvpnd@{instance} %(levelname)s: %(message)s"))
    handler.addFilter(RateLimit())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)


def set_level(level):
    """level: the least that is logged: debug, info, warning or error."""
    logging.getLogger().setLevel(level.upper())


def _stderr_is_journal():
    """JOURNAL_STREAM names the device and inode of the journal's stream, see systemd.exec(5)."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class RateLimit(logging.Filter):
    """Thins out whatever is logged: each kind of line has a budget, and the next that passes tells how many did not.

    A kind is a place in the code and, where the line has one, an identity: who connects again and again hides nobody
    else's lines. `burst` in a record is for a place that says much in a short time by its nature; else RATE_BURST is.
    There is no other way around it, so a new line has its rate whether or not a peer can cause it.
    """

    def __init__(self, clock=time.monotonic):
        super().__init__()
        self._clock = clock
        self._budgets = {}  # kind: (lines left, when, lines left out since the last that passed), the last to come last

    def filter(self, record):
        now = self._clock()
        kind = record.pathname, record.lineno, getattr(record, "IDENTITY", None)
        burst = getattr(record, "burst", RATE_BURST)
        left, since, left_out = self._budgets.pop(kind, (burst, now, 0))
        left = min(burst, left + (now - since) * burst / RATE_PERIOD)
        passes = left >= 1
        self._budgets[kind] = (left - 1, now, 0) if passes else (left, now, left_out + 1)
        if len(self._budgets) > KINDS_MAX:
            del self._budgets[next(iter(self._budgets))]
        if passes and left_out:
            record.msg = f"{record.msg} ({left_out} more like this before)"
        return passes


def printable(text, limit=64):
    """Text from outside, as a log line may show it: ASCII, escaped, at most `limit` characters."""
    shown = str(text).encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def notify(**variables):
    """Tells systemd, as sd_notify(3): READY=1, STATUS=text, STOPPING=1, WATCHDOG=1.

    sd_notify itself waits for room in systemd's socket, and with it the whole event loop would; here a greenlet does.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    message = "\n".join(f"{name}={value}" for name, value in variables.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_TIMEOUT)
            # unix(7): a name that begins with @ is of the abstract namespace.
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.sendall(message.encode())
    except OSError as error:
        # The tunnel does not need it; systemd ends what it hears nothing from.
        log.warning("systemd cannot be notified: %s", error.strerror or error)


def watchdog_period():
    """Seconds between two signs of life, half of what the unit allows; None if it has no watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdecimal() and int(microseconds) else None
