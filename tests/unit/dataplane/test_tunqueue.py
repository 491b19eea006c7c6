"""dataplane.tun over a socket pair, which keeps packets apart as the device does."""

import collections
import contextlib
import errno
import os
import socket
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inmemory import SMALLEST, batch_of, entries_of, entry

from bulkvpnd.dataplane.frames import BATCH_PACKETS_MAX, Frame
from bulkvpnd.dataplane.joining import JOINED_SIZE, PAUSE
from bulkvpnd.dataplane.tun import TunQueue
from bulkvpnd.protocol import packet

FRAME_SIZE = 128 * 1024
SO_SNDBUFFORCE = 32
"""asm-generic/socket.h"""


@pytest.fixture
def device():
    """(queue, the other end's socket)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        with contextlib.suppress(PermissionError):
            # Linux before 6.16 allows 208 KiB, which hold no whole batch.
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 << 20)
    yield TunQueue(ours.fileno(), collections.Counter()), theirs
    ours.close()
    theirs.close()


def send(kernel, entries):
    for one in entries:
        try:
            kernel.send(one)
        except BlockingIOError:
            pytest.skip("needs root or a larger net.core.wmem_max, for a socket that holds a whole batch")


def read(queue, batch=None):
    """(number, entries of the batch)."""
    batch = batch or Frame(FRAME_SIZE)
    number = queue.read_batch(batch)
    entries = entries_of(batch.view[: batch.end])
    assert [bytes(batch.view[start : batch.begin(n + 1)]) for n, start in enumerate(batch.starts)] == entries
    return number, entries


def test_nothing_is_there(device):
    queue, _ = device
    batch = Frame(FRAME_SIZE)
    assert read(queue, batch) == (0, [])
    assert not queue.is_full(batch)


def test_packets_become_entries_behind_what_is_there(device):
    queue, kernel = device
    packets = [entry(1, number, 60 + number) for number in range(10)]
    for one in packets:
        kernel.send(one)
    batch = batch_of([entry(2, 1)], FRAME_SIZE)
    assert read(queue, batch) == (10, [entry(2, 1), *packets])
    assert read(queue, batch)[0] == 0


def test_a_batch_is_full_when_the_largest_packet_may_not_fit(device):
    queue, kernel = device
    largest = entry(1, 1, packet.ENTRY_MAX - 40)
    for _ in range(4):
        kernel.send(largest)
    small = Frame(packet.ENTRY_MAX + 4)
    assert read(queue, small) == (1, [largest])
    assert queue.is_full(small)
    batch = Frame(FRAME_SIZE)
    assert read(queue, batch)[0] == 1
    assert queue.is_full(batch)
    batch.clear()
    assert not queue.is_full(batch)
    larger = Frame(2 * packet.ENTRY_MAX + 8)
    assert read(queue, larger) == (2, [largest] * 2)


def test_the_largest_packet_that_there_is(device):
    queue, kernel = device
    largest = entry(1, 1, 1000) + bytes(packet.ENTRY_MAX - 1000)
    kernel.send(largest)
    assert read(queue, Frame(packet.ENTRY_MAX + 4)) == (1, [largest])


def test_a_batch_ends_after_so_many_packets(device):
    queue, kernel = device
    one = entry(1, 1, SMALLEST)
    send(kernel, [one] * (BATCH_PACKETS_MAX + 10))
    batch = Frame(FRAME_SIZE)
    assert read(queue, batch)[0] == BATCH_PACKETS_MAX
    assert queue.is_full(batch)
    batch.clear()
    assert read(queue, batch)[0] == 10


def test_many_packets_are_a_full_batch():
    batch = Frame(FRAME_SIZE)
    for _ in range(BATCH_PACKETS_MAX - 1):
        batch.add(entry(1, 1, SMALLEST))
    assert not TunQueue.is_full(batch)
    batch.add(entry(1, 1, SMALLEST))
    assert TunQueue.is_full(batch)


def test_what_is_shorter_than_a_header_is_not_carried(device):
    """A program with a packet socket can send it; the peer would end the connection for it."""
    queue, kernel = device
    for number, size in enumerate((1, 10, 11, 29)):
        kernel.send(entry(1, number))
        kernel.send(entry(1, number)[:size])
    kernel.send(entry(1, 4, 60)[:30])
    for number in range(4):
        assert read(queue) == (1, [entry(1, number)])
        assert queue._drops == {"not_ip": number + 1}
    assert read(queue) == (1, [entry(1, 4, 60)[:30]])


def test_the_end_of_an_inbox_is_no_packet(device):
    queue, kernel = device
    kernel.close()
    assert read(queue) == (0, [])


def test_waiting_ends_with_the_first_batch(device):
    queue, kernel = device
    batch = Frame(FRAME_SIZE)
    before = time.monotonic()
    assert queue.wait(batch, 0.05) == 0
    assert 0.05 <= time.monotonic() - before < 5
    for number in range(3):
        kernel.send(entry(1, number))
    before = time.monotonic()
    assert queue.wait(batch, 10) == 3
    assert time.monotonic() - before < 5
    assert entries_of(batch.view[: batch.end]) == [entry(1, number) for number in range(3)]


def test_a_device_that_fails_is_an_error():
    queue = TunQueue(os.open("/", os.O_RDONLY), {})
    try:
        with pytest.raises(OSError) as caught:
            queue.read_batch(Frame(FRAME_SIZE))
        assert caught.value.errno == errno.EISDIR
    finally:
        os.close(queue.fileno())


def test_every_entry_is_one_write(device):
    queue, kernel = device
    entries = [entry(1, number, 60 + number) for number in range(5)]
    batch = batch_of(entries, FRAME_SIZE)
    spans = [(start, batch.begin(number + 1)) for number, start in enumerate(batch.starts)]
    assert queue.write_batch(batch.view.toreadonly(), spans[1:4]) == 0
    assert [kernel.recv(2000) for _ in range(3)] == entries[1:4]
    with pytest.raises(BlockingIOError):
        kernel.recv(1)


def test_what_the_kernel_refuses_is_counted_and_the_rest_is_written(device):
    queue, kernel = device
    batch = batch_of([entry(1, 0)], FRAME_SIZE)
    # A datagram that is larger than the socket's buffer is refused, EMSGSIZE.
    small, large = (batch.starts[0], batch.end), (0, len(batch.view))
    with socket.socket(fileno=os.dup(queue.fileno())) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    assert queue.write_batch(batch.view.toreadonly(), [large, small, large, small]) == 2
    assert [kernel.recv(2000) for _ in range(2)] == [entry(1, 0)] * 2


def test_what_a_closed_device_refuses(device):
    queue, kernel = device
    kernel.close()
    batch = batch_of([entry(1, 0)], FRAME_SIZE)
    assert queue.write_batch(batch.view.toreadonly(), [(4, batch.end)] * 3) == 3


# Datagrams joined while they are read.


def datagram(flow, data, version=4, identification=0):
    """As the kernel hands it over: the sum of the pseudo header waits in the field."""
    udp = struct.pack(">HHHH", 1000 + flow, 53, 8 + len(data), 0)
    if version == 6:
        addresses = bytes(range(32))
        head = struct.pack(">IHBB", 6 << 28, 8 + len(data), 17, 64) + addresses
    else:
        addresses = bytes(range(8))
        head = struct.pack(">BBHHHBBH", 0x45, 0, 28 + len(data), identification, 0x4000, 64, 17, 0) + addresses
        head = head[:10] + (~sum(struct.unpack(">10H", head)) % 0xFFFF).to_bytes(2, "big") + head[12:]
    words = struct.unpack(f">{len(addresses) // 2}H", addresses)
    udp = udp[:6] + ((sum(words) + 17 + 8 + len(data)) % 0xFFFF).to_bytes(2, "big")
    return packet.VNET.pack(packet.NEEDS_CSUM, 0, 0, 0, len(head), 6) + head + udp + data


def on_the_wire(entries):
    """The packets that entries stand for, without what segmentation makes anew: IPv4's identification and checksum."""
    packets = []
    for one in entries:
        pieces = packet.plain_packets(one, 0, len(one), ())
        for piece in [one[packet.VNET_SIZE :]] if pieces is None else map(bytes, pieces):
            packets.append(piece[:4] + piece[6:10] + piece[12:] if piece[0] == 0x45 else piece)
    return packets


