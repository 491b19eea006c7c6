"""control.session: every step of the table in its docstring, the refusals first, then any order of steps."""

import collections
import datetime
import ipaddress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from bulkvpnd.control.session import PARALLEL_MAX, PENDING_MAX, Sessions
from bulkvpnd.protocol.errors import Refused

GRACE, PENDING = 30, 5
DONE = 100
"""A moment at which every grace time is over."""
TERMS = {"connections": 4, "cipher": "aes-256-gcm"}


class Pool:
    """Counts leases and releases, and those that were settled; test_pool.py has the real one."""

    def __init__(self):
        self.numbers = {}
        self.held = {}
        self.settled = collections.Counter()

    def lease(self, identity):
        number = self.numbers.setdefault(identity, len(self.numbers) + 2)
        self.held[identity] = self.held.get(identity, 0) + 1
        return {4: ipaddress.ip_interface(f"10.{number >> 8}.{number & 255}.1/8")}

    def settle(self, identity):
        assert self.held[identity]
        self.settled[identity] += 1

    def release(self, identity):
        self.held[identity] -= 1
        assert self.held[identity] >= 0


def make(workers=3, second_login="replace"):
    return Sessions(Pool(), GRACE, workers, PENDING, second_login)


def begun(sessions, identity="alice", name=b"1", now=0.0, source="192.0.2.1", terms=TERMS):
    return sessions.begin(identity, name * 16, name * 32, terms, source, now)


def live(sessions, session, index=0, now=0.0):
    """A connection that has sent its first authentic frame."""
    connection = sessions.add(session, index, "peer", now)
    assert sessions.established(connection.number)
    return connection


def reason(function, *arguments):
    with pytest.raises(Refused) as caught:
        function(*arguments)
    return caught.value.reason


# join


WRONG = {
    "id alone": {"token": bytes(32)},
    "one bit of the token": {"token": b"1" * 31 + b"0"},
    "shorter token": {"token": b"1" * 31},
    "no token": {"token": b""},
    "another session's token": {"token": b"2" * 32},
    "another identity": {"identity": "bob"},
    "unknown session": {"session_id": b"3" * 16},
    "another's session": {"session_id": b"2" * 16},
    "index beyond the agreed number": {"index": 4},
}
JOIN = {"identity": "alice", "session_id": b"1" * 16, "token": b"1" * 32, "index": 3}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_join_refuses(wrong):
    sessions = make()
    session = begun(sessions)
    begun(sessions, "bob", b"2")
    live(sessions, session)
    with pytest.raises(Refused) as caught:
        sessions.join(**{**JOIN, **wrong})
    # All in the same words: nobody learns which part was right.
    assert (caught.value.reason, str(caught.value)) == ("session", "no such session")
    assert sessions.join(**JOIN) is session


@pytest.mark.parametrize("bit", range(256))
def test_join_refuses_a_token_with_any_bit_flipped(bit):
    sessions = make()
    begun(sessions)
    token = (int.from_bytes(JOIN["token"], "big") ^ 1 << bit).to_bytes(32, "big")
    assert reason(sessions.join, "alice", b"1" * 16, token, 0) == "session"


def test_join_refuses_a_session_that_ended():
    sessions = make()
    session = begun(sessions)
    assert sessions.expire(PENDING) == [session]
    assert reason(sessions.join, *JOIN.values()) == "session"


def test_a_session_that_ends_during_a_handshake_gets_no_connection():
    sessions = make()
    session = begun(sessions)
    assert sessions.join(**JOIN) is session
    sessions.expire(PENDING)
    assert reason(sessions.add, session, 1, "peer", PENDING) == "session"
    assert not sessions.connections and not session.connections


def test_connections_that_wait_for_their_first_frame_are_bounded():
    sessions = make()
    session = begun(sessions)
    waiting = [sessions.add(sessions.join(**JOIN), 0, "peer", 0.0) for _ in range(TERMS["connections"] + PENDING_MAX)]
    assert reason(sessions.join, *JOIN.values()) == "busy"
    sessions.established(waiting[0].number)
    assert sessions.join(**JOIN) is session
    sessions.add(session, 0, "peer", 0.0)
    assert reason(sessions.join, *JOIN.values()) == "busy"
    sessions.closed(waiting[1].number, 1.0)
    assert sessions.join(**JOIN) is session


