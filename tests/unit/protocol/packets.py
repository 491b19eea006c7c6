"""Packets as kernels make them, by hand and with a checksum of our own, so that nothing is compared with itself."""

import collections
import dataclasses
import struct

from hypothesis import settings
from hypothesis import strategies as st

from bulkvpnd.protocol import packet

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


def ip(version, protocol, inner, options=b"", identification=0x1234, fragment=0x4000, tos=0, addresses=None, ttl=64,
       label=0x54321):
    """options: of IPv4, or one whole extension header of IPv6, whose own next header is the protocol."""
    source, destination = addresses or ADDRESSES[version]
    if version == V6:
        following = 60 if options else protocol  # RFC 8200 section 4.6: destination options
        return (
            struct.pack(">IHBB", 6 << 28 | tos << 20 | label, len(options) + len(inner), following, ttl)
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
    view, spans, segments, at = memoryview(content).toreadonly(), [], 0, 0
    while at != size:
        more, count, end = packet.inspect(view, at, size, frozenset(offloads), verdicts, drops)
        assert at < end <= size and len(more) <= packet.INSPECTED_MAX
        spans, segments, at = spans + more, segments + count, end
    assert all(0 < start < end <= size for start, end in spans)
    assert all(end + 4 <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    return [content[start:end] for start, end in spans], segments, dict(drops)


def pieces_of(entry, offloads=()):
    """What an end with these offloads gets in place of the entry, or None."""
    pieces = packet.plain_packets(entry, 0, len(entry), offloads)
    return pieces if pieces is None else [bytes(piece) for piece in pieces]


def segments_of(entry):
    return packet.segment_count(entry, 0, len(entry))


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
