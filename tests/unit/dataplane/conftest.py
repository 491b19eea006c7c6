"""Connections over real sockets: two that face each other, and one that faces a peer by hand that may misbehave."""

import os

import gevent
import pytest
from gevent.hub import get_hub
from inmemory import until
from ends import OURS, THEIRS, End, Peer, joined


@pytest.fixture
def ends():
    """([Peer], [End]) that a test made. They end with it, and give back descriptors, frames and watchers."""
    peers, ends = [], []
    gevent.sleep(0.001)  # makes the hub, which has descriptors of its own
    # Counted as below, with the timer of until() itself.
    before = until(lambda: (set(os.listdir("/proc/self/fd")), get_hub().loop.activecnt))
    with gevent.Timeout(30):
        yield peers, ends
        for peer in peers:
            peer.close()
        for end in ends:
            end.connection.close("done")
        until(lambda: all(end.end for end in ends), "every connection ends")
        until(lambda: all(end.socket.fileno() == -1 for end in ends), "every socket is closed")
        assert [end.worker.pool.in_use for end in ends] == [0] * len(ends)
        assert not any(end.connection.queued for end in ends)
    until(lambda: get_hub().loop.activecnt <= before[1], "every watcher is stopped")
    # Fewer where the garbage of earlier tests had sockets.
    until(lambda: set(os.listdir("/proc/self/fd")) <= before[0], "every descriptor is closed")


@pytest.fixture
def facing(ends):
    """Makes (Peer, End). is_small: between them there is room for some 30 KiB; the rest as End."""

    def make(is_small=False, **arguments):
        ours, theirs = joined(is_small)
        made = Peer(theirs), End(ours, (OURS, THEIRS), **arguments)
        for one, kept in zip(made, ends, strict=True):
            kept.append(one)
        return made

    return make


@pytest.fixture
def pair(ends):
    """Makes two Ends that face each other. Arguments as facing."""

    def make(is_small=False, **arguments):
        ours, theirs = joined(is_small)
        made = End(ours, (OURS, THEIRS), **arguments), End(theirs, (THEIRS, OURS), **arguments)
        ends[1].extend(made)
        return made

    return make
