"""Buffers of frame size, made once and used again."""

import mmap

from bulkvpnd.protocol import aead, frame

BATCH_PACKETS_MAX = 1024
"""Packets in one batch; with small packets a batch ends here, so that the loop gets its turn (choice)."""
IDLE_TIME = 10
"""Ticks, about seconds, of quiet after which memory for data goes back to the kernel (choice)."""


def memory(size):
    """A buffer of `size` bytes whose pages the kernel can have back: zero until touched, so idle ones cost nothing."""
    # Private: of shared memory, mmap's default, madvise(2) would give nothing back.
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def release(buffer, start=0):
    """Gives the pages of memory() behind the first `start` bytes back; they read as zeros then."""
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if start < len(buffer):
        buffer.madvise(mmap.MADV_DONTNEED, start)


class Frame:
    """A payload being filled, entries in wire format; or, sealed, the bytes that go over the connection.

    limit: bytes of payload. buffer, view: room for them and for what sealing adds. starts: offset of each entry's
    virtio_net_hdr. end: bytes filled. times: for a frame in a send queue, when each entry came, seconds. first: the
    first entry that is still to be sent.
    """

    __slots__ = ("buffer", "end", "first", "limit", "starts", "times", "view")

    def __init__(self, limit):
        self.buffer = memory(frame.OVERHEAD + limit + aead.SLACK)
        self.view = memoryview(self.buffer)
        self.limit = limit
        self.starts = []
        self.times = []
        self.first = 0
        self.end = 0

    def clear(self):
        self.starts.clear()
        self.times.clear()
        self.first = 0
        self.end = 0

    def begin(self, number):
        """Offset of entry `number`, its length included; of the entry behind the last one it is `end`."""
        return self.starts[number] - frame.LENGTH_SIZE if number < len(self.starts) else self.end

    def copy(self, other, first, stop):
        """Appends the entries first … stop - 1 of another Frame; the caller knows that there is room."""
        begin, end = other.begin(first), other.begin(stop)
        at = self.end
        shift = at - begin
        self.view[at : end + shift] = other.view[begin:end]
        self.starts += [start + shift for start in other.starts[first:stop]]
        self.end = end + shift

    def add(self, entry):
        """Appends one entry, bytes; the caller knows that there is room."""
        start = self.end + frame.LENGTH_SIZE
        end = start + len(entry)
        self.view[self.end : start] = len(entry).to_bytes(frame.LENGTH_SIZE, "big")
        self.view[start:end] = entry
        self.starts.append(start)
        self.end = end

    def exchange(self, other):
        """Swaps contents with another Frame of the same limit: a batch becomes a payload without being copied."""
        self.buffer, other.buffer = other.buffer, self.buffer
        self.view, other.view = other.view, self.view
        self.starts, other.starts = other.starts, self.starts
        self.end, other.end = other.end, self.end

    def release_memory(self):
        """Gives the pages back to the kernel; the frame must be empty."""
        release(self.buffer)


class FramePool:
    """Frames of a worker, handed out last in, first out: the one used last is still in the CPU's cache.

    limit: how many there should be, and are kept. Who fills send queues asks `left` first; who receives or seals, for a
    moment, does not.
    """

    def __init__(self, frame_size, limit):
        self.frame_size = frame_size
        self.limit = limit
        self.made = 0
        self._free = []

    def take(self):
        """An empty frame."""
        if self._free:
            return self._free.pop()
        self.made += 1
        return Frame(self.frame_size)

    def give_back(self, used):
        used.clear()
        if self.made > self.limit:
            self.made -= 1
        else:
            self._free.append(used)

    def release_memory(self):
        """Gives the pages of the frames that nobody uses back to the kernel."""
        for frame_ in self._free:
            frame_.release_memory()

    @property
    def in_use(self):
        return self.made - len(self._free)

    @property
    def left(self):
        """Frames that may still be filled; negative when more than `limit` are in use."""
        return self.limit - self.in_use
