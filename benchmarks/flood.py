"""Holds idle TCP connections to a server, which never say a word. Prints "ready", and one line of JSON at the end.

    python3 -m benchmarks.flood ADDRESS PORT COUNT SECONDS NETWORK

NETWORK: where they come from: the addresses of an IPv4 network, one address of each /64 of an IPv6 network, in turn.
First COUNT connections are made, as fast as one core can; it is "ready" when the kernel at the other end has answered
all of them. What the server ends is made anew, COUNT in HOLD seconds: so many as a server must bear that lets each of
them wait for HOLD.
"""

import ipaddress
import itertools
import json
import resource
import select
import socket
import sys
import time

HOLD = 10
"""Seconds (choice: bulkvpnd's handshake-timeout)."""
WAVE = 500
"""Connections begun before those are looked at that the server has ended: fewer than a listen queue holds (choice)."""
IP_FREEBIND, IPV6_FREEBIND = 15, 78
"""linux/in.h, linux/in6.h; not in Python's socket module. No address need be configured, only routes to here."""


def sources(network):
    """The addresses, text, over and over."""
    network = ipaddress.ip_network(network)
    step = 1 if network.version == 4 else 1 << 64
    count = max(1, network.num_addresses // step)
    first = int(network.network_address) + (0 if network.num_addresses == 1 else 1)
    make = type(network.network_address)
    return (str(make(first + number * step)) for number in itertools.cycle(range(max(1, count - (step == 1) * 2))))


class Flood:
    """The connections. server: (address, port). addresses: iterator of where they come from."""

    def __init__(self, server, addresses):
        self._server = server
        self._addresses = addresses
        self._family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        self._poll = select.epoll()
        self._sockets = {}
        self.begun = self.ended = 0
        self._unanswered = set()

    def begin(self):
        sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if self._family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        sock.bind((next(self._addresses), 0))
        sock.connect_ex(self._server)
        self._sockets[sock.fileno()] = sock
        self._unanswered.add(sock.fileno())
        # Edge: told once when it is connected, and once when it is ended.
        self._poll.register(sock, select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)
        self.begun += 1

    def look(self, seconds):
        """Waits for news, `seconds` at most. Returns how many are answered and not ended."""
        for descriptor, event in self._poll.poll(seconds, 1024):
            self._unanswered.discard(descriptor)
            if event & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
                self._sockets.pop(descriptor).close()
                self.ended += 1
        return len(self._sockets) - len(self._unanswered)

    @property
    def waiting(self):
        return len(self._unanswered)


def run(address, port, count, seconds, network):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    flood = Flood((address, port), sources(network))
    while flood.begun < count:
        for _ in range(min(WAVE, count - flood.begun)):
            flood.begin()
        flood.look(0)
    while flood.waiting:
        flood.look(0.1)
    print("ready", flush=True)
    begun = time.monotonic()
    again = 0
    while (now := time.monotonic()) < begun + seconds:
        flood.look(0.01)
        due = int((now - begun) * count / HOLD)
        for _ in range(min(due, flood.ended) - again):
            flood.begin()
            again += 1
    print(json.dumps({"begun": flood.begun, "ended": flood.ended, "seconds": time.monotonic() - begun}))


if __name__ == "__main__":
    address, port, count, seconds, network = sys.argv[1:]
    run(address, int(port), int(count), float(seconds), network)
