"""control.pool with real files: who has which address, over restarts, full pools and broken disks."""

import contextlib
import ipaddress
import json
import logging
import os
import pathlib
import tempfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bulkvpnd.control import pool as pool_module
from bulkvpnd.control.latest import LatestFile
from bulkvpnd.protocol.errors import Refused

SMALL = (ipaddress.ip_network("10.86.0.0/29"), None)  # five clients: 10.86.0.2 to 10.86.0.6
BOTH = (ipaddress.ip_network("10.86.0.0/24"), ipaddress.ip_network("fd86::/126"))  # two: fd86::2 and fd86::3


class Nowhere:
    """Where nothing is written, which is quick."""

    def save(self, make_text):
        make_text()


class AtOnce(LatestFile):
    """What was saved is in the file when save() returns."""

    def save(self, make_text):
        super().save(make_text)
        self.flush()


def Pool(networks, path, fixed=None):
    return pool_module.Pool(networks, path, fixed, AtOnce(path, "leases"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "leases.json"


def begun(pool, identity):
    """The address of a session that waits for its first frame."""
    return str(pool.lease(identity)[4].ip)


def used(pool, identity):
    """The address of a session whose first frame has come."""
    address = begun(pool, identity)
    pool.settle(identity)
    return address


def address(pool, identity):
    """What a session would have."""
    found = begun(pool, identity)
    pool.release(identity)
    return found


def test_full_pool_refuses_and_serves_exactly_its_size(path):
    pool = Pool(SMALL, path)
    served = [used(pool, f"client{at}") for at in range(5)]
    assert served == [f"10.86.0.{at}" for at in range(2, 7)]
    for at in range(5, 10):
        with pytest.raises(Refused) as caught:
            pool.lease(f"client{at}")
        assert caught.value.reason == "pool"
    # Who has one keeps it; who was refused left nothing behind.
    assert [used(pool, f"client{at}") for at in range(5)] == served
    pool.release("client3")
    with pytest.raises(Refused):
        pool.lease("client7")  # client3 had two sessions
    pool.release("client3")
    assert address(pool, "client7") == "10.86.0.5"


def test_the_server_has_the_first_address_and_no_client_an_odd_one(path):
    pool = Pool(BOTH, path)
    assert [str(one) for one in pool.server_interfaces] == ["10.86.0.1/24", "fd86::1/126"]
    given = [pool.lease(name) for name in ("alice", "bob")]
    assert [{version: str(one) for version, one in lease.items()} for lease in given] == [
        {4: "10.86.0.2/24", 6: "fd86::2/126"}, {4: "10.86.0.3/24", 6: "fd86::3/126"},
    ]  # fmt: skip
    # Both must have room: the IPv4 network alone would have some.
    with pytest.raises(Refused):
        pool.lease("carol")


@pytest.mark.parametrize(
    ("network", "last"),
    [("10.86.0.0/30", "10.86.0.2"), ("10.86.0.0/29", "10.86.0.6"), ("fd86::/126", "fd86::3"),
     ("fd86::/125", "fd86::7")],
)
def test_every_usable_address_is_leased_and_no_other(path, network, last):
    network = ipaddress.ip_network(network)
    pool = Pool((network,), path)
    leased = []
    with contextlib.suppress(Refused):
        while True:
            name = f"client{len(leased)}"
            leased.append(str(pool.lease(name)[network.version].ip))
    assert leased[0] == str(network[2]) and leased[-1] == last and len(set(leased)) == len(leased)


@pytest.mark.parametrize("networks", [("10.0.0.0/8",), ("fd86::/64",), ("10.0.0.0/8", "fd86::/64")])
def test_leases_are_bounded(path, monkeypatch, networks):
    monkeypatch.setattr(pool_module, "LEASES_MAX", 3)
    pool = Pool([*map(ipaddress.ip_network, networks)], path)
    for name in "abc":
        pool.lease(name), pool.settle(name)
    with pytest.raises(Refused):
        pool.lease("d")
    pool.release("a")
    pool.lease("d"), pool.settle("d")
    assert json.loads(path.read_text())["leases"] == {"b": 3, "c": 4, "d": 2}


def test_leases_are_kept_by_identity_over_restarts(path):
    before = Pool(BOTH, path)
    wanted = [used(before, name) for name in ("alice", "bob")]
    after = Pool(BOTH, path)
    assert [address(after, name) for name in ("bob", "alice")] == wanted[::-1]


def test_the_lease_unused_for_the_longest_goes_first(path):
    pool = Pool(SMALL, path)
    for name in ("a", "b", "c", "d", "e"):
        used(pool, name)
        pool.release(name)
    used(pool, "a")  # used again: now b is the oldest, and c after it
    pool.release("a")
    pool = Pool(SMALL, path)  # the order too is kept
    pool.lease("b")
    assert address(pool, "new") == "10.86.0.4"
    assert address(pool, "b") == "10.86.0.3"


def test_a_smaller_pool_keeps_whom_it_can(path):
    large = Pool(BOTH[:1], path)
    for at in range(20):
        used(large, f"client{at}")
    small = Pool(SMALL, path)
    assert [address(small, f"client{at}") for at in range(5)] == [f"10.86.0.{at}" for at in range(2, 7)]
    assert address(small, "client19") == "10.86.0.2"  # none is in use since the restart


def test_another_network_keeps_the_place_in_it(path):
    used(Pool(BOTH[:1], path), "alice")
    assert address(Pool((ipaddress.ip_network("192.168.7.0/24"),), path), "alice") == "192.168.7.2"


# before the first authentic frame


def test_who_sends_no_frame_takes_nobodys_lease(path):
    pool = Pool((ipaddress.ip_network("10.86.0.0/30"),), path)
    used(pool, "alice")
    pool.release("alice")
    before = path.read_bytes()
    assert begun(pool, "bob") == "10.86.0.2", "a newcomer gets what nobody uses"
    assert pool.addresses("alice") and path.read_bytes() == before
    with pytest.raises(Refused):
        pool.lease("alice")  # two sessions never have one address
    pool.release("bob")
    assert pool.addresses("bob") is None and used(pool, "alice") == "10.86.0.2"
    # One whose frame has come takes it.
    pool.release("alice")
    assert used(pool, "bob") == "10.86.0.2"
    assert pool.addresses("alice") is None and json.loads(path.read_text())["leases"] == {"bob": 2}


def test_who_comes_back_while_its_lease_is_lent_gets_another(path):
    pool = Pool(SMALL, path)
    for name in "abcde":
        used(pool, name)
        pool.release(name)
    assert [begun(pool, name) for name in ("new", "a", "a")] == ["10.86.0.2", "10.86.0.3", "10.86.0.3"]
    # Whoever does not stay leaves all as it was.
    for name in ("new", "a", "a"):
        pool.release(name)
    assert [address(pool, name) for name in "abcde"] == [f"10.86.0.{at}" for at in range(2, 7)]
    assert [begun(pool, "new"), used(pool, "a")] == ["10.86.0.2", "10.86.0.3"]
    pool.settle("new")
    assert json.loads(path.read_text())["leases"] == {"c": 4, "d": 5, "e": 6, "a": 3, "new": 2}


# the file


BROKEN = [
    b"", b"\0" * 100, b"{", b"[]", b"null", b"1", b'"leases"', b"{}", b'{"leases": []}', b'{"leases": null}',
    b'{"leases": {"alice": "2"}}', b'{"leases": {"alice": true}}', b'{"leases": {"alice": 2.0}}',
    b'{"leases": {"alice": -1}}', b'{"leases": {"alice": 0}}', b'{"leases": {"alice": 1}}',
    b'{"leases": {"alice": 7}}', b'{"leases": {"alice": 1e400}}', b'{"leases": {"alice": NaN}}', b"\xff\xfe",
    b'{"leases": {"alice": %s}}' % (b"9" * 5000), b"[" * 100_000, b'{"leases":' * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_costs_the_leases_and_nothing_else(path, data):
    path.parent.mkdir()
    path.write_bytes(data)
    pool = Pool(SMALL, path)
    assert used(pool, "bob") == "10.86.0.2"
    assert json.loads(path.read_text()) == {"leases": {"bob": 2}}


def test_a_broken_file_is_said_in_one_line(path, caplog):
    path.parent.mkdir()
    path.write_bytes(b"\x1b[2J\n{")
    Pool(SMALL, path)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and record.getMessage().isprintable()


def test_two_never_have_the_same_lease_whatever_the_file_says(path):
    path.parent.mkdir()
    path.write_text('{"leases": {"alice": 3, "bob": 3, "carol": 2}}')
    pool = Pool(SMALL, path)
    assert pool.addresses("alice") and pool.addresses("bob") is None
    assert [used(pool, name) for name in ("alice", "bob", "carol")] == ["10.86.0.3", "10.86.0.4", "10.86.0.2"]


KEYS = st.text(max_size=5) | st.just("leases")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
FILES = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda value: json.dumps(value).encode(), JSON),
    st.builds(lambda leases: json.dumps({"leases": leases}).encode(), st.dictionaries(st.text(max_size=5), JSON)),
    st.builds(lambda cut: b'{"leases": {"alice": 2, "bob": 3, "carol": 4}}'[:cut], st.integers(0, 45)),
)


@settings(max_examples=60, deadline=None)
@given(data=FILES)
@example(data=b'{"leases": {"alice": 2, "bob": 2}}')
def test_any_file_leaves_a_pool_that_works(data):
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "leases.json")
        path.write_bytes(data)
        pool = pool_module.Pool(SMALL, path, file=Nowhere())
        assert sorted(used(pool, f"client{at}") for at in range(5)) == [f"10.86.0.{at}" for at in range(2, 7)]


