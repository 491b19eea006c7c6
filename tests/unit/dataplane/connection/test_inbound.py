"""dataplane.connection, from the socket to the TUN."""

import itertools
import mmap
import socket
import time

import gevent
import gevent.socket
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inmemory import FRAME_SIZE, HERE, THERE, entry, until
from ends import Peer, many, payload

from bulkvpnd.dataplane.frames import IDLE_TIME
from bulkvpnd.protocol import frame

STREAM = [
    (frame.PING, b"stamp..."),
    (frame.DATA, payload(*many(3, 200))),
    (frame.CONTROL, b"of a later version"),
    (frame.DATA, payload(*many(1, 60, first=3))),
    (frame.REKEY, b""),
    (frame.DATA, payload(*many(40, 1400, first=4))),
    (frame.PONG, b"no stamp"),
    (frame.DATA, payload(*many(2, 100, first=44))),
]
IN_STREAM = many(3, 200) + many(1, 60, first=3) + many(40, 1400, first=4) + many(2, 100, first=44)


def stream_of(peer):
    data = b""
    for kind, content in STREAM:
        data += peer.sealed(kind, content)
        if kind == frame.REKEY:
            peer.sealer.ratchet()
    return data


@given(
    cuts=st.lists(st.one_of(st.integers(0, 1000), st.integers(0, 58000)), max_size=12), has_head=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_of_the_stream_gives_the_same_packets(facing, cuts, has_head):
    maker = Peer(socket.socket())
    data = stream_of(maker)
    maker.close()
    pieces = [data[start:end] for start, end in itertools.pairwise([0, *sorted(cuts), len(data)])]
    head = pieces.pop(0) if has_head else b""
    peer, end = facing(head=head)
    sent = len(head)
    for piece in pieces:
        peer.write(piece)
        sent += len(piece)
        until(lambda: end.connection.bytes_in + len(head) >= min(sent, len(data)))
    until(lambda: end.connection.frames_in == len(STREAM), "every frame")
    assert end.written == IN_STREAM
    assert end.connection.packets_in == end.connection.segments_in == len(IN_STREAM)
    assert end.worker.live == [end.connection] and end.end is None
    assert [peer.frame()[0], peer.frame()] == [frame.PING, (frame.PONG, b"stamp...")]


def test_more_than_the_buffer_holds(facing):
    """Frames of every size, so that each place in the buffer is once the start of one."""
    peer, end = facing()
    sizes = [7919 * n % (FRAME_SIZE - 64) for n in range(60)]
    expected = []
    for number, size in enumerate(sizes):
        entries = [entry(1, 100 * number + n, 1396) for n in range(size // 1400)] + [entry(1, number, 60 + size % 1400)]
        expected += entries
        peer.send(frame.DATA, payload(*entries))
    until(lambda: len(end.written) == len(expected), "every packet")
    assert end.written == expected


def test_a_connection_lives_from_the_first_authentic_frame_on(facing):
    peer, end = facing()
    assert peer.frame()[0] == frame.PING
    assert not end.worker.live and not end.connection.is_established
    peer.send(frame.PONG, bytes(8))
    until(lambda: end.worker.live == [end.connection])
    peer.send(frame.PONG, bytes(8))
    until(lambda: end.connection.frames_in == 2)
    assert end.worker.live == [end.connection]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_connection_that_has_ended_does_not_come_to_life(facing, is_late):
    """Its first frame and the end may be found in one turn of the event loop, in either order."""
    peer, end = facing(keepalive_timeout=5)
    gevent.sleep(0.01)
    first, second = gevent.socket.socketpair()

    def wait():
        gevent.socket.wait_read(first.fileno())
        end.connection.tick(time.monotonic() + 10)
        return end.connection.is_established

    waiting = gevent.spawn(wait)
    gevent.sleep(0.01)
    for act in (lambda: second.send(b"x"), lambda: peer.send(frame.PING, bytes(8)))[:: -1 if is_late else 1]:
        act()
    was_established = waiting.get()
    until(lambda: end.socket.fileno() == -1)
    assert bool(end.worker.live) == was_established
    for sock in (first, second):
        sock.close()


def test_a_ping_is_answered_with_what_it_brought(facing):
    peer, end = facing()
    assert peer.frame()[0] == frame.PING
    for content, answer in ((b"12345678", b"12345678"), (b"", b""), (b"more than eight bytes", b"more tha")):
        peer.send(frame.PING, content)
        assert peer.frame() == (frame.PONG, answer)


def test_the_round_trip_is_measured(facing):
    peer, end = facing()
    kind, stamp = peer.frame()
    earlier = (int.from_bytes(stamp, "big") - 1).to_bytes(8, "big")
    for wrong in (b"", stamp[:7], stamp + b"x", bytes(8), b"\xff" * 8, earlier):
        peer.send(frame.PONG, wrong)
    until(lambda: end.connection.frames_in == 6)
    assert end.connection.rtt is None
    peer.send(frame.PONG, stamp)
    assert 0 < until(lambda: end.connection.rtt) < 10


def test_what_may_not_be_written_is_counted(facing):
    peer, end = facing(sources=(HERE,))
    good, foreign, refused = entry(1, 1), entry(1, 2, source=THERE), entry(1, 3)
    end.worker.queue.refuses.add(refused)
    peer.send(frame.DATA, payload(good, foreign, refused))
    until(lambda: end.connection.frames_in)
    assert end.written == [good]
    assert {name: count for name, count in end.worker.drops.items() if count} == {
        "foreign_source": 1, "tun_refused": 1
    }  # fmt: skip


def test_a_quiet_connection_gives_back_its_memory_but_not_what_came(facing):
    peer, end = facing()
    entries = many(90)
    peer.send(frame.DATA, payload(*entries))
    until(lambda: len(end.written) == 90, "the first frame")
    sealed = peer.sealed(frame.DATA, payload(*entries))
    peer.write(sealed[:10000])
    until(lambda: end.connection.bytes_in > len(sealed) + 9999, "a part of the second")
    buffer = end.connection._buffer
    now = time.monotonic()
    for _ in range(IDLE_TIME):
        end.connection.tick(now)
        assert any(buffer[10000 + mmap.PAGESIZE :])
    end.connection.tick(now)
    assert not any(buffer[10000 + mmap.PAGESIZE :])
    peer.write(sealed[10000:])
    until(lambda: len(end.written) == 180, "the second frame")
    assert end.written == 2 * entries


def test_what_a_connection_says_of_itself(facing):
    peer, end = facing()
    now = time.monotonic()
    one = end.connection.describe(now + 1)
    assert (one["established"], one["rate_in"], one["rtt_ms"], one["queue_delay_ms"]) == (False, 0, None, 0)
    assert one["age"] >= 1
    end.connection.tick(now)
    came = end.connection.bytes_in
    peer.send(frame.DATA, payload(*many(50)))
    until(lambda: len(end.written) == 50, "the packets")
    end.connection.tick(now + 2)
    one = end.connection.describe(now + 2)
    assert (one["established"], one["packets_in"], one["retransmits"]) == (True, 50, 0)
    assert one["rate_in"] == int(8 * (end.connection.bytes_in - came) / 2)
    assert 0 < one["tcp_rtt_ms"] < 1000 and one["congestion"]
    end.connection.tick(now + 3)
    assert end.connection.describe(now + 3)["rate_in"] == 0
    end.socket.close()
    assert "tcp_rtt_ms" not in end.connection.describe(now)
