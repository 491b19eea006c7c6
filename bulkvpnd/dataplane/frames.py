"""Buffers of frame size, made once and used again."""

import mmap

from bulkvpnd.protocol import aead, frame

BATCH_PACKETS_MAX = 1024
"""Packets in one batch; with small packets a batch ends here, so that the loop gets its turn (choice)."""


class Frame:
    """A payload being filled, entries in wire format; or, sealed, the bytes that go over the connection.

    limit: bytes of payload. buffer, view: room for them and for what sealing adds. starts: offset of each entry's
    virtio_net_hdr. end: bytes filled.
    """

    __slots__ = ("buffer", "end", "limit", "starts", "view")

    def __init__(self, limit):
        # Memory of its own mapping: page-aligned, zero pages until touched, so an idle connection costs nothing.
        self.buffer = mmap.mmap(-1, frame.OVERHEAD + limit + aead.SLACK)
        self.view = memoryview(self.buffer)
        self.limit = limit
        self.starts = []
        self.end = 0

    def clear(self):
        self.starts.clear()
        self.end = 0

    def exchange(self, other):
        """Swaps contents with another Frame of the same limit: a batch becomes a payload without being copied."""
        self.buffer, other.buffer = other.buffer, self.buffer
        self.view, other.view = other.view, self.view
        self.starts, other.starts = other.starts, self.starts
        self.end, other.end = other.end, self.end


class FramePool:
    """At most `limit` frames, handed out last in, first out: the one used last is still in the CPU's cache."""

    def __init__(self, frame_size, limit):
        self.frame_size = frame_size
        self.limit = limit
        self.made = 0
        self._free = []

    def take(self, reserve=False):
        """An empty frame, or None when `limit` frames are in use; reserve: then one more all the same."""
        if self._free:
            return self._free.pop()
        if self.made >= self.limit and not reserve:
            return None
        self.made += 1
        return Frame(self.frame_size)

    def give_back(self, used):
        used.clear()
        if self.made > self.limit:
            self.made -= 1
        else:
            self._free.append(used)

    @property
    def in_use(self):
        return self.made - len(self._free)
