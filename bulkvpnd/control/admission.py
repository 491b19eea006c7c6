"""Who may begin a handshake, and how often: what is asked before anything is spent on a stranger. No sockets, no clock.

    accepted --> its source has a penalty? ----------------------> dropped
        |
        +------> too many, of its source or in all? -------------> one is dropped: who had the most time, else itself
        |
      silent --first byte--> speaking --certificate verified--> its source is known for a day
        |                       |                              (few for each identity)
        '-- deadline, failure --'--> a penalty for the source; enough of them, and it is turned away for a time

The model is OpenSSH: MaxStartups, PerSourceMaxStartups, PerSourcePenalties of sshd_config(5). It differs in whom a
crowd costs the place. sshd drops the newcomer, so idle connections that come back keep everybody out. Here one goes
that has said nothing yet, the longest first: a client that speaks at once, as ours does, is never of these.

A source is an IPv4 address, or an IPv6 /64: the least that one host is given to choose addresses from (RFC 4291). Wider
prefixes would make strangers answer for each other: customers of one provider, in IPv4 and in IPv6.
"""

import dataclasses
import random
from socket import AF_INET, AF_INET6, inet_pton  # for its parser alone: a tenth of the time of ipaddress

PATIENCE = 3.0
"""Seconds of speaking after which a connection may lose its place to a newcomer. TLS and HELLO are four round trips, so
this is time enough from anywhere (choice)."""
PENALTIES = {"left": 1.0, "failed": 5.0, "timeout": 10.0}
"""Seconds for a connection that went without a word, whose handshake failed, that used up its time (sshd's noauth,
authfail, grace-exceeded)."""
PENALTY_MIN = 15.0
"""Seconds of penalties that a source collects before it is turned away: a few failures happen to anybody (sshd's)."""
KNOWN_SECONDS = 86400.0
"""How long a source is known after a client authenticated from it; then the address may be another's (choice)."""
KNOWN_RENEWAL = 3600.0
"""Seconds after which it is put down again that a client authenticated from a source (choice)."""
KNOWN_PER_IDENTITY = 64
"""How often one identity may have a source put down: at once, and then for each KNOWN_SECONDS. It is enough for a phone
that is elsewhere twice an hour; whoever has a /48 gets at most twice as many sources, 1 % of SOURCES_MAX (choice)."""
SOURCES_MAX = 16384
"""Sources that are remembered, penalised and known each: about 4 MiB. The oldest are forgotten first (choice)."""
BURST, RATE = 256, 16.0
"""Handshakes of one identity: at once, and then for each second. A client of 64 connections may lose all of them four
times in a row; 16 handshakes a second are about 5 % of a CPU, and half of one if each is made as dear as
control.tls.PEER_MAX allows (choice)."""
_NONE = (float("-inf"), False)
"""A penalty that was over long ago."""
IDENTITIES_MAX = 16384
"""Identities whose rate is remembered; a pool seldom has more addresses (choice)."""


def source_of(address):
    """What is counted as one source: the packed IPv4 address, or the packed upper half of an IPv6 address.

    address: text as from accept(2), IPv4 in IPv6 too.
    """
    if ":" not in address:
        return inet_pton(AF_INET, address)
    packed = inet_pton(AF_INET6, address.partition("%")[0])
    # ::ffff:0:0/96, RFC 4291 section 2.5.5.2: what an IPv6 socket makes of IPv4.
    return packed[12:] if packed[:12] == bytes(10) + b"\xff\xff" else packed[:8]


@dataclasses.dataclass(eq=False, slots=True)
class Place:
    """One connection that is not authenticated. since: when it came or, if it speaks, when it began to; seconds."""

    source: bytes
    since: float
    room: "_Room"
    speaks: bool = False


class _Room:
    """Places of one kind, each dictionary in the order in which `since` grew."""

    def __init__(self):
        self.silent = {}
        self.speaking = {}

    def __len__(self):
        return len(self.silent) + len(self.speaking)


