"""dataplane.connection: one that takes the place of another loses nothing and overtakes nothing."""

import time

import pytest
from inmemory import entries_of, until
from ends import in_order, many, payload

from bulkvpnd.dataplane.connection import MOVE_TIME
from bulkvpnd.dataplane.frames import IDLE_TIME
from bulkvpnd.protocol import frame


@pytest.fixture
def replaced(facing):
    """(Peer, End) of a connection and of the one that takes over from it, in one worker."""
    peer, old = facing()
    fresh_peer, fresh = facing(worker=old.worker)
    fresh.connection.follow(old.connection)
    return peer, old, fresh_peer, fresh


@pytest.mark.parametrize("how", ["moved", "lost", "late"])
def test_nothing_comes_from_a_successor_before_all_that_was_sent_before_it(replaced, how):
    peer, old, fresh_peer, fresh = replaced
    fresh_peer.send(frame.PING, bytes(8))
    fresh_peer.send(frame.DATA, payload(*many(3, first=3)))
    # The successor is up, and answers: only what comes behind the first PING waits.
    assert (frame.PONG, bytes(8)) in (fresh_peer.frame(), fresh_peer.frame())
    for number in range(3):
        peer.send(frame.DATA, payload(*many(1, first=number)))
        until(lambda: len(old.written) == number + 1)
    if how == "moved":
        peer.send(frame.CLOSE, b"moved")
    elif how == "lost":
        peer.reset()
    else:
        old.connection.move()
        now = time.monotonic()
        fresh.connection.tick(now + MOVE_TIME)
        assert not fresh.end, "it does not listen, so it does not miss anything"
        old.connection.tick(now + MOVE_TIME + 1)
        assert old.end[0] == "moving took too long"
    until(lambda: len(old.written) == 6)
    assert in_order(old.written)
    assert not old.worker.bugs and not fresh.end


def test_memory_is_not_given_back_before_what_came_is_through(replaced):
    peer, old, fresh_peer, fresh = replaced
    fresh_peer.write(fresh_peer.sealed(frame.PING, bytes(8)) + fresh_peer.sealed(frame.DATA, payload(*many(90))))
    assert (frame.PONG, bytes(8)) in (fresh_peer.frame(), fresh_peer.frame())
    now = time.monotonic()
    for second in range(IDLE_TIME + 2):
        fresh.connection.tick(now + second)
    peer.send(frame.CLOSE, b"moved")
    until(lambda: len(old.written) == 90 or fresh.end)
    assert old.written == many(90)


def test_what_is_queued_is_sent_before_a_connection_moves_and_what_comes_still_counts(facing):
    peer, end = facing(is_small=True)
    end.give(many(80))
    until(lambda: end.connection._full_since)
    end.connection.move()
    end.connection.close("replaced")  # the main process is later, and is not to cut it short
    frames = []
    while not frames or frames[-1][0] != frame.CLOSE:
        frames.append(peer.frame())
    assert frames[-1] == (frame.CLOSE, b"moved")
    assert [one for kind, content in frames if kind == frame.DATA for one in entries_of(content)] == many(80)
    peer.send(frame.DATA, payload(*many(5)))
    until(lambda: len(end.written) == 5)
    assert not end.end
    peer.send(frame.CLOSE, b"moved")
    until(lambda: end.end)
    assert end.end[1:] == (True, None) and not end.worker.drops.total()


def test_one_end_may_have_moved_long_before_the_other(facing):
    peer, end = facing()
    peer.send(frame.CLOSE, b"moved")
    until(lambda: end.connection.inbound_ended.is_set())
    # Its successor is not up at this end yet: what there is to send still goes this way.
    end.give(many(3))
    assert peer.data(3) == many(3)
    assert not end.end
    end.connection.move()
    assert list(peer.frames())[-1] == (frame.CLOSE, b"moved")
    until(lambda: end.end)
    assert end.end[1]


def test_an_idle_connection_moves_at_once(pair):
    one, other = pair()
    until(lambda: one.worker.live and other.worker.live)
    one.connection.move()
    until(lambda: one.connection._outbound_ended)
    assert not one.end and not other.end
    other.connection.move()
    until(lambda: one.end and other.end)
    assert one.end[1] and other.end[1]
