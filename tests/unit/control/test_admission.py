"""control.admission: whom a crowd costs the place, what failures cost, and that every table has an end.

The state machine holds it against a model of its own: plain lists, searched from end to end.
"""

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bulkvpnd.control import admission
from bulkvpnd.control.admission import (
    KNOWN_PER_IDENTITY, KNOWN_RENEWAL, KNOWN_SECONDS, PATIENCE, PENALTIES, PENALTY_MIN, Admission, Pace, source_of,
)  # fmt: skip

STRANGER, NEIGHBOUR, FAR = "192.0.2.1", "192.0.2.2", "2001:db8::1"


def made(start=4, rate=100, full=4, per_source=4, penalty_max=600.0, chance=lambda: 0.5):
    return Admission(start, rate, full, per_source, penalty_max, chance)


def fail(door, address, now, how="failed"):
    """One connection that comes, fails and goes. Returns the seconds of its penalty."""
    place, _, why = door.arrive(address, now)
    assert place, why
    door.leave(place)
    return door.failed(place, how, now)


def test_the_numbers_are_those_of_the_manual():
    """bulkvpn.conf(5) and docs/design.md name them."""
    assert PATIENCE == 3 and PENALTIES == {"left": 1, "failed": 5, "timeout": 10} and PENALTY_MIN == 15
    assert (KNOWN_SECONDS, KNOWN_RENEWAL, KNOWN_PER_IDENTITY) == (24 * 3600, 3600, 64)
    assert admission.SOURCES_MAX == admission.IDENTITIES_MAX == 1 << 14
    assert (admission.BURST, admission.RATE) == (256, 16)


def test_everybody_is_counted_once():
    door = made(start=2, full=2, per_source=1)
    nothing = {"admitted": 0, "crowded": 0, "source_full": 0, "penalised": 0, "failed": 0}
    assert door.counters == nothing
    door.arrive(STRANGER, 0)
    door.arrive(STRANGER, 0)
    door.arrive(NEIGHBOUR, 0)
    place = door.arrive(FAR, 0)[0]
    assert door.counters == {**nothing, "admitted": 4, "source_full": 1, "crowded": 1}
    for _ in range(2):
        door.failed(place, "timeout", 0)
    door.arrive(FAR, 0)
    assert door.counters == {"admitted": 4, "crowded": 1, "source_full": 1, "penalised": 1, "failed": 2}


# Sources


@given(st.ip_addresses(v=4))
def test_every_ipv4_address_is_a_source_of_its_own(address):
    assert source_of(str(address)) == address.packed
    assert source_of(f"::ffff:{address}") == address.packed


@given(st.ip_addresses(v=6), st.ip_addresses(v=6))
def test_ipv6_addresses_of_one_64_are_one_source_and_others_not(one, other):
    if one.ipv4_mapped or other.ipv4_mapped:
        return
    same = ipaddress.IPv6Network((one, 64), strict=False) == ipaddress.IPv6Network((other, 64), strict=False)
    assert (source_of(str(one)) == source_of(str(other))) is same
    neighbour = ipaddress.IPv6Address(int(one) ^ 1)
    assert source_of(str(neighbour)) == source_of(str(one)) and len(source_of(str(one))) == 8


def test_a_zone_belongs_to_no_source():
    assert source_of("fe80::1%eth0") == source_of("fe80::1") == b"\xfe\x80" + bytes(6)


# Crowds


def test_idle_ones_make_room_the_longest_silent_first():
    door = made(per_source=9)
    places = [door.arrive(f"192.0.2.{number}", number)[0] for number in range(4)]
    door.speaks(places[0], 4)
    place, victim, why = door.arrive("192.0.2.9", 5)
    assert place and victim is places[1] and why == "crowded"
    place, victim, _ = door.arrive("192.0.2.9", 5)
    assert place and victim is places[2]


def test_who_speaks_has_time_enough_and_then_none():
    door = made()
    places = [door.arrive(f"192.0.2.{number}", 0)[0] for number in range(4)]
    for place in places[::-1]:
        door.speaks(place, 10)
    assert door.arrive(STRANGER, 10 + PATIENCE - 0.01) == (None, None, "crowded")
    place, victim, _ = door.arrive(STRANGER, 10 + PATIENCE)
    assert place and victim is places[-1]


def test_of_one_source_who_has_spoken_for_longest_goes():
    door = Admission(8, 30, 8, 2, 60.0, lambda: 0.5)
    first, second = (door.arrive("192.0.2.1", 0.0)[0] for _ in range(2))
    door.speaks(second, 0.0)
    door.speaks(first, 1.0)
    assert door.arrive("192.0.2.1", 1.0 + PATIENCE)[1:] == (second, "source_full")


