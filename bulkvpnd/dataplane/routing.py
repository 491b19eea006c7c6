"""Which connection carries a packet.

    packet --> flow memo --> lane of a connection            (nearly always: one slice, one look-up)
                  | miss
                  v
           destination address --> session --> rendezvous over its live connections in this worker
           or else its networks           '--> none here: a sibling worker that has one
                                          '--> none anywhere: the last packets wait for one

Whatever a packet is routed to is a lane, which names its `sink`: that has append(batch, lanes, first, stop) for the
entries first ... stop - 1 of a Frame.
"""

import collections
import time

from bulkvpnd.protocol.packet import VNET_SIZE, flow_hash, rendezvous

MEMO_MAX = 16384
"""Flows remembered; then the memo starts anew (choice: 2 MiB at most)."""

VERDICTS_MAX = 1024
"""Pairs of addresses remembered for a session; then it starts anew (choice: 150 KiB for a peer that makes them up)."""

WAITING_MAX = 128
"""Packets of a worker that may wait for a connection (choice: MAX_STAGED_PACKETS of the kernel's WireGuard)."""
WAITING_TIME = 60.0
"""Seconds for which they may (choice: TCP that has had no answer for so long tries again once in 50 s)."""

_TRANSPORT = frozenset((6, 17))


class Prefixes:
    """Values by network; the longest prefix that holds an address counts."""

    def __init__(self, items=()):
        # {bytes of an address: {bits of the host part: {network without them: value}}}, longest prefix first
        self._tables = {4: {}, 16: {}}
        for network, value in items:
            self.add(network, value)

    def __bool__(self):
        return any(self._tables.values())

    @staticmethod
    def _place(network):
        """network: of ipaddress. Returns (bytes of an address, bits of the host part, the rest as a number)."""
        bits = network.max_prefixlen - network.prefixlen
        return network.max_prefixlen // 8, bits, int(network.network_address) >> bits

    def add(self, network, value):
        size, bits, key = self._place(network)
        table = self._tables[size]
        table.setdefault(bits, {})[key] = value
        self._tables[size] = {bits: table[bits] for bits in sorted(table)}

    def discard(self, network, value):
        """Takes the network out, if `value` is what it has."""
        size, bits, key = self._place(network)
        values = self._tables[size].get(bits, {})
        if values.get(key) is value:
            del values[key]
            if not values:
                del self._tables[size][bits]

    def find(self, address):
        """The value of the longest prefix that holds `address`, bytes of 4 or 16; None if there is none."""
        number = int.from_bytes(address, "big")
        for bits, values in self._tables[len(address)].items():
            value = values.get(number >> bits)
            if value is not None:
                return value
        return None


class Isolation:
    """Where packets of clients may not go: to other clients. networks: theirs. exempt: addresses in them that may be
    reached, the server's own, bytes of 4 or 16 each."""

    def __init__(self, networks, exempt):
        self._prefixes = Prefixes((network, network) for network in networks)
        self._exempt = exempt

    def forbids(self, destination):
        return destination not in self._exempt and self._prefixes.find(destination) is not None


class Verdicts(dict):
    """What becomes of a packet by its addresses: {(source, destination): why it is dropped, or None}.

    Each pair is judged once and then remembered, so that the check of every packet is one look-up of a dictionary,
    whatever there is to check. addresses: the peer's own, bytes of 4 or 16 each. networks: those behind it. isolation:
    Isolation, None where clients may reach each other.
    """

    def __init__(self, addresses, networks, isolation):
        self._addresses = addresses
        self._networks = Prefixes((network, network) for network in networks)
        self._isolation = isolation

    def __missing__(self, pair):
        if len(self) >= VERDICTS_MAX:
            self.clear()
        self[pair] = verdict = self._judge(*pair)
        return verdict

    def _judge(self, source, destination):
        if source not in self._addresses and self._networks.find(source) is None:
            # A kernel reports the multicast groups of a device from :: (RFC 3590), which is nobody's fault.
            return "foreign_source" if any(source) else "no_source"
        if self._isolation is not None and self._isolation.forbids(destination):
            return "client_to_client"
        return None


