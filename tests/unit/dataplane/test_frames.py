"""dataplane.frames: what a frame holds, and how many there are."""

import mmap

from hypothesis import given, settings
from hypothesis import strategies as st
from inmemory import SMALLEST, batch_of, entries_of, entry

from bulkvpnd.dataplane.frames import FramePool, memory, release

LIMIT = 16 * 1024


def contents(one):
    """The entries of a frame, once by their lengths and once by where the frame says that they start."""
    entries = entries_of(one.view[: one.end])
    assert [bytes(one.view[start : one.begin(n + 1)]) for n, start in enumerate(one.starts)] == entries
    return entries


ENTRIES = st.lists(st.integers(SMALLEST, 300), max_size=20).map(
    lambda sizes: [entry(0, number, size) for number, size in enumerate(sizes)]
)


@given(ENTRIES, ENTRIES, st.data())
@settings(max_examples=100, deadline=None)
def test_a_run_is_copied_behind_what_is_there(there, others, data):
    first = data.draw(st.integers(0, len(others)))
    stop = data.draw(st.integers(first, len(others)))
    frame, other = batch_of(there, LIMIT), batch_of(others, LIMIT)
    frame.copy(other, first, stop)
    assert contents(frame) == there + others[first:stop]
    assert contents(other) == others


def test_exchange_swaps_all_that_a_batch_is():
    ones, others = [entry(1, 1)], [entry(2, 1), entry(2, 2, 200)]
    first, second = batch_of(ones, LIMIT), batch_of(others, LIMIT)
    buffers = first.buffer, second.buffer
    first.exchange(second)
    assert (contents(first), contents(second)) == (others, ones)
    assert (second.buffer, first.buffer) == buffers


def test_a_frame_that_is_cleared_is_empty():
    frame = batch_of([entry(1, 1), entry(1, 2)], LIMIT)
    frame.times += [0.0, 0.0]
    frame.first = 1
    frame.clear()
    assert (contents(frame), frame.times, frame.first, frame.begin(0)) == ([], [], 0, 0)


def test_memory_that_is_released_is_zero_and_usable():
    frame = batch_of([entry(1, 1)], LIMIT)
    frame.clear()
    frame.release_memory()
    assert not any(frame.view)
    frame.add(entry(1, 2))
    assert contents(frame) == [entry(1, 2)]


def test_how_many_frames_may_still_be_filled():
    pool = FramePool(LIMIT, 3)
    taken = [pool.take() for _ in range(3)]
    assert (pool.in_use, pool.left) == (3, 0)
    pool.give_back(taken.pop())
    assert (pool.in_use, pool.left) == (2, 1)


def test_frames_beyond_the_limit_are_not_kept():
    pool = FramePool(LIMIT, 2)
    taken = [pool.take() for _ in range(5)]
    assert (pool.in_use, pool.left) == (5, -3) and len(set(map(id, taken))) == 5
    for frame in taken:
        pool.give_back(frame)
    assert (pool.in_use, pool.left, pool.made) == (0, 2, 2)


def test_the_frame_used_last_comes_first_and_empty():
    pool = FramePool(LIMIT, 2)
    first, second = pool.take(), pool.take()
    first.add(entry(1, 1))
    first.first = 1
    pool.give_back(second)
    pool.give_back(first)
    again = pool.take()
    assert again is first and (contents(again), again.first) == ([], 0)


def test_memory_behind_what_counts_is_released():
    buffer = memory(5 * mmap.PAGESIZE)
    for start, kept in ((2 * mmap.PAGESIZE, 2), (mmap.PAGESIZE + 1, 2), (1, 1), (0, 0), (5 * mmap.PAGESIZE, 5)):
        buffer[:] = b"x" * len(buffer)
        release(buffer, start)
        assert bytes(buffer) == b"x" * kept * mmap.PAGESIZE + bytes((5 - kept) * mmap.PAGESIZE)


def test_only_free_frames_give_their_memory_back():
    pool = FramePool(LIMIT, 2)
    used, free = pool.take(), pool.take()
    for frame in (used, free):
        frame.add(entry(1, 1))
    pool.give_back(free)
    pool.release_memory()
    assert contents(used) == [entry(1, 1)]
    assert not any(free.view)
