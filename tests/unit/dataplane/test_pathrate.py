"""dataplane.pathrate: what is set for which path. Time is an argument; the socket says what a kernel would."""

import pathlib
import socket
import struct

import pytest

from bulkvpnd.dataplane import pathrate, tcpinfo
from bulkvpnd.dataplane.pathrate import (
    BUDGET_MIN, FAST_RATE, FRAME_TIME, LONG_PATH, QUEUE_TIME, RATE_PERIOD, SHORT_PATH, SO_BUF_LOCK, STANDING_MIN,
    STANDING_TIME, STANDING_TRIPS, TCP_NOTSENT_LOWAT, UNSENT_RANGE, PathRate,
)  # fmt: skip

FRAME = 256 * 1024
PERIOD = 2**-5
"""Seconds; a little longer than RATE_PERIOD, and exact in binary, so that sums of it are too."""
assert PERIOD / 2 < RATE_PERIOD < PERIOD


class Sock:
    """A socket of which only its options are there. round_trip, queue: seconds. is_old, has_bbr: of its kernel."""

    def __init__(self, round_trip=0.001, queue=0, is_old=False, has_bbr=True):
        self.round_trip = round_trip
        self.queue = queue
        self.options = {}
        self._is_old = is_old
        self._has_bbr = has_bbr

    def getsockopt(self, level, name, size=0):
        if (level, name) == (socket.IPPROTO_TCP, socket.TCP_INFO):
            smoothed, least = (int(seconds * 1e6) for seconds in (self.round_trip + self.queue, self.round_trip))
            return struct.pack("=68xI76xI", smoothed, least).ljust(size, b"\0")
        assert (level, name) == (socket.SOL_SOCKET, SO_BUF_LOCK)
        if self._is_old:
            raise OSError(92, "Protocol not available")
        return 0

    def setsockopt(self, level, name, value):
        if name == socket.TCP_CONGESTION and not self._has_bbr:
            raise OSError(2, "No such file or directory")
        self.options.setdefault((level, name), []).append(value)

    @property
    def unsent(self):
        return self.options.get((socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT), [])

    @property
    def congestion(self):
        return self.options.get((socket.IPPROTO_TCP, socket.TCP_CONGESTION), [])

    @property
    def sndbuf(self):
        return self.options.get((socket.SOL_SOCKET, socket.SO_SNDBUF), [])

    @property
    def freed(self):
        return self.options.get((socket.SOL_SOCKET, SO_BUF_LOCK), [])


class Path:
    """A path of a rate, in bytes a second, and the socket before it, full all the time."""

    def __init__(self, owns_congestion=False, **arguments):
        self.sock = Sock(**arguments)
        self.now = 100.0
        self.path = PathRate(self.sock, FRAME, owns_sndbuf=True, owns_congestion=owns_congestion)

    def carry(self, rate, seconds=PERIOD):
        self.path.full(self.now)
        self.now += seconds
        self.path.sent += int(rate * seconds)
        self.path.writable(self.now)
        return self.path.budget


def test_nothing_is_set_before_the_socket_was_full():
    one = Path()
    one.path.sent += 10**9
    one.path.idle()
    assert one.path.budget == FRAME and one.sock.options == {}


def test_a_short_time_says_nothing():
    one = Path()
    assert one.carry(1e6, PERIOD / 2) == FRAME and one.sock.options == {}
    # Both halves together do.
    assert one.carry(1e6, PERIOD / 2) == max(1e6 * FRAME_TIME, BUDGET_MIN)


@pytest.mark.parametrize("rate", [1e5, 2.5e6, 12.5e6, 40e6])
def test_a_slow_path_gets_short_frames_and_little_stands_in_it(rate):
    one = Path()
    assert one.carry(rate) == int(max(rate * FRAME_TIME, BUDGET_MIN))
    assert one.sock.unsent == [int(max(rate * FRAME_TIME, UNSENT_RANGE[0]))]
    expected = max(rate * (STANDING_TRIPS * 0.001 + STANDING_TIME), STANDING_MIN)
    assert one.sock.sndbuf == [pytest.approx(expected, abs=1)]


def test_a_fast_path_keeps_the_largest_frames():
    one = Path()
    assert one.carry(FAST_RATE) == FRAME and one.sock.options == {}


def test_a_path_that_becomes_fast_is_set_free():
    one = Path()
    one.carry(1e6)
    assert one.sock.sndbuf and not one.sock.freed
    assert one.carry(2 * FAST_RATE) == FRAME
    assert one.sock.freed == [0] and one.sock.unsent[-1] == UNSENT_RANGE[1]
    one.carry(2 * FAST_RATE)
    assert one.sock.freed == [0]


