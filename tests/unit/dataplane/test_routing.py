"""dataplane.routing: which connection carries a packet, and what moves when one is lost."""

import collections
import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inmemory import HERE, PLAIN, THERE, batch_of, entries_of, entry, udp

from bulkvpnd.dataplane import routing
from bulkvpnd.dataplane.routing import Routes, Session

HERE6, THERE6 = bytes.fromhex("fd86000000000000000000000000000a"), bytes.fromhex("fd86000000000000000000000000000b")
SERVER6 = bytes.fromhex("fd860000000000000000000000000001")
ELSEWHERE = bytes([10, 86, 0, 99])
LANES = 4


class Sink:
    """A connection or a sibling: keeps the runs that it was given."""

    def __init__(self):
        self.sink = self
        self.lanes = [Lane(self, number) for number in range(LANES)]
        self.runs = []

    def lane(self, flow):
        return self.lanes[flow % LANES]

    def append(self, batch, lanes, first, stop):
        assert all(lane.sink is self for lane in lanes[first:stop])
        self.runs.append(entries_of(batch.view[batch.begin(first) : batch.begin(stop)]))
        self.given_lanes = lanes[first:stop]

    @property
    def entries(self):
        return [one for run in self.runs for one in run]


class Lane:
    def __init__(self, sink, number):
        self.sink, self.number = sink, number


class Table:
    """Routes with what they lead to."""

    def __init__(self, siblings=()):
        self.drops = collections.Counter()
        self.siblings = {index: Sink() for index in siblings}
        self.now = 0.0
        self.routes = Routes(self.drops, self.siblings, lambda: self.now)

    def session(self, number=1, addresses=(THERE,), connections=4, siblings=(), any_address=False,
                networks=()):
        networks = tuple(ipaddress.ip_network(network) for network in networks)
        session = Session(number, frozenset(addresses), any_address, networks)
        session.connections.update((index, Sink()) for index in range(connections))
        session.siblings = tuple(siblings)
        self.routes.add(session)
        return session

    def split(self, *entries, from_sibling=False):
        self.routes.split(batch_of(entries), from_sibling)

    def retry(self):
        self.routes.retry(batch_of([]))

    def where(self, session, one, from_sibling=False):
        """Index of the connection that carries an entry; None if none does."""
        for sink in session.connections.values():
            sink.runs.clear()
        self.split(one, from_sibling=from_sibling)
        found = [index for index, sink in session.connections.items() if sink.entries]
        assert len(found) <= 1
        return found[0] if found else None


def lose(table, session, index):
    lost = session.connections.pop(index)
    table.routes.changed()
    return lost


FLOWS = [entry(flow, 1) for flow in range(200)]


# Nowhere


def test_nothing_is_carried_before_there_is_a_session():
    table = Table()
    table.split(*FLOWS)
    assert table.drops == {"no_session": len(FLOWS)}


def test_nothing_is_carried_to_another_address():
    table = Table()
    session = table.session(addresses=(THERE, THERE6))
    table.split(entry(1, 1, destination=ELSEWHERE), PLAIN + udp(1, 1, 100, version=6)[:24] + HERE6 + bytes(40))
    assert table.drops == {"no_session": 2}
    assert not any(sink.runs for sink in session.connections.values())


@pytest.mark.parametrize("siblings, from_sibling", [((), False), ((), True), ((2,), True)])
def test_nothing_is_carried_without_a_connection(siblings, from_sibling):
    table = Table(siblings=(2,))
    table.session(connections=0, siblings=siblings)
    table.split(*FLOWS[:100], from_sibling=from_sibling)
    assert len(table.routes.waiting) == 100 and not table.drops and not table.siblings[2].runs


def test_the_last_packets_wait_for_a_connection():
    table = Table(siblings=(2,))
    session = table.session(connections=0)
    table.split(*FLOWS)
    assert table.drops == {"no_connection": len(FLOWS) - routing.WAITING_MAX}
    table.retry()
    assert len(table.routes.waiting) == routing.WAITING_MAX, "as long as there is none"
    session.connections[0] = Sink()
    table.routes.changed()
    table.retry()
    assert session.connections[0].entries == FLOWS[-routing.WAITING_MAX:], "in their order, and once"
    table.retry()
    assert len(session.connections[0].runs) == routing.WAITING_MAX and not table.routes.waiting
    # A sibling's does as well.
    lose(table, session, 0)
    table.split(FLOWS[0])
    session.siblings = (2,)
    table.routes.changed()
    table.retry()
    assert table.siblings[2].entries == [FLOWS[0]]


