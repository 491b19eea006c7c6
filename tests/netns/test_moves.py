"""What a move from one instance to another does to the packets of a flow: numbered datagrams that never pause.

    site B: FLOWS sockets ──┬─ client1 ═══ server1 ─┬─ one socket of site A, which is told by which device each came
                            ├─ client2 ═══ server2 ─┤
                            └─ client3 ═══ server3 ─┘
"""

import socket
import time

import pytest
from flows import Flows, disturbed, late
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
ADDRESSES = SITES[4][1]


def between_sites(sites):
    """Flows from B to A."""
    sender, receiver = (sites.network.client, ADDRESSES[1]), (sites.network.server, ADDRESSES[0])
    return Flows(FLOWS, sender, receiver, 9000, PERIOD, OVERLAP)


def ways(flows):
    """{flow: device by which its last packet came}"""
    return {flow: arrivals[-1].device for flow, arrivals in flows.arrived.items()}


def check(flows, first, last, moved):
    """What holds of every move. moved: the flows that may have. Returns what may be: (lost, overtaken) packets."""
    lost, overtaken = disturbed(flows, first, last, moved)
    arrived = flows.between(first, last)
    for flow, arrivals in ((flow, arrived[flow]) for flow in moved):
        new = arrivals[-1].device
        since = next(one.came for one in arrivals if one.device == new)
        assert all(one.device == new for one in arrivals if one.came > since + OVERLAP), f"flow {flow} goes to and fro"
        for device in {one.device for one in arrivals}:
            by_one = [one for one in arrivals if one.device == device]
            assert not late(by_one), f"flow {flow}: overtaken within one instance"
    return lost, [one for behind in overtaken.values() for one in behind]


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
    with between_sites(sites) as flows:
        first = flows.settle()
        before = ways(flows)
        assert set(before.values()) == {way(sites, number) for number in NUMBERS}, "all carry some"
        assert check(flows, first, flows.settle(), ()) == (0, [])

        # One is killed. The flows of the others notice nothing.
        first = flows.settle()
        hit = {flow for flow, device in before.items() if device == way(sites, 2)}
        sites.running["client", 2].kill()
        sites.wait_members([1, 3], 2)
        last = flows.settle()
        assert set(ways(flows).values()) == {way(sites, 1), way(sites, 3)}
        told("killed", hit, check(flows, first, last, hit))

        # It returns to several: no flow goes back that never pauses, and new ones go there.
        sites.start("client", 2).wait_ready()
        sites.wait_members(NUMBERS, 20)
        first = flows.settle()
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() > begun + UNBALANCED_SECONDS + 2, UNBALANCED_SECONDS + 5, "time passes")
        assert check(flows, first, flows.settle(), ()) == (0, [])
        assert set(ways(flows).values()) == {way(sites, 1), way(sites, 3)}
    with between_sites(sites) as flows:
        flows.settle()
        assert set(ways(flows).values()) == {way(sites, number) for number in NUMBERS}, "new flows go there"

        # Two are stopped, one after the other: they leave first and send what they have.
        for number, left in ((2, [1, 3]), (3, [1])):
            first = flows.settle()
            hit = {flow for flow, device in ways(flows).items() if device == way(sites, number)}
            leaving = sites.running.pop(("client", number))
            leaving.process.terminate()
            sites.wait_members(left, 2)
            told("stopped", hit, check(flows, first, flows.settle(), hit))
            assert leaving.stop() == 0
        assert set(ways(flows).values()) == {way(sites, 1)}

        # One returns to a single one: then the kernel has not noted which flows are busy, and moves some at once.
        first = flows.settle()
        sites.start("client", 2).wait_ready()
        sites.wait_members([1, 2], 20)
        last = flows.settle()
        hit = {flow for flow, device in ways(flows).items() if device == way(sites, 2)}
        assert hit and len(hit) < FLOWS
        lost, overtaken = check(flows, first, last, hit)
        told("returned to a single one", hit, (lost, overtaken))
        assert lost == 0, "both carry what they are given"
