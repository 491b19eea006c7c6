"""What a move from one instance to another does to the packets of a flow: numbered datagrams that never pause.

    site B: FLOWS sockets ──┬─ client1 ═══ server1 ─┬─ one socket of site A, which is told by which device each came
                            ├─ client2 ═══ server2 ─┤
                            └─ client3 ═══ server3 ─┘
"""

import collections
import contextlib
import select
import socket
import struct
import threading
import time

import pytest
from harness import inside, two_hosts, wait_until
from test_sites import SITES, Sites

from bulkvpnd.host.nexthop import UNBALANCED_SECONDS

NUMBERS = (1, 2, 3)
FLOWS = 48
"""None on one of three instances by chance: 1 in 300 million. Few enough that a fair share of the 256 is silent."""
PERIOD = 0.02
"""Seconds between two packets of a flow: far less than the second after which the kernel calls a flow idle."""
OVERLAP = 0.5
"""Seconds after a flow's first packet by the new way within which what was under way by the old one has come (choice:
a busy machine; it is some milliseconds otherwise)."""
RECEIVE_BUFFER = 1 << 20
"""Bytes: a second of all flows, should this process not get its turn."""
ADDRESSES = SITES[4][1]
PORT = 9000
IP_PKTINFO = 8
"""linux/in.h"""
PACKET = struct.Struct("=IId")  # flow, number, when it was sent
Arrival = collections.namedtuple("Arrival", "number device sent came")


class Flows:
    """Datagrams from B to A, as a context manager: {flow: [Arrival]} in the order in which they came."""

    def __init__(self, sites):
        self._sites = sites
        self._devices = {}  # index: name
        self.arrived = {flow: [] for flow in range(FLOWS)}
        self.sent = 0  # of each flow
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._receive, self._send)]

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            with inside(self._sites.network.server):
                self._receiver = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self._receiver.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            self._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._receiver.bind((ADDRESSES[0], PORT))
            self._receiver.settimeout(0.2)
            self._senders = []
            with inside(self._sites.network.client):
                for _ in range(FLOWS):
                    sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                    # Not connected, so that the kernel looks for the way of each packet, as of those that it forwards.
                    sender.bind((ADDRESSES[1], 0))
                    sender.setblocking(False)
                    self._senders.append(sender)
            self._close = stack.pop_all().close
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._close()

    def _send(self):
        due = time.monotonic()
        while not self._stop.is_set():
            for flow, sender in enumerate(self._senders):
                # No route for a moment, or no room: a packet that is lost, as any other.
                with contextlib.suppress(OSError):
                    sender.sendto(PACKET.pack(flow, self.sent, time.monotonic()), (ADDRESSES[0], PORT))
            self.sent += 1
            due += PERIOD
            select.select([], [], [], max(0.0, due - time.monotonic()))

    def _receive(self):
        while not self._stop.is_set():
            try:
                data, ancillary, _, _ = self._receiver.recvmsg(64, 64)
            except TimeoutError:
                continue
            flow, number, sent = PACKET.unpack(data)
            device = struct.unpack_from("=i", ancillary[0][2])[0]
            self.arrived[flow].append(Arrival(number, device, sent, time.monotonic()))

    def settle(self):
        """Waits until what is sent from now on comes, of every flow. Returns the number of the next packet of each."""
        number = self.sent + 20
        wait_until(lambda: all(list_ and list_[-1].number >= number for list_ in self.arrived.values()), 20,
                   "all flows arrive")
        return number

    def ways(self):
        """{flow: device by which its last packet came}"""
        return {flow: arrivals[-1].device for flow, arrivals in self.arrived.items()}

    def between(self, first, last):
        """{flow: the arrivals whose numbers are from `first` on and below `last`}"""
        return {flow: [one for one in list(arrivals) if first <= one.number < last]
                for flow, arrivals in self.arrived.items()}


def late(arrivals):
    """Those that were overtaken by a packet that was sent after them."""
    found, highest = [], -1
    for one in arrivals:
        if one.number < highest:
            found.append(one)
        highest = max(highest, one.number)
    return found


