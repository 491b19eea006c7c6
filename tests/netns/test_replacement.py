"""Connections are replaced while packets flow both ways: each packet arrives, and in its turn.

Every packet has its number, and several flows run at once at a steady rate below what the tunnel carries; with
replace-interval = 1 each of the connections is replaced about once a second.
"""

import contextlib
import select
import socket
import struct
import threading
import time

import pytest
from harness import inside, wait_until

FLOWS = 12
RATE = 2000
"""Packets a second, of all flows and in each direction."""
SIZES = (60, 700, 1400)
SO_RCVBUFFORCE = 33
INNER = {"client": ("10.86.0.2", "fd86::2"), "server": ("10.86.0.1", "fd86::1")}


class Stream:
    """A numbered flow from one host to the other, and what has gone wrong with it."""

    def __init__(self, network, number, source, target):
        self.sent = self.received = 0
        self.wrong = []
        self._size = SIZES[number % len(SIZES)]
        version = number % 2
        family = (socket.AF_INET, socket.AF_INET6)[version]
        addresses = [INNER[host][version] for host in (source, target)]
        self.sockets = []
        for host, address, port in ((source, addresses[0], 7100), (target, addresses[1], 7200)):
            with inside(getattr(network, host)):
                sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
            sock.setblocking(False)
            sock.bind((address, port + number))
            self.sockets.append(sock)
        self.sockets[0].connect((addresses[1], 7200 + number))

    def send(self):
        self.sockets[0].send(struct.pack(">Q", self.sent).ljust(self._size, b"."))
        self.sent += 1

    def receive(self):
        while True:
            try:
                data = self.sockets[1].recv(2048)
            except BlockingIOError:
                return
            (number,) = struct.unpack_from(">Q", data)
            if number != self.received:
                self.wrong.append((self.received, number))
            self.received = number + 1

    def close(self):
        for sock in self.sockets:
            sock.close()


@contextlib.contextmanager
def flowing(network):
    """Streams both ways, which are sent all the time."""
    streams = [Stream(network, number, source, target)
               for source, target in (("client", "server"), ("server", "client")) for number in range(FLOWS)]
    stop = threading.Event()

    def run():
        due = time.monotonic()
        while not stop.is_set():
            # As many as are due, so that a thread that had to wait for a CPU does not send for good behind.
            while due <= time.monotonic():
                for stream in streams:
                    stream.send()
                due += FLOWS / RATE
            for stream in streams:
                stream.receive()
            select.select([stream.sockets[1] for stream in streams], [], [], max(0, due - time.monotonic()))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield streams
    finally:
        stop.set()
        thread.join()

        def complete():
            for stream in streams:
                stream.receive()
            return all(stream.received == stream.sent for stream in streams)

        try:
            wait_until(complete, 10, "the last packets come")
        finally:
            for stream in streams:
                stream.close()


def replacements(daemon):
    """(index, number of the connection) of those that live."""
    return {(one["index"], one["connection"]) for one in daemon.connections() if "connection" in one}


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.long)])
def test_nothing_is_lost_or_overtaken(network, rounds):
    server = network.start_server("--queue-target=1000").wait_ready()
    # CoDel must not drop what a busy machine holds up.
    client = network.start_client("--replace-interval=1", "--queue-target=1000").wait_ready()
    client.wait_connections(4)
    seen = set()
    with flowing(network) as streams:
        def enough():
            seen.update(replacements(client))
            return all(len({number for index, number in seen if index == one}) > rounds for one in range(4))

        wait_until(enough, 30 + 5 * rounds, f"each connection was replaced {rounds} times")
    assert not any(stream.wrong for stream in streams), [stream.wrong for stream in streams]
    assert all(stream.sent > 100 for stream in streams)
    for daemon in (server, client):
        assert not any(daemon.status()["drops"].values()), daemon.status()["drops"]
        assert not daemon.lines("ERROR|WARNING|Traceback")
        assert len(daemon.status()["sessions"]) == 1
    wait_until(lambda: len(server.connections()) <= 5, 10, "the old ones have gone")
    assert not server.lines("has no connection left")
    # Each connection shows its age.
    assert all(one["age"] < 20 for one in client.connections())
    assert client.stop() == 0 and server.stop() == 0
