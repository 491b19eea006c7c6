"""One queue of the TUN device: whole batches in, whole batches out.

Offload lives behind this seam: an entry is what the kernel hands over, a packet or a super-packet with its
virtio_net_hdr, and nothing above asks which. `host.tun` makes the device; here it is only read and written.
"""

import errno
import os
import select
import struct

from bulkvpnd.dataplane.frames import BATCH_PACKETS_MAX
from bulkvpnd.dataplane.joining import Joiner
from bulkvpnd.protocol import frame, packet

_POLLIN = 1  # poll(2)

_LENGTH = struct.Struct(">I")
_ROOM = frame.LENGTH_SIZE + packet.ENTRY_MAX


class TunQueue:
    """A queue that was opened by the main process.

    descriptor: non-blocking, with IFF_VNET_HDR of 10 bytes. drops: counter by cause. joins: whether datagrams of
    a flow become super-packets; everybody whom they may go to must take those.
    """

    def __init__(self, descriptor, drops):
        self._descriptor = descriptor
        self._drops = drops
        self._poll = select.poll()
        self._poll.register(descriptor, _POLLIN)
        self._joiner = Joiner()
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
        joiner = self._joiner if self.joins and self._joiner.wants() else None
        for _ in range(BATCH_PACKETS_MAX):
            if end > last:
                break
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
            if joiner and joiner.take(buffer, start, start + size):
                last = batch.limit - _ROOM - joiner.held
                continue
            pack_into(buffer, end, size)
            starts.append(start)
            end = start + size
        batch.end = end
        if joiner:
            joiner.flush(batch)
        return len(starts) - before

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
