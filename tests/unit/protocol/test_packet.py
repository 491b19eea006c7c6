"""bulkvpnd.protocol.packet: what a peer may not hand to our kernel, what an end without offload gets instead of a
super-packet, and which connection a flow takes.

Packets are made and checked here by hand, with a checksum of our own, so that nothing is compared with itself.
"""

import collections
import dataclasses
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bulkvpnd.protocol import packet
from bulkvpnd.protocol.errors import RemoteError

ALL = ("csum", "tso", "uso")
TCP, UDP, SCTP, ICMP, GRE = 6, 17, 132, 1, 47
V4, V6 = 4, 6
ADDRESSES = {
    V4: (bytes([10, 86, 0, 2]), bytes([192, 0, 2, 1])),
    V6: (bytes.fromhex("fd860001000200030000000000000002"), bytes.fromhex("20010db8000000000000000000000001")),
}

# linux/virtio_net.h
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 1, 4, 5, 0x80
CSUM_OFFSET = {TCP: 16, UDP: 6}

# RFC 793, RFC 3168
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))

examples = settings(max_examples=150, deadline=None)


# By hand.


def ones_sum(data):
    """RFC 1071, word by word."""
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | (data[at + 1] if at + 1 < len(data) else 0)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_header(version, protocol, size, addresses=None):
    """RFC 793 section 3.1 and RFC 768; RFC 8200 section 8.1."""
    source, destination = addresses or ADDRESSES[version]
    if version == V4:
        return source + destination + bytes([0, protocol]) + size.to_bytes(2, "big")
    return source + destination + size.to_bytes(4, "big") + bytes([0, 0, 0, protocol])