@pytest.mark.parametrize("where", ["through a file", "not writable"])
def test_a_disk_that_takes_nothing_never_costs_the_tunnel(tmp_path, where, caplog):
    directory = tmp_path / "state"
    if where == "through a file":
        directory.write_text("")
    else:
        # As disk full looks like; root may write anywhere, so the new file's place is taken by a directory.
        (directory / "leases.new").mkdir(parents=True)
    pool = Pool(SMALL, directory / "leases.json")
    caplog.clear()
    assert used(pool, "alice") == "10.86.0.2"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(directory / "leases.json") in record.getMessage()
    assert used(pool, "bob") == "10.86.0.3"


def test_leases_are_written_without_being_waited_for_until_they_are(path, caplog):
    pool = pool_module.Pool(SMALL, path)
    used(pool, "alice")
    assert not path.exists()
    pool.flush()
    assert json.loads(path.read_text()) == {"leases": {"alice": 2}}
    os.symlink("/dev/full", path.with_suffix(".new"))
    pool.save()
    pool.flush()
    assert f"{path}: leases cannot be written" in caplog.text


def test_a_full_disk_leaves_the_old_file_whole(path):
    pool = Pool(SMALL, path)
    used(pool, "alice")
    before = path.read_bytes()
    # /dev/full takes no byte and says ENOSPC, as a full disk does.
    os.symlink("/dev/full", path.with_suffix(".new"))
    used(pool, "bob")
    assert path.read_bytes() == before
    assert address(Pool(SMALL, path), "alice") == "10.86.0.2"


