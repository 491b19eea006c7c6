"""dataplane.connection over real sockets: two connections that face each other, and peers by hand that misbehave."""

import fcntl
import itertools
import mmap
import os
import socket
import struct
import termios
import time

import gevent
import gevent.socket
import pytest
from gevent.hub import get_hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inmemory import FRAME_SIZE, HERE, THERE, Worker, batch_of, entries_of, entry, identity, ones_sum, udp, until
from peer import CIPHER, OURS, SETTINGS, THEIRS, Peer, joined, payload

from bulkvpnd.dataplane import connection as module
from bulkvpnd.dataplane.connection import CLOSE_TIME, CONTROL_QUEUE_MAX, DIRECT_MIN, MOVE_TIME, STALL_TIME, Connection
from bulkvpnd.dataplane.frames import IDLE_TIME
from bulkvpnd.dataplane.routing import Session
from bulkvpnd.dataplane.sendqueue import FRAMES_MAX
from bulkvpnd.protocol import frame, packet
from bulkvpnd.protocol.keys import Opener, Sealer


class End:
    """A connection, its worker and its session."""

    numbers = itertools.count(1)

    def __init__(self, sock, secrets, worker=None, head=b"", sealer=None, sources=None, **changed):
        self.worker = worker or Worker()
        self.socket = sock
        self.session = Session(1, frozenset(sources or ()), sources is None)
        self.connection = Connection(
            next(self.numbers), 0, sock, self.session, sealer or Sealer(CIPHER, secrets[0]), Opener(CIPHER, secrets[1]),
            {**SETTINGS, **changed}, self.worker, head,
        )  # fmt: skip
        self.connection.start()

    def give(self, entries, size=None):
        """As routing gives a run."""
        batch = batch_of(entries, size or self.worker.pool.frame_size)
        lanes = [self.connection.lane(identity(one)[0] if not one[0] else 0) for one in entries]
        self.connection.append(batch, lanes, 0, len(entries))

    def give_part(self, entries):
        """As routing gives a run that others of its batch follow."""
        batch = batch_of([*entries, *many(1)], self.worker.pool.frame_size)
        self.connection.append(batch, [self.connection.lane(0)] * (len(entries) + 1), 0, len(entries))

    @property
    def written(self):
        return self.worker.queue.written

    @property
    def end(self):
        """(reason, clean, blame) once it has ended."""
        mine = [end[1:] for end in self.worker.ends if end[0] == self.connection.number]
        assert len(mine) <= 1
        return mine[0] if mine else None


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """Every connection ends with the test, and gives back descriptors, frames and watchers."""
    ends, peers = request.node.ends, request.node.peers = [], []
    gevent.sleep(0.001)  # makes the hub, which has descriptors of its own
    # Counted as below, with the timer of until() itself.
    before = until(lambda: (set(os.listdir("/proc/self/fd")), get_hub().loop.activecnt))
    with gevent.Timeout(30):
        yield
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
def facing(request):
    """Makes (Peer, End)."""

    def make(is_small=False, **arguments):
        ours, theirs = joined(is_small)
        peer, end = Peer(theirs), End(ours, (OURS, THEIRS), **arguments)
        request.node.peers.append(peer)
        request.node.ends.append(end)
        return peer, end

    return make


@pytest.fixture
def pair(request):
    """Makes two Ends that face each other."""

    def make(is_small=False, **arguments):
        ours, theirs = joined(is_small)
        ends = End(ours, (OURS, THEIRS), **arguments), End(theirs, (THEIRS, OURS), **arguments)
        request.node.ends.extend(ends)
        return ends

    return make