def test_sessions_that_wait_for_their_first_frame_are_bounded_per_identity():
    sessions = make()
    waiting = [begun(sessions, name=bytes([at])) for at in range(PENDING_MAX)]
    assert reason(begun, sessions, "alice", b"x") == "busy"
    assert sessions._pool.held == {"alice": PENDING_MAX}
    begun(sessions, "bob", b"y")
    live(sessions, waiting[0])
    begun(sessions, "alice", b"x")
    sessions.expire(PENDING)
    assert sessions._pool.held == {"alice": 1, "bob": 0}


# the first authentic frame


def test_nothing_is_replaced_before_the_first_authentic_frame():
    sessions = make()
    first = begun(sessions)
    old = live(sessions, first)
    again = sessions.add(first, 0, "elsewhere", 1.0)
    second = begun(sessions, name=b"2")
    other = sessions.add(second, 0, "elsewhere", 1.0)
    assert first.live_connections == [old] and list(sessions) == [first, second] and not second.is_live
    # A connection of the same index, then a session of the same identity.
    assert sessions.established(again.number) == (again, [old], [])
    assert sessions.established(other.number) == (other, [], [first])
    assert list(sessions) == [second]


def test_established_is_said_once():
    sessions = make()
    session = begun(sessions)
    connection = live(sessions, session)
    assert sessions.established(connection.number) is None
    assert sessions.established(99) is None
    sessions.closed(connection.number, 1.0)
    assert sessions.established(connection.number) is None


def test_a_frame_for_a_session_that_ended_meanwhile_changes_nothing():
    sessions = make()
    first, second = begun(sessions), begun(sessions, name=b"2")
    late, early = (sessions.add(session, 0, "peer", 0.0) for session in (first, second))
    assert sessions.established(early.number) == (early, [], [first])
    # The worker's word for the other one was under way already.
    assert sessions.established(late.number) is None
    assert list(sessions) == [second] and not first.is_live and second.live_connections == [early]


def test_a_second_login_is_refused_while_the_first_is_there():
    sessions = make(second_login="refuse")
    first = begun(sessions)
    assert reason(begun, sessions, "alice", b"2") == "identity", "one that waits for its first frame counts"
    connection = live(sessions, first)
    assert reason(begun, sessions, "alice", b"2") == "identity"
    begun(sessions, "bob", b"3")

    # Nobody is there: who comes may well be the same again, whose session was cut off.
    sessions.closed(connection.number, 1.0)
    second = begun(sessions, "alice", b"2", 2.0)
    assert not first.is_ended
    number = sessions.add(second, 0, "peer", 2.0).number
    _, _, ended = sessions.established(number)
    assert ended == [first] and first.is_ended and second.is_live


def test_parallel_sessions_have_addresses_of_their_own():
    sessions = make(second_login="parallel")
    first, second, other = begun(sessions), begun(sessions, "alice", b"2"), begun(sessions, "bob", b"3")
    connections = [live(sessions, one) for one in (first, second, other)]
    assert not any(one.is_ended for one in (first, second, other))
    assert len({one.interfaces[4] for one in (first, second, other)}) == 3
    assert [one.lease for one in (first, second, other)] == ["alice", "alice#2", "bob"]
    # Each is joined by its own token alone.
    assert sessions.join("alice", first.id, first.token, 1) is first
    assert reason(sessions.join, "alice", first.id, second.token, 1) == "session"

    # The first that is free again goes to the next.
    sessions.closed(connections[0].number, 1.0)
    assert sessions.expire(DONE) == [first]
    third = begun(sessions, "alice", b"4")
    assert third.interfaces == first.interfaces and third.lease == "alice"
    assert sessions._pool.held == {"alice": 1, "alice#2": 1, "bob": 1}


def test_parallel_sessions_are_bounded_per_identity():
    sessions = make(second_login="parallel")
    for number in range(PARALLEL_MAX):
        live(sessions, begun(sessions, "alice", bytes([number])))
    assert reason(begun, sessions, "alice", b"x") == "busy"
    begun(sessions, "bob", b"y")


def test_other_identities_are_never_replaced():
    sessions = make()
    alice, bob = begun(sessions), begun(sessions, "bob", b"2")
    live(sessions, alice)
    live(sessions, bob)
    assert list(sessions) == [alice, bob]


# the end