def test_packets_wait_for_a_limited_time_and_for_nobody_else():
    table = Table()
    session = table.session(connections=0)
    table.split(FLOWS[0])
    table.now = 1.0
    table.split(FLOWS[1])
    table.now = 1.0 + routing.WAITING_TIME
    session.connections[0] = Sink()
    table.routes.changed()
    table.retry()
    assert session.connections[0].entries == [FLOWS[1]] and table.drops == {"no_connection": 1}
    lose(table, session, 0)
    table.split(FLOWS[2])
    table.routes.remove(session)
    table.retry()
    other = table.session(number=2)
    table.retry()
    assert table.drops == {"no_connection": 1, "no_session": 1}
    assert not any(sink.runs for sink in other.connections.values())


def test_a_session_that_is_removed_carries_nothing_more():
    table = Table()
    session = table.session()
    default = table.session(number=2, addresses=(HERE,), any_address=True)
    table.split(FLOWS[0])
    table.routes.remove(session)
    table.routes.remove(default)
    table.routes.remove(default)
    table.split(*FLOWS)
    assert table.drops == {"no_session": len(FLOWS)}
    assert table.routes.sessions == {}


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=10), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_bytes_go_somewhere(contents, from_sibling):
    table = Table()
    session = table.session(any_address=True)
    entries = [(PLAIN + content).ljust(50, b"\0") for content in contents]
    table.split(*entries, from_sibling=from_sibling)
    carried = [one for sink in session.connections.values() for one in sink.entries]
    assert sorted(carried) == sorted(entries) and not table.drops


# Flows and connections


@pytest.mark.parametrize("connections", [1, 2, 4, 16])
def test_a_flow_keeps_its_connection_and_flows_spread(connections):
    table = Table()
    session = table.session(connections=connections)
    first = [table.where(session, one) for one in FLOWS]
    assert first == [table.where(session, one) for one in FLOWS]
    assert set(first) == set(range(connections))


@pytest.mark.parametrize("version, here, there", [(4, HERE, THERE), (6, b"\1" * 4, b"\2" * 4)])
def test_both_ends_choose_the_same_index(version, here, there):
    def whole(address):
        return address if version == 4 else bytes(12) + address

    server, client = Table(), Table()
    at_server = server.session(addresses=(whole(there),))
    at_client = client.session(addresses=(whole(there),), any_address=True)
    chosen = set()
    for flow in range(50):
        to_client = udp(flow, 1, 100, source=here, destination=there, version=version)
        ports = 20 if version == 4 else 40
        to_server = udp(flow, 1, 100, source=there, destination=here, version=version)
        to_server = to_server[:ports] + to_server[ports + 2 : ports + 4] + to_server[ports : ports + 2] + to_server[44:]
        index = server.where(at_server, PLAIN + to_client)
        assert client.where(at_client, PLAIN + to_server.ljust(100)) == index is not None
        chosen.add(index)
    assert len(chosen) == 4


def test_only_the_flows_of_a_lost_connection_move_and_they_return():
    table = Table()
    session = table.session()
    before = [table.where(session, one) for one in FLOWS]
    lost = lose(table, session, 2)
    without = [table.where(session, one) for one in FLOWS]
    assert all(now == then or then == 2 for now, then in zip(without, before))
    assert {now for now, then in zip(without, before) if then == 2} == {0, 1, 3}
    assert not lost.runs
    session.connections[2] = Sink()
    table.routes.add(session)
    assert [table.where(session, one) for one in FLOWS] == before


def test_a_connection_that_takes_the_place_of_another_gets_its_flows_at_once():
    table = Table()
    session = table.session()
    before = [table.where(session, one) for one in FLOWS]
    old = session.connections[1]
    old.runs.clear()
    session.connections[1] = Sink()
    table.routes.changed()
    assert [table.where(session, one) for one in FLOWS] == before
    assert not old.runs


def test_a_flow_has_one_lane():
    table = Table()
    session = table.session(connections=1)
    (sink,) = session.connections.values()
    lanes = []
    for one in FLOWS:
        for _ in range(2):
            table.split(one)
            lanes.append(sink.given_lanes[0].number)
    assert lanes[::2] == lanes[1::2] and set(lanes) == set(range(LANES))