def test_a_long_path_is_left_to_the_congestion_control():
    one = Path(round_trip=2 * LONG_PATH)
    assert one.carry(1e6) == max(1e6 * FRAME_TIME, BUDGET_MIN)
    assert one.sock.sndbuf == [] and one.sock.unsent
    # One that only looked short is given back.
    one = Path()
    one.carry(1e6)
    one.sock.round_trip = 2 * LONG_PATH
    one.carry(1e6)
    assert one.sock.freed == [0]


def test_a_buffer_that_the_administrator_set_is_left_alone():
    one = Path()
    one.path = PathRate(one.sock, FRAME, owns_sndbuf=False, owns_congestion=False)
    one.carry(1e6)
    assert one.sock.sndbuf == one.sock.freed == [] and one.sock.unsent


def test_a_kernel_that_cannot_free_a_buffer_again():
    one = Path(is_old=True)
    one.carry(1e6)
    one.carry(1e6)
    assert one.sock.sndbuf == []


def test_up_at_once_and_down_in_steps():
    one = Path()
    one.carry(16e6)
    assert one.carry(2e6) == int(9e6 * FRAME_TIME)
    assert one.carry(2e6) == int(5.5e6 * FRAME_TIME)
    assert one.carry(16e6) == int(16e6 * FRAME_TIME)


def test_a_small_change_is_not_worth_a_system_call():
    one = Path()
    one.carry(10e6)
    for _ in range(20):
        one.carry(11e6)
        one.carry(10e6)
    assert len(one.sock.unsent) == len(one.sock.sndbuf) == 1
    one.carry(20e6)
    assert len(one.sock.unsent) == len(one.sock.sndbuf) == 2


def test_an_idle_socket_lets_frames_grow_again():
    one = Path()
    small = one.carry(2.5e6)
    one.path.idle()
    assert one.path.budget == 2 * small
    for _ in range(20):
        one.path.idle()
    assert one.path.budget == FRAME


def test_time_between_two_full_sockets_does_not_count():
    one = Path()
    one.carry(10e6)
    one.path.idle()
    one.now += 1000
    assert one.carry(10e6) == int(10e6 * FRAME_TIME)


def test_a_short_path_keeps_the_congestion_control_that_it_began_with():
    one = Path(owns_congestion=True, round_trip=SHORT_PATH, queue=QUEUE_TIME - 2 * SHORT_PATH)
    one.path.begin()
    one.carry(FAST_RATE)
    assert one.sock.congestion == []


def test_a_long_path_gets_bbr_before_anything_is_sent():
    one = Path(owns_congestion=True, round_trip=2 * SHORT_PATH)
    one.path.begin()
    assert one.sock.congestion == [b"bbr"]
    one.carry(FAST_RATE)
    assert one.sock.congestion == [b"bbr"], "once and for good"


@pytest.mark.parametrize("rate", [1e6, FAST_RATE])
def test_a_short_path_with_a_queue_gets_bbr(rate):
    one = Path(owns_congestion=True, round_trip=SHORT_PATH)
    one.path.begin()
    one.carry(rate)
    assert one.sock.congestion == []
    one.sock.queue = QUEUE_TIME
    one.carry(rate)
    assert one.sock.congestion == [b"bbr"]
    one.sock.queue = 0
    one.carry(rate)
    assert one.sock.congestion == [b"bbr"]


def test_a_congestion_control_that_the_administrator_chose_is_left_alone():
    one = Path(round_trip=2 * SHORT_PATH, queue=2 * QUEUE_TIME)
    one.path.begin()
    one.carry(FAST_RATE)
    assert one.sock.congestion == []


def test_a_kernel_without_bbr():
    one = Path(owns_congestion=True, round_trip=2 * SHORT_PATH, has_bbr=False)
    one.path.begin()
    assert one.carry(FAST_RATE) == FRAME


def test_bbr_is_really_taken(monkeypatch):
    if "bbr" not in pathlib.Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split():
        pytest.skip("this kernel has no BBR, or has not loaded it: modprobe tcp_bbr")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        PathRate(sock, FRAME, owns_sndbuf=True, owns_congestion=True).begin()
        assert tcpinfo.congestion_control(sock) == "reno"
        # Now loopback is long.
        monkeypatch.setattr(pathrate, "SHORT_PATH", 0)
        PathRate(sock, FRAME, owns_sndbuf=True, owns_congestion=True).begin()
        assert tcpinfo.congestion_control(sock) == "bbr"


def test_the_real_options_are_taken():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        path = PathRate(sock, FRAME, owns_sndbuf=True, owns_congestion=False)
        path.full(1.0)
        path.sent = 20_000
        path.writable(1.02)
        assert sock.getsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT) == UNSENT_RANGE[0]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * STANDING_MIN
        path.full(1.02)
        path.sent += 10**9
        path.writable(1.04)
        assert sock.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK) == 0
        assert sock.getsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT) == pathrate.UNSENT_RANGE[1]