def test_a_source_that_has_all_of_its_places_pays_itself():
    door = made(start=9, full=9, per_source=2)
    other = door.arrive(NEIGHBOUR, 0)[0]
    own = [door.arrive(STRANGER, 1)[0] for _ in range(2)]
    place, victim, why = door.arrive(STRANGER, 2)
    assert place and victim is own[0] and why == "source_full"
    for place in (own[1], place):
        door.speaks(place, 2)
    assert door.arrive(STRANGER, 3) == (None, None, "source_full")
    assert door.overdue(99) == [other] and len(door) == 3


@pytest.mark.parametrize(("count", "chance", "drops"), [
    (3, 0.0, False),                     # below START nobody is dropped
    (4, 0.29, True), (4, 0.31, False),   # RATE
    (8, 0.649, True), (8, 0.65, False), (8, 0.651, False),  # half-way
    (12, 0.999, True),                   # FULL
])  # fmt: skip
def test_the_chance_to_be_dropped_grows_from_rate_to_all(count, chance, drops):
    rolled = [1.0]
    door = made(start=4, rate=30, full=12, per_source=99, chance=lambda: rolled[0])
    for number in range(count):
        assert door.arrive(f"192.0.2.{number}", number)[2] is None
    rolled[0] = chance
    place, victim, _ = door.arrive(STRANGER, 99)
    assert place and bool(victim) is drops


def test_strangers_never_take_the_places_of_known_sources():
    door = made(per_source=99)
    first = door.arrive(FAR, 0)[0]
    door.authenticated(first, "alice", 0)
    door.leave(first)
    strangers = [door.arrive(f"192.0.2.{number}", 1)[0] for number in range(4)]
    for place in strangers:
        door.speaks(place, 1)
    assert door.arrive(STRANGER, 1) == (None, None, "crowded")
    known = [door.arrive("2001:db8::2", 1) for _ in range(4)]
    assert all(place and not victim for place, victim, _ in known)
    # And the other way round: places that known ones have are no less for strangers.
    door.leave(strangers[0])
    assert door.arrive(STRANGER, 1)[0]


# Penalties


@pytest.mark.parametrize("how", PENALTIES)
def test_failures_add_up_until_nobody_answers(how):
    door = made()
    needed = round(PENALTY_MIN / PENALTIES[how] + 0.49)
    for _ in range(needed - 1):
        assert fail(door, STRANGER, 0, how) == 0
        assert not door.is_penalised(source_of(STRANGER), 0)
    seconds = fail(door, STRANGER, 0, how)
    assert seconds == needed * PENALTIES[how] >= PENALTY_MIN
    assert door.arrive(STRANGER, seconds - 0.01) == (None, None, "penalised")
    assert door.arrive(NEIGHBOUR, 0)[0] and door.arrive(FAR, 0)[0]
    # It is over at once, and all is forgotten.
    assert fail(door, STRANGER, seconds) == 0
    assert not door.is_penalised(source_of(STRANGER), seconds)


def test_failures_that_come_seldom_cost_nothing():
    door = made()
    for number in range(1000):
        assert fail(door, STRANGER, number * PENALTIES["failed"]) == 0


def test_a_penalty_has_a_longest_time_and_may_be_switched_off():
    door = made(full=99, start=99, per_source=99, penalty_max=20.0)
    places = [door.arrive(STRANGER, 0)[0] for _ in range(50)]
    assert [door.failed(place, "timeout", 0) for place in places] == [0, 20] + [0] * 48
    assert door.is_penalised(source_of(STRANGER), 19.9) and not door.is_penalised(source_of(STRANGER), 20)
    door = made(penalty_max=0)
    assert all(fail(door, STRANGER, 0, "timeout") == 0 for _ in range(50))


def test_a_short_longest_time_is_reached_by_few_failures():
    door = made(penalty_max=3.0)
    assert fail(door, STRANGER, 0) == 3


def test_a_source_from_which_a_client_authenticated_is_not_locked_out():
    door = made()
    for _ in range(3):
        fail(door, STRANGER, 0)
    assert door.is_penalised(source_of(STRANGER), 0)
    door = made()
    for _ in range(2):
        fail(door, STRANGER, 0)
    place = door.arrive(STRANGER, 0)[0]
    door.authenticated(place, "alice", 0)
    for _ in range(100):
        assert fail(door, STRANGER, KNOWN_SECONDS - 1, "timeout") == 0
    # A day later the address may be another's.
    for _ in range(2):
        fail(door, STRANGER, KNOWN_SECONDS, "timeout")
    assert door.is_penalised(source_of(STRANGER), KNOWN_SECONDS)


