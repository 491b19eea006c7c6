"""No key and nonce are ever used twice: two connections under full load, whose keys are replaced all the time.

    End --> socket --> relay, which opens every frame with a key schedule of its own --> socket --> End

The relay knows only the first traffic secret of each direction. That a frame opens with the key and the nonce which it
expects proves that these two were used, and it notes them.
"""

import contextlib
import hashlib
import hmac
import itertools
import pathlib
import socket
import time

import gevent.socket
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from inmemory import entry, identity, until
from ends import OURS, THEIRS, End, joined

from bulkvpnd.protocol import frame

LIMIT = 1 << 16
"""rekey_bytes: the least that can be configured."""
SIZES = (200, 1400, 33000, 33000)
"""Bytes of the entries of a batch, together more than LIMIT: each frame brings a REKEY."""
SEGMENT = 8000
"""Bytes: small against a socket's buffer. With loopback's 64 KiB the kernel may wait 0.2 s for a window as large."""
SNDBUF = 1 << 17
"""Bytes: no more than a receiver here takes. In front of a window that has closed the kernel waits for an
acknowledgement that the far end delays, 40 ms or a tenth of a second for nothing that is ours."""
STALL = 0.1
"""Seconds (issue: the promise)."""


def expand(secret, label, size):
    """HKDF-Expand-Label as bulkvpn-protocol(7) has it, written anew; sizes up to one block of SHA-256."""
    name = b"bulkvpn1 " + label
    info = bytes([0, size, len(name)]) + name + b"\0"
    return hmac.new(secret, info + b"\1", hashlib.sha256).digest()[:size]


class Schedule:
    """One direction's keys, one after the other, and what was used of them."""

    def __init__(self, secret):
        self._secret = secret
        self.ratchets = 0
        self.used = []
        self._install()

    def _install(self):
        self._key = expand(self._secret, b"key", 32)
        self._iv = int.from_bytes(expand(self._secret, b"iv", 12), "big")
        self._count = 0

    def open(self, header, sealed):
        """Checks one frame. Raises InvalidTag if it was sealed with anything else."""
        nonce = (self._iv ^ self._count).to_bytes(12, "big")
        AESGCM(self._key).decrypt(nonce, sealed, header)
        self.used.append((self._key, nonce))
        self._count += 1
        if header[0] == frame.REKEY:
            self._secret = expand(self._secret, b"upd", 32)
            self.ratchets += 1
            self._install()


def waited():
    """Seconds that this process was ready to run and had no CPU (proc(5), schedstat: nanoseconds)."""
    return int(pathlib.Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def running_time():
    """A clock that stands still while this process has no CPU although it wants one, seconds."""
    before = waited()
    while True:
        now, after = time.monotonic(), waited()
        # Not one that lost the CPU between the two: what it waited would count against the wrong frame.
        if after - before < 0.001:
            return now - after
        before = after


class Relay:
    """One direction. worst: the longest time between two frames in which the process had a CPU, seconds."""

    def __init__(self, source, sink, secret):
        self.schedule = Schedule(secret)
        self.worst = 0.0
        self._source, self._sink = source, sink

    def run(self):
        buffer, last = b"", None
        # The end that is closed first resets the other's.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while data := self._source.recv(1 << 18):
                buffer += data
                while len(buffer) >= 4 and len(buffer) >= 4 + int.from_bytes(buffer[1:4], "big"):
                    size = int.from_bytes(buffer[1:4], "big")
                    self.schedule.open(buffer[:4], buffer[4 : 4 + size])
                    buffer = buffer[4 + size :]
                    now = running_time()
                    self.worst, last = max(self.worst, now - (last or now)), now
                self._sink.sendall(data)


def load(end, stop):
    """Keeps the connection of `end` busy. Returns how many entries it gave."""
    for number in itertools.count():
        if stop:
            return number * len(SIZES)
        end.give([entry(0, number * len(SIZES) + at, size) for at, size in enumerate(SIZES)])
        while end.connection.queued > 2 * LIMIT and not stop:
            gevent.sleep(0.0002)
        gevent.sleep(0)


def drain(end, other, count):
    """Takes away what came from `other`, which must be next in order. Returns how many came in all."""
    for one in end.written:
        assert identity(one) == (0, count), f"not entry {count} but {identity(one)}, {+other.worker.drops}"
        count += 1
    end.written.clear()
    return count


@pytest.mark.parametrize("ratchets", [400, pytest.param(10000, marks=pytest.mark.long)])
def test_no_key_and_nonce_twice_no_packet_lost_no_stall(ratchets):
    with gevent.Timeout(900):
        (ours, near), (far, theirs) = joined(False, SEGMENT), joined(False, SEGMENT)
        for sock in (ours, near, far, theirs):
            # Whatever the machine's own is. BBR takes a path whose ends wait for a CPU for a slow one, and paces.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SNDBUF)
        near, far = (gevent.socket.socket(fileno=sock.detach()) for sock in (near, far))
        # CoDel is off: what a busy machine holds up must not be dropped.
        settings = {"rekey_bytes": LIMIT, "queue_target": 1000, "sndbuf": SNDBUF}
        ends = End(ours, (OURS, THEIRS), **settings), End(theirs, (THEIRS, OURS), **settings)
        relays = Relay(near, far, OURS), Relay(far, near, THEIRS)
        running = [gevent.spawn(relay.run) for relay in relays]
        stop = []
        loads = [gevent.spawn(load, end, stop) for end in ends]
        came = [0, 0]
        try:
            while min(relay.schedule.ratchets for relay in relays) < ratchets / 2:
                came = [drain(end, other, count) for end, other, count in zip(ends, ends[::-1], came)]
                assert [end.end for end in ends] == [None, None] and not any(one.ready() for one in running)
                gevent.sleep(0.001)
            worst = [relay.worst for relay in relays]
            stop.append(True)
            sent = [one.get() for one in loads]

            def all_came():
                came[:] = [drain(end, other, count) for end, other, count in zip(ends, ends[::-1], came)]
                return came == [sent[1], sent[0]]

            until(all_came, "the last packets", 60)
        finally:
            stop.append(True)
            for end in ends:
                end.connection.close("done")
            until(lambda: all(end.end for end in ends))
            gevent.killall(running)
            near.close()
            far.close()
    assert sum(relay.schedule.ratchets for relay in relays) >= ratchets
    used = [one for relay in relays for one in relay.schedule.used]
    assert len(set(used)) == len(used), "a key and nonce twice"
    assert len({key for key, _ in used}) >= ratchets
    assert not any(end.worker.drops.total() or end.worker.bugs for end in ends)
    print("longest time between two frames:", worst)
    assert max(worst) < STALL, worst
