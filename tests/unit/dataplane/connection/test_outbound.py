"""dataplane.connection, from the TUN to the socket: what is sent at once, what waits, and what it waits for."""

import struct
import time

import gevent
import pytest
from inmemory import FRAME_SIZE, Worker, entries_of, entry, ones_sum, udp, until
from ends import End, in_order, many

from bulkvpnd.dataplane import connection as module
from bulkvpnd.dataplane.connection import DIRECT_MIN, STALL_TIME
from bulkvpnd.dataplane.sendqueue import FRAMES_MAX
from bulkvpnd.protocol import frame, packet


@pytest.mark.parametrize("count, give, is_direct", [
    (1, End.give_part, False),
    (1, End.give, True),  # all that was read: nothing comes that could share a frame with it
    (DIRECT_MIN // 1400 + 1, End.give_part, True),
])  # fmt: skip
def test_what_is_worth_a_frame_is_sent_at_once(facing, count, give, is_direct):
    peer, end = facing()
    end.idle()
    before = end.connection.bytes_out
    give(end, many(count))
    assert (end.connection.bytes_out > before) == is_direct
    assert peer.data(count) == many(count)
    assert end.connection.packets_out == count


def test_a_super_packet_counts_as_its_segments(facing):
    peer, end = facing()
    end.idle()
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
    end.idle()
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


def test_a_ping_passes_what_waits_for_a_full_socket_and_only_that(facing):
    peer, end = facing(is_small=True, queue_target=1000)
    end.idle()
    end.give(many(80))
    until(lambda: end.connection._full_since)
    end.give(many(80, first=80))
    end.give([entry(5, 1)])
    received = peer.data(161)
    assert 80 <= received.index(entry(5, 1)) < 100
    # The socket is free again: then what came first goes first.
    end.idle()
    end.give(many(100, 100))
    end.give([entry(5, 2)])
    assert peer.data(101)[-1] == entry(5, 2)


def test_a_frame_size_smaller_than_ours(facing):
    worker = Worker(frame_size=4 * FRAME_SIZE)
    peer, end = facing(worker=worker)
    end.idle()
    entries = many(350)
    reading = gevent.spawn(peer.data, 350)  # frames beyond what was agreed are refused there
    end.give(entries)
    assert reading.get() == entries


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
    end.idle()
    end.give(many(80))
    until(lambda: end.connection._full_since)
    end.give(many(10))
    assert end.worker.drops["stalled"] == 10
    assert len(peer.data(80)) == 80
    end.idle()
    end.give(many(10))
    assert peer.data(10) == many(10)