class Session:
    """What the worker knows of one session.

    number: the main process's name for it. addresses: its own, bytes of 4 or 16 each. any_address: it carries every
    destination, and its peer may use every source (the client's only session). networks: those behind the peer.
    isolation: Isolation or None. connections: live ones of this worker by index, which is the same at both ends.
    siblings: indexes of the other workers that have live ones.
    """

    __slots__ = ("addresses", "any_address", "connections", "networks", "number", "siblings", "verdicts")

    def __init__(self, number, addresses, any_address, networks=(), isolation=None):
        self.number = number
        self.addresses = addresses
        self.any_address = any_address
        self.networks = networks
        self.connections = {}
        self.siblings = ()
        self.isolate(isolation)

    def isolate(self, isolation):
        """Another Isolation, or None, holds for what comes from the peer from now on."""
        self.verdicts = None if self.any_address else Verdicts(self.addresses, self.networks, isolation)


class Drop:
    """A sink that counts, and its own only lane."""

    def __init__(self, drops, cause):
        self.sink = self
        self._drops = drops
        self._cause = cause

    def append(self, batch, lanes, first, stop):
        self._drops[self._cause] += stop - first


class Waiting:
    """A sink, and its own only lane: keeps the last packets whose sessions have no connection.

    While nothing gets through, TCP inside the tunnel tries again after pauses that double, RFC 6298 section 5.5: it
    would stand still for as long again as the tunnel has. Its last try waits here instead, for the next connection.
    """

    def __init__(self, drops, clock):
        self.sink = self
        self._drops = drops
        self._clock = clock
        self._entries = collections.deque()  # (when it came, entry), oldest first

    def __len__(self):
        return len(self._entries)

    def append(self, batch, lanes, first, stop):
        now = self._clock()
        for number in range(first, stop):
            self._entries.append((now, bytes(batch.view[batch.starts[number] : batch.begin(number + 1)])))
        while len(self._entries) > WAITING_MAX:
            self._entries.popleft()
            self._drops["no_connection"] += 1

    def take(self):
        """Entries that are to be tried again; none of them waits any more."""
        entries, self._entries = self._entries, collections.deque()
        since = self._clock() - WAITING_TIME
        fresh = [entry for came, entry in entries if came >= since]
        self._drops["no_connection"] += len(entries) - len(fresh)
        return fresh


class Routes:
    """All sessions of a worker.

    drops: counter by cause. siblings: {worker index: sink}. clock(): seconds. waiting: packets without a connection.
    """

    def __init__(self, drops, siblings, clock=time.monotonic):
        self._memo = {}
        self._by_address = {}
        self._by_network = Prefixes()
        self._default = None
        self._siblings = siblings
        self._no_session = Drop(drops, "no_session")
        self.waiting = Waiting(drops, clock)
        self.sessions = {}

    def add(self, session):
        """Makes `session` the owner of its addresses and networks, in place of whichever had them."""
        self.sessions[session.number] = session
        if session.any_address:
            self._default = session
        for address in session.addresses:
            self._by_address[address] = session
        for network in session.networks:
            self._by_network.add(network, session)
        self.changed()

    def remove(self, session):
        self.sessions.pop(session.number, None)
        for address in session.addresses:
            if self._by_address.get(address) is session:
                del self._by_address[address]
        for network in session.networks:
            self._by_network.discard(network, session)
        if self._default is session:
            self._default = None
        self.changed()

    def changed(self):
        """Forgets remembered flows; called whenever a session or connection comes or goes."""
        self._memo.clear()

    def retry(self, batch):
        """Routes what waits once more, now that a session or connection has come or gone. batch: an empty Frame."""
        for entry in self.waiting.take():
            batch.add(entry)
            self.split(batch)
            batch.clear()

    def split(self, batch, from_sibling=False):
        """Hands every packet of the Frame `batch` to its sink, consecutive ones together.

        from_sibling: the packets were handed over by another worker; they go to a connection or nowhere.
        """
        buffer, memo = batch.buffer, self._memo
        sink = first = None
        lanes = []
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
            session = self._by_network.find(destination) if self._by_network else None
            if session is None:
                return self._no_session
        flow = flow_hash(buffer, ip, end)
        if session.connections:
            return session.connections[rendezvous(flow, session.connections)].lane(flow)
        if session.siblings and not from_sibling:
            return self._siblings[rendezvous(flow, session.siblings)]
        return self.waiting
