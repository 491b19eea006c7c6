"""dataplane.connection: what a peer must not send or do ends its connection, and no other."""

import contextlib
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inmemory import FRAME_SIZE, SMALLEST, Worker, entry, until
from ends import many, payload

from bulkvpnd.dataplane.connection import CONTROL_QUEUE_MAX, RECEIVE_EXTRA
from bulkvpnd.protocol import frame


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
    peer, end = facing(is_small=True)
    end.give(many(80))
    until(lambda: end.connection._full_since, "the socket is full")
    for _ in range(CONTROL_QUEUE_MAX):
        peer.send(frame.PING, bytes(8))
    until(lambda: end.connection.frames_in == CONTROL_QUEUE_MAX)
    assert end.end is None
    peer.send(frame.PING, bytes(8))
    reason, clean, blame = until(lambda: end.end, "the end")
    assert (clean, blame) == (False, "peer") and "faster than it reads" in reason


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


def test_our_own_pings_are_no_flood(facing):
    """tick runs for all connections in one loop, which must not end for one of them."""
    peer, end = facing(is_small=True, keepalive=0, keepalive_timeout=1e6)
    end.give(many(80))
    until(lambda: end.connection._full_since, "the socket is full")
    for _ in range(CONTROL_QUEUE_MAX):
        peer.send(frame.PING, bytes(8))
    until(lambda: end.connection.frames_in == CONTROL_QUEUE_MAX)
    now = time.monotonic()
    for second in range(2 * CONTROL_QUEUE_MAX):
        end.connection.tick(now + second)
    assert end.end is None
    end.connection.close("done")
    kinds = [kind for kind, _ in peer.frames()]
    # The one of the start, and one of all these; DATA that waited was stalled and is gone.
    assert kinds.count(frame.PING) == 2 and kinds.count(frame.PONG) == CONTROL_QUEUE_MAX
