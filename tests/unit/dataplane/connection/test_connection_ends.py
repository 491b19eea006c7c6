"""dataplane.connection: how it ends, by either end, by silence and by a bug."""

import fcntl
import termios
import time

import gevent
import pytest
from inmemory import Worker, entries_of, entry, until
from ends import CIPHER, OURS, End, many, payload

from bulkvpnd.dataplane.connection import CLOSE_TIME
from bulkvpnd.protocol import frame
from bulkvpnd.protocol.keys import Sealer


def test_an_end_without_close_is_not_clean(facing):
    peer, end = facing()
    peer.send(frame.DATA, payload(entry(1, 1)))
    peer.close()
    assert until(lambda: end.end) == ("the peer closed it without CLOSE", False, None)
    assert end.written == [entry(1, 1)]


def test_a_reset(facing):
    peer, end = facing()
    peer.reset()
    assert until(lambda: end.end) == ("Connection reset by peer", False, None)


@pytest.mark.parametrize("word, said", [(b"shutdown", "shutdown"), (b"\x1b[2Jnonsense", "unknown"), (b"", "unknown")])
def test_the_peer_closes(facing, word, said):
    peer, end = facing()
    peer.write(peer.sealed(frame.DATA, payload(entry(1, 1))) + peer.sealed(frame.CLOSE, word) + b"what comes behind")
    assert until(lambda: end.end) == (f"closed by the peer: {said}", True, None)
    assert end.written == [entry(1, 1)]


@pytest.mark.parametrize("word", [b"done", b"moved"])
def test_what_comes_behind_close_does_not_count(facing, word):
    """Nor if it is authentic, and came with it."""
    peer, end = facing()
    peer.write(peer.sealed(frame.CLOSE, word) + peer.sealed(frame.DATA, payload(entry(1, 1))))
    until(lambda: end.connection.inbound_ended.is_set())
    peer.send(frame.DATA, payload(entry(1, 2)))
    if word == b"moved":
        end.give(many(1))
        assert peer.data(1) == many(1), "the other direction goes on"
        assert not end.end
    else:
        until(lambda: end.end)
    assert not end.written and end.connection.frames_in == 1


def test_we_close(facing):
    peer, end = facing()
    end.connection.close("replaced")
    end.connection.close("done")
    assert [kind for kind, _ in peer.frames()][-1] == frame.CLOSE
    assert end.end == ("replaced", True, None)


def test_two_that_close_at_once(pair):
    one, other = pair()
    gevent.sleep(0.01)
    one.connection.close("done")
    other.connection.close("shutdown")
    until(lambda: one.end and other.end)


def test_close_comes_behind_what_is_half_sent(facing):
    peer, end = facing(is_small=True)
    end.give(many(80))
    until(lambda: end.connection._full_since)
    end.give(many(80, first=80))
    end.connection.close("done")
    frames = list(peer.frames())
    assert frames[-1] == (frame.CLOSE, b"done")
    entries = [one for kind, content in frames if kind == frame.DATA for one in entries_of(content)]
    assert len(entries) + end.worker.drops["closing"] == 160
    assert entries == many(160)[: len(entries)]


@pytest.mark.parametrize("how", ["reset", "close"])
def test_an_end_while_the_socket_is_full(facing, how):
    peer, end = facing(is_small=True)
    end.idle()
    end.give(many(80))
    end.give(many(80))
    if how == "reset":
        until(lambda: end.connection._full_since)
    getattr(peer, how)()
    until(lambda: end.end)
    assert end.worker.drops["connection_lost"] == 80


def test_a_peer_that_reads_nothing_cannot_keep_its_connection(facing):
    peer, end = facing(is_small=True)
    end.give(many(80))
    until(lambda: end.connection._full_since)
    for _ in range(100):
        end.connection.close("shutdown")
    now = time.monotonic()
    end.connection.tick(now)
    peer.send(frame.PING, bytes(8))
    until(lambda: end.connection.frames_in)
    assert end.end is None and not end.worker.live
    end.connection.tick(now + CLOSE_TIME + 0.1)
    assert end.end and not end.end[1]


@pytest.mark.parametrize("reason", ["refused", "shutdown"])
def test_nothing_comes_from_a_peer_that_is_refused(facing, reason):
    peer, end = facing(is_small=True)
    peer.send(frame.DATA, payload(*many(1)))
    until(lambda: len(end.written) == 1)
    # It reads nothing, so CLOSE has to wait.
    end.give(many(80))
    until(lambda: end.connection._full_since)
    end.connection.close(reason)
    assert not end.worker.live, "it takes no more packets either"
    peer.send(frame.DATA, payload(*many(1, first=1)))
    if reason == "shutdown":
        until(lambda: len(end.written) == 2)
    else:
        until(lambda: any(fcntl.ioctl(end.socket, termios.FIONREAD, bytes(4))), "it came")
        for _ in range(20):
            gevent.sleep(0.001)
        assert len(end.written) == 1
    assert list(peer.frames())[-1] == (frame.CLOSE, reason.encode())
    until(lambda: end.end)


def test_a_silent_peer(facing):
    peer, end = facing(keepalive=10, keepalive_timeout=30)
    now = time.monotonic()
    assert peer.frame()[0] == frame.PING
    end.connection.tick(now + 9)
    end.connection.tick(now + 11)
    assert peer.frame()[0] == frame.PING
    end.connection.tick(now + 29)
    assert end.end is None
    peer.send(frame.PONG, bytes(8))
    until(lambda: end.connection.frames_in)
    now = time.monotonic()
    end.connection.tick(now + 29)
    assert end.end is None
    end.connection.tick(now + 31)
    assert end.end == ("nothing came from the peer for 31 s", False, None)
    end.connection.tick(now + 32)


def test_a_bug_while_receiving_costs_one_connection(facing):
    worker = Worker()
    peer, end = facing(worker=worker)
    other_peer, other = facing(worker=worker)
    worker.queue.refuses = None
    peer.send(frame.DATA, payload(entry(1, 1)))
    assert until(lambda: end.end) == ("internal error", False, None)
    worker.queue.refuses = set()
    other_peer.send(frame.DATA, payload(entry(2, 1)))
    until(lambda: entry(2, 1) in worker.queue.written)
    assert other.end is None and len(worker.bugs) == 1


class Failing(Sealer):
    """Fails for DATA."""

    def seal_into(self, header, *rest):
        if header[0] == frame.DATA:
            raise RuntimeError("the cipher failed")
        return super().seal_into(header, *rest)


@pytest.mark.parametrize("give", [End.give_part, End.give], ids=["queued", "direct"])
def test_a_bug_while_sending_costs_one_connection(facing, give):
    entries = many(1)
    worker = Worker()
    peer, end = facing(worker=worker, sealer=Failing(CIPHER, OURS))
    other_peer, other = facing(worker=worker)
    assert peer.frame()[0] == frame.PING
    gevent.sleep(0.01)
    give(end, entries)
    assert until(lambda: end.end) == ("internal error", False, None)
    other.give(entries)
    assert other_peer.data(len(entries)) == entries
    assert [str(error) for error in worker.bugs] == ["the cipher failed"]
