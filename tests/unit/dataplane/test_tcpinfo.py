"""dataplane.tcpinfo over a real connection, beside what the standard tools read."""

import pathlib
import socket

import pytest

from bulkvpnd.dataplane import tcpinfo


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    with one, other:
        yield one, other


def test_what_the_kernel_says(pair):
    one, other = pair
    before = tcpinfo.read(one)
    one.sendall(b"x" * 100_000)
    received = 0
    while received < 100_000:
        received += len(other.recv(100_000))
    after = tcpinfo.read(one)
    # Loopback: some microseconds, never a second.
    assert 0 < after.least_round_trip <= after.round_trip < 1
    assert 0 < before.round_trip < 1
    assert after.retransmits == after.retransmitted == 0
    # Ten segments is what a connection begins with (RFC 6928).
    segment = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    assert after.window >= 10 * segment and after.window % segment == 0
    assert after.delivery_rate > 8_000_000


def test_a_kernel_that_says_less(pair):
    class Old(socket.socket):
        def getsockopt(self, level, name, size=0):
            return super().getsockopt(level, name, min(size, 104))

    with Old(fileno=pair[0].detach()) as old:
        info = tcpinfo.read(old)
        assert info.round_trip > 0 and (info.least_round_trip, info.delivery_rate, info.retransmitted) == (0, 0, 0)


def test_the_name_of_its_congestion_control(pair):
    default = pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    assert tcpinfo.congestion_control(pair[0]) == default


def test_a_socket_that_is_gone(pair):
    pair[0].close()
    with pytest.raises(OSError):
        tcpinfo.read(pair[0])
