"""dataplane.tun over a socket pair, which keeps packets apart as the device does."""

import collections
import errno
import os
import socket
import time

import pytest
from inmemory import SMALLEST, batch_of, entries_of, entry

from bulkvpnd.dataplane.frames import BATCH_PACKETS_MAX, Frame
from bulkvpnd.dataplane.tun import TunQueue
from bulkvpnd.protocol import packet

FRAME_SIZE = 128 * 1024


@pytest.fixture
def device():
    """(queue, the other end's socket)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    yield TunQueue(ours.fileno(), collections.Counter()), theirs
    ours.close()
    theirs.close()


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
    for _ in range(BATCH_PACKETS_MAX + 10):
        kernel.send(one)
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
