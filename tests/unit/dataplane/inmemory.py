"""Packets that say which they are, batches of them, and the worker that a connection sees."""

import collections
import struct

import gevent

from bulkvpnd.dataplane.frames import Frame, FramePool
from bulkvpnd.dataplane.worker import DROPS

FRAME_SIZE = 128 * 1024
"""Bytes; the smallest that an end may ask for."""
HERE, THERE = bytes([10, 86, 0, 1]), bytes([10, 86, 0, 2])
PLAIN = bytes(10)
SMALLEST = 46
"""Bytes of the smallest entry made here."""


def until(condition, what="it", seconds=10):
    """Lets the event loop run until condition() is true. Returns what it returned."""
    with gevent.Timeout(seconds, TimeoutError(f"not within {seconds} s: {what}")):
        while not (value := condition()):
            gevent.sleep(0.001)
    return value


# Packets


def ones_sum(data):
    """RFC 1071, word by word."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def udp(flow, number, size, tos=0, source=HERE, destination=THERE, version=4):
    """An IP packet of `size` bytes: UDP from port 1000 + flow to 2000, which carries its flow and number."""
    inner = struct.pack(">HHHH", 1000 + flow, 2000, size - (20 if version == 4 else 40), 0) + struct.pack(
        ">II", flow, number
    )
    if version == 6:
        head = struct.pack(">IHBB", 6 << 28 | tos << 20, size - 40, 17, 64) + bytes(12) + source + bytes(12)
        return (head + destination + inner).ljust(size, b"\x5a")
    head = bytearray(struct.pack(">BBHHHBBH", 0x45, tos, size, number & 0xFFFF, 0, 64, 17, 0) + source + destination)
    head[10:12] = (0xFFFF - ones_sum(bytes(head))).to_bytes(2, "big")
    return (bytes(head) + inner).ljust(size, b"\x5a")


def entry(flow, number, size=100, **fields):
    """udp() as the TUN gives it; `size` counts the virtio_net_hdr."""
    return PLAIN + udp(flow, number, size - 10, **fields)


def identity(one):
    """(flow, number) of an entry."""
    return struct.unpack_from(">II", one, 10 + (28 if one[10] >> 4 == 4 else 48))


def batch_of(entries, frame_size=FRAME_SIZE):
    """A Frame as TunQueue.read_batch fills it."""
    batch = Frame(frame_size)
    for one in entries:
        batch.add(one)
    return batch


def entries_of(payload):
    """The entries of a DATA payload, by their lengths alone."""
    entries, at = [], 0
    while at < len(payload):
        size = int.from_bytes(payload[at : at + 4], "big")
        entries.append(bytes(payload[at + 4 : at + 4 + size]))
        assert len(entries[-1]) == size
        at += 4 + size
    return entries


# Doubles


class Queue:
    """A TUN queue that keeps what is written to it."""

    def __init__(self):
        self.written = []
        self.refuses = set()

    def write_batch(self, payload, spans):
        entries = [bytes(payload[start:end]) for start, end in spans]
        self.written += [one for one in entries if one not in self.refuses]
        return sum(one in self.refuses for one in entries)


class Worker:
    """What a connection sees of its worker."""

    def __init__(self, frame_size=FRAME_SIZE, pool_frames=64):
        self.queue = Queue()
        self.pool = FramePool(frame_size, pool_frames)
        self.plain = Frame(frame_size)
        self.scratch = Frame(frame_size).view
        self.scratch_read = self.scratch.toreadonly()
        self.drops = collections.Counter(dict.fromkeys(DROPS, 0))
        self.live = []
        self.ends = []
        self.bugs = []

    def established(self, connection):
        self.live.append(connection)

    def closing(self, connection):
        self.live = [one for one in self.live if one is not connection]

    def closed(self, connection, reason, clean, blame):
        self.ends.append((connection.number, reason, clean, blame))

    def bug(self, error):
        self.bugs.append(error)
