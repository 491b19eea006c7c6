"""The status socket: one JSON line in, one JSON line out, then the end.

    {"command": "status"}   -->   {"instance": …, "sessions": […], …}   or   {"error": "…"}
"""

import fcntl
import json
import logging
import os
import socket

import gevent
from gevent.server import StreamServer

log = logging.getLogger(__name__)

SOCKET_NAME = "status.sock"
REQUEST_MAX = 4096
TIME_MAX = 5.0
"""Seconds for one request (choice)."""

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
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise OSError(f"{self._directory}: another instance runs with this runtime directory; stop it, or give "
                          "this one a name of its own") from None
        return self

    def __exit__(self, *exception):
        os.close(self._descriptor)


class StatusSocket:
    """Listens in the runtime directory, readable for its owner and group. report: () -> JSON-able object."""

    def __init__(self, directory, report):
        self._path = directory / SOCKET_NAME
        self._commands = {"status": report}
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
        sock.listen(8)
        self._server = StreamServer(sock, self._answer, spawn=16)
        self._server.start()

    def _answer(self, sock, _address):
        try:
            with gevent.Timeout(TIME_MAX), sock, sock.makefile("rwb") as stream:
                try:
                    command = json.loads(stream.readline(REQUEST_MAX))["command"]
                    report = self._commands[command]
                # RecursionError: nesting as deep as 4 KiB of brackets.
                except (ValueError, LookupError, TypeError, RecursionError):
                    answer = {"error": f"unknown command; there is: {', '.join(self._commands)}"}
                else:
                    answer = report()
                stream.write(json.dumps(answer).encode("ascii") + b"\n")
        except (OSError, gevent.Timeout) as error:
            log.debug("status socket: %s", error)

    def stop(self):
        if self._server:
            self._server.stop(timeout=0)
            self._path.unlink(missing_ok=True)