def test_grace_counts_from_the_last_live_connection():
    sessions = make()
    session = begun(sessions)
    first, second = live(sessions, session, 0), live(sessions, session, 1)
    sessions.closed(first.number, 10.0)
    assert sessions.expire(1000.0) == []
    sessions.closed(second.number, 1000.0)
    assert sessions.expire(1000.0 + GRACE - 0.001) == []
    assert sessions.expire(1000.0 + GRACE) == [session]
    assert sessions.expire(1000.0 + GRACE) == [] and not list(sessions)
    assert sessions._pool.held == {"alice": 0}


def test_a_connection_that_never_sent_a_frame_does_not_prolong_the_grace_time():
    sessions = make()
    session = begun(sessions)
    sessions.closed(live(sessions, session).number, 0.0)
    sessions.closed(sessions.add(session, 0, "peer", GRACE - 1).number, GRACE - 1)
    assert sessions.expire(GRACE) == [session]


def test_a_session_comes_back_within_its_grace_time():
    sessions = make()
    session = begun(sessions)
    sessions.closed(live(sessions, session).number, 0.0)
    live(sessions, session, now=GRACE - 1)
    assert sessions.expire(1e6) == [] and session.idle_since is None


def test_closing_twice_is_closing_once():
    sessions = make()
    connection = live(sessions, begun(sessions))
    assert sessions.closed(connection.number, 1.0) is connection
    assert sessions.closed(connection.number, 2.0) is None
    assert connection.session.idle_since == 1.0


def test_a_session_ends_with_the_newest_certificate_of_its_live_connections():
    sessions = make()
    session, other, pending = begun(sessions), begun(sessions, "bob", b"2"), begun(sessions, "carol", b"3")
    noon = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone.utc)
    second = datetime.timedelta(seconds=1)

    def connected(to, expires, index=0, frame=True):
        connection = sessions.add(to, index, "peer", 0.0, None, expires)
        if frame:
            sessions.established(connection.number)
        return connection

    connected(session, noon)
    connected(other, noon + 9 * second)
    connected(pending, noon, frame=False)
    assert sessions.end_expired(noon - second) == []
    # One that is renewed cuts nothing, as soon as it has shown that it is there.
    renewed = connected(session, noon + 5 * second, 1, frame=False)
    sessions.established(renewed.number)
    connected(session, noon + 9 * second, 2, frame=False)
    assert sessions.end_expired(noon) == sessions.end_expired(noon + 4 * second) == []
    assert sessions.end_expired(noon + 5 * second) == [session] and session.is_ended
    assert list(sessions) == [other, pending], "what has no connection has its own time"


# workers


def test_connections_go_round_robin_over_the_workers_per_source():
    sessions = make(workers=3)
    one = [begun(sessions, f"client{at}", bytes([at]), source="192.0.2.1") for at in range(6)]
    assert [session.offset for session in one] == [0, 1, 2, 0, 1, 2]
    other = [begun(sessions, f"other{at}", bytes([64 + at]), source="192.0.2.2") for at in range(3)]
    # Its own turn, that does not begin where every other source began.
    assert [session.offset for session in other] == [1, 2, 0]
    assert [sessions.add(one[1], index, "peer", 0.0).worker for index in range(4)] == [1, 2, 0, 1]


def test_sources_are_remembered_in_a_bounded_table():
    sessions = make()
    for at in range(5000):
        begun(sessions, f"client{at}", at.to_bytes(16, "big"), source=f"2001:db8::{at:x}")
    assert len(sessions._offsets) <= 4097


def test_no_token_in_repr():
    sessions = make()
    session = begun(sessions, name=b"Z")
    assert "Z" * 32 not in repr(sessions.add(session, 0, "peer", 0.0)) + repr(session)


# any order of steps

IDENTITIES = st.sampled_from(["alice", "bob"])


