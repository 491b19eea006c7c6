"""The send queue of one connection: bounded in time and in bytes, and fair between flows.

              .-- nothing waits --> express --------------------------------------------.
    append ---|                                                                          |--> take
              '-- the socket is full --> a flow with little in the queue --> sparse ----|     express first, then
                                     '-> any other flow --> its lane --> CoDel --> turns '     sparse, then lanes

The idea is FQ-CoDel's (RFC 8290): a flow that sends little, a ping or a keystroke, does not wait behind one that sends
much; those that send much take turns; and in each lane CoDel (RFC 8289) keeps the time short that packets wait.
What is different is the unit: entries stay in frames, one behind the other, so that a run of them is sealed where it
lies and nothing is made or kept for a single packet.

While nothing waits there is nothing to be fair about: then a batch becomes a payload as it is.
"""

import bisect
import collections

from bulkvpnd.protocol import packet

LANES = 16
"""Lanes of a connection; flows with the same hash modulo LANES share one (choice; RFC 8290 has 1024 queues for a whole
interface, and here each of several connections has its own)."""
QUANTUM = 3028
"""Bytes that a flow may have among the sparse between two turns of the lanes: two packets of 1514 bytes (RFC 8290
section 5.2.3 has one)."""
FRAMES_MAX = 24
"""Frames of one connection, express, sparse and in lanes: one for each lane and some for those that fill several
(choice)."""


class Lane:
    """Some flows of one connection. sink: the connection. The rest belongs to SendQueue."""

    __slots__ = ("bytes", "count", "deficit", "dropping", "epoch", "frames", "late_at", "next_drop", "sink", "sparse")

    def __init__(self, sink):
        self.sink = sink
        self.frames = collections.deque()
        self.bytes = 0
        self.deficit = 0
        self.sparse = 0  # bytes among the sparse in `epoch`
        self.epoch = -1
        # CoDel's state, RFC 8289 section 5.3
        self.late_at = 0.0  # first_above_time_
        self.next_drop = 0.0
        self.count = 0
        self.dropping = False