def test_no_reader_ever_sees_half_a_file(path):
    pool = Pool(BOTH[:1], path)
    used(pool, "alice")
    with path.open("rb") as reader:  # one that began before
        for at in range(50):
            used(pool, f"client{at}")
            assert len(json.loads(path.read_bytes())["leases"]) == at + 2
        assert json.loads(reader.read()) == {"leases": {"alice": 2}}


# addresses that are somebody's for good


def fixed(**addresses):
    """{identity: {4 | 6: address}}, from one text or several."""
    return {
        identity: {ipaddress.ip_address(one).version: ipaddress.ip_address(one) for one in texts.split()}
        for identity, texts in addresses.items()
    }


def test_a_fixed_address_is_its_owners_and_nobody_elses(path):
    pool = Pool(SMALL, path, fixed(warehouse="10.86.0.2", office="10.86.0.5"))
    assert [used(pool, f"client{at}") for at in range(3)] == ["10.86.0.3", "10.86.0.4", "10.86.0.6"]
    with pytest.raises(Refused):
        pool.lease("client3")
    assert used(pool, "warehouse") == "10.86.0.2" and used(pool, "office") == "10.86.0.5"
    assert str(pool.addresses("office")[4]) == "10.86.0.5/29"
    # Nobody gets it when its owner is away either.
    pool.release("office")
    with pytest.raises(Refused):
        pool.lease("client3")
    assert set(json.loads(path.read_text())["leases"]) == {"client0", "client1", "client2"}


def test_one_address_fixed_and_the_other_leased(path):
    networks = (BOTH[0], ipaddress.ip_network("fd86::/64"))
    pool = Pool(networks, path, fixed(warehouse="10.86.0.3", office="fd86::2", far="fd86::1:0:0:9"))
    lease = {name: [str(one.ip) for one in pool.lease(name).values()] for name in ("a", "warehouse", "office", "far")}
    # The number of a fixed address leads to nobody else's in the other network.
    assert lease == {
        "a": ["10.86.0.4", "fd86::4"], "warehouse": ["10.86.0.3", "fd86::5"], "office": ["10.86.0.6", "fd86::2"],
        "far": ["10.86.0.7", "fd86::1:0:0:9"],
    }  # fmt: skip


def test_a_fixed_address_beyond_the_other_network_takes_no_place_in_it(path):
    pool = Pool(BOTH, path, fixed(office="10.86.0.4"))
    assert [str(pool.lease(name)[6].ip) for name in ("a", "b")] == ["fd86::2", "fd86::3"]


