"""bulkvpnd.protocol.packet: pieces for an end without offload, datagrams that become a super-packet, and ECN."""

import dataclasses
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packets import (
    ACK, ALL, CSUM4, CWR, DATA_VALID, FIN, PLAIN4, PSH, TCP, TCP4, TCP6, UDP, UDP4, UDP6, V4, V6, Sent, altered,
    examples, ip, look, ones_sum, payload, pieces_of, plain, poked, ports, pseudo_header, segments_of, sent,
)  # fmt: skip

from bulkvpnd.protocol import packet


# Segmentation and checksums for an end without offload.


def verified(content, version, protocol, transport):
    """(IP header, transport header, data) of a packet whose lengths and checksums are right."""
    if version == V4:
        assert content[0] == 0x40 | transport // 4
        assert int.from_bytes(content[2:4], "big") == len(content)
        assert ones_sum(content[:transport]) == 0xFFFF
    else:
        assert content[0] >> 4 == 6
        assert int.from_bytes(content[4:6], "big") == len(content) - 40
    segment = content[transport:]
    assert ones_sum(pseudo_header(version, protocol, len(segment)) + segment) == 0xFFFF
    if protocol == UDP:
        assert int.from_bytes(segment[4:6], "big") == len(segment)
        assert segment[6:8] != b"\0\0"  # RFC 768: that would say that there is no checksum
    size = (segment[12] >> 4) * 4 if protocol == TCP else 8
    return content[:transport], segment[:size], segment[size:]


def without(header, *fields):
    """The header with zeros in the bytes [start:end] of each field."""
    rest = bytearray(header)
    for start, end in fields:
        rest[start:end] = bytes(end - start)
    return bytes(rest)


def check_segments(one, pieces):
    original = one.packet()
    assert len(pieces) == one.segments
    transport = one.transport
    parts = [verified(piece, one.version, one.protocol, transport) for piece in pieces]
    # Every byte of data once and in its order, in pieces of the size that was asked for.
    assert b"".join(data for _, _, data in parts) == one.data
    assert all(len(data) == one.gso_size for _, _, data in parts[:-1])
    assert len(parts[-1][2]) <= one.gso_size
    # IP: addresses, options, TOS with its ECN bits, TTL and flow label stay; IPv4 counts the identification on.
    varies = ((2, 6), (10, 12)) if one.version == V4 else ((4, 6),)
    for number, (ip_header, _, _) in enumerate(parts):
        assert without(ip_header, *varies) == without(original[:transport], *varies)
        if one.version == V4:
            assert int.from_bytes(ip_header[4:6], "big") == (one.identification + number) % 2**16
    sent_header = original[transport : one.header_size]
    for number, (_, header, _) in enumerate(parts):
        is_last = number == len(parts) - 1
        if one.protocol == UDP:
            assert header[:4] == sent_header[:4]
            continue
        assert int.from_bytes(header[4:8], "big") == (one.sequence + number * one.gso_size) % 2**32
        assert without(header, (4, 8), (13, 14), (16, 18)) == without(sent_header, (4, 8), (13, 14), (16, 18))
        # RFC 9293: FIN and PSH concern the end of the data; RFC 3168 section 6.1.2: CWR is said once.
        expected = one.tcp_flags
        if number:
            expected &= ~CWR
        if not is_last:
            expected &= ~(FIN | PSH)
        assert header[13] == expected


@given(sent())
@settings(max_examples=250, deadline=None)
@example(Sent())
@example(Sent(data=b""))
@example(Sent(data=b"", gso_size=1))
@example(Sent(data=bytes(1000)))
@example(Sent(data=bytes(1001)))
@example(Sent(tcp_flags=255))
@example(Sent(version=V6, tcp_flags=FIN | PSH | CWR | ACK))
@example(Sent(protocol=UDP, data=b"x"))
@example(Sent(data=b"\xff" * 3001))
@example(Sent(data=bytes(65000), gso_size=1448, tcp_options=b"\1" * 12))
@example(Sent(flags=DATA_VALID, ip_options=b"\1" * 4, tcp_options=b"\1" * 12))
@example(Sent(flags=DATA_VALID, version=V6))
def test_segments_are_what_the_super_packet_stands_for(one):
    entry = one.entry()
    pieces = pieces_of(entry)
    check_segments(one, pieces)
    # The other end takes them without any offload, as many as were announced.
    kept, segments, drops = look(payload(*map(plain, pieces)), offloads=())
    assert (len(kept), segments, drops) == (one.segments, one.segments, {})
    assert segments_of(entry) == look(payload(entry))[1] == one.segments


@given(sent(gso_size=0))
@examples
@example(Sent(gso_size=0, data=b""))
@example(Sent(gso_size=0, data=b"odd"))
@example(Sent(gso_size=0, protocol=UDP, version=V6, data=b"\xff" * 101))
def test_a_checksum_is_completed(one):
    (completed,) = pieces_of(one.entry())
    check_segments(dataclasses.replace(one, gso_size=65535), [completed])


