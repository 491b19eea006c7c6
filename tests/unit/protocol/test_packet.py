"""bulkvpnd.protocol.packet: what a peer may not hand to our kernel."""

import collections
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packets import (
    ADDRESSES, ALL, CSUM4, DATA_VALID, EVERY, GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, ICMP, PLAIN4, PLAIN6, SUPER,
    TCP, TCP4, TCP6, UDP, UDP4, UDP6, V4, V6, Sent, altered, examples, ip, look, payload, pieces_of, plain, poked,
    ports, segments_of, sent,
)  # fmt: skip

from bulkvpnd.protocol import packet
from bulkvpnd.protocol.errors import RemoteError


def refused(content, reason, text="", **arguments):
    with pytest.raises(RemoteError) as caught:
        look(content, **arguments)
    assert caught.value.reason == reason and text in str(caught.value)
    assert str(caught.value).isprintable() and str(caught.value).isascii()


def test_the_packets_here_are_right():
    assert packet.OFFLOADS == ALL
    kept, segments, drops = look(payload(*EVERY))
    assert (kept, segments, drops) == (EVERY, 3 + 4 * 3, {})


# Entries of a payload.


@pytest.mark.parametrize("front", [b"", payload(PLAIN4)], ids=["first", "second"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_length_that_is_cut(front, cut):
    refused(front + payload(PLAIN4)[:cut], "length", "is cut off")


@pytest.mark.parametrize("front", [b"", payload(PLAIN4)], ids=["first", "second"])
def test_a_length_with_nothing_behind_it(front):
    refused(front + payload(PLAIN4)[:4], "length", "length is wrong")


@pytest.mark.parametrize("front", [b"", payload(PLAIN4)], ids=["first", "second"])
@pytest.mark.parametrize("length", [0, 1, 9, 10, 29, packet.ENTRY_MAX + 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_length_that_no_packet_has(front, length):
    body = (PLAIN4[:10] + b"\x45" + bytes(packet.ENTRY_MAX))[:length]
    refused(front + length.to_bytes(4, "big") + body, "length")


def test_a_length_beyond_the_payload():
    whole = payload(PLAIN4)
    for cut in range(1, len(PLAIN4)):
        refused(whole[:-cut], "length")
    # Not even into what the buffer still holds of an earlier frame.
    for size in range(len(whole) + 1, 2 * len(whole)):
        refused(whole * 2, "length", size=size)
    assert look(whole * 2, size=len(whole)) == ([PLAIN4], 1, {})
    refused((len(PLAIN4) + 1).to_bytes(4, "big") + PLAIN4 + whole, "length")


def test_the_smallest_and_the_largest_entry():
    smallest = plain(ip(V4, 59, b""))
    largest4 = plain(ip(V4, UDP, bytes(65535 - 20)))
    largest6 = plain(ip(V6, UDP, bytes(65535)))
    assert (len(smallest), len(largest6)) == (30, packet.ENTRY_MAX)
    for entry in (smallest, largest4, largest6):
        assert look(payload(entry)) == ([entry], 1, {})


@pytest.mark.parametrize("entry", EVERY)
@pytest.mark.parametrize("first", [0x00, 0x15, 0x35, 0x40, 0x44, 0x50, 0x55, 0x5F, 0x70, 0x80, 0xF5])
def test_not_ip(entry, first):
    assert look(payload(PLAIN4, poked(entry, 0, first), PLAIN6)) == ([PLAIN4, PLAIN6], 2, {"not_ip": 1})


@pytest.mark.parametrize("size", range(20, 40))
def test_an_ipv6_packet_shorter_than_its_header(size):
    entry = bytes(10) + PLAIN6[10 : 10 + size]
    assert look(payload(PLAIN4, entry, PLAIN6)) == ([PLAIN4, PLAIN6], 2, {"not_ip": 1})


def test_an_ipv6_packet_of_its_header_alone():
    entry = plain(ip(V6, 59, b""))
    assert look(payload(entry)) == ([entry], 1, {})


@pytest.mark.parametrize("entry, field", [(PLAIN4, 2), (TCP4, 2), (PLAIN6, 4), (TCP6, 4)])
@pytest.mark.parametrize("wrong", [-1, 1, 256, -256])
def test_a_packet_whose_length_is_not_that_of_its_entry(entry, field, wrong):
    at = 10 + field
    length = int.from_bytes(entry[at : at + 2], "big") + wrong
    lying = entry[:at] + (length & 0xFFFF).to_bytes(2, "big") + entry[at + 2 :]
    assert look(payload(PLAIN4, lying, PLAIN6)) == ([PLAIN4, PLAIN6], 2, {"ip_length": 1})
    # Padding behind the packet, or its end cut off, under a length that is right for neither.
    for other in (entry + b"\0", entry[:-1]):
        assert look(payload(other)) == ([], 0, {"ip_length": 1})


def test_an_ipv4_header_longer_than_its_packet():
    short = plain(ip(V4, 59, bytes(4)))
    assert look(payload(short)) == ([short], 1, {})
    assert look(payload(poked(short, 0, 0x46))) == ([poked(short, 0, 0x46)], 1, {})
    assert look(payload(poked(short, 0, 0x47))) == ([], 0, {"ip_length": 1})


@pytest.mark.parametrize("entry, at", [(PLAIN4, 12), (TCP4, 12), (PLAIN6, 8), (TCP6, 8)])
def test_a_source_that_is_not_the_sessions(entry, at):
    sources = {ADDRESSES[V4][0], ADDRESSES[V6][0]}
    size = len(ADDRESSES[entry[10] >> 4][0])
    for byte in range(size):
        foreign = poked(entry, at + byte, entry[10 + at + byte] ^ 1)
        assert look(payload(PLAIN4, foreign), sources=sources) == ([PLAIN4], 1, {"foreign_source": 1})
        assert look(payload(foreign))[0] == [foreign]  # a client takes any
    assert look(payload(entry), sources=sources)[0] == [entry]
    assert look(payload(entry), sources=frozenset())[2] == {"foreign_source": 1}
    # Not even from the session's other address family, nor the destination for the source.
    assert look(payload(entry), sources=sources - {entry[10 + at : 10 + at + size]})[2] == {"foreign_source": 1}
    assert look(payload(entry), sources={ADDRESSES[entry[10] >> 4][1]})[2] == {"foreign_source": 1}


@pytest.mark.parametrize("entry", [PLAIN4, TCP4, PLAIN6, TCP6])
def test_a_verdict_is_asked_for_both_addresses_as_they_stand_in_the_header(entry):
    source, destination = ADDRESSES[entry[10] >> 4]
    for cause in (None, "somewhere else"):
        drops = collections.Counter()
        content = payload(entry)
        spans, _, _ = packet.inspect(memoryview(content).toreadonly(), 0, len(content), frozenset(ALL),
                                     {(source, destination): cause}, drops)
        assert (len(spans), dict(drops)) == ((1, {}) if cause is None else (0, {cause: 1}))


def test_every_cause_has_its_counter():
    foreign = plain(ip(V4, UDP, ports(1, 2), addresses=ADDRESSES[V4][::-1]))
    content = payload(poked(PLAIN4, 0, 0), poked(PLAIN4, 3, 1), foreign, foreign, PLAIN6)
    assert look(content, sources=[ADDRESSES[V4][0], ADDRESSES[V6][0]]) == (
        [PLAIN6], 1, {"not_ip": 1, "ip_length": 1, "foreign_source": 2}
    )  # fmt: skip


# The virtio_net_hdr.


@pytest.mark.parametrize("entry", [PLAIN4, CSUM4, TCP4, UDP6])
@pytest.mark.parametrize("flag", [1 << bit for bit in range(2, 8)])
def test_an_unknown_flag(entry, flag):
    refused(payload(altered(entry, flags=entry[0] | flag)), "vnet")


@pytest.mark.parametrize("entry", [CSUM4, *SUPER.values()])
@pytest.mark.parametrize("offloads", [(), ("tso", "uso")])
def test_checksum_offload_that_was_not_agreed(entry, offloads):
    refused(payload(entry), "vnet", offloads=offloads)


@pytest.mark.parametrize("entry", [PLAIN4, PLAIN6])
def test_an_end_without_offload_takes_plain_packets(entry):
    assert look(payload(entry), offloads=()) == ([entry], 1, {})
    valid = altered(entry, flags=DATA_VALID)
    assert look(payload(valid), offloads=()) == ([valid], 1, {})


def test_a_checksum_within_its_packet():
    size = len(CSUM4) - 10
    for start, offset in ((20, 0), (20, size - 22), (size - 2, 0), (40, size - 42)):
        entry = altered(CSUM4, csum_start=start, csum_offset=offset)
        assert look(payload(entry)) == ([entry], 1, {})
    for start, offset in (
        (0, 16), (19, 16), (20, size - 21), (size - 1, 0), (size, 0), (20, 65535), (65535, 0), (65535, 65535),
    ):  # fmt: skip
        refused(payload(altered(CSUM4, csum_start=start, csum_offset=offset)), "vnet")


@pytest.mark.parametrize("entry", [CSUM4, altered(PLAIN4, flags=2), altered(PLAIN6, gso_size=1), *SUPER.values()])
def test_a_header_length_within_its_packet(entry):
    size = len(entry) - 10
    for length in (0, size):
        kept = altered(entry, hdr_len=length)
        assert look(payload(kept))[0] == [kept]
    for length in (size + 1, 65535):
        refused(payload(altered(entry, hdr_len=length)), "vnet")


def test_an_unknown_type_of_super_packet():
    known = {0, GSO_TCPV4, GSO_TCPV4 | GSO_ECN, GSO_TCPV6, GSO_TCPV6 | GSO_ECN, GSO_UDP_L4}
    for gso_type in set(range(256)) - known:
        for entry in SUPER.values():
            refused(payload(altered(entry, gso_type=gso_type)), "vnet")


@pytest.mark.parametrize("entry", SUPER.values(), ids=SUPER)
def test_super_packets_that_were_not_agreed(entry):
    needed = "uso" if entry in (UDP4, UDP6) else "tso"
    assert look(payload(entry), offloads=("csum", needed))[0] == [entry]
    refused(payload(entry), "vnet", offloads=set(ALL) - {needed})


@pytest.mark.parametrize("entry", SUPER.values(), ids=SUPER)
def test_a_super_packet_without_checksum(entry):
    refused(payload(altered(entry, flags=0)), "vnet")
    refused(payload(altered(entry, flags=0, csum_start=0, csum_offset=0)), "vnet")


@pytest.mark.parametrize("version", [V4, V6])
def test_a_super_packet_whose_checksum_a_network_card_verified(version):
    tcp = Sent(version=version, flags=DATA_VALID).entry()
    assert look(payload(tcp)) == ([tcp], 3, {})
    refused(payload(Sent(version=version, flags=DATA_VALID, protocol=UDP).entry()), "vnet")
    # The packet is looked at just as well.
    refused(payload(poked(tcp, 9 if version == V4 else 6, UDP)), "vnet")
    refused(payload(poked(tcp, (20 if version == V4 else 40) + 12, 0x40)), "vnet")
    if version == V4:
        assert look(payload(Sent(flags=DATA_VALID, ip_options=b"\1" * 8).entry()))[1] == 3


@pytest.mark.parametrize("entry", SUPER.values(), ids=SUPER)
def test_a_super_packet_with_the_checksum_of_another_protocol(entry):
    right = struct.unpack_from("<H", entry, 8)[0]
    for offset in {0, 6, 15, 16, 17} - {right}:
        refused(payload(altered(entry, csum_offset=offset)), "vnet")


@pytest.mark.parametrize("ecn", [0, GSO_ECN])
def test_a_super_packet_of_the_other_version(ecn):
    refused(payload(altered(TCP4, gso_type=GSO_TCPV6 | ecn)), "vnet")
    refused(payload(altered(TCP6, gso_type=GSO_TCPV4 | ecn)), "vnet")
    for entry, gso_type in ((TCP4, GSO_TCPV4), (TCP6, GSO_TCPV6)):
        assert look(payload(altered(entry, gso_type=gso_type | ecn)))[1] == 3


@pytest.mark.parametrize("entry", SUPER.values(), ids=SUPER)
def test_a_super_packet_of_another_protocol(entry):
    at = 9 if entry[10] >> 4 == 4 else 6
    for protocol in {TCP, UDP, ICMP, 0, 60} - {entry[10 + at]}:
        refused(payload(poked(entry, at, protocol)), "vnet")


@pytest.mark.parametrize("entry", SUPER.values(), ids=SUPER)
def test_a_super_packet_whose_transport_header_is_not_where_it_says(entry):
    right = struct.unpack_from("<H", entry, 6)[0]
    starts = {0, 4, 19, 20, 21, 24, 36, 39, right - 1} - {right}
    for start in starts | ({right + 1, right + 4, 60} if right == 20 else set()):
        refused(payload(altered(entry, csum_start=start)), "vnet")


def test_a_super_packet_behind_options_and_extension_headers():
    for protocol in (TCP, UDP):
        for version, options in ((V4, b"\1" * 4), (V4, b"\1" * 40), (V6, bytes([protocol, 0, 1, 4, 0, 0, 0, 0]))):
            entry = Sent(version=version, protocol=protocol, ip_options=options).entry()
            assert look(payload(entry)) == ([entry], 3, {})
    refused(payload(altered(Sent(ip_options=b"\1" * 4).entry(), csum_start=20)), "vnet")


def test_a_super_packet_with_a_cut_transport_header():
    def cut(entry, size):
        at, base = (2, 0) if entry[10] >> 4 == 4 else (4, 40)
        short = altered(entry[: 10 + size], hdr_len=0)
        return short[: 10 + at] + (size - base).to_bytes(2, "big") + short[12 + at :]

    for entry, header in ((TCP4, 40), (TCP6, 60), (UDP4, 28), (UDP6, 48)):
        kinds = {entry[1], entry[1] | packet.GSO_ECN} if entry in (TCP4, TCP6) else {entry[1]}
        for one in (altered(entry, gso_type=kind) for kind in kinds):
            assert look(payload(cut(one, header))) == ([cut(one, header)], 1, {})  # no data: no super-packet really
            refused(payload(cut(one, header - 1)), "vnet")
    for entry, start in ((TCP4, 20), (TCP6, 40)):
        for size in range(start, start + 20):
            refused(payload(cut(altered(entry, flags=DATA_VALID), size)), "vnet")


@pytest.mark.parametrize("version", [V4, V6])
def test_a_tcp_header_of_a_length_that_it_cannot_have(version):
    at = (20 if version == V4 else 40) + 12
    entry = Sent(version=version, data=bytes(36)).entry()
    for words in range(5):
        refused(payload(poked(entry, at, words << 4)), "vnet")
    for words in range(5, 15):
        assert look(payload(poked(entry, at, words << 4)))[1] == 1
    refused(payload(poked(entry, at, 0xF0)), "vnet")
    # The lower half of the byte is not the length's (RFC 9293 section 3.1).
    assert look(payload(poked(entry, at, 0x5F)))[1] == 1


@pytest.mark.parametrize("entry", SUPER.values(), ids=SUPER)
@pytest.mark.parametrize("gso_size", [0, 65535])
def test_a_segment_size_that_the_kernel_refuses(entry, gso_size):
    refused(payload(altered(entry, gso_size=gso_size)), "vnet")


@pytest.mark.parametrize("version", [V4, V6])
@pytest.mark.parametrize(
    "protocol, most, sizes",
    [
        (TCP, 8191, (1, 2, 7)),  # of TCP_MIN_GSO_SIZE = 8 bytes no more fit
        (UDP, 128, (1, 2, 100, 511)),
    ],
)
def test_too_many_segments(version, protocol, most, sizes):
    for size in sizes:
        for data, segments in ((most * size, most), (most * size - size + 1, most)):
            entry = Sent(version=version, protocol=protocol, data=bytes(data), gso_size=size).entry()
            assert look(payload(entry)) == ([entry], segments, {})
        one_more = Sent(version=version, protocol=protocol, data=bytes(most * size + 1), gso_size=size)
        refused(payload(one_more.entry()), "vnet")


@pytest.mark.parametrize("gso_size", [8, 10, 36, 47, 48, 536, 1448, 65000])
def test_segments_as_small_as_a_far_host_makes_our_kernel_send(gso_size):
    # An MSS of 48 less 12 bytes of timestamps is 36; receive offload joins whatever it gets.
    sent = Sent(data=bytes(65000), gso_size=gso_size)
    assert look(payload(sent.entry())) == ([sent.entry()], sent.segments, {})


# Any payload.


ENTRIES = st.one_of(
    st.sampled_from(EVERY),
    sent().map(Sent.entry),
    sent(gso_size=0).map(Sent.entry),
    st.builds(
        lambda version, protocol, inner: plain(ip(version, protocol, inner)),
        st.sampled_from([V4, V6]), st.integers(0, 255), st.binary(max_size=60),
    ),
)  # fmt: skip


@given(st.lists(ENTRIES, max_size=6))
@examples
def test_what_a_kernel_makes_passes(entries):
    kept, segments, drops = look(payload(*entries))
    assert (kept, drops) == (entries, {})
    assert segments == sum(map(segments_of, entries))


@given(st.lists(ENTRIES, max_size=4), st.lists(ENTRIES, max_size=4))
@examples
def test_payloads_one_after_the_other_are_one_payload(first, second):
    front, behind, whole = look(payload(*first)), look(payload(*second)), look(payload(*first, *second))
    assert whole == (front[0] + behind[0], front[1] + behind[1], {})


@given(st.lists(ENTRIES, min_size=1, max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage(entries, data):
    """Bytes changed, cut out, put in: RemoteError, or entries that are still what they must be."""
    content = bytearray(payload(*entries))
    for _ in range(data.draw(st.integers(1, 3))):
        # Lengths and headers are what matters, so most damage is done near the start.
        start = data.draw(st.one_of(st.integers(0, min(60, len(content))), st.integers(0, len(content))))
        end = data.draw(st.integers(start, min(len(content), start + 4)))
        content[start:end] = data.draw(st.binary(max_size=4))
    check_any(bytes(content))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
@example(b"\0\0\0\x1e" + bytes(30))
def test_any_bytes(content):
    check_any(content)
    check_any(payload(content[:10].ljust(10, b"\0") + b"\x45" + content[10:].ljust(30, b"\0")))


def check_any(content):
    sources = {ADDRESSES[V4][0], ADDRESSES[V6][0]}
    try:
        kept, segments, drops = look(content, sources=sources)
    except RemoteError as error:
        assert error.reason in ("length", "vnet")
        return
    assert set(drops) <= {"not_ip", "ip_length", "foreign_source"}
    assert segments >= len(kept)
    assert payload(*kept) == content or drops
    for entry in kept:
        content = entry[10:]
        if content[0] >> 4 == 4:
            assert (content[0] & 15) * 4 >= 20 and int.from_bytes(content[2:4], "big") == len(content)
            assert content[12:16] in sources
        else:
            assert content[0] >> 4 == 6 and int.from_bytes(content[4:6], "big") + 40 == len(content)
            assert content[8:24] in sources
        # What the kernel was told is true of the packet: an end without offload could be sent it in pieces.
        pieces = pieces_of(entry)
        assert pieces is None or 1 <= len(pieces) <= segments
