"""dataplane.sendqueue: order, fairness, bounds, and CoDel's law. Time is an argument, so nothing here waits."""

import collections
import itertools
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from inmemory import SMALLEST, batch_of, entries_of, entry, identity, ones_sum, udp

from bulkvpnd.dataplane.frames import FramePool
from bulkvpnd.dataplane.sendqueue import FRAMES_MAX, LANES, QUANTUM, SendQueue
from bulkvpnd.protocol import packet

FRAME = 16 * 1024
TARGET, INTERVAL = 0.005, 0.1
NOT_ECT, ECT1, ECT0, CE = range(4)


def queue_of(frames=100, frame_size=FRAME, pool=None):
    """(queue, drops by cause)."""
    drops = collections.Counter()
    return SendQueue("sink", pool or FramePool(frame_size, frames), drops, frame_size, TARGET, INTERVAL), drops


def put(queue, entries, now=0.0, frame_size=FRAME, part=None):
    """Appends entries, those of `part` (first, stop) only; their flow is their lane. Returns the batch."""
    batch = batch_of(entries, frame_size)
    lanes = [queue.lanes[identity(one)[0] % LANES] for one in entries]
    queue.append(batch, lanes, *(part or (0, len(entries))), now)
    return batch


def get(queue, now=0.0):
    """The entries of the next payload, as a sender takes them; None if nothing waits."""
    taken = queue.take(now)
    if taken is None:
        return None
    frame, first, stop = taken
    entries = entries_of(frame.view[frame.begin(first) : frame.begin(stop)])
    assert len(entries) == stop - first
    queue.done()
    return entries


def drain(queue, now=0.0):
    return list(itertools.chain.from_iterable(iter(lambda: get(queue, now), None)))


def waiting(flow, count, size=100, **fields):
    return [entry(flow, number, size, **fields) for number in range(count)]


def numbers(entries):
    return [identity(one) for one in entries]


def test_how_long_the_longest_waits():
    queue, _ = queue_of()
    put(queue, waiting(1, 3), 1.0)
    assert queue.delay(9.0) == 0  # the socket takes it now
    drain(queue)
    queue.is_full = True
    put(queue, waiting(1, 157), 1.0)
    put(queue, waiting(1, 10), 2.0)
    put(queue, waiting(2, 1), 3.0)
    assert queue.delay(4.0) == 3
    assert numbers(get(queue, 4.0)) == [(2, 0)]
    assert len(get(queue, 4.0)) == 157
    assert queue.delay(4.0) == 2
    drain(queue, 4.0)
    assert queue.delay(4.0) == 0


# A batch that becomes a payload


def test_a_whole_batch_is_not_copied():
    queue, _ = queue_of()
    entries = waiting(1, 20)
    batch = batch_of(entries, FRAME)
    buffer = batch.buffer
    queue.append(batch, [queue.lanes[1]] * 20, 0, 20, 0.0)
    assert batch.buffer is not buffer and not batch.starts
    frame, first, stop = queue.take(0.0)
    assert frame.buffer is buffer and (first, stop) == (0, 20)
    queue.done()


@pytest.mark.parametrize("part", [(0, 19), (1, 20), (5, 6)])
@pytest.mark.parametrize("is_full", [False, True])
def test_a_part_of_a_batch_leaves_it_as_it_is(part, is_full):
    queue, _ = queue_of()
    queue.is_full = is_full
    entries = waiting(1, 20)
    batch = put(queue, entries, part=part)
    assert entries_of(batch.view[: batch.end]) == entries
    assert drain(queue) == entries[slice(*part)]


def test_a_batch_behind_another_shares_its_payload():
    queue, _ = queue_of()
    put(queue, waiting(1, 3))
    put(queue, waiting(2, 3))
    assert numbers(get(queue)) == [(flow, number) for flow in (1, 2) for number in range(3)]
    assert get(queue) is None


def test_what_was_first_on_a_full_socket_stays_first():
    """A packet that finds the socket free again must not pass those of its flow that still wait."""
    for count in (1, 100):
        queue, _ = queue_of()
        queue.is_full = True
        put(queue, waiting(1, count))
        queue.is_full = False
        put(queue, [entry(1, 1000)])
        assert numbers(drain(queue)) == [*((1, number) for number in range(count)), (1, 1000)]


# Fairness


