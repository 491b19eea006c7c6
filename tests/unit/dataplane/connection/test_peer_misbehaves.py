"""dataplane.connection: what a peer must not send or do ends its connection, and no other."""

import contextlib
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inmemory import FRAME_SIZE, SMALLEST, Queue, Worker, entry, until
from ends import many, payload

from bulkvpnd.dataplane.connection import RECEIVE_EXTRA, REKEYS_EXTRA, TURN_TIME
from bulkvpnd.protocol import frame

FLOOD = 200
"""Frames, far more than a peer should send at once."""


class SlowQueue(Queue):
    """A TUN queue to which every write takes a turn, by a clock that nothing makes faster."""

    def write_batch(self, payload, spans):
        end = time.monotonic() + TURN_TIME
        while time.monotonic() < end:
            pass
        return super().write_batch(payload, spans)


def damaged(peer):
    data = bytearray(peer.sealed(frame.DATA, payload(entry(1, 1))))
    data[-1] ^= 1
    return bytes(data)


def header_changed(peer):
    return bytes([frame.PONG]) + peer.sealed(frame.PING, bytes(8))[1:]


def replayed(peer):
    return 2 * peer.sealed(frame.DATA, payload(entry(1, 1)))


def out_of_order(peer):
    first = peer.sealed(frame.PING, bytes(8))
    return peer.sealed(frame.PING, bytes(8)) + first


def old_key(peer):
    first = peer.sealed(frame.REKEY)
    return first + peer.sealed(frame.PING, bytes(8))


HOSTILE = {
    "an unknown type": lambda peer: b"\x09\0\0\x20" + bytes(32),
    "a type of zero": lambda peer: bytes(40),
    "DATA of more than was agreed": lambda peer: frame.pack_header(frame.DATA, FRAME_SIZE + 1),
    "PING of more than a PING has": lambda peer: frame.pack_header(frame.PING, frame.CONTROL_PAYLOAD_LIMIT + 1),
    "a length below the tag's": lambda peer: b"\x01\0\0\x0f" + bytes(15),
    "DATA without a packet": lambda peer: peer.sealed(frame.DATA),
    "noise": lambda peer: b"\x01\0\1\0" + os.urandom(256),
    "a damaged frame": damaged,
    "another type in the header": header_changed,
    "a replayed frame": replayed,
    "frames out of order": out_of_order,
    "a frame under the old key": old_key,
    "an entry that is cut off": lambda peer: peer.sealed(frame.DATA, payload(entry(1, 1))[:-1]),
    "an entry of length zero": lambda peer: peer.sealed(frame.DATA, payload(entry(1, 1)) + bytes(4)),
    "a bad virtio_net_hdr": lambda peer: peer.sealed(frame.DATA, payload(b"\x80" + entry(1, 1)[1:])),
}


@pytest.mark.parametrize("attack", HOSTILE.values(), ids=HOSTILE)
def test_what_a_peer_must_not_send_ends_its_connection_and_no_other(facing, attack):
    worker = Worker()
    peer, end = facing(worker=worker)
    other_peer, other = facing(worker=worker)
    peer.write(attack(peer))
    reason, clean, blame = until(lambda: end.end, "the end")
    assert (clean, blame) == (False, "peer") and reason.isprintable()
    assert len(worker.queue.written) <= 1  # the one that was replayed is good the first time
    other_peer.send(frame.DATA, payload(entry(2, 7)))
    until(lambda: entry(2, 7) in worker.queue.written, "the other's packet")
    assert other.end is None and not worker.bugs


@given(data=st.binary(min_size=4, max_size=300))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_garbage_is_waited_for_or_refused(facing, data):
    peer, end = facing()
    peer.write(data)
    peer.close()
    reason, clean, blame = until(lambda: end.end, "the end")
    assert not clean and not end.written and not end.worker.bugs and not end.worker.live
    assert blame == "peer" or reason == "the peer closed it without CLOSE"


def test_a_flood_of_pings_by_a_peer_that_reads_nothing(facing):
    """One answer waits at most, that to the last of them."""
    peer, end = facing(is_small=True)
    end.give(many(80))
    until(lambda: end.connection._full_since, "the socket is full")
    for number in range(FLOOD):
        peer.send(frame.PING, bytes([number]))
    until(lambda: end.connection.frames_in == FLOOD)
    assert end.end is None
    end.connection.close("done")
    assert [content for kind, content in peer.frames() if kind == frame.PONG] == [bytes([FLOOD - 1])]


def test_a_flood_of_tiny_frames_does_not_hold_up_others(facing):
    """Each connection receives once in a turn of the loop, whatever its socket still holds."""
    before, (flood, flooded), after = facing(), facing(), facing()
    others = [before[0], after[0]]
    for peer in (flood, *others):
        peer.frame()
    tiny = [flood.sealed(frame.DATA, payload(entry(0, number, SMALLEST))) for number in range(60000)]
    stream, sent = b"".join(tiny), 0
    with contextlib.suppress(BlockingIOError):
        # Without the loop, which would let it be received meanwhile.
        while sent < len(stream):
            sent += os.write(flood._socket.fileno(), stream[sent : sent + 65536])
    count = sent // len(tiny[0])
    assert sent > 3 * (FRAME_SIZE + RECEIVE_EXTRA), "that is too little to tell"
    for peer in others:
        peer.send(frame.PING, bytes(8))
    for peer in others:
        assert peer.frame() == (frame.PONG, bytes(8))
    assert 0 < flooded.connection.frames_in < count
    until(lambda: flooded.connection.frames_in == count, "all of it is received in the end")


