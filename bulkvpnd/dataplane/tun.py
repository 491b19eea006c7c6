"""One queue of the TUN device: whole batches in, whole batches out.

Offload lives behind this seam: an entry is what the kernel hands over, a packet or a super-packet with its
virtio_net_hdr, and nothing above asks which. `host.tun` makes the device; here it is only read and written.
"""

import errno
import os
import struct

from gevent import monkey

from bulkvpnd.dataplane.frames import BATCH_PACKETS_MAX
from bulkvpnd.protocol import frame, packet

# The reader runs in a native thread, where gevent's cooperative poll would start a second hub.
_poll = monkey.get_original("select", "poll")
_POLLIN = 1  # poll(2)

JOINED_SIZE = 16 * 1024
"""Bytes of a super-packet made of datagrams; a slow path carries it in one piece, and others wait for it (choice)."""
_DATAGRAM_MAX = 2048
"""Bytes of an entry that may be a datagram; what is larger is not looked at (choice)."""

_LENGTH = struct.Struct(">I")
_ROOM = frame.LENGTH_SIZE + packet.ENTRY_MAX


class TunQueue:
    """A queue that was opened by the main process.

    descriptor: non-blocking, with IFF_VNET_HDR of 10 bytes. drops: counter by cause. joins: whether datagrams that
    follow each other in a flow become one super-packet; everybody whom they may go to must take those.
    """

    def __init__(self, descriptor, drops):
        self._descriptor = descriptor
        self._drops = drops
        self._poll = _poll()
        self._poll.register(descriptor, _POLLIN)
        self._headers = bytearray(packet.VNET_SIZE + 48)
        self.joins = False

    def fileno(self):
        return self._descriptor

    def wait(self, batch, seconds):
        """Waits up to `seconds` for packets and reads the first batch. For a native thread: blocks without the hub."""
        self._poll.poll(seconds * 1000)
        return self.read_batch(batch)

    def read_batch(self, batch):
        """Appends the packets that are there now to the Frame `batch`, up to its size. Returns their number."""
        descriptor, buffer, view, starts = self._descriptor, batch.buffer, batch.view, batch.starts
        end, last = batch.end, batch.limit - _ROOM
        before = len(starts)
        readv, pack_into = os.readv, _LENGTH.pack_into
        limit = before + BATCH_PACKETS_MAX
        while end <= last and len(starts) < limit:
            start = end + 4
            try:
                size = readv(descriptor, [view[start:]])
            except OSError as error:
                # EIO, EBADFD: the device is down or gone; the main process watches it and decides.
                if error.errno in (errno.EAGAIN, errno.EIO, errno.EBADFD):
                    break
                raise
            if size < packet.ENTRY_MIN:
                # What a program sends through a packet socket need not be IP, and the peer would end the connection
                # for it. No reading on: of an inbox whose other ends are closed there is no end of this.
                self._drops["not_ip"] += 1
                break
            pack_into(buffer, end, size)
            starts.append(start)
            end = start + size
            if self.joins and size < _DATAGRAM_MAX and len(starts) > before + 1:
                end = self._join(batch, start, end, last)
        batch.end = end
        return len(starts) - before

    def _join(self, batch, start, end, last):
        """Joins the datagram at `start`, and what follows of its flow, to the one before; returns the batch's end.

        Once two of a flow are there, the next ones' headers are read to elsewhere, so that the data lies where it has
        to (GRO's idea; benchmarks, udp200_pps).
        """
        buffer, view, starts = batch.buffer, batch.view, batch.starts
        first, size = starts[-2], end - start
        headers = packet.joinable(buffer, start, end)
        if not headers or end - start != start - frame.LENGTH_SIZE - first:
            return end
        key = packet.joined_key(buffer[start : start + headers])
        if packet.joined_key(buffer[first : first + headers]) != key:
            return end
        starts.pop()
        data = size - headers
        begin = first + size
        end = begin + data
        view[begin:end] = view[start + headers : start + size]
        most = begin - data + min(packet.UDP_JOINED_MAX * data, JOINED_SIZE)
        scratch = self._headers
        into = memoryview(scratch)[:headers]
        stray = 0
        while end + data <= most and end <= last:
            try:
                stray = os.readv(self._descriptor, [into, view[end:]])
            except OSError:
                # The next plain read says what it is.
                break
            if stray != size or packet.joined_key(scratch[:headers]) != key:
                break
            end += data
            stray = 0
        packet.join(buffer, first, end, headers, data)
        if stray < packet.ENTRY_MIN:
            self._drops["not_ip"] += stray > 0
            return end
        # It is something else: behind its length and headers, like any entry.
        start = end + frame.LENGTH_SIZE
        view[start + headers : start + stray] = view[end : end + max(stray - headers, 0)]
        view[start : start + min(headers, stray)] = into[:stray]
        _LENGTH.pack_into(buffer, end, stray)
        starts.append(start)
        return start + stray

    @staticmethod
    def is_full(batch):
        """Whether there may be more packets than `batch` could take."""
        return batch.end > batch.limit - _ROOM or len(batch.starts) >= BATCH_PACKETS_MAX

    def write_batch(self, payload, spans):
        """Writes the entries payload[start:end] of `spans`. Returns how many the kernel refused."""
        descriptor, write = self._descriptor, os.write
        refused = 0
        for start, end in spans:
            try:
                write(descriptor, payload[start:end])
            except OSError:
                # EINVAL: a virtio_net_hdr that this kernel dislikes; EIO: the device is down; ENOMEM, ENOBUFS.
                refused += 1
        return refused