def test_a_checksum_outside_its_packet_is_left():
    for offset in (len(CSUM4) - 10 - 21, 65535):
        entry = altered(CSUM4, csum_offset=offset)
        assert pieces_of(entry) == [entry[10:]]


@pytest.mark.parametrize("version", [V4, V6])
@pytest.mark.parametrize("gso_size", [0, 100])
def test_a_udp_checksum_of_zero_is_sent_as_all_ones(version, gso_size):
    one = Sent(version=version, protocol=UDP, gso_size=gso_size, data=bytes(10))
    segment = one.packet()[one.transport :]
    rest = ones_sum(pseudo_header(version, UDP, len(segment)) + without(segment, (6, 8)))
    one = dataclasses.replace(one, data=(0xFFFF - rest).to_bytes(2, "big") + bytes(8))
    (completed,) = pieces_of(one.entry())
    assert completed[one.transport + 6 : one.transport + 8] == b"\xff\xff"
    verified(completed, version, UDP, one.transport)


@pytest.mark.parametrize("position", [0, 1, 77])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_an_entry_amid_others(position, kind):
    one = Sent(gso_size=100)
    entry = one.entry()
    content = kind(bytes(position) + entry + b"\xee" * 50)
    end = position + len(entry)
    check_segments(one, [bytes(piece) for piece in packet.plain_packets(content, position, end, ())])
    assert packet.segment_count(content, position, end) == one.segments