class Admission:
    """The places for connections that are not authenticated yet.

    start, rate, full: from `start` places on somebody is dropped with a chance of `rate` percent, which grows to 100
    at `full`. Known sources and strangers are counted apart, so that strangers never take the places of known ones.
    per_source: places for one source. penalty_max: seconds, the longest time that a source is turned away; 0: never.
    chance: () -> number from 0 to 1.
    """

    def __init__(self, start, rate, full, per_source, penalty_max, chance=random.random):
        self._chance = chance
        self.set_limits(start, rate, full, per_source, penalty_max)
        self._rooms = {True: _Room(), False: _Room()}  # whether the source is known: its room
        self._places = {}  # source: [Place]
        self._penalties = {}  # source: (when it has served them, whether it is turned away until then)
        self._known = {}  # source: when it was put down that a client authenticated from there
        self._marks = Pace(KNOWN_PER_IDENTITY, KNOWN_PER_IDENTITY / KNOWN_SECONDS)
        self.counters = dict.fromkeys(("admitted", "crowded", "source_full", "penalised", "failed"), 0)

    def set_limits(self, start, rate, full, per_source, penalty_max):
        """Other limits from now on. Places and penalties that were given stay."""
        self._start, self._rate, self._full = start, rate, full
        self._per_source = per_source
        self._penalty_max = penalty_max

    def __len__(self):
        return sum(map(len, self._rooms.values()))

    def arrive(self, address, now):
        """A connection was accepted.

        Returns (its Place or None, the Place that has to go for it or None, the counter that tells why or None).
        """
        source = source_of(address)
        if self.is_penalised(source, now):
            self.counters["penalised"] += 1
            return None, None, "penalised"
        room = self._rooms[self.is_known(source, now)]
        # In the order in which they came; who came first may have begun to speak last.
        own = sorted(self._places.get(source, ()), key=lambda one: one.since)
        victim = why = None
        if len(own) >= self._per_source:
            why = "source_full"
            victim = _slowest((one for one in own if not one.speaks), (one for one in own if one.speaks), now)
        elif self._is_crowded(len(room)):
            why = "crowded"
            victim = _slowest(room.silent, room.speaking, now)
        if why:
            self.counters[why] += 1
            if victim is None:
                return None, None, why
            self.leave(victim)
        place = Place(source, now, room)
        room.silent[place] = None
        self._places.setdefault(source, []).append(place)
        self.counters["admitted"] += 1
        return place, victim, why

    def _is_crowded(self, count):
        """The rule of MaxStartups, sshd_config(5)."""
        if count >= self._full:
            return True
        return count >= self._start and self._chance() * 100 < (
            self._rate + (100 - self._rate) * (count - self._start) / (self._full - self._start)
        )

    def speaks(self, place, now):
        """The first bytes of a connection came."""
        if place.room.silent.pop(place, self) is None:
            place.speaks, place.since = True, now
            place.room.speaking[place] = None

    def overdue(self, before):
        """The silent places that are older than `before`, a time; the caller lets each fail."""
        found = []
        for room in self._rooms.values():
            for place in room.silent:
                if place.since > before:
                    break
                found.append(place)
        return found

    def authenticated(self, place, identity, now):
        """The certificate at the other end is good: whoever else fails from there, this source is not locked out.

        Of one identity only so many sources are known, or it could push those of all others out of the table.
        """
        is_fresh = now - self._known.get(place.source, float("-inf")) < KNOWN_RENEWAL
        if not is_fresh and self._marks.allows(identity, now):
            _remember(self._known, place.source, now, SOURCES_MAX)
        self._penalties.pop(place.source, None)

    def failed(self, place, how, now):
        """A connection ended without a good certificate. how: of PENALTIES.

        Returns the seconds for which its source is turned away, if it is so from now on, else 0.
        """
        self.counters["failed"] += 1
        source = place.source
        if not self._penalty_max or self.is_known(source, now):
            return 0.0
        until, is_out = self._penalties.get(source, _NONE)
        if until <= now:
            until, is_out = now, False
        until = min(until + PENALTIES[how], now + self._penalty_max)
        reached = until - now >= min(PENALTY_MIN, self._penalty_max)
        _remember(self._penalties, source, (until, is_out or reached), SOURCES_MAX)
        return until - now if reached and not is_out else 0.0

    def leave(self, place):
        """A connection has no need of its place any more; more than once does no harm."""
        place.room.silent.pop(place, None)
        place.room.speaking.pop(place, None)
        own = self._places.get(place.source, [])
        if place in own:
            own.remove(place)
            if not own:
                del self._places[place.source]

    def is_penalised(self, source, now):
        """Whether a source is turned away."""
        until, is_out = self._penalties.get(source, _NONE)
        return is_out and now < until

    def is_known(self, source, now):
        """Whether a client authenticated from there lately."""
        return now - self._known.get(source, float("-inf")) < KNOWN_SECONDS


class Pace:
    """How often each identity may do something, such as make a connection: a token bucket for each, in a bounded table.

    burst: how often at once. rate: how often for each second.
    """

    def __init__(self, burst=BURST, rate=RATE):
        self._burst, self._rate = burst, rate
        self._buckets = {}  # identity: (tokens, when)

    def allows(self, identity, now):
        """Whether it may now. now: seconds."""
        tokens, since = self._buckets.get(identity, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        allowed = tokens >= 1
        _remember(self._buckets, identity, (tokens - allowed, now), IDENTITIES_MAX)
        return allowed


def _slowest(silent, speaking, now):
    """Who has to go: the first of `silent`, else the first of `speaking` if its time was enough, else None."""
    first = next(iter(silent), None)
    if first is None:
        first = next(iter(speaking), None)
        if first is not None and now - first.since < PATIENCE:
            return None
    return first


def _remember(table, key, value, most):
    """Puts the newest last, and drops the oldest of more than `most`."""
    table.pop(key, None)
    table[key] = value
    if len(table) > most:
        del table[next(iter(table))]