def fragments():
    """Of two datagrams of one flow; only the first of each has the ports."""
    for number in range(2):
        packet = udp(7, number, 100)
        for flags in (b"\x20\x00", b"\x20\x05", b"\x00\x0a"):
            # What stands where ports would be looks like those of a flow.
            yield PLAIN + packet[:6] + flags + packet[8:]


def test_fragments_of_all_datagrams_between_two_addresses_stay_together():
    for own in range(20):
        table = Table()
        destination = bytes([10, 86, 1, own])
        session = table.session(addresses=(destination,))
        # A flow that is remembered has no say in it.
        table.split(entry(7, 0, destination=destination))
        parts = [one[:26] + destination + one[30:] for one in fragments()]
        assert len({table.where(session, one) for one in parts}) == 1


def test_options_and_extension_headers_do_not_confuse_flows():
    """Where no ports stand in the usual place, others are not taken for them."""
    table = Table()
    session = table.session()
    indexes = set()
    for flow in range(20):
        packet = udp(flow, 1, 100)
        longer = b"\x46" + packet[1:20] + b"\1\1\1\1" + packet[20:]
        indexes.add(table.where(session, PLAIN + longer))
        assert table.where(session, PLAIN + longer) == table.where(session, PLAIN + packet)
    assert len(indexes) > 1


# Runs


def test_a_run_is_handed_over_together():
    table = Table()
    one, other = table.session(1, (HERE,), connections=1), table.session(2, (THERE,), connections=1)
    to_one, to_other = ([entry(1, number, destination=where) for number in range(9)] for where in (HERE, THERE))
    nowhere = entry(1, 1, destination=ELSEWHERE)
    table.split(*to_one[:3], *to_other[:2], nowhere, nowhere, *to_one[3:4], *to_other[2:])
    assert one.connections[0].runs == [to_one[:3], to_one[3:4]]
    assert other.connections[0].runs == [to_other[:2], to_other[2:]]
    assert table.drops == {"no_session": 2}


def test_flows_of_one_connection_are_one_run():
    table = Table()
    session = table.session(connections=1)
    table.split(*FLOWS)
    assert session.connections[0].runs == [FLOWS]


def test_an_empty_batch_is_nobodys():
    table = Table()
    table.session()
    table.split()
    assert not table.drops


class Failing(Sink):
    """A connection that ends while it is given a run, as the first that notices does."""

    def __init__(self, table, session):
        super().__init__()
        self.table, self.session = table, session

    def append(self, *run):
        super().append(*run)
        lose(self.table, self.session, 0)


def test_what_comes_behind_the_end_of_a_connection_in_one_batch_takes_another():
    table = Table()
    session = table.session(1, (HERE,), connections=2)
    other = table.session(2, (THERE,), connections=1)
    flow = next(n for n in range(50) if table.where(session, entry(n, 0, destination=HERE)) == 0)
    session.connections[0] = first = Failing(table, session)
    table.routes.changed()
    table.split(entry(flow, 1, destination=HERE), entry(flow, 2, destination=THERE), entry(flow, 3, destination=HERE))
    assert first.entries == [entry(flow, 1, destination=HERE)]
    assert session.connections[1].entries == [entry(flow, 3, destination=HERE)]
    assert other.connections[0].entries == [entry(flow, 2, destination=THERE)]


# Siblings


def test_without_a_connection_here_a_sibling_carries_it():
    table = Table(siblings=(0, 2, 3))
    session = table.session(connections=0, siblings=(0, 2))
    for one in FLOWS * 2:
        table.split(one)
    assert sorted(table.siblings[0].entries + table.siblings[2].entries) == sorted(FLOWS * 2)
    assert table.siblings[0].runs and table.siblings[2].runs and not table.siblings[3].runs
    # As soon as there is one here it is taken.
    session.connections[0] = Sink()
    table.routes.changed()
    assert table.where(session, FLOWS[0]) == 0


def test_what_a_sibling_handed_over_goes_to_a_connection():
    table = Table(siblings=(2,))
    session = table.session(siblings=(2,))
    direct = [table.where(session, one) for one in FLOWS]
    assert [table.where(session, one, from_sibling=True) for one in FLOWS] == direct
    assert not table.siblings[2].runs


def test_what_a_sibling_handed_over_in_vain_does_not_stop_the_flow_here():
    table = Table(siblings=(2,))
    table.session(connections=0, siblings=(2,))
    table.split(FLOWS[0], from_sibling=True)
    assert len(table.routes.waiting) == 1
    table.split(FLOWS[0])
    assert table.siblings[2].entries == [FLOWS[0]] and len(table.routes.waiting) == 1
    # Nor is it handed back because the flow was remembered.
    table.split(FLOWS[0], from_sibling=True)
    assert table.siblings[2].entries == [FLOWS[0]] and len(table.routes.waiting) == 2