def test_a_sparse_flow_passes_a_bulk_flow_that_was_first():
    queue, _ = queue_of()
    queue.is_full = True
    put(queue, waiting(1, 100))
    put(queue, [entry(2, 0)])
    put(queue, [entry(3, 0)])
    assert numbers(get(queue)) == [(2, 0), (3, 0)]
    assert {identity(one)[0] for one in drain(queue)} == {1}


def test_what_had_left_the_queue_when_the_socket_was_free_comes_first():
    queue, _ = queue_of()
    put(queue, waiting(1, 3))
    queue.is_full = True
    put(queue, [entry(1, 3)])
    put(queue, [entry(2, 0)])
    assert numbers(get(queue)) == [(1, 0), (1, 1), (1, 2)]
    assert numbers(get(queue)) == [(1, 3), (2, 0)]


def test_a_flow_is_sparse_for_two_packets_and_not_for_more():
    queue, _ = queue_of()
    queue.is_full = True
    put(queue, waiting(1, 10, 1000))
    size = QUANTUM // 2 - 4
    for number in range(3):
        put(queue, [entry(2, number, size)])
    assert numbers(get(queue)) == [(2, 0), (2, 1)]
    # The others were taken: it begins anew only when its lane is empty.
    put(queue, [entry(2, 3, 100)])
    assert (2, 3) not in numbers(get(queue))


