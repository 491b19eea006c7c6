"""What the path of a connection carries, and how little is handed to it at a time because of that.

    the socket is full --> its rate, measured until it is not --> budget of a frame, TCP_NOTSENT_LOWAT, SO_SNDBUF,
                                                                  congestion control

What stands in the kernel or on the path cannot be overtaken any more: a ping behind it waits. On a slow path frames are
short and the kernel's share is small, so that what waits, waits in the send queue, which is fair and keeps it short.
"""

import contextlib
import socket

from bulkvpnd.dataplane import tcpinfo

FRAME_TIME = 0.002
"""Seconds that a frame may occupy a slow path: a sparse flow waits that long at most for the one before (choice)."""
FAST_RATE = 50e6
"""Bytes a second above which no path is slow: the largest frame takes 5 ms. A socket that is full at such a rate
mostly waits for a CPU at the far end, and short frames would cost more of it (benchmarks, cpu_s_per_gb; choice)."""
BUDGET_MIN = 4 * 1024
"""Bytes; smaller frames would cost more CPU time than they save time on the path (choice)."""
UNSENT_RANGE = (4 * 1024, 128 * 1024)
"""Bytes, TCP_NOTSENT_LOWAT: least and most (choice; the larger is DSVPN's value, and what the socket comes with)."""
STANDING_TIME = 0.004
"""Seconds of data that a connection may keep in queues of the path, beyond STANDING_TRIPS round trips (choice)."""
STANDING_TRIPS = 3
"""Round trips of data that the kernel may hold for a slow path: one is on its way, one for growth, one for what is
sent again (choice)."""
STANDING_MIN = 24 * 1024
"""Bytes (choice)."""
LONG_PATH = 0.01
"""Seconds of round trip above which that is left to the congestion control: there a queue adds little to the way
itself, and what was lost and is sent again needs the room (benchmarks, lossy_mbps)."""
SHORT_PATH = 0.002
"""Seconds of least round trip up to which a connection keeps cubic. BBR is for paths that are long and lose packets, or
have deep queues; here its pacing, a timer for every few segments, would only cost CPU time (benchmarks, tcp4;
choice)."""
QUEUE_TIME = 0.01
"""Seconds of round trip above which such a path has a queue, which cubic has filled and BBR would not (choice)."""
RATE_PERIOD = 0.02
"""Seconds over which the rate of a full socket is measured (choice)."""

TCP_NOTSENT_LOWAT = 25
SO_BUF_LOCK = 72
"""linux/tcp.h, asm-generic/socket.h; Python has no names for them."""


class PathRate:
    """Measures one connection's path and sets what depends on it.

    sock: connected. frame_size: largest payload, bytes. owns_sndbuf: whether SO_SNDBUF is ours to set. owns_congestion:
    whether the congestion control is, cubic so far. budget: bytes that a frame should have. sent: bytes that the socket
    took; the caller counts it up. now, in every method: seconds. Every method raises OSError if the socket is broken.
    """

    def __init__(self, sock, frame_size, owns_sndbuf, owns_congestion):
        self.budget = frame_size
        self.sent = 0
        self._socket = sock
        self._frame_size = frame_size
        self._owns_sndbuf = owns_sndbuf
        self._owns_congestion = owns_congestion
        self._rate = None  # bytes a second that a full socket took
        self._since = None
        self._sent_before = 0
        self._unsent_limit = UNSENT_RANGE[1]
        self._standing_limit = None  # SO_SNDBUF, where it was set here

    def begin(self):
        """Before the first byte: what the handshakes say of the path."""
        if self._owns_congestion:
            self._choose_congestion(tcpinfo.read(self._socket))

    def idle(self):
        """The socket took all there was: the path may be faster than it seemed."""
        self._since = None
        self.budget = min(2 * self.budget, self._frame_size)

    def full(self, now):
        """The socket takes no more."""
        if self._since is None:
            self._since, self._sent_before = now, self.sent

    def writable(self, now):
        """After full(): the socket takes more again."""
        elapsed = now - self._since
        if elapsed < RATE_PERIOD:
            return
        rate = (self.sent - self._sent_before) / elapsed
        self._since, self._sent_before = now, self.sent
        # Up at once, down in some steps: what fills the kernel's buffer at first is no rate of the path.
        self._rate = rate if self._rate is None or rate > self._rate else (self._rate + rate) / 2
        is_fast = self._rate >= FAST_RATE
        self.budget = self._frame_size if is_fast else int(max(self._rate * FRAME_TIME, BUDGET_MIN))
        least, most = UNSENT_RANGE
        limit = int(min(max(self._rate * FRAME_TIME, least), most))
        if _differs(limit, self._unsent_limit):
            self._unsent_limit = limit
            self._socket.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, limit)
        path = tcpinfo.read(self._socket)
        if self._owns_congestion:
            self._choose_congestion(path)
        if self._owns_sndbuf:
            self._limit_standing(path.least_round_trip)

    def _choose_congestion(self, path):
        """Goes over to BBR, once and for good: it would not be rid of its pacing afterwards."""
        if path.least_round_trip <= SHORT_PATH and path.round_trip <= QUEUE_TIME:
            return
        self._owns_congestion = False
        # It takes no privilege, and the main process had the kernel load it; if there is none, what there is stays.
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")

    def _limit_standing(self, round_trip):
        """Bounds what the kernel holds, on its way and unsent: what is more only stands in a queue of the path.

        BBR keeps some 15 packets of each connection beyond what the path holds, cubic fills every queue that there is.
        """
        if self.budget == self._frame_size or round_trip > LONG_PATH:
            if self._standing_limit is not None:
                self._standing_limit = None
                self._socket.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)
            return
        if not self._sndbuf_can_be_freed():
            self._owns_sndbuf = False
            return
        limit = int(max(self._rate * (STANDING_TRIPS * round_trip + STANDING_TIME), STANDING_MIN))
        if self._standing_limit is None or _differs(limit, self._standing_limit):
            self._standing_limit = limit
            # The kernel doubles it, for its own overhead: socket(7).
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limit)

    def _sndbuf_can_be_freed(self):
        """Whether the kernel can go back to its autotuning, which needs Linux 5.14."""
        try:
            self._socket.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)
        except OSError:
            return False
        return True


def _differs(limit, present):
    """Whether it is worth a system call."""
    return not 0.75 < limit / present < 1.33