@pytest.fixture
def surrounded(facing):
    """(Peer, End) that is going to flood, and the Peers of two more connections of its worker, to whom writing is slow.

    Of one made before and of one made after it, since the loop looks at them in the one order or the other.
    """
    worker = Worker()
    worker.queue = SlowQueue()
    (before, _), (flood, flooded), (after, _) = (facing(worker=worker) for _ in range(3))
    for peer in (before, flood, after):
        peer.frame()
    return flood, flooded, [before, after]


def test_whole_frames_that_came_in_one_go_wait_for_the_others_turn(surrounded):
    flood, flooded, others = surrounded
    entries = many(FLOOD, SMALLEST)
    flood.write(b"".join(flood.sealed(frame.DATA, payload(one)) for one in entries))
    for peer in others:
        peer.send(frame.PING, bytes(8))
    for peer in others:
        assert peer.frame() == (frame.PONG, bytes(8))
    assert len(flooded.written) < FLOOD // 8
    until(lambda: len(flooded.written) == FLOOD, "all of it is handled in the end")
    assert flooded.written == entries


def test_a_frame_of_very_many_packets_waits_for_the_others_turn(surrounded):
    """And what the others send meanwhile goes where it should, although all frames are opened in one place."""
    flood, flooded, others = surrounded
    entries = many(2500, SMALLEST, flows=2)
    flood.send(frame.DATA, payload(*entries))
    for number, peer in enumerate(others):
        peer.send(frame.DATA, payload(*many(80, 1400, first=100 * number)))
        peer.send(frame.PING, bytes(8))
    for peer in others:
        assert peer.frame() == (frame.PONG, bytes(8))
    assert flooded.connection.packets_in < len(entries) // 2
    until(lambda: flooded.connection.packets_in == len(entries), "all of it is written in the end")
    assert [one for one in flooded.written if len(one) == SMALLEST] == entries
    assert sorted(one for one in flooded.written if len(one) != SMALLEST) == sorted(
        many(80, 1400) + many(80, 1400, first=100)
    )


def test_more_connections_bring_no_larger_share(facing):
    worker = Worker()
    (flood, flooded), (other_peer, other) = facing(worker=worker), facing(worker=worker)
    # Its session has nine more in this worker.
    flooded.session.connections.update(dict.fromkeys(range(10)))
    frames = 4000
    streams = [
        b"".join(peer.sealed(frame.DATA, payload(entry(0, number, SMALLEST))) for number in range(frames))
        for peer in (flood, other_peer)
    ]
    for peer, stream in zip((flood, other_peer), streams, strict=True):
        with contextlib.suppress(BlockingIOError):
            # Without the loop, so that all of it is there when they begin.
            assert os.write(peer._socket.fileno(), stream) == len(stream)
    until(lambda: other.connection.frames_in == frames)
    assert 0 < flooded.connection.frames_in < frames // 2
    until(lambda: flooded.connection.frames_in == frames)


def replaces_its_key(peer, end, times):
    before = end.connection._opener.generation
    for _ in range(times):
        peer.send(frame.REKEY)
        peer.sealer.ratchet()
    until(lambda: end.connection._opener.generation == before + times or end.end)


def test_a_peer_that_replaces_its_key_before_it_is_due_is_cut(facing):
    limit = 1 << 16
    peer, end = facing(rekey_bytes=limit, rekey_interval=100)
    # After enough bytes it may, however often.
    for number in range(3 * REKEYS_EXTRA):
        peer.send(frame.DATA, payload(*many(1, limit - 4)))
        replaces_its_key(peer, end, 1)
    # For time's sake twice in each interval, no matter how they lie in it.
    end.connection.since -= 1000
    replaces_its_key(peer, end, REKEYS_EXTRA + 20)
    assert not end.end
    peer.send(frame.DATA, payload(*many(1, limit - 5)))
    replaces_its_key(peer, end, 1)
    assert end.end == ("the peer replaces its key before it is due", False, "peer")


def test_our_own_pings_are_no_flood(facing):
    """tick runs for all connections in one loop, which must not end for one of them."""
    peer, end = facing(is_small=True, keepalive=0, keepalive_timeout=1e6)
    end.give(many(80))
    until(lambda: end.connection._full_since, "the socket is full")
    now = time.monotonic()
    for second in range(100):
        end.connection.tick(now + second)
    assert end.end is None
    end.connection.close("done")
    kinds = [kind for kind, _ in peer.frames()]
    # The one of the start, and one of all these; DATA that waited was stalled and is gone.
    assert kinds.count(frame.PING) == 2
