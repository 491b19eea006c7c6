"""dataplane.connection: when a key is replaced, and a peer that does not replace its own."""

import time

import gevent
import pytest
from inmemory import FRAME_SIZE, until
from ends import in_order, many, payload

from bulkvpnd.protocol import frame


@pytest.mark.parametrize("is_small", [False, True])
def test_keys_are_replaced_under_load(pair, is_small):
    """Also while a frame is half sent."""
    one, other = pair(is_small=is_small, rekey_bytes=50_000, queue_target=1000)
    expected = []
    for number in range(40):
        batch = many(40, 1400, 2, first=100 * number)
        expected += batch
        for end in (one, other):
            end.give(batch)
        if number % 3:
            gevent.sleep(0)
        if number % 10 == 9:
            until(lambda: not (one.connection.queued or other.connection.queued))
    for end in (one, other):
        until(lambda end=end: len(end.written) >= len(expected), "every packet")
        assert sorted(end.written) == sorted(expected) and in_order(end.written)
        assert end.connection._sealer.generation >= 10


def test_a_key_is_replaced_after_a_time(facing):
    peer, end = facing(rekey_interval=0.05)
    assert peer.frame()[0] == frame.PING
    until(end.connection._rekey_is_due)
    end.give(many(1))
    assert [peer.frame()[0], peer.frame()] == [frame.REKEY, (frame.DATA, payload(*many(1)))]
    end.give(many(20, first=1))
    assert peer.data(20) == many(20, first=1)


def test_a_key_is_replaced_before_any_other_frame(facing):
    peer, end = facing(rekey_interval=0.05)
    assert peer.frame()[0] == frame.PING
    until(end.connection._rekey_is_due)
    peer.send(frame.PING, b"12345678")
    assert [peer.frame(), peer.frame()] == [(frame.REKEY, b""), (frame.PONG, b"12345678")]


def test_a_key_is_replaced_before_what_would_be_sent_at_once(facing):
    peer, end = facing(rekey_bytes=20_000)
    assert peer.frame()[0] == frame.PING
    for number in range(5):
        end.idle()
        batch = many(15, first=15 * number)
        end.give(batch)
        if number:
            assert peer.frame() == (frame.REKEY, b"")
        assert peer.frame() == (frame.DATA, payload(*batch))


def test_a_peer_that_keeps_its_key_for_too_many_bytes_is_cut(facing):
    limit = 1 << 16
    peer, end = facing(rekey_bytes=limit)
    most = payload(*many(1, size=60000))

    def sends(times):
        before = len(end.written)
        for _ in range(times):
            peer.send(frame.DATA, most)
        until(lambda: len(end.written) == before + times)
        end.connection.tick(time.monotonic())

    # It may be late by a frame, whose size both agreed on.
    for _ in range(2):
        sends((limit + FRAME_SIZE) // len(most))
        assert not end.end
        peer.send(frame.REKEY)
        peer.sealer.ratchet()
    sends((limit + FRAME_SIZE) // len(most) + 1)
    assert end.end == ("the peer did not replace its key in time", False, "peer")


def test_a_peer_that_keeps_its_key_for_too_long_is_cut(facing):
    peer, end = facing(rekey_interval=100, keepalive=5, keepalive_timeout=20)
    begun = time.monotonic()
    peer.send(frame.REKEY)
    peer.sealer.ratchet()
    until(lambda: end.connection._opener.generation)
    # What comes meanwhile does not count; it shows only that the peer is there.
    end.connection._received_at = begun + 1000
    end.connection.tick(begun + 125)
    assert not end.end
    end.connection.tick(time.monotonic() + 125.1)
    assert end.end == ("the peer did not replace its key in time", False, "peer")