def many(count, size=1400, flows=1, first=0):
    return [entry(n % flows, first + n // flows, size) for n in range(count)]


def in_order(entries):
    """Whether no packet of a flow was overtaken."""
    last = {}
    for one in entries:
        flow, number = identity(one)
        if last.get(flow, -1) >= number:
            return False
        last[flow] = number
    return True


# What a peer sends that it must not


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


# Inbound


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


# Ends


@pytest.mark.parametrize("word, said", [(b"shutdown", "shutdown"), (b"\x1b[2Jnonsense", "unknown"), (b"", "unknown")])
def test_the_peer_closes(facing, word, said):
    peer, end = facing()
    peer.write(peer.sealed(frame.DATA, payload(entry(1, 1))) + peer.sealed(frame.CLOSE, word) + b"what comes behind")
    assert until(lambda: end.end) == (f"closed by the peer: {said}", True, None)
    assert end.written == [entry(1, 1)]


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


# Outbound


def idle(end):
    return until(lambda: end.connection._is_idle, "the sender waits")


@pytest.mark.parametrize("count, give, is_direct", [
    (1, End.give_part, False),
    (1, End.give, True),  # all that was read: nothing comes that could share a frame with it
    (DIRECT_MIN // 1400 + 1, End.give_part, True),
])  # fmt: skip
def test_what_is_worth_a_frame_is_sent_at_once(facing, count, give, is_direct):
    peer, end = facing()
    idle(end)
    before = end.connection.bytes_out
    give(end, many(count))
    assert (end.connection.bytes_out > before) == is_direct
    assert peer.data(count) == many(count)
    assert end.connection.packets_out == count


def test_a_super_packet_counts_as_its_segments(facing):
    peer, end = facing()
    idle(end)
    for number, (one, segments) in enumerate([(super_packet(30000), 21), (super_packet(3000), 3)], 1):
        end.give([one])
        assert peer.data(1) == [one]
        assert end.connection.packets_out == number
    assert end.connection.segments_out == 24


def super_packet(size, mss=1448, options=12, version=4):
    """A TCP super-packet with `size` bytes of data; only what is looked at here is right."""
    header = 20 + options
    total = 20 + header + size
    head = bytearray(udp(0, 0, 40)[:20])
    head[2:4], head[9], head[10:12] = total.to_bytes(2, "big"), 6, bytes(2)
    head[10:12] = (0xFFFF - ones_sum(bytes(head))).to_bytes(2, "big")
    tcp = struct.pack(">HHIIBBHHH", 1000, 443, 1, 1, header // 4 << 4, 16, 512, 0, 0) + b"\1" * options
    vnet = struct.pack("<BBHHHH", 1, 1, 20 + header, mss, 20, 16)
    return vnet + bytes(head) + tcp + bytes(n % 253 for n in range(size))


@pytest.mark.parametrize("flows", [1, 5])
def test_order_is_kept_however_often_the_socket_is_full(facing, flows):
    peer, end = facing(is_small=True, queue_target=1000)
    idle(end)
    given = 0
    received = []
    for round_ in range(60):
        # Direct, half sent, express, sparse, in lanes: by turns.
        batch = many((40, 1, 150, 3)[round_ % 4], 600, flows, first=1000 * round_)
        end.give(batch)
        given += len(batch)
        if round_ % 7 == 3:
            gevent.sleep(0)
        if round_ % 5 == 4:
            kind, content = peer.frame()
            received += entries_of(content) if kind == frame.DATA else []
    lost = sum(end.worker.drops.values())
    received += peer.data(given - lost - len(received))
    assert in_order(received)
    assert end.worker.pool.in_use <= 1


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
        idle(end)
        batch = many(15, first=15 * number)
        end.give(batch)
        if number:
            assert peer.frame() == (frame.REKEY, b"")
        assert peer.frame() == (frame.DATA, payload(*batch))


# A peer without offload


def test_a_peer_without_offload_gets_plain_packets(facing):
    peer, end = facing(peer_offloads=())
    one, plain = super_packet(30000), entry(3, 1)
    end.give([plain, one, plain])
    segments = [bytes(10) + bytes(part) for part in packet.plain_packets(one, 0, len(one), ())]
    assert len(segments) == 21
    assert peer.data(23) == [plain, *segments, plain]
    assert end.connection.packets_out == 23


def test_a_peer_that_lacks_one_offload_gets_the_others(facing):
    peer, end = facing(peer_offloads=("csum", "tso"))
    one = super_packet(30000)
    end.give([one])
    assert peer.data(1) == [one]


@pytest.mark.parametrize("mss", [8, 36])
def test_super_packets_of_tiny_segments_for_a_peer_without_offload(facing, mss):
    """A far host chooses its MSS: with all their headers the segments are more than a frame."""
    peer, end = facing(peer_offloads=())
    one = super_packet(60000, mss)
    expected = packet.plain_packets(one, 0, len(one), ())
    assert sum(map(len, expected)) > FRAME_SIZE
    end.give([one])
    reading = gevent.spawn(peer.data, len(expected))
    assert reading.get() == [bytes(10) + bytes(part) for part in expected]
    assert end.end is None and not end.worker.bugs


def test_what_one_connection_failed_over_does_not_reach_another(facing):
    worker = Worker()
    peer, end = facing(worker=worker, peer_offloads=())
    worker.plain.add(entry(9, 9))
    end.give([entry(1, 1)])
    assert peer.data(1) == [entry(1, 1)]


def test_a_frame_size_smaller_than_ours(facing):
    worker = Worker(frame_size=4 * FRAME_SIZE)
    peer, end = facing(worker=worker)
    idle(end)
    entries = many(350)
    reading = gevent.spawn(peer.data, 350)  # frames beyond what was agreed are refused there
    end.give(entries)
    assert reading.get() == entries


# Fairness


def test_a_ping_passes_what_waits_for_a_full_socket_and_only_that(facing):
    peer, end = facing(is_small=True, queue_target=1000)
    idle(end)
    end.give(many(80))
    until(lambda: end.connection._full_since)
    end.give(many(80, first=80))
    end.give([entry(5, 1)])
    received = peer.data(161)
    assert 80 <= received.index(entry(5, 1)) < 100
    # The socket is free again: then what came first goes first.
    idle(end)
    end.give(many(100, 100))
    end.give([entry(5, 2)])
    assert peer.data(101)[-1] == entry(5, 2)


# A peer that stands still


def test_a_stuck_peer_costs_little_and_recovers(facing):
    peer, end = facing(is_small=True, queue_target=1000)
    given = 0
    for number in range(100):
        end.give(many(90, 1400, first=90 * number))
        given += 90
        gevent.sleep(0)
    assert end.connection._full_since
    assert end.worker.pool.in_use <= FRAMES_MAX + 1
    assert end.worker.drops["queue_full"] > 0
    end.connection.tick(time.monotonic() + STALL_TIME + 0.1)
    assert end.worker.drops["stalled"] > 0 and end.connection.queued == 0
    assert end.worker.pool.in_use <= 1
    lost = end.worker.drops["queue_full"] + end.worker.drops["stalled"]
    received = peer.data(given - lost)
    assert in_order(received)
    end.give(many(50, first=90 * 100))
    assert peer.data(50) == many(50, first=90 * 100)


def test_what_comes_for_a_stuck_peer_is_dropped_at_once(facing, monkeypatch):
    monkeypatch.setattr(module, "STALL_TIME", -1.0)
    peer, end = facing(is_small=True)
    idle(end)
    end.give(many(80))
    until(lambda: end.connection._full_since)
    end.give(many(10))
    assert end.worker.drops["stalled"] == 10
    assert len(peer.data(80)) == 80
    idle(end)
    end.give(many(10))
    assert peer.data(10) == many(10)


@pytest.mark.parametrize("how", ["reset", "close"])
def test_an_end_while_the_socket_is_full(facing, how):
    peer, end = facing(is_small=True)
    idle(end)
    end.give(many(80))
    end.give(many(80))
    if how == "reset":
        until(lambda: end.connection._full_since)
    getattr(peer, how)()
    until(lambda: end.end)
    assert end.worker.drops["connection_lost"] == 80


# One that replaces another


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
