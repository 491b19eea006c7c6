"""Two connections whose ways are unequally long: which packets of a flow may be overtaken by later ones, and which not.

    client ── relay, in the client's namespace ─┬─ SLOW: every byte later, both ways ──┬─ server
                                                └─ QUICK: at once ──────────────────────────┘

Every packet has its number, and the flows never pause.
"""

import collections
import contextlib
import select
import socket
import struct
import threading
import time

from flows import Flows, disturbed
from harness import INNER, inside, wait_until

from bulkvpnd.protocol.packet import flow_hash, rendezvous

QUICK, SLOW = 0, 1
"""Indexes of the two connections."""
DELAYS = {QUICK: 0.0, SLOW: 0.3}
"""Seconds, each way: a difference that a busy machine does not make by itself (choice)."""
FLOWS = 24
PERIOD = 0.01
"""Seconds between two packets of a flow, so that the slow way holds many (choice)."""
SERVER, RELAY = ("192.0.2.1", 7443), ("127.0.0.1", 7443)
FROM, TO, PORT = "10.86.0.2", INNER[4], 9000
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() a reset, socket(7)."""


class Way:
    """Bytes between two sockets, which come `delay` seconds later. sources: the sockets that are still read."""

    def __init__(self, client, server, delay):
        self._ends = (client, server)
        self._delay = delay
        self.sources = {client: server, server: client}
        self._waiting = {client: collections.deque(), server: collections.deque()}  # by target; at last b""

    def take(self, source):
        data = b""
        with contextlib.suppress(OSError):
            data = source.recv(1 << 16)
        self._waiting[self.sources[source]].append((time.monotonic() + self._delay, data))
        if not data:
            del self.sources[source]

    def give(self):
        """Passes on what is due. Returns whether that was all."""
        for target, waiting in self._waiting.items():
            while waiting and waiting[0][0] <= time.monotonic():
                _, data = waiting.popleft()
                if not data:
                    return True
                with contextlib.suppress(OSError):
                    target.sendall(data)
        return False

    def cut(self):
        """The client's end is gone; what is under way from there still arrives, and then the end."""
        client, server = self._ends
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        self.sources.clear()
        self._waiting[client].clear()
        self._waiting[server].append((time.monotonic() + self._delay, b""))

    def close(self):
        for end in self._ends:
            end.close()


class Relay:
    """The two ways, as a context manager. A new connection takes the first that is free.

    accepts: threading.Event; while it is not set, new connections wait.
    """

    def __init__(self, host):
        self._host = host
        self._ways = {}
        self._cut_off = []
        self._to_cut = None
        self.accepts = threading.Event()
        self.accepts.set()
        self._stop = threading.Event()
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._listens.wait(10)
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()

    def cut(self, index):
        """Ends a connection, and lets no other take its way for now."""
        self.accepts.clear()
        self._to_cut = index
        wait_until(lambda: self._to_cut is None, 10, "it is cut")

    def _run(self):
        # The sockets that are made here, too.
        with inside(self._host), socket.create_server(RELAY) as listener:
            self._listens.set()
            while not self._stop.is_set():
                self._turn(listener)
        for way in (*self._ways.values(), *self._cut_off):
            way.close()

    def _turn(self, listener):
        sources = {source: way for way in self._ways.values() for source in way.sources}
        listeners = [listener] if self.accepts.is_set() else []
        for source in select.select([*listeners, *sources], [], [], 0.005)[0]:
            if source is listener:
                free = min(DELAYS.keys() - self._ways.keys())
                self._ways[free] = Way(listener.accept()[0], socket.create_connection(SERVER), DELAYS[free])
            else:
                sources[source].take(source)
        if self._to_cut is not None:
            self._cut_off.append(self._ways.pop(self._to_cut))
            self._cut_off[-1].cut()
            self._to_cut = None
        for way in [way for way in self._cut_off if way.give()]:
            self._cut_off.remove(way)
            way.close()
        for index in [index for index, way in self._ways.items() if way.give()]:
            self._ways.pop(index).close()


def _hash(source, target):
    """The flow's, by the first packet that could be: 28 bytes of IPv4 and UDP."""
    addresses = b"".join(socket.inet_aton(address) for address, _ in (source, target))
    packet = struct.pack(">BBHIBBH8sHHI", 0x45, 0, 28, 0, 64, socket.IPPROTO_UDP, 0, addresses, source[1], target[1], 0)
    return flow_hash(packet, 0, len(packet))


def by(index, flows):
    """The flows that the connection of that index carries, while both live."""
    return {flow for flow, source in enumerate(flows.sources())
            if rendezvous(_hash(source, (TO, PORT)), list(DELAYS)) == index}


def overtaken(flows, first, last, moved):
    """How many packets were, of the flows in `moved`; of the others none is, and none is lost."""
    _, found = disturbed(flows, first, last, moved)
    for flow, behind in found.items():
        assert all(one.came - one.sent >= DELAYS[SLOW] for one in behind), f"flow {flow}: not by the slow way"
    return sum(map(len, found.values()))


def indexes(daemon):
    """Of its connections that live."""
    return {one["index"] for one in daemon.connections() if "age" in one}


def test_what_may_be_overtaken(network):
    """Where a flow moves from a slow way to a quick one, what is under way by the slow one. Nothing else."""
    with Relay(network.client) as relay:
        network.start_server("--workers=1", "--queue-target=1000").wait_ready()
        client = network.start_client(f"--remote={RELAY[0]}", "--workers=1", "--connections=2", "--queue-target=1000",
                                      "--retry-max=1").wait_ready()
        client.wait_connections(len(DELAYS))
        ends = (network.client, FROM), (network.server, TO)
        with Flows(FLOWS, *ends, PORT, PERIOD, overlap=2 * max(DELAYS.values())) as flows:
            carried = {index: by(index, flows) for index in DELAYS}
            assert all(carried.values()), "each carries some"
            first = flows.settle()
            last = flows.settle()
            assert overtaken(flows, first, last, ()) == 0, "unequal ways alone do nothing"

            for index, lost, back in ((SLOW, True, False), (QUICK, False, True)):
                first = last
                relay.cut(index)
                wait_until(lambda: indexes(client) == DELAYS.keys() - {index}, 10, "it is gone")
                last = flows.settle()
                assert bool(overtaken(flows, first, last, carried[index])) is lost
                first = last
                relay.accepts.set()
                wait_until(lambda: indexes(client) == DELAYS.keys(), 20, "it is back")
                last = flows.settle()
                assert bool(overtaken(flows, first, last, carried[index])) is back
