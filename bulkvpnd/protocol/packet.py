"""IP packets behind a virtio_net_hdr: checks, flows, and segmentation for an end without offload.

An entry is a virtio_net_hdr and the packet that it describes, exactly as the kernel's TUN device reads and writes them
(linux/virtio_net.h, native byte order on the machine; on the wire little-endian, see `VNET`):

    flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16 | csum_offset u16
"""

import struct
import zlib

from bulkvpnd.protocol.errors import RemoteError
from bulkvpnd.protocol.frame import LENGTH_SIZE

VNET_SIZE = 10
VNET = struct.Struct("<BBHHHH")
"""Little-endian, always: on a big-endian machine host.tun asks the kernel for it (TUNSETVNETLE)."""
VNET_NONE = bytes(VNET_SIZE)

# linux/virtio_net.h
NEEDS_CSUM = 1
DATA_VALID = 2
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80
GSO_BY_FRAGS = 0xFFFF
"""linux/skbuff.h: a gso_size with a meaning of its own, which virtio_net_hdr_to_skb refuses."""

PROTOCOL_TCP = 6
PROTOCOL_UDP = 17
_PORTS_FIRST = frozenset((PROTOCOL_TCP, PROTOCOL_UDP, 33, 132, 136))
"""Protocols whose header opens with both ports: TCP, UDP, DCCP, SCTP, UDP-Lite (IANA protocol numbers)."""

PACKET_MAX = 65535
"""Bytes of the largest IPv4 packet, hence of a super-packet (RFC 791)."""
ENTRY_MIN = VNET_SIZE + 20
"""Bytes: the smallest IP header is that of IPv4."""
ENTRY_MAX = VNET_SIZE + 40 + PACKET_MAX
"""Bytes: the payload length of IPv6 does not count its 40-byte header (RFC 8200)."""
TCP_SEGMENTS_MAX = PACKET_MAX // 8
"""TCP_MIN_GSO_SIZE of net/tcp.h is 8 bytes: the smallest MSS, 48, less 40 bytes of options. Receive offload (GRO) joins
even smaller segments, but few of them; so it is their number that has a bound, not their size."""
UDP_SEGMENTS_MAX = 128
"""UDP_MAX_SEGMENTS of linux/udp.h since 6.9; earlier kernels have 64 and refuse more themselves."""
INSPECTED_MAX = 64
"""Entries that `inspect` looks at in one go (choice: a frame can have thousands, and each costs a write)."""
UDP_JOINED_MAX = 64
"""Datagrams that `join` makes one of: what every kernel with UDP segmentation offload takes."""

OFFLOADS = ("csum", "tso", "uso")
"""What an end can take from the other: packets without checksum, TCP super-packets, UDP super-packets."""
_GSO_RULES = {
    # gso_type: (IP version, protocol, csum_offset, smallest transport header, most segments, offload it needs)
    GSO_TCPV4: (4, PROTOCOL_TCP, 16, 20, TCP_SEGMENTS_MAX, "tso"),
    GSO_TCPV4 | GSO_ECN: (4, PROTOCOL_TCP, 16, 20, TCP_SEGMENTS_MAX, "tso"),
    GSO_TCPV6: (6, PROTOCOL_TCP, 16, 20, TCP_SEGMENTS_MAX, "tso"),
    GSO_TCPV6 | GSO_ECN: (6, PROTOCOL_TCP, 16, 20, TCP_SEGMENTS_MAX, "tso"),
    GSO_UDP_L4: (None, PROTOCOL_UDP, 6, 8, UDP_SEGMENTS_MAX, "uso"),
}

# The virtio_net_hdr of a datagram whose UDP checksum is to be completed.
_DATAGRAM4, _DATAGRAM6 = (VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, udp, 6) for udp in (20, 40))

_U16, _U32 = struct.Struct(">H"), struct.Struct(">I")
_PAIR4, _PAIR6 = struct.Struct("4s4s").unpack_from, struct.Struct("16s16s").unpack_from
"""Source and destination, which stand together in both headers."""