def test_a_sparse_flow_stays_sparse_for_as_long_as_lanes_have_their_turns():
    queue, _ = queue_of()
    queue.is_full = True
    queue.budget = 1000
    put(queue, waiting(1, 150, 100))
    for number in range(10):
        put(queue, [entry(2, number, QUANTUM // 2)])
        assert numbers(get(queue)) == [(2, number)]
        assert {identity(one)[0] for one in get(queue)} == {1}


def test_a_flood_of_sparse_flows_does_not_starve_a_bulk_flow():
    queue, _ = queue_of()
    queue.is_full = True
    queue.budget = 2000
    put(queue, waiting(1, 10, 1000))
    seen = []
    for number in range(40):
        put(queue, [entry(2, 2 * number, 1400), entry(2, 2 * number + 1, 1400)])
        put(queue, [entry(3, 2 * number, 1400), entry(3, 2 * number + 1, 1400)])
        seen += numbers(get(queue))
    # What comes faster than it goes is no longer sparse.
    assert [one for one in seen if one[0] == 1]


def test_a_batch_of_more_than_the_budget_is_fair_from_the_start():
    queue, _ = queue_of()
    queue.budget = 2000
    put(queue, [*waiting(1, 50), entry(2, 0)])
    assert numbers(get(queue)) == [(2, 0)]
    assert len(get(queue)) == 2000 // 104


def test_a_lane_that_was_empty_owes_nothing():
    queue, _ = queue_of()
    queue.is_full = True
    queue.budget = 2000
    put(queue, [entry(1, 0, 9000)])
    assert numbers(get(queue)) == [(1, 0)]
    put(queue, waiting(1, 50))
    put(queue, waiting(2, 50))
    assert numbers(get(queue)) == [(1, number) for number in range(2000 // 104)]


def rounds(queue, flows, count):
    """Bytes that each flow got in `count` payloads, all of them with enough to send."""
    got = collections.Counter()
    for _ in range(count):
        entries = get(queue)
        for one in entries:
            got[identity(one)[0]] += len(one) + 4
    assert set(got) == set(flows)
    return got


@pytest.mark.parametrize("budget", [2000, 4000, FRAME])
def test_lanes_take_turns_by_bytes_and_not_by_packets(budget):
    queue, drops = queue_of(frame_size=4 * FRAME)
    queue.is_full = True
    sizes = {1: 1500, 2: 64, 3: 700}
    for flow, size in sizes.items():
        for _ in range(3):
            put(queue, waiting(flow, 60000 // (size + 4), size), frame_size=4 * FRAME)
    queue.budget = budget
    got = rounds(queue, sizes, 3 * (60000 // budget))
    assert max(got.values()) - min(got.values()) <= budget + 1504
    assert not drops


def test_a_flow_with_much_waiting_gets_no_more_than_one_with_little():
    queue, _ = queue_of(frame_size=4 * FRAME)
    queue.is_full = True
    for _ in range(4):
        put(queue, waiting(1, 600, 100), frame_size=4 * FRAME)
    put(queue, waiting(2, 200, 100), frame_size=4 * FRAME)
    queue.budget = 2000
    got = rounds(queue, (1, 2), 16)
    assert abs(got[1] - got[2]) <= 2000 + 104


def test_a_payload_has_no_more_than_the_budget_and_one_entry_when_that_is_larger():
    queue, _ = queue_of()
    queue.is_full = True
    put(queue, waiting(1, 40, 300))
    queue.budget = 2000
    while entries := get(queue):
        assert 1 <= len(entries) <= 2000 // 304
    put(queue, [entry(1, 0, 9000), entry(1, 1, 6000)])
    assert [len(get(queue)), len(get(queue)), get(queue)] == [1, 1, None]


def test_little_of_several_lanes_is_one_payload():
    queue, _ = queue_of()
    queue.is_full = True
    for flow in (1, 2, 3):
        put(queue, waiting(flow, 40, 96))
    entries = get(queue)
    assert numbers(entries) == [(flow, number) for flow in (1, 2, 3) for number in range(40)]
    assert get(queue) is None


def test_little_of_several_lanes_keeps_within_the_budget():
    queue, _ = queue_of()
    queue.is_full = True
    for flow in range(1, 9):
        put(queue, waiting(flow, 40, 96))
    queue.budget = 10000
    sizes = [100 * len(entries) for entries in iter(lambda: get(queue), None)]
    assert sum(sizes) == 8 * 4000 and max(sizes) <= 10000 and len(sizes) <= 5


# Super-packets


def super_packet(version, data, mss, number, flags):
    """A TCP super-packet as the kernel gives it, from port 1000 + number."""
    transport = 20 if version == 4 else 40
    size = 32 + len(data)
    # RFC 9293 section 3.1, with a timestamp (RFC 7323); the checksum field has the sum of the pseudo header.
    packet_ = bytearray(udp(0, number, transport + 40, tos=2, version=version)[:transport])
    packet_[6 if version == 6 else 9] = 6
    struct.pack_into(">H", packet_, 4 if version == 6 else 2, size if version == 6 else transport + size)
    if version == 4:
        packet_[10:12] = bytes(2)
        packet_[10:12] = (0xFFFF - ones_sum(bytes(packet_))).to_bytes(2, "big")
    addresses = bytes(packet_[12:20] if version == 4 else packet_[8:40])
    partial = ones_sum(addresses + struct.pack(">II", 6, size))
    tcp = struct.pack(">HHIIBBHHH", 1000 + number, 2000, 0xFFFFF000, 7, 8 << 4, flags, 512, partial, 0) + b"\1" * 12
    vnet = struct.pack("<BBHHHH", 1, 1 if version == 4 else 4, transport + 32, mss, transport, 16)
    return vnet + bytes(packet_) + tcp + data


def segments_of(entries):
    """The packets of wire size that they stand for, which the tests of protocol.packet hold."""
    segments = []
    for one in entries:
        whole = packet.plain_packets(one, 0, len(one), ())
        segments += [one[10:]] if whole is None else map(bytes, whole)
    return segments


@given(
    st.sampled_from([4, 6]),
    st.lists(st.tuples(st.integers(1, 9000), st.sampled_from([100, 536, 1448])), min_size=1, max_size=3),
    st.integers(QUANTUM, 9000), st.integers(0, 255), st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_super_packet_larger_than_the_budget_is_the_same_in_parts(version, sizes, budget, flags, has_others):
    queue, drops = queue_of()
    queue.is_full = True
    entries = [
        super_packet(version, bytes(n % 251 for n in range(size)), mss, number, flags)
        for number, (size, mss) in enumerate(sizes)
        if size > mss
    ]
    batch = batch_of(entries, 4 * FRAME)
    if has_others:
        put(queue, waiting(2, 40))
    if entries:
        queue.append(batch, [queue.lanes[1]] * len(entries), 0, len(entries), 0.0)
    queue.budget = budget
    sent = []
    while (before := queue.bytes) and (got := get(queue)):
        size = sum(len(one) + 4 for one in got)
        # A divided packet has its headers twice.
        assert before - size <= queue.bytes <= before - size + 86
        assert size <= budget and packet.inspect(
            memoryview(batch_of(got).view[:size]).toreadonly(), 0, size, packet.OFFLOADS, None, drops
        )
        sent += got
    assert segments_of(one for one in sent if one[0]) == segments_of(entries)
    assert len([one for one in sent if not one[0]]) == 40 * has_others
    assert not drops and queue._pool.in_use == 0


def test_divided_super_packets_take_no_more_than_their_turn():
    queue, _ = queue_of(frame_size=4 * FRAME)
    queue.is_full = True
    queue.budget = 4000
    entries = [super_packet(4, bytes(15000), 1000, number, 0) for number in range(4)]
    queue.append(batch_of(entries, 4 * FRAME), [queue.lanes[1]] * 4, 0, 4, 0.0)
    put(queue, waiting(2, 40, 1000), frame_size=4 * FRAME)
    got = collections.Counter()
    for _ in range(12):
        for one in get(queue):
            got[one[0]] += len(one) + 4
    assert abs(got[0] - got[1]) <= 2 * 4000


# Bounds


def test_no_more_frames_than_one_connection_may_have():
    queue, drops = queue_of(frames=1000)
    queue.is_full = True
    given = 0
    for number in range(3 * FRAMES_MAX):
        put(queue, [entry(1, 100 * number + n, 1000) for n in range(16)])
        given += 16
    assert queue._pool.in_use == FRAMES_MAX
    assert drops["queue_full"] == given - len(drain(queue)) > 0
    assert queue._pool.in_use == 0


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("stuck", [1, 5, 20, 100])
def test_one_that_moves_gets_a_frame_however_many_stand_still(stuck, is_full):
    pool = FramePool(FRAME, 16)
    for _ in range(stuck):
        queue, drops = queue_of(pool=pool)
        queue.is_full = True
        for number in range(20):
            put(queue, waiting(1, 15, 1000))
        assert drops["queue_full"] > 0
    assert pool.in_use <= pool.limit + stuck
    moving, drops = queue_of(pool=pool)
    moving.is_full = is_full
    for number in range(20):
        put(moving, [entry(1, number, 1000)])
        assert numbers(get(moving)) == [(1, number)]
    assert not drops


def test_the_longest_lane_pays_when_there_is_no_room():
    queue, drops = queue_of(frames=12)
    queue.is_full = True
    for number in range(20):
        put(queue, [entry(1, 15 * number + n, 1000) for n in range(15)])
    queue.budget = 3000
    assert numbers(get(queue)) == [(1, 0), (1, 1)]
    queue.budget = FRAME
    put(queue, waiting(2, 5, 1000))
    refused = drops["queue_full"]
    put(queue, waiting(3, 5, 1000))
    put(queue, waiting(4, 5, 1000))
    assert drops["queue_full"] > refused
    got = collections.defaultdict(list)
    for flow, number in numbers(drain(queue)):
        got[flow].append(number)
    assert got[2] == got[3] == got[4] == [0, 1, 2, 3, 4]
    # From the front, where what has waited longest is.
    assert got[1][0] > 2 and got[1] == list(range(got[1][0], got[1][0] + len(got[1])))
    assert not any(lane.bytes for lane in queue.lanes)


def test_the_longest_lane_itself_gets_no_room():
    queue, drops = queue_of(frames=4)
    queue.is_full = True
    for number in range(20):
        put(queue, [entry(1, 15 * number + n, 1000) for n in range(15)])
    got = numbers(drain(queue))
    assert got == [(1, number) for number in range(len(got))]
    assert len(got) + drops["queue_full"] == 300


def test_everything_is_dropped_and_counted():
    queue, drops = queue_of()
    put(queue, waiting(4, 2))
    queue.is_full = True
    put(queue, waiting(1, 100))
    put(queue, waiting(2, 1))
    assert queue.bytes == 103 * 104
    assert numbers(get(queue)) == [(4, 0), (4, 1)]
    queue.budget = 1000
    assert numbers(get(queue)) == [(2, 0)]
    partly = len(get(queue))
    queue.drop_all("connection_lost")
    assert drops == {"connection_lost": 100 - partly}
    assert (queue.bytes, bool(queue), get(queue), queue._pool.in_use) == (0, False, None, 0)


# CoDel


class Path:
    """A lane that always has more, and a path that takes one packet every STEP seconds."""

    STEP = 0.001

    def __init__(self, tos=NOT_ECT, now=0.0):
        self.queue, self.drops = queue_of(frame_size=4 * FRAME)
        self.queue.is_full = True
        self.queue.budget = 100
        self.numbers = itertools.count()
        self.tos = tos
        self.now = now
        self.dropped_at = []
        self.marked_at = []

    def feed(self, count):
        entries = [entry(1, next(self.numbers), 100, tos=self.tos) for _ in range(count)]
        put(self.queue, entries, self.now, frame_size=4 * FRAME)

    def step(self):
        entries = get(self.queue, self.now)
        self.dropped_at += [self.now] * (self.drops["queue_delay"] - len(self.dropped_at))
        self.marked_at += [self.now] * (self.queue.marked - len(self.marked_at))
        self.now += self.STEP
        return entries

    def run(self, seconds, keep):
        """With `keep` packets waiting, so that each waits about `keep` steps."""
        for _ in range(round(seconds / self.STEP)):
            missing = keep - self.queue.bytes // 104
            if missing > 0:
                self.feed(missing)
            yield self.step()


def run(path, seconds, keep):
    return [one for one in path.run(seconds, keep)]


@pytest.mark.parametrize("now", [0.0, 1e6])
def test_nothing_is_dropped_below_the_target(now):
    path = Path(now=now)
    run(path, 3, 4)
    assert not path.dropped_at and not path.drops


@pytest.mark.parametrize("now", [0.0, 1e6])
def test_drops_come_after_one_interval_and_then_by_the_square_root_law(now):
    path = Path(now=now)
    run(path, 1.0, 60)
    first = path.dropped_at[0]
    # The first packets are fresh; from the one that waited TARGET on it takes one interval.
    assert INTERVAL <= first - now <= INTERVAL + TARGET + 3 * path.STEP
    expected, at = [], first
    for count in range(1, len(path.dropped_at) + 1):
        expected.append(at)
        at += INTERVAL / math.sqrt(count)
    # More than ten in 0.9 s, where one an interval would have been nine.
    assert len(path.dropped_at) > 12
    assert path.dropped_at == pytest.approx(expected, abs=1.5 * path.STEP)


def test_dropping_stops_below_the_target():
    path = Path()
    run(path, 0.5, 60)
    path.dropped_at.clear()
    path.drops.clear()
    while path.queue.bytes > 3 * 104:
        path.step()
    before = len(path.dropped_at)
    run(path, 1.0, 4)
    assert len(path.dropped_at) == before


def test_after_a_pause_it_takes_an_interval_again():
    """Lateness that ended with the queue empty says nothing of what comes later."""
    path = Path()
    run(path, 0.05, 60)
    path.queue.budget = FRAME
    assert len(get(path.queue, path.now)) > 2 and not path.drops
    assert get(path.queue, path.now) is None
    path.queue.budget = 100
    path.now += 10
    path.feed(60)
    path.now += 2 * TARGET
    for _ in range(40):
        path.step()
    assert not path.dropped_at


def test_the_last_packet_of_a_lane_is_never_dropped():
    path = Path()
    run(path, 1.0, 60)
    # A long time without a take: many drops are due.
    for _ in range(3):
        path.feed(5)
        path.now += 30
        last = None
        while entries := path.step():
            last = entries
        assert numbers(last)[-1] == (1, next(path.numbers) - 1)


@pytest.mark.parametrize("tos", [ECT0, ECT1, CE])
def test_what_can_be_marked_is_marked_and_not_dropped(tos):
    path = Path(tos=tos)
    sent = list(itertools.chain.from_iterable(run(path, 1.0, 60)))
    assert not path.drops
    marked = [one for one in sent if one[11] & 3 == CE]
    if tos != CE:
        assert len(marked) == path.queue.marked == len(path.marked_at) > 12
    assert all(ones_sum(one[10:30]) == 0xFFFF for one in sent)
    assert numbers(sent) == [(1, number) for number in range(len(sent))]


def test_one_packet_is_marked_once_however_many_are_due():
    path = Path(tos=ECT0)
    run(path, 1.0, 60)
    marked = path.queue.marked
    path.now += 30
    sent = path.step()
    assert [one[11] & 3 for one in sent] == [CE]
    assert path.queue.marked == marked + 1


# Whatever happens, in whatever order


class Model(RuleBasedStateMachine):
    """Connections of one pool against what went into them: nothing is lost unseen, made twice or overtaken."""

    @initialize(frames=st.sampled_from([1, 2, 5, 12, 200]), queues=st.integers(1, 3))
    def start(self, frames, queues):
        self.now = 0.0
        self.pool = FramePool(FRAME, frames)
        self.queues = [queue_of(pool=self.pool) for _ in range(queues)]
        self.last = collections.Counter()  # number of the last packet of each (queue, flow)
        self.sent = collections.Counter()
        self.given = [0] * queues
        self.done = [0] * queues

    index = st.integers(0, 2)

    def pick(self, index):
        index %= len(self.queues)
        return index, *self.queues[index]

    @rule(
        index=index, cut=st.integers(0, 4),
        runs=st.lists(
            st.tuples(
                # The last two share a lane with the first.
                st.sampled_from([0, 1, 2, 3, LANES, 2 * LANES]),
                st.sampled_from([1, 1, 2, 5, 12]), st.integers(SMALLEST, 1500), st.sampled_from([NOT_ECT, ECT0]),
            ),
            min_size=1, max_size=4,
        ),
    )  # fmt: skip
    def append(self, index, cut, runs):
        index, queue, drops = self.pick(index)
        entries, room = [], FRAME
        for flow, count, size, tos in runs:
            for _ in range(min(count, room // (size + 4))):
                room -= size + 4
                self.last[index, flow] += 1
                entries.append(entry(flow, self.last[index, flow], size, tos=tos))
        first = min(cut, len(entries) - 1) if entries else 0
        if not entries:
            return
        bytes_before, dropped = queue.bytes, drops.total()
        put(queue, entries, self.now, part=(first, len(entries)))
        self.given[index] += len(entries) - first
        size = sum(len(one) + 4 for one in entries[first:])
        if drops.total() == dropped:
            assert queue.bytes == bytes_before + size
        else:
            assert queue.bytes < bytes_before + size

    @rule(index=index, is_full=st.booleans())
    def fill(self, index, is_full):
        self.pick(index)[1].is_full = is_full

    @rule(index=index, budget=st.sampled_from([1000, 4000, FRAME]))
    def path_is_measured(self, index, budget):
        self.pick(index)[1].budget = budget

    @rule(milliseconds=st.sampled_from([1, 10, 150]))
    def time_passes(self, milliseconds):
        self.now += milliseconds / 1000

    @invariant()
    def nothing_waits_longer_than_it_can(self):
        for queue, _ in self.queues:
            assert 0 <= queue.delay(self.now) <= self.now

    @rule(index=index, count=st.integers(1, 4))
    def take(self, index, count):
        for _ in range(count):
            self.take_one(*self.pick(index))

    def take_one(self, index, queue, drops):
        bytes_before, dropped = queue.bytes, drops.total()
        entries = get(queue, self.now)
        if entries is None:
            assert not queue and queue.bytes == 0 and not any(lane.bytes for lane in queue.lanes)
            return False
        size = sum(len(one) + 4 for one in entries)
        assert entries and size <= FRAME
        assert queue.bytes == bytes_before - size or drops.total() > dropped
        for one in entries:
            flow, number = identity(one)
            assert number > self.sent[index, flow], "overtaken, or sent twice"
            self.sent[index, flow] = number
            assert ones_sum(one[10:30]) == 0xFFFF
        self.done[index] += len(entries)
        return True

    @rule(index=index, cause=st.sampled_from(["stalled", "closing"]))
    @precondition(lambda self: self.now > 0.1)
    def drop_all(self, index, cause):
        _, queue, drops = self.pick(index)
        before = drops.copy()
        queue.drop_all(cause)
        assert not queue and queue.bytes == 0
        assert set(drops - before) <= {cause}

    @invariant()
    def the_memory_is_bounded(self):
        if hasattr(self, "pool"):
            # One that has none may have one more than the pool has.
            assert self.pool.in_use <= self.pool.limit + len(self.queues)
            assert self.pool.in_use <= FRAMES_MAX * len(self.queues)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for index, (queue, drops) in enumerate(self.queues):
            while self.take_one(index, queue, drops):
                self.now += 0.001
            assert self.done[index] + drops.total() == self.given[index]
        assert self.pool.in_use == 0


Model.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase
