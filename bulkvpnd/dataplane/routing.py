"""Which connection carries a packet.

    packet --> flow memo --> lane of a connection            (nearly always: one slice, one look-up)
                  | miss
                  v
           destination address --> session --> rendezvous over its live connections in this worker
                                          '--> none here: a sibling worker that has one
                                          '--> none anywhere: dropped and counted

Whatever a packet is routed to is a lane, which names its `sink`: that has append(batch, lanes, first, stop) for the
entries first ... stop - 1 of a Frame.
"""

from bulkvpnd.protocol.packet import VNET_SIZE, flow_hash, rendezvous

MEMO_MAX = 16384
"""Flows remembered; then the memo starts anew (choice: 2 MiB at most)."""

_TRANSPORT = frozenset((6, 17))


class Session:
    """What the worker knows of one session.

    number: the main process's name for it. addresses: its own, bytes of 4 or 16 each. any_address: it carries every
    destination, and its peer may use every source (the client's only session). connections: live ones of this worker
    by index, which is the same at both ends. siblings: indexes of the other workers that have live ones.
    """

    __slots__ = ("addresses", "any_address", "connections", "number", "siblings", "sources")

    def __init__(self, number, addresses, any_address):
        self.number = number
        self.addresses = addresses
        self.any_address = any_address
        self.sources = None if any_address else addresses
        self.connections = {}
        self.siblings = ()


class Drop:
    """A sink that counts, and its own only lane."""

    def __init__(self, drops, cause):
        self.sink = self
        self._drops = drops
        self._cause = cause

    def append(self, batch, lanes, first, stop):
        self._drops[self._cause] += stop - first


class Routes:
    """All sessions of a worker.

    drops: counter by cause. siblings: {worker index: sink}.
    """

    def __init__(self, drops, siblings):
        self._memo = {}
        self._by_address = {}
        self._default = None
        self._siblings = siblings
        self._no_session = Drop(drops, "no_session")
        self._no_connection = Drop(drops, "no_connection")
        self.sessions = {}

    def add(self, session):
        """Makes `session` the owner of its addresses, in place of whichever had them."""
        self.sessions[session.number] = session
        if session.any_address:
            self._default = session
        for address in session.addresses:
            self._by_address[address] = session
        self.changed()

    def remove(self, session):
        self.sessions.pop(session.number, None)
        for address in session.addresses:
            if self._by_address.get(address) is session:
                del self._by_address[address]
        if self._default is session:
            self._default = None
        self.changed()

    def changed(self):
        """Forgets remembered flows; called whenever a session or connection comes or goes."""
        self._memo.clear()

    def split(self, batch, from_sibling=False):
        """Hands every packet of the Frame `batch` to its sink, consecutive ones together.

        from_sibling: the packets were handed over by another worker; they go to a connection or nowhere.
        """
        buffer, memo = batch.buffer, self._memo
        sink, first, lanes = None, 0, []
        end = batch.end
        for number, start in enumerate(batch.starts):
            ip = start + VNET_SIZE
            version = buffer[ip]
            # Addresses and ports stand together in both headers; only where they really are ports are they used.
            if version == 0x45 and buffer[ip + 9] in _TRANSPORT and not (buffer[ip + 6] & 0x3F or buffer[ip + 7]):
                key = buffer[ip + 12 : ip + 24]
            elif version & 0xF0 == 0x60 and buffer[ip + 6] in _TRANSPORT:
                key = buffer[ip + 8 : ip + 44]
            else:
                key = None
            lane = None if from_sibling else memo.get(key)
            if lane is None:
                lane = self._route(buffer, ip, end, from_sibling)
                if key is not None and not from_sibling:
                    if len(memo) >= MEMO_MAX:
                        memo.clear()
                    memo[key] = lane
            lanes.append(lane)
            if lane.sink is not sink:
                if number:
                    sink.append(batch, lanes, first, number)
                sink, first = lane.sink, number
        if lanes:
            sink.append(batch, lanes, first, len(lanes))

    def _route(self, buffer, ip, end, from_sibling):
        version = buffer[ip] >> 4
        destination = buffer[ip + 16 : ip + 20] if version == 4 else buffer[ip + 24 : ip + 40]
        session = self._by_address.get(destination, self._default)
        if session is None:
            return self._no_session
        flow = flow_hash(buffer, ip, end)
        if session.connections:
            return session.connections[rendezvous(flow, session.connections)].lane(flow)
        if session.siblings and not from_sibling:
            return self._siblings[rendezvous(flow, session.siblings)]
        return self._no_connection