def inspect(payload, at, size, offloads, verdicts, drops):
    """Checks a DATA payload, packet by packet, INSPECTED_MAX at a time.

    payload: read-only memoryview, at: where to begin, size: where to end. offloads: names of OFFLOADS that this end
    announced. verdicts: {(source, destination), bytes of 4 or 16 each: why it is dropped, or None}, with an answer for
    every pair; None where every address may come. drops: counter by cause.
    Returns (spans, segments, at): [(start, end)] of the entries to write, how many packets of wire size they stand for,
    and where to go on; at `size` that was all. Raises RemoteError when an entry's length or virtio_net_hdr is not what
    a kernel makes.
    """
    spans = []
    segments = 0
    for _ in range(INSPECTED_MAX):
        if at == size:
            break
        if size - at < LENGTH_SIZE:
            raise RemoteError("length", "an entry is cut off")
        (length,) = _U32.unpack_from(payload, at)
        start = at + LENGTH_SIZE
        at = start + length
        if not ENTRY_MIN <= length <= ENTRY_MAX or at > size:
            raise RemoteError("length", "an entry's length is wrong")
        ip = start + VNET_SIZE
        first = payload[ip]
        if 0x45 <= first <= 0x4F:
            whole = payload[ip + 2] << 8 | payload[ip + 3]
            pair, at_pair = _PAIR4, ip + 12
        elif first >> 4 == 6 and at - ip >= 40:
            whole = 40 + (payload[ip + 4] << 8 | payload[ip + 5])
            pair, at_pair = _PAIR6, ip + 8
        else:
            drops["not_ip"] += 1
            continue
        if whole != at - ip or (first & 15) * 4 > whole and first < 0x60:
            drops["ip_length"] += 1
            continue
        # Both addresses at once, so that what is asked of the destination costs no second look-up.
        if verdicts is not None and (cause := verdicts[pair(payload, at_pair)]) is not None:
            drops[cause] += 1
            continue
        if payload[start : start + VNET_SIZE] == VNET_NONE:
            segments += 1
        else:
            segments += _check_vnet(payload, start, ip, at, offloads)
        spans.append((start, at))
    return spans, segments, at


