"""What the kernel knows of a TCP connection: struct tcp_info of linux/tcp.h, by getsockopt(TCP_INFO) of tcp(7)."""

import socket
import struct
import typing

SIZE = 216
"""Bytes up to tcpi_bytes_retrans, since Linux 4.19; an older kernel gives fewer."""


class TCPInfo(typing.NamedTuple):
    """round_trip, least_round_trip: seconds, smoothed, and the least of late.

    retransmits: segments. retransmitted: bytes. delivery_rate: bits per second that the peer acknowledged of late.
    window: bytes that may be on their way at once.
    """

    round_trip: float
    least_round_trip: float
    retransmits: int
    retransmitted: int
    delivery_rate: int
    window: int


_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
# Offsets of snd_mss, rtt, snd_cwnd, total_retrans, min_rtt; delivery_rate, bytes_retrans.
_SMALL, _LARGE = (16, 68, 80, 100, 148), (160, 208)


def read(sock):
    """The TCPInfo of a connected socket. Raises OSError."""
    data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SIZE).ljust(SIZE, b"\0")
    segment, round_trip, window, retransmits, least = (_U32.unpack_from(data, at)[0] for at in _SMALL)
    rate, retransmitted = (_U64.unpack_from(data, at)[0] for at in _LARGE)
    return TCPInfo(round_trip / 1e6, least / 1e6, retransmits, retransmitted, 8 * rate, segment * window)


def congestion_control(sock):
    """Name of the socket's congestion control. Raises OSError."""
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)  # TCP_CA_NAME_MAX of net/tcp.h
    return name.rstrip(b"\0").decode("ascii", "replace")
