"""The link between the main process and one worker: messages with descriptors over a UNIX SEQPACKET socket.

A message is a JSON object with a "type", one datagram each, and descriptors travel beside it (SCM_RIGHTS, unix(7)).
Both ends are this project's own and of one version, so an unknown message is a bug, not a protocol question.
"""

import json
import os
import socket

from gevent.lock import Semaphore

MESSAGE_MAX = 128 * 1024
"""Bytes; below net.core.wmem_default (212992) with the kernel's overhead, so that one message is one datagram."""
DESCRIPTORS_MAX = 70
"""Descriptors in one message: the queue and an inbox for each of up to 64 workers (SCM_MAX_FD is 253)."""


class LinkClosed(Exception):
    """The other process is gone."""


class WorkerLink:
    """One end. Sending and receiving block cooperatively; sockets are gevent's in both processes."""

    def __init__(self, sock):
        self._socket = sock
        # A gevent socket lets one greenlet at a time wait for room, and messages must keep their order.
        self._sending = Semaphore()

    @classmethod
    def pair(cls):
        """(link for this process, socket for the other)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    def send(self, message, descriptors=()):
        """message: dict with "type". descriptors: ints, which stay open here. Raises LinkClosed."""
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        if len(data) > MESSAGE_MAX:
            raise ValueError(f"worker message of {len(data)} bytes")
        try:
            with self._sending:
                # gevent's sendmsg waits once, and returns 0 if there is still no room then.
                while not socket.send_fds(self._socket, [data], list(descriptors)):
                    pass
        except OSError as error:
            raise LinkClosed(str(error)) from None

    def receive(self):
        """The next (message, [descriptor]); the descriptors are the caller's to close. Raises LinkClosed.

        There are fewer descriptors than were sent if this process may have no more of them (recvmsg(2), MSG_CTRUNC).
        """
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._socket, MESSAGE_MAX, DESCRIPTORS_MAX)
        except OSError as error:
            raise LinkClosed(str(error)) from None
        if not data:
            raise LinkClosed("end of stream")
        try:
            if flags & socket.MSG_TRUNC:
                raise LinkClosed("message cut short")
            return json.loads(data), descriptors
        except (LinkClosed, ValueError, RecursionError) as error:
            # The other process is out of its mind.
            for descriptor in descriptors:
                os.close(descriptor)
            raise LinkClosed(str(error)) from None

    def shutdown(self):
        """Ends the link for both sides, also for a greenlet that is receiving on it."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other process was faster.
            pass

    def close(self):
        self._socket.close()