def ip(version, protocol, inner, options=b"", identification=0x1234, fragment=0x4000, tos=0, addresses=None, ttl=64):
    """options: of IPv4, or one whole extension header of IPv6, whose own next header is the protocol."""
    source, destination = addresses or ADDRESSES[version]
    if version == V6:
        following = 60 if options else protocol  # RFC 8200 section 4.6: destination options
        return (
            struct.pack(">IHBB", 6 << 28 | tos << 20 | 0x54321, len(options) + len(inner), following, ttl)
            + source + destination + options + inner
        )  # fmt: skip
    size = 20 + len(options)
    header = bytearray(
        struct.pack(">BBHHHBBH", 0x40 | size // 4, tos, size + len(inner), identification, fragment, ttl, protocol, 0)
        + source + destination + options
    )  # fmt: skip
    header[10:12] = (0xFFFF - ones_sum(header)).to_bytes(2, "big")
    return bytes(header) + inner


def ports(source, destination, rest=bytes(16)):
    return struct.pack(">HH", source, destination) + rest


@dataclasses.dataclass(frozen=True)
class Sent:
    """What a kernel sends with offload; gso_size 0: one packet whose checksum is still to be computed."""

    version: int = V4
    protocol: int = TCP
    data: bytes = bytes(range(250)) * 10
    gso_size: int = 1000
    ip_options: bytes = b""
    tcp_options: bytes = b""
    tcp_flags: int = ACK
    sequence: int = 0xFFFFFC00
    identification: int = 0xFFFF
    tos: int = 0
    flags: int = NEEDS_CSUM

    @property
    def transport(self):
        return (20 if self.version == V4 else 40) + len(self.ip_options)

    @property
    def header_size(self):
        return self.transport + (20 + len(self.tcp_options) if self.protocol == TCP else 8)

    @property
    def segments(self):
        return max(1, -(-len(self.data) // self.gso_size)) if self.gso_size else 1

    @property
    def gso_type(self):
        if not self.gso_size:
            return 0
        if self.protocol == UDP:
            return GSO_UDP_L4
        return (GSO_TCPV4 if self.version == V4 else GSO_TCPV6) | (GSO_ECN if self.tcp_flags & CWR else 0)

    def vnet(self):
        needs = self.flags & NEEDS_CSUM
        return struct.pack(
            "<BBHHHH", self.flags, self.gso_type, self.header_size if self.gso_size else 0, self.gso_size,
            self.transport if needs else 0, CSUM_OFFSET[self.protocol] if needs else 0,
        )  # fmt: skip

    def packet(self):
        size = self.header_size - self.transport + len(self.data)
        # linux/skbuff.h, CHECKSUM_PARTIAL: the sum of the pseudo header waits in the field.
        partial = ones_sum(pseudo_header(self.version, self.protocol, size & 0xFFFF))
        if self.protocol == TCP:
            words = (20 + len(self.tcp_options)) // 4
            head = struct.pack(
                ">HHIIBBHHH", 40000, 443, self.sequence, 0xCAFE, words << 4, self.tcp_flags, 512, partial, 0
            )
            head += self.tcp_options
        else:
            head = struct.pack(">HHHH", 40000, 443, size & 0xFFFF, partial)
        return ip(
            self.version, self.protocol, head + self.data, self.ip_options, self.identification, tos=self.tos
        )  # fmt: skip

    def entry(self):
        return self.vnet() + self.packet()


def plain(content):
    return bytes(10) + content


PLAIN4 = plain(ip(V4, UDP, ports(1, 2)))
PLAIN6 = plain(ip(V6, UDP, ports(1, 2)))


def payload(*entries):
    return b"".join(len(entry).to_bytes(4, "big") + entry for entry in entries)


# The three that know the signatures of what is tested.


class Verdicts:
    """Foreign is what is not from one of `sources`."""

    def __init__(self, sources):
        self._sources = sources

    def __getitem__(self, pair):
        source, destination = pair
        assert len(source) == len(destination) in (4, 16)
        return None if source in self._sources else "foreign_source"


def look(content, offloads=ALL, sources=None, size=None):
    """(entries that may be written, packets of wire size, drops by cause)."""
    drops = collections.Counter()
    size = len(content) if size is None else size
    verdicts = None if sources is None else Verdicts(sources)
    spans, segments = packet.inspect(memoryview(content).toreadonly(), size, frozenset(offloads), verdicts, drops)
    assert all(0 < start < end <= size for start, end in spans)
    assert all(end + 4 <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    return [content[start:end] for start, end in spans], segments, dict(drops)


def pieces_of(entry, offloads=()):
    """What an end with these offloads gets in place of the entry, or None."""
    pieces = packet.plain_packets(entry, 0, len(entry), offloads)
    return pieces if pieces is None else [bytes(piece) for piece in pieces]


def segments_of(entry):
    return packet.segment_count(entry, 0, len(entry))


def refused(content, reason, **arguments):
    with pytest.raises(RemoteError) as caught:
        look(content, **arguments)
    assert caught.value.reason == reason
    assert str(caught.value).isprintable() and str(caught.value).isascii()


def altered(entry, **fields):
    """The entry with other values in its virtio_net_hdr."""
    names = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    values = dict(zip(names, struct.unpack_from("<BBHHHH", entry)))
    assert set(fields) <= set(names)
    return struct.pack("<BBHHHH", *{**values, **fields}.values()) + entry[10:]


def poked(entry, at, value):
    """The entry with another byte in its packet."""
    changed = bytearray(entry)
    changed[10 + at] = value
    return bytes(changed)


TCP4, TCP6 = Sent().entry(), Sent(version=V6).entry()
UDP4, UDP6 = Sent(protocol=UDP).entry(), Sent(version=V6, protocol=UDP).entry()
SUPER = {"TCP over IPv4": TCP4, "TCP over IPv6": TCP6, "UDP over IPv4": UDP4, "UDP over IPv6": UDP6}
CSUM4 = Sent(gso_size=0, data=bytes(100)).entry()
EVERY = [PLAIN4, PLAIN6, CSUM4, *SUPER.values()]


def test_the_packets_here_are_right():
    assert packet.OFFLOADS == ALL
    kept, segments, drops = look(payload(*EVERY))
    assert (kept, segments, drops) == (EVERY, 3 + 4 * 3, {})


# Entries of a payload.


@pytest.mark.parametrize("front", [b"", payload(PLAIN4)], ids=["first", "second"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_length_that_is_cut(front, cut):
    refused(front + payload(PLAIN4)[:cut], "length")


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
        spans, _ = packet.inspect(memoryview(content).toreadonly(), len(content), frozenset(ALL),
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


@st.composite
def sent(draw, **fixed):
    version = draw(st.sampled_from([V4, V6]))
    protocol = draw(st.sampled_from([TCP, UDP]))
    extension = bytes([protocol, 0, 1, 4, 0, 0, 0, 0])
    fields = {
        "version": version,
        "protocol": protocol,
        "data": draw(st.binary(max_size=60)) * draw(st.integers(0, 60)),
        "gso_size": draw(st.integers(8, 1500)),
        "ip_options": (
            b"\1" * 4 * draw(st.integers(0, 10)) if version == V4 else draw(st.sampled_from([b"", extension]))
        ),
        "tcp_options": b"\1" * 4 * draw(st.integers(0, 10)) if protocol == TCP else b"",
        "tcp_flags": draw(st.integers(0, 255)),
        "sequence": draw(st.sampled_from([0, 1, 2**31 - 500, 2**32 - 1, 2**32 - 1000])),
        "identification": draw(st.sampled_from([0, 1, 0xFFFF, 0xFFF0])),
        "tos": draw(st.integers(0, 255)),
    }
    one = Sent(**{**fields, **fixed})
    return dataclasses.replace(one, gso_size=max(one.gso_size, -(-len(one.data) // 128))) if one.gso_size else one


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
    one = Sent()
    entry = one.entry()
    content = kind(bytes(position) + entry + b"\xee" * 50)
    end = position + len(entry)
    check_segments(one, [bytes(piece) for piece in packet.plain_packets(content, position, end, ())])
    assert packet.segment_count(content, position, end) == one.segments


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


# Congestion.


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
def test_joined_datagrams_are_the_super_packet_that_stands_for_them(version, size, number, position, random):
    data = random.randbytes(size * number)
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
    assert packet.joinable(bytes(7) + entry + bytes(9), 7, 7 + len(entry)) == len(entry) - 200


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
        assert key(one.entry()) == key(dataclasses.replace(one, identification=7).entry())
    others = [
        dataclasses.replace(one, data=bytes(199)).entry(),
        dataclasses.replace(one, tos=2).entry(),
        poked(one.entry(), 8 if version == V4 else 7, 9),  # TTL, hop limit
        *(poked(one.entry(), at, 0xEE) for at in range(12 if version == V4 else 8, ports_at + 4)),
    ]
    assert all(key(other) != key(one.entry()) for other in others)
    assert all(
        (datagram_flow(other) == datagram_flow(one.entry())) is (number < 3) for number, other in enumerate(others)
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


def marked(content, front=b"", behind=b""):
    """What mark_congestion makes of an IP packet amid others, or None if it must be dropped."""
    buffer = bytearray(front + content + behind)
    is_marked = packet.mark_congestion(buffer, len(front))
    at = len(front)
    assert (buffer[:at], buffer[at + len(content) :]) == (front, behind)
    assert is_marked or buffer[at : at + len(content)] == content
    return bytes(buffer[at : at + len(content)]) if is_marked else None


@pytest.mark.parametrize("version", [V4, V6])
@pytest.mark.parametrize("tos", range(0, 256, 4))
def test_a_packet_whose_ends_do_not_know_of_congestion_is_not_marked(version, tos):
    assert marked(ip(version, UDP, ports(1, 2), tos=tos)) is None


@pytest.mark.parametrize("version", [V4, V6])
@pytest.mark.parametrize("options", [b"", b"\1" * 8])
def test_only_the_two_bits_of_congestion_change(version, options):
    """RFC 3168 section 5, RFC 2474: the upper six bits are for something else."""
    for tos in range(256):
        if tos & 3:
            before = ip(version, UDP, ports(1, 2), options, tos=tos)
            assert marked(before, b"\xff" * 3, b"\xff" * 3) == ip(version, UDP, ports(1, 2), options, tos=tos | 3)


def test_the_header_checksum_stays_right_whatever_it_is():
    """RFC 1624: 0 and 0xFFFF are both zero in ones' complement, so it is the sum that is looked at."""
    for identification in range(0x10000):
        content = marked(ip(V4, UDP, b"", identification=identification, tos=1))
        assert ones_sum(content) == 0xFFFF


# Flows.


def flow(content):
    return packet.flow_hash(plain(content), 10, 10 + len(content))


ADDRESS_PAIRS = {
    V4: st.tuples(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4)),
    V6: st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
}
PORT = st.integers(0, 65535)


@given(st.data(), st.sampled_from([V4, V6]), st.integers(0, 255), PORT, PORT, st.integers(0, 10))
@examples
def test_both_directions_of_a_flow_are_one_flow(data, version, protocol, source, destination, words):
    addresses = data.draw(ADDRESS_PAIRS[version])
    options = b"\1" * 4 * words if version == V4 else b""
    there = ip(version, protocol, ports(source, destination), options, addresses=addresses)
    if protocol not in (TCP, UDP, 33, SCTP, 136):  # the first bytes of another header do not change places
        source, destination = destination, source
    back = ip(version, protocol, ports(destination, source, b"back" * 9), addresses=addresses[::-1], ttl=3, tos=8)
    assert flow(there) == flow(back)
    assert 0 <= flow(there) < 2**32


@pytest.mark.parametrize("version", [V4, V6])
@pytest.mark.parametrize("protocol", [TCP, UDP, 33, SCTP, 136])
def test_flows_are_told_apart_by_ports(version, protocol):
    seen = {flow(ip(version, protocol, ports(source, 443))) for source in range(1024, 4096)}
    assert len(seen) == 4096 - 1024
    assert flow(ip(version, protocol, ports(1, 2))) != flow(ip(version, protocol, ports(1, 3)))


@pytest.mark.parametrize("version", [V4, V6])
@pytest.mark.parametrize("protocol", [ICMP, 58, GRE, 50, 4, 41, 0])
def test_protocols_without_ports(version, protocol):
    assert flow(ip(version, protocol, ports(1, 2))) == flow(ip(version, protocol, ports(3, 4)))


@pytest.mark.parametrize("version, addresses", [(V4, (b"\x0a\0\0\1", b"\x0a\0\0\2")), (V6, (bytes(16), b"\1" * 16))])
def test_flows_are_told_apart_by_addresses(version, addresses):
    for protocol in (TCP, ICMP):
        assert flow(ip(version, protocol, ports(1, 2))) != flow(ip(version, protocol, ports(1, 2), addresses=addresses))


def test_all_fragments_of_a_datagram_are_one_flow():
    first = flow(ip(V4, UDP, ports(1, 2), fragment=0x2000))  # RFC 791: more fragments
    for fragment in (0x2001, 0x2100, 0x0001, 0x0100, 0x1FFF, 0x3FFF):
        assert flow(ip(V4, UDP, ports(77, 88), fragment=fragment)) == first
    # Do not fragment is no fragment.
    whole = flow(ip(V4, UDP, ports(1, 2), fragment=0))
    assert flow(ip(V4, UDP, ports(1, 2), fragment=0x4000)) == whole != first
    # RFC 8200 section 4.5: a header of its own, number 44.
    fragments = [ip(V6, 44, struct.pack(">BBHI", UDP, 0, offset, 7) + ports(1, offset)) for offset in (1, 9, 16)]
    assert len(set(map(flow, fragments))) == 1


def test_a_super_packet_and_its_segments_are_one_flow():
    for entry in SUPER.values():
        flows = set(map(flow, pieces_of(entry)))
        assert flows == {packet.flow_hash(entry, 10, len(entry))}


def test_ports_are_read_within_the_packet_only():
    content = ip(V4, TCP, ports(1, 2)[:4])
    behind = bytearray(content + ports(3, 4))
    for size in (22, 23):
        cut = packet.flow_hash(behind, 0, size)
        assert cut == packet.flow_hash(behind[:size], 0, size)
        behind[20:24] = ports(5, 6)[:4]
        assert cut == packet.flow_hash(behind, 0, size)
    assert packet.flow_hash(content, 0, 24) != packet.flow_hash(content, 0, 23)


@pytest.mark.parametrize("content", [b"\0" * 60, b"\x50" * 60, b"\x45" + bytes(18), b"\x60" + bytes(38)])
def test_what_is_not_ip_has_no_flow(content):
    assert flow(content) == 0


@given(st.binary(min_size=1, max_size=80), st.sampled_from([0x45, 0x4F, 0x40, 0x60, 0x00]))
@examples
def test_any_bytes_have_a_flow(content, first):
    for one in (content, bytes([first]) + content):
        assert 0 <= flow(one) < 2**32


# Rendezvous.

CONSECUTIVE = [flow(ip(V4, TCP, ports(source, 5201))) for source in range(40000, 44000)]
CLIENTS = [
    flow(ip(V6, UDP, ports(53000 + host % 7, 53), addresses=(bytes(14) + host.to_bytes(2, "big"), b"\1" * 16)))
    for host in range(4000)
]
NUMBERS = [
    [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [1, 3, 4, 5], [17, 33, 40, 51], [0, 4, 8, 12], [2, 6, 10, 1000003],
    list(range(8)), [2**31, 2**32 - 1, 7],
]  # fmt: skip


@pytest.mark.parametrize("flows", [CONSECUTIVE, CLIENTS], ids=["ports", "hosts"])
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_flows_spread_evenly(flows, numbers):
    shares = collections.Counter(packet.rendezvous(one, numbers) for one in flows)
    even = len(flows) / len(numbers)
    assert all(abs(shares[number] - even) < even / 5 for number in numbers)


@pytest.mark.parametrize("flows", [CONSECUTIVE, CLIENTS], ids=["ports", "hosts"])
@pytest.mark.parametrize("numbers", [one for one in NUMBERS if len(one) > 2], ids=str)
def test_only_the_flows_of_a_lost_number_move_and_evenly(flows, numbers):
    before = [packet.rendezvous(one, numbers) for one in flows]
    for lost in numbers:
        rest = [number for number in numbers if number != lost]
        after = [packet.rendezvous(one, rest) for one in flows]
        assert all(new == old for old, new in zip(before, after) if old != lost)
        moved = collections.Counter(new for old, new in zip(before, after) if old == lost)
        even = moved.total() / len(rest)
        assert all(abs(moved[number] - even) < even * 0.4 for number in rest)


@given(st.integers(0, 2**32 - 1), st.sets(st.integers(0, 2**32 - 1), min_size=1, max_size=8), st.randoms())
@examples
def test_the_order_of_the_numbers_does_not_matter(one, numbers, random):
    shuffled = sorted(numbers)
    random.shuffle(shuffled)
    chosen = packet.rendezvous(one, numbers)
    assert chosen in numbers
    assert packet.rendezvous(one, shuffled) == packet.rendezvous(one, dict.fromkeys(shuffled)) == chosen
    assert packet.rendezvous(one, [chosen]) == chosen