def known_after(door, source, identity, now):
    """Whether a source is known once an identity has authenticated from there. source: text."""
    place = door.arrive(source, now)[0]
    door.leave(place)
    door.authenticated(place, identity, now)
    return door.is_known(source_of(source), now)


def test_one_identity_makes_few_sources_known():
    """Whoever has a /48 has 65536 of them, and would push those of all others out."""
    door = made()
    assert known_after(door, STRANGER, "alice", 0)
    prefixes = [f"2001:db8:0:{number:x}::1" for number in range(1000)]
    assert [known_after(door, prefix, "mallory", 1) for prefix in prefixes] == [True] * 64 + [False] * 936
    # What is known already, from whomever, and what others make known is as ever.
    assert known_after(door, STRANGER, "mallory", 2) and known_after(door, prefixes[-1], "bob", 2)
    assert sum(known_after(door, prefix, "mallory", 3601) for prefix in prefixes[64:-1]) == 64 // 24
    # And it cannot have more of them by keeping what it has.
    for day in (1, 2, 3):
        now = day * (KNOWN_SECONDS - 1)
        count = sum(known_after(door, prefix, "mallory", now) for prefix in prefixes)
        assert 64 <= count <= 128


def test_a_source_is_known_for_a_day_from_when_it_was_put_down_again():
    door = made()
    for now in (0, KNOWN_RENEWAL - 1, KNOWN_RENEWAL):
        assert known_after(door, STRANGER, "alice", now)
    assert door.is_known(source_of(STRANGER), KNOWN_RENEWAL + KNOWN_SECONDS - 1)
    assert not door.is_known(source_of(STRANGER), KNOWN_RENEWAL + KNOWN_SECONDS)
    # Who comes and goes all the time does not use up what is for new ones.
    assert all(known_after(door, STRANGER, "bob", KNOWN_RENEWAL) for _ in range(1000))
    assert known_after(door, FAR, "bob", KNOWN_RENEWAL)


def test_who_authenticates_ends_the_penalty_of_its_source():
    door = made(full=9, start=9, per_source=9)
    waiting = door.arrive(STRANGER, 0)[0]
    for _ in range(3):
        fail(door, STRANGER, 0)
    assert door.arrive(STRANGER, 0) == (None, None, "penalised")
    door.authenticated(waiting, "alice", 0)
    assert door.arrive(STRANGER, 0)[0]


def test_another_failure_makes_no_penalty_shorter():
    door = made(full=9, start=9, per_source=9)
    waiting = door.arrive(STRANGER, 0)[0]
    for _ in range(3):
        fail(door, STRANGER, 0)
    assert door.failed(waiting, "left", 14) == 0, "only the first time is news"
    assert door.arrive(STRANGER, 15.9) == (None, None, "penalised") and door.arrive(STRANGER, 16)[0]


# Tables have an end


def test_every_table_has_an_end_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(admission, "SOURCES_MAX", 10)
    monkeypatch.setattr(admission, "IDENTITIES_MAX", 10)
    door, pace = made(), Pace(burst=1, rate=0)
    for number in range(100):
        fail(door, f"192.0.2.{number}", 0)
        pace.allows("always here", 0)
        place = door.arrive(f"198.51.100.{number}", 0)[0]
        door.authenticated(place, f"client{number}", 0)
        door.leave(place)
        assert pace.allows(f"client{number}", 0)
    tables = door._penalties, door._known, door._marks._buckets, door._places, pace._buckets
    assert [len(table) for table in tables] == [10, 10, 10, 0, 10]
    assert door.is_known(source_of("198.51.100.99"), 0) and not door.is_known(source_of("198.51.100.9"), 0)
    assert not pace.allows("always here", 0) and not pace.allows("client99", 0) and pace.allows("client9", 0)


# The model


ADDRESSES = ["192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2", "2001:db8:1::1"]