def _check_vnet(payload, start, ip, end, offloads):
    """Segments of a packet whose virtio_net_hdr is not empty; the rules are those of the kernel's
    virtio_net_hdr_to_skb (linux/virtio_net.h), so that a write cannot fail for the header's sake."""
    flags, gso_type, header, gso_size, csum_start, csum_offset = VNET.unpack_from(payload, start)
    if flags & ~(NEEDS_CSUM | DATA_VALID):
        raise RemoteError("vnet", "virtio_net_hdr: unknown flags")
    size = end - ip
    if header > size:
        raise RemoteError("vnet", "virtio_net_hdr: header longer than the packet")
    if flags & NEEDS_CSUM:
        if "csum" not in offloads:
            raise RemoteError("vnet", "virtio_net_hdr: checksum offload was not agreed")
        if csum_start < 20 or csum_start + csum_offset + 2 > size:
            raise RemoteError("vnet", "virtio_net_hdr: checksum outside the packet")
    if gso_type == GSO_NONE:
        return 1
    rule = _GSO_RULES.get(gso_type)
    if rule is None:
        raise RemoteError("vnet", "virtio_net_hdr: unknown type of super-packet")
    version, protocol, offset, transport, most, offload = rule
    if offload not in offloads:
        raise RemoteError("vnet", "virtio_net_hdr: this type of super-packet was not agreed")
    actual = payload[ip] >> 4
    if flags == DATA_VALID and protocol == PROTOCOL_TCP:
        csum_start, csum_offset = _transport(payload, ip), offset
    elif not flags & NEEDS_CSUM:
        raise RemoteError("vnet", "virtio_net_hdr: super-packet without checksum offload")
    if (
        csum_offset != offset
        or csum_start + transport > size
        or version not in (None, actual)
        or (csum_start < 40 if actual == 6 else csum_start != (payload[ip] & 15) * 4)
        or payload[ip + (6 if actual == 6 else 9)] != protocol
        and (actual == 4 or csum_start == 40)
    ):
        raise RemoteError("vnet", "virtio_net_hdr: does not fit its packet")
    if protocol == PROTOCOL_TCP:
        transport = (payload[ip + csum_start + 12] >> 4) * 4
        if transport < 20 or csum_start + transport > size:
            raise RemoteError("vnet", "virtio_net_hdr: does not fit its packet")
    data = size - csum_start - transport
    segments = -(-data // gso_size) if gso_size else 0
    if gso_size in (0, GSO_BY_FRAGS) or segments > most:
        raise RemoteError("vnet", "virtio_net_hdr: segment size out of range")
    return max(1, segments)


def _transport(buffer, ip):
    """Bytes from the start of an IP packet to its transport header, for a super-packet whose virtio_net_hdr does not
    say: a network card joined it and verified its checksum (LRO), so there is none to complete."""
    return 40 if buffer[ip] >> 4 == 6 else (buffer[ip] & 15) * 4


def segment_count(buffer, start, end):
    """Packets of wire size that an entry of our own kernel stands for."""
    gso_size = buffer[start + 4] | buffer[start + 5] << 8
    if not gso_size:
        return 1
    return max(1, -(-(end - start - VNET_SIZE - (buffer[start + 2] | buffer[start + 3] << 8)) // gso_size))


def divide(buffer, start, end, most, target, at):
    """Moves the first segments of a TCP super-packet elsewhere, so that it need not travel in one piece.

    The entry buffer[start:end] is our own kernel's. What moves becomes an entry of at most `most` bytes, length
    included, at target[at]; what stays becomes a shorter one with the same end. Returns (start of what stays, end of
    what moved), or None if it is no such super-packet or there is nothing to gain: `most` holds less than a segment or
    all of them.
    """
    flags, gso_type, _, mss, csum_start, csum_offset = VNET.unpack_from(buffer, start)
    rule = _GSO_RULES.get(gso_type)
    if rule is None or rule[1] != PROTOCOL_TCP or not flags & NEEDS_CSUM:
        return None
    ip = start + VNET_SIZE
    header = VNET_SIZE + csum_start + (buffer[ip + csum_start + 12] >> 4) * 4
    moved = (most - LENGTH_SIZE - header) // mss * mss
    left = end - start - header - moved
    if moved <= 0 or left <= 0:
        return None
    begin = start - LENGTH_SIZE
    headers = bytes(buffer[begin : start + header])
    target_end = at + LENGTH_SIZE + header + moved
    target[at:target_end] = buffer[begin : start + header + moved]
    _shorten(target, at + LENGTH_SIZE, header + moved, left, mss)
    target[at + LENGTH_SIZE + VNET_SIZE + csum_start + 13] &= ~0x09 & 0xFF  # FIN, PSH: the last has them
    # The headers of what stays go where the data that moved was.
    start += moved
    buffer[start - LENGTH_SIZE : start + header] = headers
    ip = start + VNET_SIZE
    if buffer[ip] >> 4 == 4:
        _U16.pack_into(buffer, ip + 4, (_U16.unpack_from(buffer, ip + 4)[0] + moved // mss) & 0xFFFF)
    tcp = ip + csum_start
    _U32.pack_into(buffer, tcp + 4, (_U32.unpack_from(buffer, tcp + 4)[0] + moved) & 0xFFFFFFFF)
    buffer[tcp + 13] &= ~0x80 & 0xFF  # CWR: the first has it (RFC 3168 section 6.1.2)
    _shorten(buffer, start, header + left, moved, mss)
    return start, target_end


def _shorten(buffer, start, size, missing, mss):
    """Makes the headers of a TCP super-packet say that the entry has `size` bytes, `missing` less than before."""
    _U32.pack_into(buffer, start - LENGTH_SIZE, size)
    flags, gso_type, header, _, csum_start, csum_offset = VNET.unpack_from(buffer, start)
    ip = start + VNET_SIZE
    data = size - VNET_SIZE - csum_start - (buffer[ip + csum_start + 12] >> 4) * 4
    if data <= mss:
        gso_type = mss = 0
    VNET.pack_into(buffer, start, flags, gso_type, min(header, size - VNET_SIZE), mss, csum_start, csum_offset)
    if buffer[ip] >> 4 == 4:
        _U16.pack_into(buffer, ip + 2, size - VNET_SIZE)
        _U16.pack_into(buffer, ip + 10, 0)
        _U16.pack_into(buffer, ip + 10, _checksum(bytes(buffer[ip : ip + csum_start])))
    else:
        _U16.pack_into(buffer, ip + 4, size - VNET_SIZE - 40)
    # The field has the sum of the pseudo header, to which the length belongs (RFC 9293 section 3.1).
    field = ip + csum_start + csum_offset
    _U16.pack_into(buffer, field, (_U16.unpack_from(buffer, field)[0] - missing) % 0xFFFF)


def joinable(buffer, start, end):
    """Bytes of headers, virtio_net_hdr included, of a UDP datagram whose flow's next ones may be joined to it; else 0.

    The entry buffer[start:end] is our own kernel's. Only where the kernel left the checksum to be completed: another
    one says something about its datagram that a new one would not.
    """
    ip = start + VNET_SIZE
    vnet = buffer[start:ip]
    if vnet == _DATAGRAM4 and buffer[ip] == 0x45 and buffer[ip + 9] == PROTOCOL_UDP:
        if buffer[ip + 6] & 0x3F or buffer[ip + 7]:  # RFC 791: more fragments, or not the first
            return 0
        headers = VNET_SIZE + 28
    elif vnet == _DATAGRAM6 and buffer[ip] >> 4 == 6 and buffer[ip + 6] == PROTOCOL_UDP:
        headers = VNET_SIZE + 48
    else:
        return 0
    return headers if end - start > headers else 0


def joined_key(headers):
    """(what the headers of two datagrams must have in common to be joined, their flow) as bytes each.

    headers: bytes from the virtio_net_hdr on, as many as `joinable` says. The flow is addresses and ports. In common is
    all but the identification and the checksum of IPv4, which segmentation makes anew.
    """
    if len(headers) == VNET_SIZE + 28:
        return headers[11:14] + headers[16:20] + headers[22:], headers[22:34]
    return headers, headers[18:54]


def is_tcp(buffer, start):
    """Whether an entry of our own kernel is TCP and no fragment of IPv6."""
    ip = start + VNET_SIZE
    return buffer[ip + (9 if buffer[ip] >> 4 == 4 else 6)] == PROTOCOL_TCP


def join(buffer, start, end, headers, data):
    """Makes the entry buffer[start:end], a datagram of `data` bytes with those of others behind it, a super-packet.

    headers: bytes up to the first datagram's data, as `joinable` says.
    """
    ip = start + VNET_SIZE
    udp = start + headers - 8
    _U32.pack_into(buffer, start - LENGTH_SIZE, end - start)
    VNET.pack_into(buffer, start, NEEDS_CSUM, GSO_UDP_L4, headers - VNET_SIZE, data, udp - ip, 6)
    more = end - start - headers - data
    if buffer[ip] >> 4 == 4:
        _U16.pack_into(buffer, ip + 2, end - ip)
        _U16.pack_into(buffer, ip + 10, 0)
        _U16.pack_into(buffer, ip + 10, _checksum(bytes(buffer[ip:udp])))
    else:
        _U16.pack_into(buffer, ip + 4, end - udp)
    _U16.pack_into(buffer, udp + 4, end - udp)
    # The field has the sum of the pseudo header, to which the length belongs (RFC 768).
    _U16.pack_into(buffer, udp + 6, (_U16.unpack_from(buffer, udp + 6)[0] + more) % 0xFFFF)


def mark_congestion(buffer, ip):
    """Marks the IP packet at buffer[ip] as having met congestion, if its ends understand that (RFC 3168 section 5).

    Returns False for a packet that is not ECN-capable: it must be dropped instead.
    """
    if buffer[ip] >> 4 == 6:
        # RFC 8200 section 3: the traffic class lies across the first two bytes.
        if not buffer[ip + 1] & 0x30:
            return False
        buffer[ip + 1] |= 0x30
        return True
    before = buffer[ip + 1]
    if not before & 3:
        return False
    buffer[ip + 1] = before | 3
    # RFC 1624, equation 3, for the one 16-bit word that has changed.
    total = (~_U16.unpack_from(buffer, ip + 10)[0] & 0xFFFF) + (before ^ 3) % 4
    _U16.pack_into(buffer, ip + 10, ~(total % 0xFFFF) & 0xFFFF)
    return True


def flow_hash(buffer, ip, end):
    """A number that is the same for every packet of a flow and for both of its directions.

    buffer[ip:end] is an IP packet. Ports count only where every packet of the flow shows them: fragments of a
    datagram and the protocols without ports are told apart by their addresses alone.
    """
    version = buffer[ip] >> 4
    if version == 4 and end - ip >= 20:
        source, destination = bytes(buffer[ip + 12 : ip + 16]), bytes(buffer[ip + 16 : ip + 20])
        protocol = buffer[ip + 9]
        ports = ip + (buffer[ip] & 15) * 4
        if (buffer[ip + 6] & 0x3F) | buffer[ip + 7]:  # RFC 791: more fragments, or not the first
            protocol = None
    elif version == 6 and end - ip >= 40:
        source, destination = bytes(buffer[ip + 8 : ip + 24]), bytes(buffer[ip + 24 : ip + 40])
        protocol = buffer[ip + 6]
        ports = ip + 40
    else:
        return 0
    if protocol in _PORTS_FIRST and ports + 4 <= end:
        source += bytes(buffer[ports : ports + 2])
        destination += bytes(buffer[ports + 2 : ports + 4])
    low, high = (source, destination) if source <= destination else (destination, source)
    return zlib.crc32(high, zlib.crc32(low))


def rendezvous(flow, numbers):
    """The member of `numbers` (non-empty, ints) that carries `flow`; both ends choose alike.

    Highest random weight (Thaler and Ravishankar 1998): when a number goes, only its flows move, evenly over the rest.
    """

    def weight(number):
        # Both products mix (Knuth, volume 3, section 6.4: 2^32 and 2^64 over the golden ratio). A CRC would not do: it
        # is linear, so the order of the weights would hang on a few bits of the flow only.
        mixed = (flow ^ number * 0x9E3779B1) & 0xFFFFFFFF
        return mixed * 0x9E3779B97F4A7C15 >> 12 & 0xFFFFFFFF, number

    return max(numbers, key=weight)


def plain_packets(buffer, start, end, offloads):
    """What to send instead of an entry to an end that lacks offload: [packet], bytes each, no virtio_net_hdr.

    The entry comes from our own kernel. Checksums are completed and super-packets split as the kernel would
    (RFC 793, 3168: CWR on the first only, FIN and PSH on the last only; RFC 768: a UDP checksum of 0 is sent as
    0xFFFF). Returns None when the entry may go as it is.
    """
    flags, gso_type, _, gso_size, csum_start, csum_offset = VNET.unpack_from(buffer, start)
    rule = _GSO_RULES.get(gso_type)
    if rule is None:
        if not flags & NEEDS_CSUM or "csum" in offloads:
            return None
        packet = bytearray(buffer[start + VNET_SIZE : end])
        _complete_checksum(packet, csum_start, csum_offset)
        return [packet]
    if rule[-1] in offloads:
        return None
    if not flags & NEEDS_CSUM:
        csum_start = _transport(buffer, start + VNET_SIZE)
    return _segments(bytes(buffer[start + VNET_SIZE : end]), gso_size, csum_start, *rule[1:3])


def _segments(packet, gso_size, transport, protocol, csum_offset):
    version = packet[0] >> 4
    is_tcp = protocol == PROTOCOL_TCP
    header_size = transport + ((packet[transport + 12] >> 4) * 4 if is_tcp else 8)
    header, data = packet[:header_size], packet[header_size:]
    (identification,) = _U16.unpack_from(packet, 4)
    (sequence,) = _U32.unpack_from(packet, transport + 4)
    packets = []
    pieces = range(0, max(len(data), 1), gso_size)
    for number, at in enumerate(pieces):
        one = bytearray(header + data[at : at + gso_size])
        if version == 4:
            _U16.pack_into(one, 2, len(one))
            _U16.pack_into(one, 4, (identification + number) & 0xFFFF)
            one[10:12] = b"\0\0"
            _U16.pack_into(one, 10, _checksum(one[:transport]))
        else:
            _U16.pack_into(one, 4, len(one) - 40)
        if is_tcp:
            _U32.pack_into(one, transport + 4, (sequence + at) & 0xFFFFFFFF)
            if number:
                one[transport + 13] &= ~0x80 & 0xFF  # CWR
            if number < len(pieces) - 1:
                one[transport + 13] &= ~0x09 & 0xFF  # FIN, PSH
        else:
            _U16.pack_into(one, transport + 4, len(one) - transport)
        addresses = one[12:20] if version == 4 else one[8:40]
        pseudo = addresses + struct.pack(">II", protocol, len(one) - transport)
        field = transport + csum_offset
        one[field : field + 2] = b"\0\0"
        _U16.pack_into(one, field, _checksum(pseudo + one[transport:]))
        packets.append(one)
    return packets


def _complete_checksum(packet, csum_start, csum_offset):
    """The kernel left the sum of the pseudo header in the field; sum from csum_start on (linux/skbuff.h)."""
    if csum_start + csum_offset + 2 <= len(packet):
        _U16.pack_into(packet, csum_start + csum_offset, _checksum(packet[csum_start:]))


def _checksum(data):
    """RFC 1071. A big-endian number modulo 2^16 - 1 is the ones' complement sum of its 16-bit words; never 2^16 - 1, so
    what this returns is never 0, which in a datagram would say that it has no checksum (RFC 768)."""
    if len(data) % 2:
        data = bytes(data) + b"\0"
    return ~(int.from_bytes(data, "big") % 0xFFFF) & 0xFFFF
