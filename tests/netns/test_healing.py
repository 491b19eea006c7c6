"""What is killed, stopped, cut off or not there yet heals by itself, and inner connections survive."""

import os
import pathlib
import signal
import sys
import time

import pytest
from harness import ROOT, wait_until

TRANSFER = """
import hashlib, socket, sys, time
# Sends blocks until told to stop by a file; the far end returns the digest of all it got.
import pathlib
stop = pathlib.Path(sys.argv[1])
sock = socket.create_connection(("10.86.0.1", 6000), timeout=60)
digest, block = hashlib.sha256(), bytes(range(256)) * 64
sent = 0
while not stop.exists():
    sock.sendall(block); digest.update(block); sent += len(block)
    if sent == 64 * len(block):
        print("under way", flush=True)
    time.sleep(0.001)
sock.shutdown(socket.SHUT_WR)
assert sock.recv(100).decode() == digest.hexdigest()
print("same", sent)
"""
RECEIVE = """
import hashlib, socket
sock = socket.create_server(("10.86.0.1", 6000)).accept()[0]
digest = hashlib.sha256()
while data := sock.recv(65536):
    digest.update(data)
sock.sendall(digest.hexdigest().encode())
"""


@pytest.fixture
def server_flags():
    return []


@pytest.fixture
def tunnel(network, server_flags):
    server = network.start_server(*server_flags).wait_ready()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    yield network, server, client


@pytest.fixture
def transfer(tunnel, tmp_path):
    """A TCP connection through the tunnel that never pauses; ending it compares what was sent with what came."""
    network, _, _ = tunnel
    stop = tmp_path / "stop"
    receiver = network.server.start([sys.executable, "-c", RECEIVE])
    wait_until(lambda: network.server.listening(6000), 10, "the receiver listens")
    output = (tmp_path / "sent").open("w+")
    sender = network.client.start([sys.executable, "-c", TRANSFER, stop], stdout=output, cwd=ROOT)
    wait_until(lambda: os.fstat(output.fileno()).st_size, 10, "the transfer is under way")
    yield sender
    stop.touch()
    assert sender.wait(60) == 0
    receiver.wait(10)
    output.seek(0)
    assert "same" in output.read()


def worker_pids(daemon):
    return {worker["index"]: worker["pid"] for worker in daemon.status()["workers"] if worker["alive"]}


@pytest.mark.parametrize("role", ["server", "client"])
def test_killed_worker_is_replaced(tunnel, transfer, role):
    network, server, client = tunnel
    daemon = {"server": server, "client": client}[role]
    before = worker_pids(daemon)
    kept = {one["peer"] for one in server.connections() if one["worker"] == 1}
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: (now := worker_pids(daemon)).get(0) not in (None, before[0]) and len(now) == 2, 20,
               "a new worker")
    client.wait_connections(4, 40)
    wait_until(network.ping, 20, "ping")
    if role == "server":
        assert kept <= {one["peer"] for one in server.connections()}, "the other worker's connections were touched"


def test_killed_connection_is_remade_alone(tunnel, transfer):
    network, server, client = tunnel

    def peers():
        return {one["index"]: one["peer"] for one in server.connections()}

    before = peers()
    port = before[2].rsplit(":", 1)[1]
    network.server.run(["ss", "-K", f"dport = :{port}"])
    wait_until(lambda: (now := peers()).get(2, before[2]) != before[2] and len(now) == 4, 40, "connection 2 is re-made")
    after = peers()
    assert {index: peer for index, peer in after.items() if index != 2} == {
        index: peer for index, peer in before.items() if index != 2
    }
    assert network.ping()


def test_killed_server_comes_back(tunnel, transfer):
    network, server, client = tunnel
    server.kill()
    # Its workers notice that the main process is gone, and the device goes with the last of them.
    wait_until(lambda: "bulk0" not in network.server.ip("-br", "link"), 10, "the device is gone")
    again = network.start_server().wait_ready()
    client.wait_connections(4, 60)
    wait_until(network.ping, 20, "ping")
    assert again.status()["sessions"][0]["addresses"] == ["10.86.0.2", "fd86::2"]