class SendQueue:
    """What waits for one connection.

    sink: the connection, for its lanes. pool: FramePool. drops: counter by cause. frame_size: largest payload, bytes.
    target, interval: CoDel's, seconds.
    """

    def __init__(self, sink, pool, drops, frame_size, target, interval):
        self.lanes = tuple(Lane(sink) for _ in range(LANES))
        self.budget = self.frame_size = frame_size
        """Bytes that one take should give; less on a slow path, so that a frame does not occupy it for long."""
        self.is_full = False  # the socket takes no more for now
        self.marked = 0
        self._pool = pool
        self._drops = drops
        self._target = target
        self._interval = interval
        self._express = collections.deque()
        self._sparse = collections.deque()
        self._turns = collections.deque()  # lanes with frames
        self._epoch = 0
        self._used = None
        self._held = 0

    def __bool__(self):
        return bool(self._express or self._sparse or self._turns)

    @property
    def bytes(self):
        """Bytes that wait."""
        return sum(one.end for one in (*self._express, *self._sparse)) + sum(lane.bytes for lane in self._turns)

    def delay(self, now):
        """Seconds that what waits longest has waited, of what came while the socket was full. now: seconds."""
        heads = [self._sparse[0]] if self._sparse else []
        heads += [lane.frames[0] for lane in self._turns]
        return max((now - frame.times[frame.first] for frame in heads), default=0.0)

    # In

    def append(self, batch, lanes, first, stop, now):
        """Takes the entries first … stop - 1 of the Frame `batch`; lanes[n] is the lane of entry n. now: seconds.

        What does not fit is dropped and counted. `batch` may come back with other buffers, its contents gone.
        """
        if not (self.is_full or self._sparse or self._turns) and batch.begin(stop) - batch.begin(first) <= self.budget:
            self._append_express(batch, first, stop)
            return
        while first < stop:
            lane = lanes[first]
            after = first + 1
            while after < stop and lanes[after] is lane:
                after += 1
            self._append_waiting(lane, batch, first, after, now)
            first = after

    def _append_express(self, batch, first, stop):
        express = self._express
        last = express[-1] if express else None
        if last is None or last.end + batch.begin(stop) - batch.begin(first) > self.frame_size:
            last = self._frame()
            if last is None:
                self._drops["queue_full"] += stop - first
                return
            express.append(last)
            if first == 0 and stop == len(batch.starts):
                last.exchange(batch)
                return
        last.copy(batch, first, stop)

    def _append_waiting(self, lane, batch, first, stop, now):
        begin, end = batch.begin(first), batch.begin(stop)
        if lane.epoch != self._epoch:
            lane.epoch, lane.sparse = self._epoch, 0
        is_sparse = not lane.frames and lane.sparse + end - begin <= QUANTUM
        frames = self._sparse if is_sparse else lane.frames
        while first < stop:
            last = frames[-1] if frames else None
            room = self.frame_size - last.end if last else 0
            fit = stop if end - begin <= room else _fitting(batch, first, room)
            if fit == first:
                last = self._frame() or self._make_room(lane)
                if last is None:
                    self._drops["queue_full"] += stop - first
                    return
                if not is_sparse and not frames:
                    self._turns.append(lane)
                    lane.deficit = 0
                    # RFC 8289 section 5.5: an empty queue ends what was late before.
                    lane.late_at, lane.dropping = 0.0, False
                frames.append(last)
                continue
            last.copy(batch, first, fit)
            last.times += [now] * (fit - first)
            if is_sparse:
                lane.sparse += batch.begin(fit) - begin
            else:
                lane.bytes += batch.begin(fit) - begin
            first, begin = fit, batch.begin(fit)

    def _frame(self):
        """A frame, if this connection may have another.

        One connection gets no more than are left for all others together, so that a few that stand still cannot take
        the pool from those that move (Choudhury and Hahne, "Dynamic queue length thresholds", 1998). One frame it gets
        in any case: however many stand still, that is less than each has to receive into.
        """
        if self._held and self._held >= min(FRAMES_MAX, self._pool.left):
            return None
        self._held += 1
        return self._pool.take()

    def _make_room(self, lane):
        """A frame at the expense of the longest lane, as RFC 8290 section 4.1 does; None if that is `lane` itself."""
        longest = max(self.lanes, key=lambda one: one.bytes)
        if longest is lane or not longest.frames:
            return None
        frame = longest.frames.popleft()
        longest.bytes -= frame.end - frame.begin(frame.first)
        if not longest.frames:
            self._turns.remove(longest)
        self._drops["queue_full"] += len(frame.starts) - frame.first
        frame.clear()
        return frame

    # Out

    def take(self, now):
        """The next payload: (frame, first, stop), entries first … stop - 1 of the Frame. None if nothing waits.

        now: seconds. The caller seals it and calls done() before anything else.
        """
        for frames in (self._express, self._sparse):
            if frames:
                return self._whole(frames)
        # Only now: flows that send a little all the time would else keep those in lanes waiting for ever.
        self._epoch += 1
        return self._take_turns(now) if self._turns else None

    def _whole(self, frames):
        frame = self._used = frames.popleft()
        return frame, 0, len(frame.starts)

    def _take_turns(self, now):
        """What the lane whose turn it is may send, where it lies; little pieces of several lanes become one frame."""
        gathered = self._gather()
        turns, budget = self._turns, self.budget
        while turns:
            lane = turns[0]
            self._drop_late(lane, now)
            frame = lane.frames[0]
            first, stop, size = self._share(lane, frame)
            if size > budget and self._divide(lane, frame, gathered):
                break
            if gathered.end and gathered.end + size > budget:
                break
            is_exhausted = self._advance(lane, frame, stop, size)
            if not gathered.end and (size >= budget // 2 or len(turns) <= 1):
                self._give_back(gathered)
                self._used = frame if is_exhausted else None
                return frame, first, stop
            gathered.copy(frame, first, stop)
            if is_exhausted:
                self._give_back(frame)
        self._used = gathered
        return gathered, 0, len(gathered.starts)

    def _share(self, lane, frame):
        """Of the frame at the head of a lane, what its turn allows: (first entry, the one behind the last, bytes)."""
        if lane.deficit <= 0:
            lane.deficit += self.budget
        first = frame.first
        begin = frame.begin(first)
        if frame.end - begin <= lane.deficit:
            return first, len(frame.starts), frame.end - begin
        stop = max(first + 1, _fitting(frame, first, lane.deficit))
        return first, stop, frame.begin(stop) - begin

    def _advance(self, lane, frame, stop, size):
        """Notes that `size` bytes, the entries up to `stop`, leave a lane. Returns whether its frame has no more."""
        lane.deficit -= size
        lane.bytes -= size
        frame.first = stop
        is_exhausted = stop == len(frame.starts)
        if is_exhausted:
            lane.frames.popleft()
        if not lane.frames:
            self._turns.popleft()
        elif lane.deficit <= 0:
            self._turns.rotate(-1)
        return is_exhausted

    def _gather(self):
        self._held += 1
        return self._pool.take()

    def _divide(self, lane, frame, gathered):
        """Moves a part of the super-packet at the head of a lane, so that others need not wait for all of it."""
        start = frame.starts[frame.first]
        divided = packet.divide(
            frame.buffer, start, frame.begin(frame.first + 1), self.budget - gathered.end, gathered.buffer, gathered.end
        )
        if divided is None:
            return False
        frame.starts[frame.first], end = divided
        gathered.starts.append(gathered.end + packet.LENGTH_SIZE)
        gathered.end = end
        moved = frame.starts[frame.first] - start
        lane.bytes -= moved
        lane.deficit -= moved
        if lane.deficit <= 0:
            self._turns.rotate(-1)
        return True

    def done(self):
        """What take gave is sealed; its frame is free."""
        if self._used is not None:
            self._give_back(self._used)
            self._used = None

    def _give_back(self, frame):
        self._held -= 1
        self._pool.give_back(frame)

    def _drop_late(self, lane, now):
        """CoDel's decision at the head of a lane, once for each take: RFC 8289 section 5.5, and Appendix A."""
        if self._is_in_time(lane, now):
            lane.late_at, lane.dropping = 0.0, False
            return
        if not lane.late_at:
            lane.late_at = now + self._interval
            return
        if now < lane.late_at:
            return
        if not lane.dropping:
            lane.dropping = True
            # It was dropping a short while ago: the rate that was right then is nearly right now.
            lane.count = lane.count - 2 if lane.count > 2 and now - lane.next_drop < 16 * self._interval else 1
            lane.next_drop = now
        while now >= lane.next_drop:
            lane.next_drop += self._interval / lane.count**0.5
            lane.count += 1
            if self._mark_or_drop(lane):
                return
            if self._is_in_time(lane, now):
                lane.late_at, lane.dropping = 0.0, False
                return

    def _is_in_time(self, lane, now):
        """Whether a lane is well: its next packet waits no longer than it may, or is its last."""
        frame = lane.frames[0]
        is_last = len(lane.frames) == 1 and frame.first == len(frame.starts) - 1
        return is_last or now - frame.times[frame.first] < self._target

    def _mark_or_drop(self, lane):
        """Returns whether the lane's next packet was marked: then it is sent, and says it for all that were due."""
        frame = lane.frames[0]
        number = frame.first
        if packet.mark_congestion(frame.buffer, frame.starts[number] + packet.VNET_SIZE):
            self.marked += 1
            return True
        self._drops["queue_delay"] += 1
        lane.bytes -= frame.begin(number + 1) - frame.begin(number)
        frame.first += 1
        if frame.first == len(frame.starts):
            lane.frames.popleft()
            self._give_back(frame)
        return False

    def drop_all(self, cause):
        """Drops everything that waits, and counts it under `cause`."""
        frames = [*self._express, *self._sparse]
        self._express.clear()
        self._sparse.clear()
        for lane in self._turns:
            frames += lane.frames
            lane.frames.clear()
            lane.bytes = 0
        self._turns.clear()
        self._epoch += 1
        # For a caller that failed between take and done.
        self.done()
        for frame in frames:
            self._drops[cause] += len(frame.starts) - frame.first
            self._give_back(frame)


def _fitting(frame, first, room):
    """The first entry from `first` on that does not fit into `room` bytes any more."""
    # An entry ends where the next one begins.
    stop = bisect.bisect_right(frame.starts, frame.begin(first) + room + packet.LENGTH_SIZE) - 1
    if stop == len(frame.starts) - 1 and frame.end - frame.begin(first) <= room:
        stop += 1
    return max(stop, first)