class Door(RuleBasedStateMachine):
    """START 3, FULL 5, 2 for a source; chances are drawn by hypothesis."""

    def __init__(self):
        super().__init__()
        self.roll = 0.5
        self.now = 0.0
        self.door = Admission(3, 30, 5, 2, 60.0, lambda: self.roll)
        self.places = []  # [place, source, is known, since, speaks], in the order of arrival
        self.known = {}
        self.until, self.out = {}, {}

    def is_known(self, source):
        return source in self.known and self.now - self.known[source] < KNOWN_SECONDS

    def pick(self, scope):
        """Who has to go, by looking at all: who is silent for longest, else who speaks for longest."""
        silent = [one for one in scope if not one[4]]
        slow = [one for one in scope if one[4] and self.now - one[3] >= PATIENCE]
        return min(silent or slow, key=lambda one: one[3], default=None)

    @rule(address=st.sampled_from(ADDRESSES), roll=st.floats(0, 1, exclude_max=True))
    def arrive(self, address, roll):
        self.roll = roll
        source = source_of(address)
        room = [one for one in self.places if one[2] is self.is_known(source)]
        own = [one for one in self.places if one[1] == source]
        place, victim, why = self.door.arrive(address, self.now)
        if self.out.get(source) and self.now < self.until[source] and not self.is_known(source):
            assert (place, victim, why) == (None, None, "penalised")
            return
        assert why != "penalised"
        scope = None
        if len(own) == 2:
            assert why == "source_full"
            scope = own
        elif len(room) >= 3 and roll * 100 < 30 + 70 * (len(room) - 3) / 2:
            assert why == "crowded"
            scope = room
        else:
            assert why is None and victim is None
        expected = self.pick(scope) if scope else None
        assert (victim is None) == (expected is None)
        if expected:
            # Several may have come at the same time; which of them goes is all the same.
            gone = next(one for one in scope if one[0] is victim)
            assert gone[3:] == expected[3:]
            self.places.remove(gone)
        assert (place is None) == (scope is not None and expected is None)
        if place:
            self.places.append([place, source, self.is_known(source), self.now, False])

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def speaks(self, data):
        one = data.draw(st.sampled_from(self.places))
        self.door.speaks(one[0], self.now)
        if not one[4]:
            one[3:] = [self.now, True]

    @precondition(lambda self: self.places)
    @rule(data=st.data(), how=st.sampled_from(sorted(PENALTIES)))
    def fails(self, data, how):
        place, source = self.places.pop(data.draw(st.integers(0, len(self.places) - 1)))[:2]
        self.door.leave(place)
        seconds = self.door.failed(place, how, self.now)
        if self.is_known(source):
            assert seconds == 0
            return
        if self.until.get(source, self.now) <= self.now:
            self.until[source], self.out[source] = self.now, False
        self.until[source] = min(self.until[source] + PENALTIES[how], self.now + 60)
        reached = self.until[source] - self.now >= PENALTY_MIN
        assert seconds == (self.until[source] - self.now if reached and not self.out[source] else 0)
        self.out[source] |= reached

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def authenticates(self, data):
        at = data.draw(st.integers(0, len(self.places) - 1))
        place, source = self.places[at][:2]
        self.door.speaks(place, self.now)
        self.door.authenticated(place, "alice", self.now)
        if self.now - self.known.get(source, -KNOWN_RENEWAL) >= KNOWN_RENEWAL:
            self.known[source] = self.now
        self.until.pop(source, None)
        self.out.pop(source, None)
        self.door.leave(place)
        self.door.leave(place)
        del self.places[at]

    @rule(seconds=st.sampled_from([0.1, 1.0, PATIENCE, 7.0, 20.0, 60.0, KNOWN_RENEWAL, KNOWN_SECONDS / 2]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(age=st.sampled_from([0.0, 1.0, 10.0]))
    def overdue(self, age):
        late = {one[0] for one in self.places if not one[4] and one[3] <= self.now - age}
        assert set(self.door.overdue(self.now - age)) == late

    @invariant()
    def bounds_hold(self):
        assert len(self.door) == len(self.places) <= 2 * 5
        for known in (True, False):
            assert sum(one[2] is known for one in self.places) <= 5
        for source in set(map(source_of, ADDRESSES)):
            assert sum(one[1] == source for one in self.places) <= 2


TestDoor = Door.TestCase
TestDoor.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# The pace of one identity


def test_an_identity_has_a_burst_and_then_a_rate_and_others_have_their_own():
    pace = Pace(burst=3, rate=2.0)
    assert [pace.allows("mallory", 0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert pace.allows("alice", 0)
    assert [pace.allows("mallory", 0.5), pace.allows("mallory", 0.5)] == [True, False]
    assert [pace.allows("mallory", 1000) for _ in range(4)] == [True] * 3 + [False]


@given(st.lists(st.just(0.0) | st.floats(0, 10), min_size=1, max_size=200))
def test_never_more_than_burst_and_rate(gaps):
    pace, now, allowed = Pace(burst=5, rate=2.0), 0.0, 0
    for gap in gaps:
        now += gap
        allowed += pace.allows("mallory", now)
        assert allowed <= 5 + 2.0 * now + 1e-6
