"""The status socket: one JSON line in, one JSON line out, then the end.

    {"command": "status"}   -->   {"instance": …, "sessions": […], …}   or   {"error": "…"}

Whoever may open the socket may ask for the status. Every other command changes something, so it is only for root, as
the kernel names who asks (SO_PEERCRED of unix(7)). It is not for the daemon's own user, which its workers have too: one
that was taken over would bring a configuration with a hook, and a hook has the daemon's capability.
"""

import collections
import contextlib
import json
import logging
import os
import socket
import struct

import gevent
from gevent.server import StreamServer

from bulkvpnd.config import MAX_FILE_SIZE
from bulkvpnd.host import lock

log = logging.getLogger(__name__)

SOCKET_NAME = "status.sock"
REQUEST_MAX = 4096
"""Bytes of a request (choice)."""
PRIVILEGED_MAX = REQUEST_MAX + 2 * MAX_FILE_SIZE
"""Bytes of one that may hold the text of a configuration, in which JSON escapes each end of a line (choice)."""
TIME_MAX = 5.0
"""Seconds for one request (choice)."""
PLACES_EACH, PLACES_MAX = 8, 16
"""Requests at once of one user, and of all users but root, whom nobody keeps out (choice)."""

ROOT = 0
"""Its user id."""

_TOTALS = (
    "bytes_out", "frames_out", "packets_out", "segments_out", "bytes_in", "frames_in", "packets_in", "segments_in",
)  # fmt: skip
_SUMS = ("rate_in", "rate_out", "retransmits")


def session_report(described, connections, ended):
    """What a report says of a session.

    described: what is said of it alone. connections: what is said of each of its live connections. ended: counters of
    those that it had before, so that its own never go back.
    """
    sums = {name: sum(one.get(name, 0) for one in connections) for name in (*_TOTALS, *_SUMS)}
    return {
        **described,
        **{name: value + ended.get(name, 0) if name in _TOTALS else value for name, value in sums.items()},
        "connections": sorted(connections, key=lambda one: one["index"]),
    }


class Claim:
    """The runtime directory for this process alone, as a context manager. The kernel gives it up with the process."""

    def __init__(self, directory):
        self._directory = directory

    def __enter__(self):
        """Raises OSError when the directory cannot be made, or another process has it."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not lock.take(self._descriptor):
            os.close(self._descriptor)
            raise OSError(f"{self._directory}: another instance runs with this runtime directory; stop it, or give "
                          "this one a name of its own")
        return self

    def __exit__(self, *exception):
        os.close(self._descriptor)


class CommandError(Exception):
    """A command that cannot be done. message: one line for the administrator. status: with which bulkvpnctl exits."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class StatusSocket:
    """Listens in the runtime directory, readable for its owner and group. report: () -> JSON-able object.

    commands: {name: function(request)} of what only `master` may order, the id of a user; request is the JSON object,
    and the function returns one, or raises CommandError.
    """

    def __init__(self, directory, report, commands=(), master=ROOT):
        self._path = directory / SOCKET_NAME
        self._report = report
        self._commands = dict(commands)
        self._master = master
        self._places = collections.Counter()  # user: requests that are being answered
        self._server = None

    def start(self):
        """Raises OSError when the directory or the socket cannot be made."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        # One that a crash left behind; systemd keeps the directory over a restart.
        self._path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o117)
        try:
            sock.bind(str(self._path))
        finally:
            os.umask(mask)
        sock.listen()
        self._server = StreamServer(sock, self._serve)
        self._server.start()

    def _serve(self, sock, _address):
        with sock:
            user = _user(sock)
            if not self._has_place(user):
                # At once, or those who hold their places would fill the queue of the socket too, and keep out root.
                with contextlib.suppress(OSError):
                    sock.send(b'{"error": "too many requests at once; try again when the others are answered"}\n')
                return
            self._places += collections.Counter([user])
            try:
                self._answer(sock, user == self._master)
            finally:
                self._places -= collections.Counter([user])

    def _has_place(self, user):
        others = self._places.total() - self._places[ROOT]
        return self._places[user] < PLACES_EACH and (user == ROOT or others < PLACES_MAX)

    def _answer(self, sock, is_privileged):
        try:
            with gevent.Timeout(TIME_MAX), sock.makefile("rwb") as stream:
                line = stream.readline(PRIVILEGED_MAX if is_privileged else REQUEST_MAX)
                stream.write(json.dumps(self._answer_to(line, is_privileged)).encode("ascii") + b"\n")
        except (OSError, gevent.Timeout) as error:
            log.debug("status socket: %s", error)

    def _answer_to(self, line, is_privileged):
        try:
            request = json.loads(line)
            command = request["command"]
            function = None if command == "status" else self._commands[command]
        # RecursionError: nesting as deep as 4 KiB of brackets.
        except (ValueError, LookupError, TypeError, RecursionError):
            known = ", ".join(["status", *self._commands])
            return {"error": f"not a command of this instance, which has: {known}; name an instance that has it"}
        if function is None:
            return self._report()
        if not is_privileged:
            return {"error": f"{command}: only root may order that; run it as root", "status": os.EX_NOPERM}
        try:
            # In a greenlet of its own: whoever asked may lose patience, but it is not done by halves.
            return gevent.spawn(_outcome, function, request).get()
        except Exception:
            log.exception("internal error with the command %s", command)
            return {"error": f"{command}: internal error; the log of the instance says more"}

    def stop(self):
        if self._server:
            self._server.stop(timeout=0)
            self._path.unlink(missing_ok=True)


def _outcome(function, request):
    try:
        return function(request)
    except CommandError as error:
        return {"error": str(error), "status": error.status}


def _user(sock):
    """The user id of the process at the other end: struct ucred of unix(7)."""
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