def test_packets_of_wire_size_behind_headers_of_any_length():
    """The kernel may count data among the headers (hdr_len of linux/virtio_net.h)."""
    one = Sent(gso_size=100)
    size = len(one.packet())
    for header in (one.header_size, 255, 256, 511, 2000):
        assert segments_of(altered(one.entry(), hdr_len=header)) == -(-(size - header) // 100)
    assert segments_of(altered(one.entry(), hdr_len=size)) == 1
    assert segments_of(PLAIN4) == segments_of(CSUM4) == 1


@pytest.mark.parametrize(
    "entry, offloads, pieces",
    [
        (PLAIN4, (), None),
        (altered(PLAIN4, flags=DATA_VALID), (), None),
        (CSUM4, (), 1),
        (CSUM4, ("tso", "uso"), 1),
        (CSUM4, ("csum",), None),
        (TCP4, (), 3),
        (TCP4, ("csum",), 3),
        (TCP4, ("csum", "uso"), 3),
        (TCP4, ("csum", "tso"), None),
        (TCP6, ("csum", "tso"), None),
        (UDP4, ("csum", "tso"), 3),
        (UDP4, ALL, None),
        (UDP6, ALL, None),
        (Sent(tcp_flags=ACK | CWR).entry(), ("csum",), 3),
        (Sent(tcp_flags=ACK | CWR).entry(), ALL, None),
    ],
)
def test_only_what_the_other_end_lacks_is_done(entry, offloads, pieces):
    done = pieces_of(entry, offloads)
    assert (done if done is None else len(done)) == pieces


# Datagrams that become a super-packet.

DATAGRAM = Sent(protocol=UDP, gso_size=0, data=bytes(range(200)))


def joinable(entry):
    return packet.joinable(entry, 0, len(entry))


def key(entry):
    return packet.joined_key(entry[: joinable(entry)])[0]


def datagram_flow(entry):
    return packet.joined_key(entry[: joinable(entry)])[1]


@given(st.sampled_from((V4, V6)), st.integers(1, 900), st.integers(2, 64), st.integers(0, 99), st.randoms())
@examples
@example(V4, 900, 64, 0, random.Random(0))  # the sum of the pseudo header does not fit its field
def test_joined_datagrams_are_the_super_packet_that_stands_for_them(version, size, number, position, source):
    data = source.randbytes(size * number)
    first = dataclasses.replace(DATAGRAM, version=version, data=data[:size])
    headers = joinable(first.entry())
    assert first.entry()[headers:] == data[:size]
    content = bytearray(bytes(position + 4) + first.entry() + data[size:] + b"\xee" * 50)
    end = len(content) - 50
    packet.join(content, position + 4, end, headers, size)
    expected = dataclasses.replace(first, gso_size=size, data=data).entry()
    assert content == bytes(position) + len(expected).to_bytes(4, "big") + expected + b"\xee" * 50
    assert look(payload(expected))[1] == number


@pytest.mark.parametrize("version", [V4, V6])
def test_a_datagram_can_be_joined(version):
    entry = dataclasses.replace(DATAGRAM, version=version).entry()
    assert joinable(entry) == len(entry) - 200
    content, empty = bytes(7) + entry + bytes(9), 7 + len(entry) - 200
    assert packet.joinable(content, 7, 7 + len(entry)) == packet.joinable(content, 7, empty + 1) == len(entry) - 200
    assert packet.joinable(content, 7, empty) == 0


FRAGMENT, MORE_FRAGMENTS = poked(DATAGRAM.entry(), 7, 1), poked(DATAGRAM.entry(), 6, 0x20)


@pytest.mark.parametrize(
    "entry",
    [
        plain(DATAGRAM.packet()),
        DATAGRAM.entry()[:38],
        FRAGMENT,
        MORE_FRAGMENTS,
        Sent(gso_size=0).entry(),
        Sent(gso_size=0, version=V6).entry(),
        Sent(protocol=UDP).entry(),
        Sent(protocol=UDP, gso_size=0, flags=DATA_VALID).entry(),
        Sent(protocol=UDP, gso_size=0, ip_options=b"\1" * 4).entry(),
        altered(DATAGRAM.entry(), csum_start=70),
        altered(DATAGRAM.entry(), csum_offset=16),
    ],
)
def test_what_cannot_be_joined(entry):
    """Without an open checksum, without data, fragments, options, other protocols, checksums of an inner packet."""
    assert joinable(DATAGRAM.entry())
    assert joinable(entry) == 0


@pytest.mark.parametrize("version", [V4, V6])
def test_datagrams_of_another_flow_or_size_are_told_apart(version):
    one = dataclasses.replace(DATAGRAM, version=version)
    ports_at = one.transport
    assert key(one.entry()) == key(dataclasses.replace(one, data=bytes(200)).entry())
    if version == V4:
        assert key(one.entry()) == key(dataclasses.replace(one, identification=0x0707).entry())
    others = [
        *(poked(one.entry(), (2 if version == V4 else 4) + byte, 0xEE) for byte in range(2)),
        dataclasses.replace(one, data=bytes(199)).entry(),
        dataclasses.replace(one, data=bytes(1000)).entry(),
        dataclasses.replace(one, tos=2).entry(),
        poked(one.entry(), 8 if version == V4 else 7, 9),  # TTL, hop limit
        *(poked(one.entry(), at, 0xEE) for at in range(12 if version == V4 else 8, ports_at + 4)),
    ]
    assert all(key(other) != key(one.entry()) for other in others)
    assert all(
        (datagram_flow(other) == datagram_flow(one.entry())) is (number < 6) for number, other in enumerate(others)
    )
    # The bit that forbids fragments belongs to all of them or to none.
    if version == V4:
        assert key(poked(one.entry(), 6, 0)) != key(one.entry())


@pytest.mark.parametrize("version", [V4, V6])
def test_tcp_is_known(version):
    assert packet.is_tcp(Sent(version=version).entry(), 0)
    assert packet.is_tcp(bytes(3) + Sent(version=version).entry(), 3)
    assert not packet.is_tcp(dataclasses.replace(DATAGRAM, version=version).entry(), 0)


def test_a_fragment_of_ipv6_is_not_taken_for_tcp():
    assert not packet.is_tcp(Sent(version=V6, ip_options=bytes((6, 0, 0, 0, 0, 0, 0, 0))).entry(), 0)


# Congestion.


def marked(content, front=b"\xff" * 3, behind=b"\xff" * 3):
    """What mark_congestion makes of an IP packet amid others, or None if it must be dropped."""
    buffer = bytearray(front + content + behind)
    is_marked = packet.mark_congestion(buffer, len(front))
    at = len(front)
    assert is_marked in (True, False) and (buffer[:at], buffer[at + len(content) :]) == (front, behind)
    assert is_marked or buffer[at : at + len(content)] == content
    return bytes(buffer[at : at + len(content)]) if is_marked else None


@pytest.mark.parametrize("version", [V4, V6])
@pytest.mark.parametrize("label", [0, 0xFFFFF])
def test_a_packet_whose_ends_do_not_know_of_congestion_is_not_marked(version, label):
    for tos in range(0, 256, 4):
        assert marked(ip(version, UDP, ports(1, 2), tos=tos, label=label)) is None


@pytest.mark.parametrize("version", [V4, V6])
@pytest.mark.parametrize("options", [b"", b"\1" * 8])
@pytest.mark.parametrize("label", [0, 0xFFFFF])
def test_only_the_two_bits_of_congestion_change(version, options, label):
    """RFC 3168 section 5, RFC 2474: the upper six bits are for something else, and so is the flow label beside them."""
    for tos in range(256):
        if tos & 3:
            before, after = (ip(version, UDP, ports(1, 2), options, tos=one, label=label) for one in (tos, tos | 3))
            assert marked(before) == after


def test_the_header_checksum_stays_right_whatever_it_is():
    """RFC 1624: 0 and 0xFFFF are both zero in ones' complement, so it is the sum that is looked at."""
    for identification in range(0x10000):
        content = marked(ip(V4, UDP, b"", identification=identification, tos=1))
        assert ones_sum(content) == 0xFFFF