def test_an_address_that_becomes_somebodys_is_taken_from_the_lease(path):
    pool = Pool(SMALL, path)
    assert [used(pool, name) for name in ("a", "b", "c")] == ["10.86.0.2", "10.86.0.3", "10.86.0.4"]
    pool = Pool(SMALL, path, fixed(c="10.86.0.2"))
    assert [used(pool, name) for name in ("c", "b", "a")] == ["10.86.0.2", "10.86.0.3", "10.86.0.4"]
    # And when it is nobody's again it is leased like any other.
    pool = Pool(SMALL, path)
    assert [used(pool, name) for name in ("a", "b", "c")] == ["10.86.0.4", "10.86.0.3", "10.86.0.2"]


def test_others_keep_theirs_for_good_from_now_on(path):
    pool = Pool(SMALL, path, fixed(office="10.86.0.2"))
    before = {name: pool.lease(name) for name in ("a", "b", "c", "office")}
    for name in before:
        pool.settle(name)
    assert {name: pool.addresses(name) for name in before} == before and pool.addresses("nobody") is None
    assert str(before["b"][4].ip) == "10.86.0.4"
    # What b has becomes a's, c gets one that nobody has, and the office has none of its own any more.
    pool.set_fixed(fixed(a="10.86.0.4", c="10.86.0.6"))
    now = {name: pool.addresses(name) for name in before}
    assert (now["b"], now["office"]) == (None, None)
    assert [str(now[name][4].ip) for name in ("a", "c")] == ["10.86.0.4", "10.86.0.6"]
    for name in before:
        pool.release(name)
    assert {name: used(pool, name) for name in before} == {
        "a": "10.86.0.4", "b": "10.86.0.2", "c": "10.86.0.6", "office": "10.86.0.3"
    }
    assert json.loads(path.read_text())["leases"] == {"b": 2, "office": 3}


# any order of steps


class AnyOrder(RuleBasedStateMachine):
    """Sessions of nine identities on a pool of five, and restarts in between."""

    identities = st.sampled_from("abcdefghi")
    fixed = {}

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.path = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()), "leases.json")
        self.restart()

    def teardown(self):
        self.stack.close()

    @rule()
    def restart(self):
        self.pool = Pool(SMALL, self.path, self.fixed)
        self.held = {}  # identity: [address, sessions]
        self.owned = getattr(self, "owned", {})  # identity: address, what is leased to whom

    @rule(given=st.dictionaries(identities, st.integers(2, 6), max_size=3).filter(
        lambda given: len(set(given.values())) == len(given)))
    def fix(self, given):
        """Whose addresses are another's now is sent away, as control.server does it."""
        self.fixed = {identity: {4: ipaddress.ip_address(f"10.86.0.{number}")} for identity, number in given.items()}
        self.pool.set_fixed(self.fixed)
        taken = {str(one[4]) for one in self.fixed.values()}
        self.owned = {identity: leased for identity, leased in self.owned.items()
                      if leased not in taken and identity not in self.fixed}
        for identity, (leased, sessions) in list(self.held.items()):
            addresses = self.pool.addresses(identity)
            if addresses is None or str(addresses[4].ip) != leased:
                del self.held[identity]
                for _ in range(sessions):
                    self.pool.release(identity)

    @rule(identity=identities)
    def begin(self, identity):
        others = [one for one in self.held if one not in self.fixed]
        if len(others) == 5 - len(self.fixed) and identity not in others and identity not in self.fixed:
            with pytest.raises(Refused):
                self.pool.lease(identity)
            return
        leased = begun(self.pool, identity)
        assert (leased == str(self.fixed.get(identity, {}).get(4))) == (identity in self.fixed)
        mine = self.held.setdefault(identity, [leased, 0])
        assert mine[0] == leased, "the address changed under a live session"
        mine[1] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def settle(self, data):
        identity = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.settle(identity)
        if identity not in self.fixed:
            leased = self.held[identity][0]
            self.owned = {other: its for other, its in self.owned.items() if its != leased} | {identity: leased}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        identity = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(identity)
        self.held[identity][1] -= 1
        if not self.held[identity][1]:
            del self.held[identity]

    @invariant()
    def nobody_loses_a_lease_before_the_first_frame(self):
        for identity in set("abcdefghi") - set(self.held) - set(self.fixed):
            addresses = self.pool.addresses(identity)
            assert (addresses and str(addresses[4].ip)) == self.owned.get(identity)

    @invariant()
    def one_owner_per_address(self):
        addresses = [leased for leased, _ in self.held.values()]
        assert len(set(addresses)) == len(addresses)
        assert set(addresses) <= {f"10.86.0.{at}" for at in range(2, 7)}


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


class AnyOrderWithFixed(AnyOrder):
    """Two of them keep theirs for good."""

    fixed = {"a": {4: ipaddress.ip_address("10.86.0.2")}, "e": {4: ipaddress.ip_address("10.86.0.4")}}


AnyOrderWithFixed.TestCase.settings = AnyOrder.TestCase.settings
TestAnyOrderWithFixed = AnyOrderWithFixed.TestCase
