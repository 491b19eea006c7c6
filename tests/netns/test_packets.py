"""Packets of every size, in every mix, several flows at once and both ways: each arrives unchanged and in its turn.

A flow is two sockets, one on each host. Both ends derive from the flow, the direction and the number of a packet what
it has to be, so the receiver compares whole packets with what is next: a loss, a swap and a changed byte all fail, for
packets without any payload too. Nothing is lost for lack of room: no more than a window is under way at any time.

    UDP      one packet for each call
    GSO      several for each call, which offload carries as one super-packet (udp(7), UDP_SEGMENT)
    raw IP   where UDP does not fit, and for the protocols whose ports nobody knows
"""

import contextlib
import random
import socket

import pytest
from harness import inside

MTU = 1500
HEADER = {4: 20, 6: 40}
UDP_HEADER = 8
RAW_PROTOCOL = 253
"""RFC 3692: for experiments."""
SO_RCVBUFFORCE = 33
UDP_SEGMENT = 103
"""asm-generic/socket.h, linux/udp.h; Python has no names for them."""
WINDOW = 48
"""Packets of one flow and direction that may be under way; eight flows of them fill half of a connection's queue."""
TIMEOUT = 10
"""Seconds in which a packet has to arrive."""
OFFLOAD = {
    # name: (of the server, of the client)
    "offload": ("yes", "yes"),
    "server without": ("no", "yes"),
    "client without": ("yes", "no"),
    "no offload": ("no", "no"),
}
NOISE = random.Random(86).randbytes(1 << 16)
MIXES = {
    "rising": list,
    "falling": lambda sizes: list(reversed(sizes)),
    "small and large": lambda sizes: [size for pair in zip(sizes, reversed(sizes)) for size in pair],
    "shuffled": lambda sizes: random.Random(len(sizes)).sample(sizes, len(sizes)),
}
"""Orders of a range of sizes; each has every size at least once."""


class Flow:
    """Packets of one kind between the two hosts.

    number: tells the flow apart. version: of IP. client, server: the hosts' inner addresses.
    """

    kind = socket.SOCK_DGRAM
    protocol = socket.IPPROTO_UDP
    transport = UDP_HEADER
    port = 6100

    def __init__(self, network, number, version, addresses):
        self.number = number
        self.overhead = HEADER[version] + self.transport
        family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
        self.sockets = []
        for host in (network.client, network.server):
            with inside(host):
                sock = socket.socket(family, self.kind, self.protocol)
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
            sock.settimeout(TIMEOUT)
            self.sockets.append(sock)
        port = self.port and self.port + number
        for sock, address in zip(self.sockets, addresses):
            sock.bind((address, port))
        for sock, address in zip(self.sockets, reversed(addresses)):
            sock.connect((address, port))

    def sequence(self, mix):
        """Sizes of IP packets, with every one that this flow can make."""
        return MIXES[mix](range(max(28, self.overhead), MTU + 1))

    def payload(self, direction, count, size):
        """What packet number `count`, of `size` bytes with its headers, carries."""
        at = (count * 8191 + self.number * 127 + direction) % (len(NOISE) - MTU)
        return NOISE[at : at + size - self.overhead]

    def send(self, sock, direction, first, sizes):
        for count, size in enumerate(sizes, first):
            sock.send(self.payload(direction, count, size))

    def receive(self, sock, direction, first, sizes):
        for count, size in enumerate(sizes, first):
            try:
                data = self.received(sock)
            except TimeoutError:
                pytest.fail(f"{self}: packet {count} of {size} bytes did not come")
            assert data == self.payload(direction, count, size), f"{self}: not packet {count} of {size} bytes"

    def received(self, sock):
        return sock.recv(2 * MTU)

    def begin(self, first, sizes):
        for direction, sock in enumerate(self.sockets):
            self.send(sock, direction, first, sizes)

    def finish(self, first, sizes):
        for direction, sock in enumerate(reversed(self.sockets)):
            self.receive(sock, direction, first, sizes)

    def __str__(self):
        return f"{type(self).__name__} flow {self.number}"

    def close(self):
        for sock in self.sockets:
            sock.close()


class Segmented(Flow):
    """Super-packets: three packets of a size and a shorter one, in one call."""

    def sequence(self, mix):
        return [
            size
            for longest in MIXES[mix](range(self.overhead + 2, MTU + 1))
            for size in (longest, longest, longest, (longest + self.overhead) // 2)
        ]

    def send(self, sock, direction, first, sizes):
        for at in range(0, len(sizes), 4):
            sock.setsockopt(socket.SOL_UDP, UDP_SEGMENT, sizes[at] - self.overhead)
            sock.send(b"".join(self.payload(direction, first + n, sizes[n]) for n in range(at, at + 4)))


class Raw(Flow):
    """IP packets without a transport header."""

    kind = socket.SOCK_RAW
    protocol = RAW_PROTOCOL
    transport = 0
    port = 0

    def received(self, sock):
        # raw(7), ipv6(7): IPv4 comes with its header, IPv6 without.
        return sock.recv(2 * MTU)[HEADER[4] if sock.family == socket.AF_INET else 0 :]


@contextlib.contextmanager
def flows(network):
    addresses = {4: ("10.86.0.2", "10.86.0.1"), 6: ("fd86::2", "fd86::1")}
    kinds = [(kind, version) for version in addresses for kind in (Flow, Flow, Segmented, Raw)]
    with contextlib.ExitStack() as stack:
        made = [kind(network, number, version, addresses[version]) for number, (kind, version) in enumerate(kinds)]
        for flow in made:
            stack.callback(flow.close)
        yield made


def exchange(made, mixes):
    """Every flow carries every size both ways, in the order of each of `mixes`."""
    sequences = [(flow, [size for mix in mixes for size in flow.sequence(mix)]) for flow in made]
    for first in range(0, max(len(sizes) for _, sizes in sequences), WINDOW):
        for step in (Flow.begin, Flow.finish):
            for flow, sizes in sequences:
                step(flow, first, sizes[first : first + WINDOW])


@pytest.fixture(scope="module", params=OFFLOAD, ids=OFFLOAD.keys())
def tunnel(request, shared_network):
    flags = OFFLOAD[request.param]
    server = shared_network.start_server(f"--offload={flags[0]}").wait_ready()
    client = shared_network.start_client(f"--offload={flags[1]}").wait_ready()
    client.wait_connections(4)
    yield shared_network, server, client
    assert client.stop() == 0 and server.stop() == 0


@pytest.mark.parametrize("rounds", [1, pytest.param(36, marks=pytest.mark.long)])
def test_every_size_and_mix(tunnel, rounds):
    """36 rounds are 1,000 packets of every size for each version of IP and each way."""
    network, server, client = tunnel
    before = [one["peer"] for one in server.connections()]
    with flows(network) as made:
        for _ in range(rounds):
            exchange(made, MIXES)
    assert [one["peer"] for one in server.connections()] == before
    both_offload = all("uso" in daemon.status()["offload"] for daemon in (server, client))
    for daemon in (server, client):
        assert not any(daemon.status()["drops"].values()), daemon.status()["drops"]
        packets, segments = (
            sum(one[name] for one in daemon.connections()) for name in ("packets_out", "segments_out")
        )
        assert segments > packets if both_offload else segments == packets, "super-packets where they do not belong"
