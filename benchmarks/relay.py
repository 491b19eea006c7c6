"""Delays packets: what comes out of one TUN device goes into the other one, a fixed time later, both ways.

    python3 -m benchmarks.relay FIRST SECOND SECONDS

Runs as a process of its own in the forwarding namespace of the lossy link (network.py). There is no netem in every
kernel; this needs only TUN. One packet a read: the link has no offload, so that its losses meet single packets.
"""

import collections
import fcntl
import os
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
"""linux/if_tun.h."""
PACKET_SIZE = 2048
"""Bytes that a read takes; the link's packets have at most 1500."""
READ_BATCH = 64
"""Packets that are read before those that are due are looked at again (choice)."""
QUEUE_LIMIT = 20000
"""Packets that wait in one direction: 0.8 s of full-size ones at 300 Mbit/s; more are dropped (choice)."""


def attach(name):
    """Opens the existing TUN device `name`. Returns a descriptor that does not block."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


class Direction:
    """Packets on their way from one descriptor to another, `delay` seconds long."""

    def __init__(self, source, target, delay):
        self.source = source
        self.target = target
        self.delay = delay
        self.waiting = collections.deque()

    def take(self, now):
        """Reads what has come, at most a batch."""
        due = now + self.delay
        try:
            for _ in range(READ_BATCH):
                packet = os.read(self.source, PACKET_SIZE)
                if len(self.waiting) < QUEUE_LIMIT:
                    self.waiting.append((due, packet))
        except BlockingIOError:
            pass  # nothing more has come

    def give(self, now):
        """Writes what is due. Returns when the next packet is, or None."""
        waiting = self.waiting
        while waiting and waiting[0][0] <= now:
            os.write(self.target, waiting.popleft()[1])
        return waiting[0][0] if waiting else None


def run(first, second, delay):
    """Relays until it is ended by a signal. first, second: names of devices. delay: seconds."""
    descriptors = attach(first), attach(second)
    directions = [Direction(*pair, delay) for pair in (descriptors, descriptors[::-1])]
    while True:
        now = time.monotonic()
        due = [at for direction in directions if (at := direction.give(now)) is not None]
        timeout = max(0, min(due) - time.monotonic()) if due else None
        readable = select.select(descriptors, (), (), timeout)[0]
        now = time.monotonic()
        for direction in directions:
            if direction.source in readable:
                direction.take(now)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], float(sys.argv[3]))