class AnyOrder(RuleBasedStateMachine):
    """Whatever clients, workers and the clock do. Beside the real one runs the simplest model that could be right."""

    sessions = Bundle("sessions")
    connections = Bundle("connections")

    def __init__(self):
        super().__init__()
        self.pool = Pool()
        self.subject = Sessions(self.pool, GRACE, 3, PENDING)
        self.now = 0.0
        self.names = 0
        self.begun = collections.Counter()  # identity: sessions whose first frame came
        self.alive = []  # sessions that have not ended
        self.proven = set()  # numbers of connections whose first frame came while they and their session lived
        self.owner = {}  # identity: session that owns its addresses

    def expect_ended(self, sessions):
        for session in sessions:
            assert session in self.alive
            self.alive.remove(session)
            if self.owner.get(session.identity) is session:
                del self.owner[session.identity]

    @rule(target=sessions, identity=IDENTITIES, count=st.integers(1, 4))
    def begin(self, identity, count):
        self.names += 1
        name = self.names.to_bytes(16, "big")
        waiting = [one for one in self.alive if one.identity == identity and not one.is_live]
        if len(waiting) >= PENDING_MAX:
            with pytest.raises(Refused):
                self.subject.begin(identity, name, name * 2, {"connections": count}, "source", self.now)
            return multiple()
        session = self.subject.begin(identity, name, name * 2, {"connections": count}, "source", self.now)
        self.alive.append(session)
        return session

    @rule(target=connections, session=sessions, index=st.integers(0, 3), identity=IDENTITIES, token=st.booleans())
    def join(self, session, index, identity, token):
        before = self.state()
        secret = session.token if token else bytes(32)
        right = (token and identity == session.identity and session in self.alive
                 and index < session.terms["connections"])
        pending = [one for one in session.connections.values() if not one.is_live]
        room = len(pending) < session.terms["connections"] + PENDING_MAX
        if not (right and room):
            with pytest.raises(Refused):
                self.subject.join(identity, session.id, secret, index)
            assert self.state() == before
            return multiple()
        assert self.subject.join(identity, session.id, secret, index) is session
        assert self.state() == before
        connection = self.subject.add(session, index, "peer", self.now)
        assert self.state() == before, "a connection without a frame changed something"
        return connection

    @rule(connection=connections)
    def established(self, connection):
        before = self.state()
        known = connection.number in self.subject.connections
        result = self.subject.established(connection.number)
        if not known or connection.number in self.proven or connection.session not in self.alive:
            assert result is None and self.state() == before
            return
        got, replaced, ended = result
        assert got is connection
        session = connection.session
        assert {one.number for one in replaced} == {
            one.number for one in session.connections.values()
            if one.number in self.proven and one.index == connection.index
        }
        self.proven.add(connection.number)
        self.begun[session.identity] += self.owner.get(session.identity) is not session
        assert self.pool.settled == self.begun
        assert all(one.identity == session.identity and one is not session for one in ended)
        self.expect_ended(ended)
        self.owner[session.identity] = session

    @rule(connection=connections)
    def closed(self, connection):
        known = connection.number in self.subject.connections
        assert (self.subject.closed(connection.number, self.now) is not None) == known

    @rule(seconds=st.sampled_from([0.5, PENDING, GRACE]))
    def pass_time(self, seconds):
        self.now += seconds
        for session in (over := self.subject.expire(self.now)):
            assert not session.connections and session.idle_since is not None
        self.expect_ended(over)
        for session in self.alive:
            limit = GRACE if session.is_live else PENDING
            assert session.connections or self.now - session.idle_since < limit

    def state(self):
        """Everything that a stranger must not be able to change."""
        return (
            [(one.number, one.is_live, one.is_ended, one.idle_since, one.workers) for one in self.subject],
            sorted(one.number for one in self.subject.connections.values() if one.is_live),
            dict(self.pool.held),
            dict(self.pool.settled),
        )

    @invariant()
    def sessions_are_those_that_live(self):
        assert list(self.subject) == self.alive
        assert not any(session.is_ended for session in self.alive)

    @invariant()
    def one_live_session_owns_an_identity(self):
        for session in self.alive:
            assert session.is_live == (self.owner.get(session.identity) is session)

    @invariant()
    def holds_and_releases_balance(self):
        for identity, count in self.pool.held.items():
            assert count == sum(session.identity == identity for session in self.alive)

    @invariant()
    def only_proven_connections_are_live(self):
        assert {one.number for one in self.subject.connections.values() if one.is_live} <= self.proven

    @invariant()
    def what_waits_is_bounded(self):
        for session in self.alive:
            waiting = sum(not one.is_live for one in session.connections.values())
            assert waiting <= session.terms["connections"] + PENDING_MAX
        for identity in ("alice", "bob"):
            assert sum(one.identity == identity and not one.is_live for one in self.alive) <= PENDING_MAX

    @invariant()
    def one_idle_since_the_last_live_connection(self):
        for session in self.alive:
            assert (session.idle_since is None) == bool(session.live_connections)


AnyOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