def joined(device, entries, batch=None):
    queue, kernel = device
    queue.joins = True
    send(kernel, entries)
    return read(queue, batch)[1]


def test_datagrams_of_one_flow_become_a_super_packet_if_that_is_wanted(device):
    queue, kernel = device
    sent = [datagram(1, bytes([number]) * 100) for number in range(10)]
    for one in sent:
        kernel.send(one)
    assert read(queue) == (10, sent)
    (one,) = joined(device, sent)
    assert on_the_wire([one]) == on_the_wire(sent)
    assert packet.segment_count(one, 0, len(one)) == 10


def test_two_datagrams_are_enough(device):
    for version in (4, 6):
        sent = [datagram(1, bytes([number]), version) for number in range(2)]
        (one,) = joined(device, sent)
        assert on_the_wire([one]) == on_the_wire(sent)


def test_flows_that_take_turns_are_joined_each_for_itself(device):
    sent = [datagram(flow, bytes([number]) * 100) for number in range(20) for flow in range(4)]
    entries = joined(device, sent)
    by_flow = [[one for one in sent if one[30:34] == of[30:34]] for of in sent[:4]]
    assert [on_the_wire([one]) for one in entries] == [on_the_wire(flow) for flow in by_flow]


@pytest.mark.parametrize("size, most", [(100, packet.UDP_JOINED_MAX), (1400, JOINED_SIZE // 1400)])
def test_a_super_packet_has_only_so_many_datagrams(device, size, most):
    sent = [datagram(1, bytes([number]) * size) for number in range(2 * most)]
    entries = joined(device, sent, Frame(4 * FRAME_SIZE))
    assert on_the_wire(entries) == on_the_wire(sent)
    assert [packet.segment_count(one, 0, len(one)) for one in entries] == [most, most]


BEHIND = {
    "no data": datagram(1, b""), "no open checksum": bytes(10) + datagram(1, bytes(100))[10:],
    "a fragment": datagram(1, bytes(100))[:17] + b"\1" + datagram(1, bytes(100))[18:],
    "another size": datagram(1, b"x"), "larger": datagram(1, bytes(101)),
}  # fmt: skip


@pytest.mark.parametrize("stray", BEHIND.values(), ids=BEHIND.keys())
@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_may_be_of_the_same_flow_stays_in_its_place(device, stray, number):
    run = [datagram(1, bytes([n]) * 100) for n in range(number)]
    other = [datagram(2, bytes([n]) * 100) for n in range(9)]
    sent = [*run, stray, *run]
    entries = joined(device, [*other[:5], *sent, *other[5:]], Frame(2 * FRAME_SIZE))
    mine = [one for one in on_the_wire(entries) if one[17:18] != on_the_wire(other)[0][17:18]]
    assert mine == on_the_wire(sent)
    # What cannot be joined at all ends every run before it, another size only that of its flow.
    ends_all = stray not in (BEHIND["another size"], BEHIND["larger"])
    assert stray in entries and len(entries) == 3 + (2 if ends_all else 1)


@pytest.mark.parametrize("size", [SMALLEST, 1000, packet.ENTRY_MAX - 40])
def test_tcp_is_not_held_up(device, size):
    tcp = bytearray(entry(1, 1, size))
    tcp[packet.VNET_SIZE + 9] = packet.PROTOCOL_TCP
    run = [datagram(1, bytes([n]) * 100) for n in range(4)]
    entries = joined(device, [*run[:2], bytes(tcp), *run[2:]], Frame(2 * FRAME_SIZE))
    assert entries[0] == tcp and len(entries) == 2 and on_the_wire(entries[1:]) == on_the_wire(run)


def test_what_is_too_short_ends_a_batch_and_is_not_carried(device):
    queue, kernel = device
    run = [datagram(1, bytes([number]) * 100) for number in range(3)]
    entries = joined(device, [*run, run[0][:29], *run])
    assert len(entries) == 1 and on_the_wire(entries) == on_the_wire(run)
    assert queue._drops == {"not_ip": 1}
    assert on_the_wire(read(queue)[1]) == on_the_wire(run)


def test_a_super_packet_that_was_there_is_left_alone(device):
    (made,) = joined(device, [datagram(1, bytes(100))] * 3)
    assert joined(device, [made, made]) == [made, made]
    assert joined(device, [made, datagram(1, bytes(100))]) == [made, datagram(1, bytes(100))]


def test_a_batch_holds_no_more_than_it_has_room_for(device):
    queue, kernel = device
    sent = [datagram(flow, bytes([number]) * 1400) for number in range(6) for flow in range(2)]
    batch = batch_of([entry(2, 1, FRAME_SIZE - packet.ENTRY_MAX - 4 - 3 * (1438 + 4) - 4)], FRAME_SIZE)
    entries = joined(device, sent, batch)[1:]
    assert 3 <= len(on_the_wire(entries)) < 6
    batch.clear()
    rest = read(queue, batch)[1]
    packets = on_the_wire(entries + rest)
    for flow in range(2):
        assert [one for one in packets if one[17] == 0xE8 + flow] == on_the_wire(sent[flow::2])


def test_a_batch_ends_after_so_many_datagrams(device):
    queue, kernel = device
    sent = [datagram(1, bytes(1))] * (BATCH_PACKETS_MAX + 10)
    assert len(on_the_wire(joined(device, sent))) == BATCH_PACKETS_MAX
    assert len(on_the_wire(read(queue)[1])) == 10


def test_where_nothing_is_joined_it_is_not_tried_for_a_while(device):
    apart = [datagram(flow, bytes(100)) for flow in range(3)]
    run = [datagram(1, bytes([n]) * 100) for n in range(4)]
    assert joined(device, apart) == apart
    for _ in range(PAUSE):
        assert joined(device, run) == run
    assert len(joined(device, run)) == 1
    assert len(joined(device, run)) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from((0, 1, 100, 101)), st.sampled_from((4, 6))), max_size=60))
@settings(max_examples=100, deadline=None)
def test_every_datagram_passes_once_and_in_the_order_of_its_flow(flows):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        sent = [datagram(flow, bytes([n]) * size, version) for n, (flow, size, version) in enumerate(flows)]
        entries = joined((TunQueue(ours.fileno(), collections.Counter()), theirs), sent)
        got, expected = on_the_wire(entries), on_the_wire(sent)
        assert sorted(got) == sorted(expected)
        for flow in {flow_of(one) for one in expected}:
            assert [one for one in got if flow_of(one) == flow] == [one for one in expected if flow_of(one) == flow]


def flow_of(one):
    """Version and source port of a packet of on_the_wire."""
    return one[0] >> 4, one[16:18] if one[0] >> 4 == 4 else one[40:42]
