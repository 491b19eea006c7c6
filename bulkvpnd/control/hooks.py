"""Programs that the administrator wants started when something happens. Never in the way of a packet.

    a role tells of an event --> waits for its turn --> RUNNING_MAX at a time, in order for each client --> its output
                                     |                                                       in the log, line by line
                                     '-- over before a program was started --> none is, for beginning or end

So whatever began for a program ends for it, and what waits is bounded by what there is: of each session at most the
end of what a program was started for, and a new beginning.

A program is started by its path with one argument, the event, and with an environment that has only what VARIABLES and
`Hooks` put there: no shell, and nothing of what the other end sent but a name from its certificate and its address. It
runs with the user, the capability and the sandbox of the daemon, and is killed when its time is up.
"""

import dataclasses
import logging
import os
import signal
import stat
import subprocess

import gevent

from bulkvpnd.config import ConfigurationError
from bulkvpnd.service import printable

log = logging.getLogger(__name__)

OPTIONS = {"up": "on-up", "down": "on-down", "client-connect": "on-client-connect",
           "client-disconnect": "on-client-disconnect"}
BEGINNINGS = {"down": "up", "client-disconnect": "client-connect"}
"""What each event is the end of."""
VARIABLES = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
RUNNING_MAX = 4
"""Programs at a time (choice)."""
TIME_MAX = 30.0
"""Seconds that a program may take (choice)."""
STOP_TIME = 3.0
"""Seconds that a stop waits for programs; the unit allows 10 s for all of it (choice)."""
LINES_MAX, LINE_MAX = 50, 300
"""Lines of a program's output that are logged, and characters of each (choice)."""


def check(configuration):
    """Raises ConfigurationError if a program is not there or anybody could change it."""
    for name in OPTIONS.values():
        path = getattr(configuration, name.replace("-", "_"))
        if path is None:
            continue
        where = f"{configuration.path}: {name} = {path}"
        try:
            status = os.stat(path)
        except OSError as error:
            raise ConfigurationError(f"{where}: {error.strerror}; give the path of a program") from None
        if not stat.S_ISREG(status.st_mode) or not os.access(path, os.X_OK):
            raise ConfigurationError(f"{where}: cannot be executed; run: chmod a+rx {path}")
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise ConfigurationError(f"{where}: others can change it; run: chown root {path} && chmod go-w {path}")


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """event: of OPTIONS. key: calls of one key run one after the other. what: of the same key, what begins and ends.
    path: program, None if none is wanted. environment: {name: text}."""

    event: str
    key: str
    what: str
    path: str | None
    environment: dict

    @property
    def fields(self):
        """Of its lines in the journal."""
        return {"IDENTITY": self.key} if self.key else {}

    def ends(self, other):
        return (BEGINNINGS.get(self.event), self.what) == (other.event, other.what)


class Hooks:
    """The programs of an instance. time_max: seconds for each."""

    def __init__(self, configuration, device, time_max=TIME_MAX):
        self._configuration = configuration
        self._device = device
        self._time_max = time_max
        self._waiting = {}  # key: [_Call]; whose turn is next comes first
        self._running = {}  # key: greenlet

    def reconfigure(self, configuration):
        """The programs of another configuration from the next event on."""
        self._configuration = configuration

    def tell(self, event, **values):
        """Something happened. event: of OPTIONS. values: of BULKVPN_ variables, in small letters; text. Never waits."""
        if not any(map(self._program, OPTIONS)):
            return
        values |= {"event": event, "instance": self._configuration.name, "mode": self._configuration.mode,
                   "device": self._device}
        environment = VARIABLES | {f"BULKVPN_{name.upper()}": value for name, value in values.items()}
        # An identity has a session for each of its addresses.
        identity = values.get("identity", "")
        call = _Call(event, identity, identity and values.get("addresses"), self._program(event), environment)
        waiting = self._waiting.setdefault(identity, [])
        begun = next(filter(call.ends, waiting), None)
        if begun:
            waiting.remove(begun)
        else:
            waiting.append(call)
        if not waiting:
            del self._waiting[identity]
        self._start_next()

    def _program(self, event):
        path = getattr(self._configuration, OPTIONS[event].replace("-", "_"))
        return path and str(path)

    def _start_next(self):
        while len(self._running) < RUNNING_MAX:
            key = next((one for one in self._waiting if one not in self._running), None)
            if key is None:
                return
            # Whoever has more to do goes to the end of the line.
            call, *rest = self._waiting.pop(key)
            if rest:
                self._waiting[key] = rest
            self._running[key] = gevent.spawn(self._run, call)

    def _run(self, call):
        try:
            if call.path:
                self._run_program(call)
        except OSError as error:
            log.warning("%s %s: cannot be started: %s; its first line has to name a program that is there", call.path,
                        call.event, error.strerror, extra=call.fields)
        finally:
            del self._running[call.key]
            self._start_next()

    def _run_program(self, call):
        with subprocess.Popen([call.path, call.event], env=call.environment, cwd="/", stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
            try:
                with gevent.Timeout(self._time_max):
                    self._log_output(call, process.stdout)
                    status = process.wait()
            except gevent.Timeout:
                log.warning("%s %s: ended after %.0f s", call.path, call.event, self._time_max, extra=call.fields)
                return
            finally:
                # What it left running in its session goes too; more than that it would have to hide on purpose.
                _kill(process.pid)
        if status:
            log.warning("%s %s: ended with status %d", call.path, call.event, status, extra=call.fields)

    @staticmethod
    def _log_output(call, stream):
        count = 0
        while line := stream.readline(LINE_MAX):
            count += 1
            if count <= LINES_MAX:
                log.info("%s %s: %s", call.path, call.event,
                         printable(line.decode("utf-8", "replace").rstrip("\n"), LINE_MAX),
                         extra={**call.fields, "burst": LINES_MAX})
        if count > LINES_MAX:
            log.info("%s %s: %d more lines", call.path, call.event, count - LINES_MAX, extra=call.fields)

    def stop(self):
        """Waits until all that was told is done, for STOP_TIME at most; the rest is ended."""
        with gevent.Timeout(STOP_TIME, False):
            while self._running:
                gevent.joinall(list(self._running.values()))
        if self._waiting or self._running:
            log.warning("stopping: %d programs of hooks were not waited for",
                        sum(map(len, self._waiting.values())) + len(self._running))
        self._waiting.clear()
        gevent.killall(list(self._running.values()))


def _kill(group):
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Nobody is left, or what is left is another user's by now.
        pass
