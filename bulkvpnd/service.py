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
RATE_PERIOD = 5.0
"""At most RATE_BURST lines of one kind at once, then one in RATE_PERIOD seconds, where peers provoke them."""
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
    """Thins out records that carry `limited=True`, one budget for each message template."""

    def __init__(self, clock=time.monotonic):
        super().__init__()
        self._clock = clock
        self._budgets = {}

    def filter(self, record):
        if not getattr(record, "limited", False):
            return True
        now = self._clock()
        left, since, suppressed = self._budgets.get(record.msg, (RATE_BURST, now, 0))
        left = min(RATE_BURST, left + (now - since) / RATE_PERIOD)
        if left < 1:
            self._budgets[record.msg] = (left, now, suppressed + 1)
            return False
        self._budgets[record.msg] = (left - 1, now, 0)
        if suppressed:
            record.msg = f"{record.msg} ({suppressed} more like this before)"
        return True


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
        log.warning("systemd cannot be notified: %s", error.strerror or error, extra={"limited": True})


def watchdog_period():
    """Seconds between two signs of life, half of what the unit allows; None if it has no watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdecimal() and int(microseconds) else None
