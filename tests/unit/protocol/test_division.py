"""bulkvpnd.protocol.packet: a TCP super-packet that travels in two parts, so that others need not wait behind it."""

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packets import (
    CSUM4, CSUM_OFFSET, DATA_VALID, NEEDS_CSUM, PLAIN4, PLAIN6, TCP, UDP4, UDP6, V4, V6, Sent, altered, look, ones_sum,
    payload, pieces_of, pseudo_header, sent,
)  # fmt: skip

from bulkvpnd.protocol import packet


def check_part(one, part, data_size, header):
    """One of the two entries in place of a super-packet: what the kernel is told is true of it."""
    segments = -(-data_size // one.gso_size)
    gso_type, gso_size = (one.gso_type, one.gso_size) if segments > 1 else (0, 0)
    assert struct.unpack_from("<BBHHHH", part) == (
        NEEDS_CSUM, gso_type, min(header, one.header_size + data_size), gso_size, one.transport, CSUM_OFFSET[TCP]
    )  # fmt: skip
    content = part[10:]
    assert len(content) == one.header_size + data_size
    if one.version == V4:
        assert ones_sum(content[: one.transport]) == 0xFFFF
    field = one.transport + CSUM_OFFSET[TCP]
    partial = ones_sum(pseudo_header(one.version, TCP, len(content) - one.transport))
    assert (int.from_bytes(content[field : field + 2], "big") - partial) % 0xFFFF == 0
    assert look(payload(part)) == ([part], segments, {})


@given(sent(protocol=TCP), st.integers(0, 4000), st.integers(0, 3600))
@settings(max_examples=400, deadline=None)
@example(Sent(data=bytes(2000)), 4 + 10 + 40 + 2000, 0)  # all of it
@example(Sent(data=bytes(2001)), 4 + 10 + 40 + 2000, 0)
@example(Sent(data=bytes(2001)), 4 + 10 + 40 + 1000, 0)
@example(Sent(data=bytes(2001)), 4 + 10 + 40 + 999, 0)  # not one segment
@example(Sent(data=bytes(2001)), 4 + 10 + 40 + 1001, 1500)
@example(Sent(data=bytes(1000)), 0, 0)
@example(Sent(data=bytes(3), gso_size=1), 4 + 10 + 40 + 1, 0)
@example(Sent(data=bytes(13500)), 4 + 10 + 40 + 7000, 0)  # the sum of the pseudo header is less than what is missing
@example(Sent(version=V6, data=b"\xff" * 3001, tcp_flags=255), 4 + 10 + 60 + 2000, 3000)
def test_the_parts_of_a_super_packet_stand_for_what_it_stood_for(one, most, more):
    """more: bytes of data that the kernel has counted among the headers, see hdr_len of linux/virtio_net.h."""
    header = one.header_size + min(more, len(one.data))
    entry = altered(one.entry(), hdr_len=header)
    front, at = b"\xaa" * 7, 5
    start, end = len(front) + 4, len(front) + 4 + len(entry)
    buffer = bytearray(front + payload(entry) + b"\xbb" * 9)
    target = bytearray(b"\xcc" * (at + len(buffer)))
    before = bytes(buffer), bytes(target)
    done = packet.divide(buffer, start, end, most, target, at)
    moved = max(0, most - 4 - 10 - one.header_size) // one.gso_size * one.gso_size
    if not 0 < moved < len(one.data):
        assert done is None and (buffer, target) == before
        return
    stays, behind = done
    first, rest = bytes(target[at:behind]), bytes(buffer[stays - 4 : end])
    assert len(first) <= most and (first, rest) == (payload(first[4:]), payload(rest[4:]))
    check_part(one, first[4:], moved, header)
    check_part(one, rest[4:], len(one.data) - moved, header)
    assert pieces_of(first[4:]) + pieces_of(rest[4:]) == pieces_of(entry)
    # Nothing around them has changed.
    assert buffer.startswith(front) and buffer.endswith(b"\xbb" * 9) and len(buffer) == len(before[0])
    assert target[:at] == b"\xcc" * at and set(target[behind:]) == {0xCC} and len(target) == len(before[1])


@pytest.mark.parametrize("entry", [PLAIN4, PLAIN6, CSUM4, UDP4, UDP6, Sent(flags=DATA_VALID).entry()])
def test_what_is_not_divided(entry):
    buffer = bytearray(payload(entry))
    assert packet.divide(buffer, 4, len(buffer), 1500, bytearray(2000), 0) is None
    assert buffer == payload(entry)