def check(flows, first, last, moved):
    """What holds of every move. moved: the flows that may have. Returns what may be: (lost, overtaken) packets."""
    lost, overtaken = 0, []
    for flow, arrivals in flows.between(first, last).items():
        numbers = [one.number for one in arrivals]
        assert len(set(numbers)) == len(numbers), f"flow {flow}: a packet came twice"
        if flow not in moved:
            assert numbers == list(range(first, last)), f"flow {flow} stays, and something is lost or overtaken"
            continue
        lost += last - first - len(numbers)
        overtaken += late(arrivals)
        new = arrivals[-1].device
        since = next(one.came for one in arrivals if one.device == new)
        assert all(one.device == new for one in arrivals if one.came > since + OVERLAP), f"flow {flow} goes to and fro"
        for device in {one.device for one in arrivals}:
            by_one = [one for one in arrivals if one.device == device]
            assert not late(by_one), f"flow {flow}: overtaken within one instance"
    return lost, overtaken


def way(sites, number):
    """The index of the device by which packets come through instance `number`."""
    with inside(sites.network.server):
        return socket.if_nametoindex(f"server{number}")


def told(what, moved, found):
    """For whoever runs pytest -s: how much it was."""
    lost, overtaken = found
    oldest = max((one.came - one.sent for one in overtaken), default=0)
    print(f"{what}: {len(moved)} of {FLOWS} flows moved, {lost} packets lost, {len(overtaken)} overtaken"
          + (f", the last after {1000 * oldest:.1f} ms" if overtaken else ""))


@pytest.fixture
def sites(tmp_path):
    with two_hosts(tmp_path) as network:
        made = Sites(network)
        for role in made.hosts:
            for number in NUMBERS:
                made.start(role, number).wait_ready(60)
        made.wait_members(NUMBERS, 20)
        yield made
        made.stop_all()


@pytest.mark.long
def test_moves(sites):
    with Flows(sites) as flows:
        first = flows.settle()
        before = flows.ways()
        assert set(before.values()) == {way(sites, number) for number in NUMBERS}, "all carry some"
        assert check(flows, first, flows.settle(), ()) == (0, [])

        # One is killed. The flows of the others notice nothing.
        first = flows.settle()
        hit = {flow for flow, device in before.items() if device == way(sites, 2)}
        sites.running["client", 2].kill()
        sites.wait_members([1, 3], 2)
        last = flows.settle()
        assert set(flows.ways().values()) == {way(sites, 1), way(sites, 3)}
        told("killed", hit, check(flows, first, last, hit))

        # It returns to several: no flow goes back that never pauses, and new ones go there.
        sites.start("client", 2).wait_ready()
        sites.wait_members(NUMBERS, 20)
        first = flows.settle()
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() > begun + UNBALANCED_SECONDS + 2, UNBALANCED_SECONDS + 5, "time passes")
        assert check(flows, first, flows.settle(), ()) == (0, [])
        assert set(flows.ways().values()) == {way(sites, 1), way(sites, 3)}
    with Flows(sites) as flows:
        flows.settle()
        assert set(flows.ways().values()) == {way(sites, number) for number in NUMBERS}, "new flows go there"

        # Two are stopped, one after the other: they leave first and send what they have.
        for number, left in ((2, [1, 3]), (3, [1])):
            first = flows.settle()
            hit = {flow for flow, device in flows.ways().items() if device == way(sites, number)}
            leaving = sites.running.pop(("client", number))
            leaving.process.terminate()
            sites.wait_members(left, 2)
            told("stopped", hit, check(flows, first, flows.settle(), hit))
            assert leaving.stop() == 0
        assert set(flows.ways().values()) == {way(sites, 1)}

        # One returns to a single one: then the kernel has not noted which flows are busy, and moves some at once.
        first = flows.settle()
        sites.start("client", 2).wait_ready()
        sites.wait_members([1, 2], 20)
        last = flows.settle()
        hit = {flow for flow, device in flows.ways().items() if device == way(sites, 2)}
        assert hit and len(hit) < FLOWS
        lost, overtaken = check(flows, first, last, hit)
        told("returned to a single one", hit, (lost, overtaken))
        assert lost == 0, "both carry what they are given"