def test_killed_client_comes_back(tunnel, transfer):
    network, server, client = tunnel
    client.kill()
    wait_until(lambda: "bulk0" not in network.client.ip("-br", "link"), 10, "the device is gone")
    assert not network.ping(count=1)
    again = network.start_client().wait_ready()
    again.wait_connections(4)
    assert network.ping()
    assert again.status()["addresses"] == ["10.86.0.2/24", "fd86::2/64"]
    assert server.wait_connections(4)


@pytest.mark.parametrize("server_flags", [["--keepalive=1", "--keepalive-timeout=3"]])
def test_connection_that_vanished_is_noticed_in_time(tunnel, transfer):
    """Its packets go nowhere, both ways and without a word, as behind a firewall that lost its state."""
    network, server, client = tunnel
    before = {one["index"]: one["peer"] for one in server.connections()}
    port = before[2].rsplit(":", 1)[1]
    cut = time.monotonic()
    for host, end in ((network.server, "sport"), (network.client, "dport")):
        # ip-rule(8): what comes in is routed too, and the table of local addresses has to wait its turn.
        for rule in ("add pref 2 lookup local", "del pref 0", f"add pref 1 ipproto tcp {end} {port} blackhole"):
            host.ip("rule", *rule.split())

    def ends(daemon):
        return daemon.lines(r"connection 2 .*ended: (nothing came from the peer for|Connection timed out)")

    wait_until(lambda: ends(server) and ends(client), 10, "both ends notice")
    assert 2 <= time.monotonic() - cut <= 3 + 2, "keepalive-timeout is 3 s, and looked at once a second"
    client.wait_connections(4)
    after = {one["index"]: one["peer"] for one in server.connections()}
    assert {index for index in before if before[index] != after[index]} == {2}
    assert network.ping()


def test_stopped_workers_are_replaced(tunnel):
    """SIGSTOP, which stands for a worker that hangs; at both ends at once, since it takes its time."""
    network, server, client = tunnel
    before = {daemon: worker_pids(daemon) for daemon in (server, client)}
    for daemon, index in ((server, 0), (client, 1)):
        os.kill(before[daemon][index], signal.SIGSTOP)
    for daemon, index in ((server, 0), (client, 1)):
        wait_until(lambda: daemon.lines(f"worker {index} is silent for"), 20, "the silence is noticed")
        wait_until(lambda: worker_pids(daemon).get(index) not in (None, before[daemon][index]), 10, "a new worker")
        assert worker_pids(daemon)[1 - index] == before[daemon][1 - index], "the other worker was touched"
    client.wait_connections(4, 40)
    wait_until(network.ping, 20, "ping")


def test_name_of_the_server_is_looked_up_again(network):
    """ip-netns(8) puts /etc/netns/NAME/hosts in the place of /etc/hosts for what runs there."""
    hosts = pathlib.Path("/etc/netns", network.client.name, "hosts")
    hosts.parent.mkdir(parents=True)
    try:
        hosts.write_text("127.0.0.1 localhost\n")
        network.add_client("named", "vpn.example.test")
        server = network.start_server().wait_ready()
        client = network.start_client("--retry-max=1", name="named")
        wait_until(lambda: client.lines("to vpn.example.test:7443 failed: vpn.example.test: "), 20, "it is not found")
        assert not server.connections()

        # Written into, because a bind mount goes on showing a file that was replaced. The first address is nobody's.
        with hosts.open("a") as stream:
            stream.write("198.51.100.1 vpn.example.test\n192.0.2.1 vpn.example.test\n")
        client.wait_ready()
        client.wait_connections(4)
        assert network.ping()
    finally:
        hosts.unlink(missing_ok=True)
        hosts.parent.rmdir()