# Sessions


def test_the_only_session_of_a_client_carries_every_destination():
    table = Table()
    session = table.session(addresses=(HERE,), any_address=True, connections=1)
    assert session.verdicts is None
    entries = [entry(1, 1, destination=where) for where in (HERE, THERE, ELSEWHERE)]
    entries.append(PLAIN + udp(1, 1, 100, version=6))
    table.split(*entries)
    assert session.connections[0].entries == entries


def test_a_sessions_peer_may_use_its_own_addresses_only():
    verdicts = Session(1, frozenset((HERE, HERE6)), False).verdicts
    for source, other, destination in ((HERE, THERE, ELSEWHERE), (HERE6, THERE6, THERE6)):
        assert verdicts[source, destination] is None
        assert verdicts[other, destination] == "foreign_source"
        assert verdicts[destination, source] == "foreign_source"
        assert verdicts[bytes(len(source)), destination] == "no_source"
    # What was remembered says the same.
    assert (verdicts[HERE, ELSEWHERE], verdicts[THERE, ELSEWHERE]) == (None, "foreign_source")


def test_verdicts_are_bounded():
    verdicts = Session(1, frozenset((HERE,)), False).verdicts
    for number in range(1, 3 * routing.VERDICTS_MAX):
        assert verdicts[HERE, number.to_bytes(4, "big")] is None
        assert verdicts[number.to_bytes(4, "big"), HERE] == "foreign_source"
        assert len(verdicts) <= routing.VERDICTS_MAX


def test_networks_belong_to_the_last_session_that_has_them():
    table = Table()
    inside = entry(1, 1, destination=bytes([192, 168, 7, 9]))
    old = table.session(1, (THERE,), connections=1, networks=["192.168.7.0/24"])
    assert table.where(old, inside) == 0
    new = table.session(2, (HERE,), connections=1, networks=["192.168.7.0/24", "fd07::/64"])
    assert table.where(old, inside) is None and table.where(new, inside) == 0
    table.routes.remove(old)
    assert table.where(new, inside) == 0
    table.routes.remove(new)
    assert table.where(new, inside) is None
    assert not table.routes._by_network


def test_an_address_of_its_own_goes_before_a_network():
    table = Table()
    wide = table.session(1, (ELSEWHERE,), connections=1, networks=["10.86.0.0/24"])
    own = table.session(2, (THERE,), connections=1)
    assert table.where(own, FLOWS[0]) == 0 and table.where(wide, FLOWS[0]) is None
    assert table.where(wide, entry(1, 1, destination=bytes([10, 86, 0, 77]))) == 0


# Networks by prefix


def networks(version):
    size = {4: 32, 6: 128}[version]
    # Few different bits, so that there is much in common.
    address = st.integers(0, 15).map(lambda bits: bits << (size - 4)) | st.integers(0, 15)
    build = {4: ipaddress.IPv4Network, 6: ipaddress.IPv6Network}[version]
    return st.builds(lambda number, length: build((number, length), strict=False), address, st.integers(0, size))


NETWORKS = st.lists(networks(4) | networks(6), max_size=12)


@given(NETWORKS, NETWORKS, st.integers(0, 255), st.sampled_from([4, 16]))
@settings(deadline=None)
def test_the_longest_prefix_counts(kept, dropped, number, size):
    held = routing.Prefixes((network, str(network)) for network in kept)
    added = [(network, str(network)) for network in dropped if network not in kept]
    for network, value in added:
        held.add(network, value)
    for network, value in added:
        held.discard(network, "another")
        assert held.find(network.network_address.packed) is not None
        held.discard(network, value)
        held.discard(network, value)
    assert bool(held) == bool(kept)
    for raw in (number, number << (8 * size - 8)):
        address = ipaddress.ip_address(raw.to_bytes(size, "big"))
        holding = [network for network in kept if network.version == address.version and address in network]
        longest = max(holding, key=lambda network: network.prefixlen, default=None)
        assert held.find(address.packed) == (longest and str(longest))


ISOLATED = ["10.86.0.0/24", "192.168.7.0/24", "fd86::/64"]


@given(networks(4) | networks(6) | st.sampled_from([ipaddress.ip_network(one) for one in ISOLATED]),
       st.integers(0, 300))
