"""Datagrams of a flow, joined to super-packets while a batch is read (GRO's idea).

    datagram --> run of its flow, as long as headers and size agree --.
    anything else but TCP --> behind all runs so far -----------------+--> flush: into the batch, in this order
    TCP, or nothing is held --> the batch itself

Nothing waits: what is held goes into the batch that is being read. Within a flow the order stays.
"""

from bulkvpnd.protocol import packet

JOINED_SIZE = 16 * 1024
"""Bytes of data in a super-packet made here: a slow path carries it in one piece, and others wait for it (choice)."""
PAUSE = 32
"""Batches that are left alone after one in which fewer than half of the datagrams found another to join (choice)."""


class _Run:
    __slots__ = ("head", "key", "most", "parts")

    def __init__(self, head, key, data):
        self.head = head
        self.key = key
        self.parts = [data]
        self.most = min(packet.UDP_JOINED_MAX, JOINED_SIZE // len(data))


class Joiner:
    """What is held of the batch being read. held: bytes that it will add to the batch at most."""

    def __init__(self):
        self.held = 0
        self._runs = {}  # by addresses and ports: the one that may still grow
        self._done = []  # runs and entries, in the order in which they came to an end
        self._datagrams = 0
        self._pause = 0

    def wants(self):
        """Whether to try with the next batch."""
        if self._pause:
            self._pause -= 1
            return False
        return True

    def take(self, buffer, start, end):
        """Holds the entry buffer[start:end] if that is its way. Returns whether it did."""
        headers = packet.joinable(buffer, start, end)
        if not headers:
            if not self.held or packet.is_tcp(buffer, start):
                return False
            self._finish()
            self._done.append(buffer[start:end])
        else:
            middle = start + headers
            head = buffer[start:middle]
            key, flow = packet.joined_key(head)
            run = self._runs.get(flow)
            if run is not None and run.key == key and len(run.parts) < run.most:
                run.parts.append(buffer[middle:end])
            else:
                if run is not None:
                    self._done.append(run)
                    del self._runs[flow]
                self._runs[flow] = _Run(head, key, buffer[middle:end])
            self._datagrams += 1
        self.held += end - start + packet.LENGTH_SIZE
        return True

    def _finish(self):
        self._done += self._runs.values()
        self._runs.clear()

    def flush(self, batch):
        """Puts all that is held into the Frame `batch`, which has room for it."""
        if not self.held:
            return
        self._finish()
        runs = 0
        for one in self._done:
            if isinstance(one, bytes):
                batch.add(one)
                continue
            runs += 1
            batch.add(one.head + b"".join(one.parts))
            if len(one.parts) > 1:
                packet.join(batch.buffer, batch.starts[-1], batch.end, len(one.head), len(one.parts[0]))
        if runs > self._datagrams // 2:
            self._pause = PAUSE
        self._done.clear()
        self._datagrams = self.held = 0
