"""What an administrator does to a server that carries traffic: reload, disconnect, drain, restart."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from harness import INNER, ROOT, inside, wait_until

BACK = 3
"""Seconds until a client that was sent away is back (issue: the promise)."""
FOUND = 1.5
"""Seconds until a server that listens again is found: a pause of 0.5 s at most, the handshake, and a ping in the middle
of it that takes one. The start of the server, 1 s of CPU, is the rest of the promise."""


@pytest.fixture
def tunnel(network):
    server = network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    yield network, server, client
    assert client.stop() == 0


def bulkvpnctl(*arguments):
    """Returns (exit status, what it printed)."""
    result = subprocess.run([sys.executable, "-m", "bulkvpnd.admin", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode, result.stdout


def sessions(server):
    return [(one["identity"], one["session"]) for one in server.status()["sessions"]]


def test_reload_disconnect_and_drain(tunnel):
    network, server, client = tunnel
    file = network.directory / "server.conf"
    good = file.read_text()
    reload = ["reload", server.runtime, "--config", file]
    before = sessions(server), [one["connection"] for one in server.connections()]
    assert not server.lines("DEBUG")

    file.write_text(good + "grace = never\n")
    status, said = bulkvpnctl(*reload)
    assert status == 78 and re.fullmatch(rf"bulkvpnctl: {file}:\d+: grace = never: should be .*\n", said)
    file.write_text(good + "log-level = debug\nmtu = 1400\nroutes = 192.168.7.0/24\n")
    status, said = bulkvpnctl(*reload)
    assert status == 0 and "log-level: in force" in said and "mtu: needs a restart" in said
    assert "routes: in force for sessions begun from then on" in said
    assert server.lines("reloaded: in force: .*after a restart: mtu")
    assert network.ping() and (sessions(server), [one["connection"] for one in server.connections()]) == before

    # The daemon can read its file here, so the signal does the same.
    file.write_text(good + "log-level = debug\ngrace = 44\n")
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: server.lines("reloaded: in force: .*grace"), 5, "the signal reloads")
    file.write_text(good + "grace = never\n")
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: server.lines("not reloaded, the former configuration stays in force: .*grace = never"), 5, "no")
    file.write_text(good)

    assert bulkvpnctl("disconnect", "nobody", server.runtime)[0] == 1
    assert sessions(server) == before[0] and not server.lines("DEBUG")
    assert bulkvpnctl("disconnect", "client", server.runtime)[0] == 0
    wait_until(lambda: sessions(server) and sessions(server) != before[0], BACK, "it is back, with another session")
    client.wait_connections(4)
    assert network.ping() and server.lines("DEBUG")

    assert bulkvpnctl("drain", server.runtime) == (0, f"{server.runtime.name}: accepts no new sessions; 1 is left\n")
    assert bulkvpnctl("disconnect", "client", server.runtime)[0] == 0
    assert bulkvpnctl("drain", server.runtime, "--wait")[0] == 0
    wait_until(lambda: client.lines("the server refuses: shutdown"), 5, "it is refused")
    wait_until(lambda: not sessions(server), 5, "it is out")
    assert not network.ping(count=1)
    assert bulkvpnctl("drain", server.runtime, "--off")[0] == 0
    wait_until(lambda: sessions(server), 30, "it is back")
    assert server.stop() == 0


def test_a_client_goes_to_another_remote_and_a_server_has_other_sockets(tunnel):
    """Both ends by a signal: their files can be read here."""
    network, server, client = tunnel
    file, own = network.directory / "server.conf", network.directory / "client.conf"

    def buffers():
        """Of the sockets for sending, as ss(8) shows them: twice what was set, socket(7)."""
        shown = network.server.run(["ss", "-tmHn", "state", "established", "sport", "=", ":7443"]).stdout
        return [int(size) // 2048 for size in re.findall(r",tb(\d+),", shown)]

    file.write_text(file.read_text() + "sndbuf = 96K\n")
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: server.lines("reloaded: in force: sndbuf; after a restart: nothing"), 5, "it is in force")
    assert len(buffers()) == 4 and 96 not in buffers(), "who is connected stays so"
    own.write_text(re.sub(r"^remote = .*$", "remote = [2001:db8::1]:7443\nconnections = 2", own.read_text(),
                          flags=re.MULTILINE))
    os.kill(client.process.pid, signal.SIGHUP)
    wait_until(lambda: client.lines("reloaded: in force: remote, connections; after a restart: nothing"), 5, "likewise")
    assert len(client.wait_connections(4)) == 4 and network.ping()
    assert bulkvpnctl("disconnect", "client", server.runtime)[0] == 0
    wait_until(lambda: [one["peer"] for one in client.connections()] == 2 * ["[2001:db8::1]:7443"], 10, "it is back")
    server.wait_connections(2)
    assert network.ping() and buffers() == [96, 96]
    assert server.stop() == 0


def test_a_restart_is_over_within_seconds_and_tcp_lives_on(tunnel):
    network, server, client = tunnel
    with inside(network.server):
        listener = socket.create_server((INNER[4], 5001))
    with inside(network.client):
        near = socket.create_connection((INNER[4], 5001), timeout=5)
    far, _ = listener.accept()
    with near, far, listener:
        near.sendall(b"before")
        assert far.recv(6) == b"before"
        assert server.stop() == 0
        assert not network.ping(count=1)
        again = network.start_server().wait_ready()
        ready = time.monotonic()
        wait_until(lambda: network.ping(count=1), 20, "the tunnel is back")
        took = time.monotonic() - ready
        near.settimeout(10)
        far.settimeout(10)
        near.sendall(b"after")
        assert far.recv(5) == b"after"
        far.sendall(b"and back")
        assert near.recv(8) == b"and back"
        assert took < FOUND, f"{took:.1f} s after it was ready"
    again.wait_connections(4)
    assert again.stop() == 0


class Stream:
    """A TCP connection that is never idle. received: bytes so far. longest: seconds, the longest time without any."""

    def __init__(self, source, sink):
        self.received, self.longest = 0, 0.0
        self._source, self._sink = source, sink
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self):
        with contextlib.suppress(BrokenPipeError):
            while True:
                self._source.sendall(bytes(65536))

    def _receive(self):
        last = time.monotonic()
        while data := self._sink.recv(65536):
            now = time.monotonic()
            self.received, self.longest, last = self.received + len(data), max(self.longest, now - last), now

    def wait(self, seconds, what):
        """Until much more has come."""
        before = self.received
        wait_until(lambda: self.received > before + (1 << 20), seconds, what)

    def stop(self):
        """All that was sent arrives."""
        self._source.shutdown(socket.SHUT_WR)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.mark.parametrize("direction", ["to the server", "to the client"])
def test_traffic_goes_on_after_a_restart(tunnel, direction):
    network, server, client = tunnel
    with inside(network.server):
        listener = socket.create_server((INNER[4], 5001))
    with inside(network.client):
        near = socket.create_connection((INNER[4], 5001), timeout=60)
    with listener, near, listener.accept()[0] as far:
        far.settimeout(60)
        stream = Stream(near, far) if direction == "to the server" else Stream(far, near)
        stream.wait(10, "it flows")
        assert server.stop() == 0
        again = network.start_server().wait_ready()
        stream.wait(20, "it goes on")
        stream.stop()
    again.wait_connections(4)
    assert len(client.lines("no connection to the server is left")) == 1
    assert again.stop() == 0


def test_hooks(network):
    said = network.directory / "said"
    hook = network.directory / "hook"
    hook.write_text(f'#!/bin/sh\necho "$1 $BULKVPN_MODE $BULKVPN_IDENTITY $BULKVPN_ADDRESSES" >>{said}\n'
                    'echo heard "$1"\n')
    hook.chmod(0o755)
    flags = [f"--on-{event}={hook}" for event in ("up", "down")]
    server = network.start_server(*flags, f"--on-client-connect={hook}", f"--on-client-disconnect={hook}").wait_ready()
    # The shell makes the file before it writes.
    wait_until(lambda: said.exists() and said.read_text(), 20, "the server is up")
    assert said.read_text() == "up server  10.86.0.1/24 fd86::1/64\n"
    client = network.start_client(*flags).wait_ready()

    def lines():
        return said.read_text().splitlines()[1:]

    wait_until(lambda: len(lines()) == 2, 20, "both ends say so")
    assert sorted(lines()) == ["client-connect server client 10.86.0.2 fd86::2", "up client  10.86.0.2/24 fd86::2/64"]
    wait_until(lambda: server.lines("hook client-connect: heard client-connect"), 20, "its output is in the log")
    assert client.stop() == 0
    assert lines()[2:] == ["down client  10.86.0.2/24 fd86::2/64"], "a stop waits for it"
    assert server.stop() == 0
    assert sorted(lines()[3:]) == ["client-disconnect server client 10.86.0.2 fd86::2",
                                   "down server  10.86.0.1/24 fd86::1/64"]