@settings(deadline=None)
def test_no_client_gets_to_another(network, offset):
    isolation = routing.Isolation([ipaddress.ip_network(one) for one in ISOLATED], frozenset((HERE, SERVER6)))
    verdicts = Session(1, frozenset((THERE, THERE6)), False, (), isolation).verdicts
    address = network[offset % network.num_addresses]
    source = {4: THERE, 6: THERE6}[address.version]
    is_other = any(address.version == one.version and address in one for one in map(ipaddress.ip_network, ISOLATED))
    is_other = is_other and address.packed not in (HERE, SERVER6)
    assert verdicts[source, address.packed] == ("client_to_client" if is_other else None)
    assert verdicts[THERE, HERE] is None and verdicts[THERE6, SERVER6] is None


def test_an_address_has_one_owner_and_the_last_one_it_is():
    table = Table()
    old = table.session(1, (THERE,), connections=1)
    assert table.where(old, FLOWS[0]) == 0
    new = table.session(2, (THERE,), connections=1)
    assert table.where(old, FLOWS[0]) is None
    assert table.where(new, FLOWS[0]) == 0
    # The old one's end takes nothing from the new one.
    table.routes.remove(old)
    assert table.where(new, FLOWS[0]) == 0
    assert set(table.routes.sessions) == {2}


def test_a_clients_next_session_is_not_ended_by_the_last_ones_end():
    table = Table()
    old = table.session(1, (HERE,), any_address=True, connections=1)
    new = table.session(2, (HERE,), any_address=True, connections=1)
    table.routes.remove(old)
    assert table.where(new, FLOWS[0]) == 0


# The memo


def test_the_memo_is_bounded(monkeypatch):
    monkeypatch.setattr(routing, "MEMO_MAX", 50)
    table = Table()
    session = table.session()
    before = [table.where(session, one) for one in FLOWS]
    for one, then in zip(FLOWS, before):
        assert table.where(session, one) == then
        assert len(table.routes._memo) <= 50


@pytest.mark.parametrize("version, protocol_at, flow_at, elsewhere", [
    (4, 9, range(12, 24), [1, 2, 3, 4, 5, 8, 10, 11, 24]),  # TOS, length, identification, TTL, checksum; behind it
    (6, 6, range(8, 44), [0, 1, 2, 3, 4, 5, 7, 44]),  # traffic class, flow label, length, hop limit; behind it
])  # fmt: skip
@pytest.mark.parametrize("protocol", [6, 17])
def test_a_flow_is_looked_up_once(version, protocol_at, flow_at, elsewhere, protocol):
    """What makes another flow is one byte of its addresses or ports, and no other."""
    first = bytearray(PLAIN + udp(1, 1, 100, version=version))
    first[len(PLAIN) + protocol_at] = protocol

    def changed(at):
        other = bytearray(first)
        other[len(PLAIN) + at] ^= 1
        return other

    table = Table()
    session = table.session(any_address=True, connections=1)
    sink, asked = session.connections[0], []
    sink.lane = lambda flow: asked.append(flow) or sink.lanes[0]
    flows = [first, *map(changed, flow_at)]
    table.split(*flows)
    assert len(asked) == len(flows)
    table.split(*flows, *map(changed, elsewhere))
    assert len(asked) == len(flows) and len(sink.entries) == 2 * len(flows) + len(elsewhere)


@pytest.mark.parametrize("version, protocol_at", [(4, 9), (6, 6)])
@pytest.mark.parametrize("protocol", [0, 1, 58])
def test_what_has_no_ports_is_looked_up_each_time(version, protocol_at, protocol):
    packet = bytearray(PLAIN + udp(1, 1, 100, version=version))
    packet[len(PLAIN) + protocol_at] = protocol
    table = Table()
    session = table.session(any_address=True, connections=1)
    sink, asked = session.connections[0], []
    sink.lane = lambda flow: asked.append(flow) or sink.lanes[0]
    table.split(packet, packet)
    assert len(asked) == 2


def test_what_is_remembered_holds_until_something_changes():
    table = Table()
    session = table.session(connections=1)
    table.split(FLOWS[0])
    # Behind its back, which nobody does.
    first, session.connections[0] = session.connections[0], Sink()
    table.split(FLOWS[0])
    assert first.entries == [FLOWS[0]] * 2
    table.routes.changed()
    table.split(FLOWS[0])
    assert session.connections[0].entries == [FLOWS[0]]
