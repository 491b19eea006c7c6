"""bulkvpnd.protocol.packet: which connection a flow takes."""

import collections
import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packets import GRE, ICMP, SCTP, SUPER, TCP, UDP, V4, V6, Sent, examples, ip, pieces_of, plain, ports

from bulkvpnd.protocol import packet


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


@pytest.mark.parametrize("version", [V4, V6])
def test_a_header_alone_has_the_flow_of_its_addresses(version):
    content = ip(version, ICMP, b"")
    assert len(content) == (20 if version == V4 else 40)
    assert flow(content) == flow(ip(version, ICMP, b"\1" * 9)) != 0


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


def test_both_ends_choose_alike_whatever_their_versions():
    """Frozen. CRC-32 over address and port of one end and then of the other; the weights of Knuth's two numbers."""
    assert (flow(Sent().packet()), flow(Sent(version=V6).packet())) == (0xECB02265, 0xCE735352)
    flows = [int.from_bytes(hashlib.sha256(bytes(divmod(one, 256))).digest()[:4], "big") for one in range(1024)]
    chosen = bytes(packet.rendezvous(one, range(16)) for one in flows)
    assert hashlib.sha256(chosen).hexdigest() == "7a783ba06b6140604f6cc6d7647f80bb98b731fdb7a170cbeb463f650e3ec34b"


@given(st.integers(0, 2**32 - 1), st.sets(st.integers(0, 2**32 - 1), min_size=1, max_size=8), st.randoms())
@examples
def test_the_order_of_the_numbers_does_not_matter(one, numbers, random):
    shuffled = sorted(numbers)
    random.shuffle(shuffled)
    chosen = packet.rendezvous(one, numbers)
    assert chosen in numbers
    assert packet.rendezvous(one, shuffled) == packet.rendezvous(one, dict.fromkeys(shuffled)) == chosen
    assert packet.rendezvous(one, [chosen]) == chosen
