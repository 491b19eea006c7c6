"""Sends numbered datagrams as fast as one core can, or counts those that arrive. Each prints one line of JSON.

    python3 -m benchmarks.udp receive ADDRESS PORT SECONDS
    python3 -m benchmarks.udp send ADDRESS PORT SECONDS FLOWS SIZE[,SIZE…]

A flow is a socket of the sender; a datagram carries its flow and its number in it. The sender makes one system call
a datagram and never UDP segmentation offload: the question is what small datagrams of many senders meet, not what one
sender of a bulk meets. Directly over a veth pair, on two cores of an AMD EPYC at 2.4 GHz, it sends and the receiver
counts about 190,000 a second; iperf3 3.12 sends 230,000, of which its receiver, with the kernel's default buffer,
loses 1 to 4 %. Both are above what a tunnel carries with what they leave it of two cores. Unlike iperf3's, this
receiver tells a datagram that came late from one that was lost, in each flow.
"""

import json
import socket
import struct
import sys
import time

STAMP = struct.Struct("!HQ")
"""Flow, number in the flow."""
LARGEST = 2048
"""Bytes; more than any datagram here."""
RECEIVE_BUFFER = 8 << 20
"""Bytes: 40 ms of the fastest sender, so that a loss is one of the path and not of this process (choice)."""
FIRST_TIMEOUT, LAST_TIMEOUT = 10, 1
"""Seconds of silence that end the receiver, before and after the first datagram."""
CLOCK_EVERY = 256
"""Datagrams between two looks at the clock."""
SO_RCVBUFFORCE = 33
"""asm-generic/socket.h; not in Python's socket module."""


class Counter:
    """Counts the datagrams of all flows, and those that came after a later one of their flow."""

    def __init__(self):
        self.received = self.reordered = 0
        self._next = {}

    def count(self, flow, number):
        self.received += 1
        if number < self._next.get(flow, 0):
            self.reordered += 1
        else:
            self._next[flow] = number + 1


def receive(address, port, seconds):
    """Counts until the flows fall silent.

    Returns {"in_time", "received", "bytes", "seconds", "reordered"}; in_time and bytes: within `seconds` of the first.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    sock.bind((address, port))
    counter = Counter()
    count, unpack, receive_into = counter.count, STAMP.unpack_from, sock.recv_into
    buffer = bytearray(LARGEST)
    size = in_time = bytes_in_time = 0
    # The kernel's timeout costs no system call a datagram, as settimeout() would.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", FIRST_TIMEOUT, 0))
    try:
        receive_into(buffer)
        count(*unpack(buffer))
        end = time.monotonic() + seconds
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", LAST_TIMEOUT, 0))
        while True:
            for _ in range(CLOCK_EVERY):
                size += receive_into(buffer)
                count(*unpack(buffer))
            if time.monotonic() <= end:
                in_time, bytes_in_time = counter.received, size
    except BlockingIOError:
        pass  # silence: all that was sent has come or is lost
    if not in_time:  # fewer than the clock is looked at for
        in_time, bytes_in_time = counter.received, size
    return {"in_time": in_time, "bytes": bytes_in_time, "seconds": seconds, "received": counter.received,
            "reordered": counter.reordered}


def send(address, port, seconds, flows, sizes):
    """Sends round robin over the flows, sizes in turn, for `seconds`. Returns {"sent"}."""
    buffer = bytearray(LARGEST)
    senders = []
    for _ in range(flows):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((address, port))
        senders.append(sock.send)
    views = [memoryview(buffer)[:size] for size in sizes]
    pack = STAMP.pack_into
    sent = number = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for view in views:
            for flow, send_one in enumerate(senders):
                pack(buffer, 0, flow, number)
                try:
                    send_one(view)
                except OSError:
                    pass  # a full queue on the way (ENOBUFS) is a loss like any other
            number += 1
        sent = number * flows
    return {"sent": sent}


if __name__ == "__main__":
    role, host, port, seconds, *rest = sys.argv[1:]
    if role == "receive":
        result = receive(host, int(port), float(seconds))
    else:
        result = send(host, int(port), float(seconds), int(rest[0]), [int(size) for size in rest[1].split(",")])
    print(json.dumps(result))
