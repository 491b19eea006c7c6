"""Strangers by the thousand, and out of descriptors: who is connected stays so, and who is honest gets in.

                                   flood: 198.18.0.0/16, 2001:db8:f::/48, or one address of them
    client, 192.0.2.2    ──┐         │
    honest, 198.18.255.1 ──┴─ veth ──┴── server
"""

import contextlib
import itertools
import os
import resource
import select
import ssl
import subprocess
import sys
import time

import pytest
from harness import ROOT, wait_until
from rawclient import RawClient

from bulkvpnd.protocol import handshake
from bulkvpnd.protocol.errors import RemoteError

HONEST = (f"198.18.255.{number}" for number in range(1, 255))
"""Strangers' addresses, one for each case: nobody has authenticated from there."""
FLOODS = {
    # name: (the server's address, where it comes from, the counter that has to move). {}: a number of each flood's own,
    # because a source whose connections ended at their deadline is turned away as one that failed.
    "one address": ("192.0.2.1", "198.18.127.{}/32", "source_full"),
    "many addresses": ("192.0.2.1", "198.18.0.0/17", "crowded"),
    "one IPv6 prefix": ("2001:db8::1", "2001:db8:f:f0{:02}::/64", "source_full"),
    "many IPv6 prefixes": ("2001:db8::1", "2001:db8:f::/48", "crowded"),
}
NUMBERS = itertools.count(1)
LET_IN = 5.0
"""Seconds in which an honest client has to be in."""
PAUSES = (0.5, 1.0, 2.0)
"""Seconds between its tries; without its jitter."""
MEMORY = 64 << 20
"""Bytes that strangers may cost the main process."""
LINES = 10
"""Lines of the log for each second, at most."""


@pytest.fixture(scope="module")
def tunnel(shared_network):
    """The server, and a client that is connected all the time; routes for the rest."""
    network = shared_network
    network.client.ip("route", "add", "local", "198.18.0.0/17", "dev", "lo")
    network.client.ip("-6", "route", "add", "local", "2001:db8:f::/48", "dev", "lo")
    network.server.ip("route", "add", "198.18.0.0/16", "via", "192.0.2.2")
    network.server.ip("-6", "route", "add", "2001:db8:f::/48", "via", "2001:db8::2")
    network.add_client("honest")
    server = network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    yield network, server, client
    assert [one.stop() for one in (client, server)] == [0, 0]


@contextlib.contextmanager
def flood(network, address, source, count, seconds=60):
    """A flood that is up, and goes on until the block is left."""
    output = network.directory / "flood"
    with output.open("wb") as stream:
        command = [sys.executable, "-m", "benchmarks.flood", address, 7443, count, seconds, source]
        process = network.client.start(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        wait_until(lambda: output.read_bytes() or process.poll() is not None, 60, "the flood is up")
        assert output.read_bytes().startswith(b"ready"), output.read_text()
        yield
    finally:
        process.terminate()
        process.wait()


def resident(server):
    """Bytes of the main process, statm of proc(5)."""
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def seconds_until_in(network, source):
    """How long an honest client needs that comes again when it is turned away, with the pauses of the daemon."""
    begun = time.monotonic()
    for pause in PAUSES:
        with contextlib.suppress(OSError, RemoteError, EOFError), RawClient(network, "honest", source) as raw:
            raw.join()
            assert raw.ping()
            return time.monotonic() - begun
        select.select([], [], [], pause)
    return float("inf")


@pytest.mark.parametrize("count", [1000, pytest.param(10000, marks=pytest.mark.long)])
@pytest.mark.parametrize("case", FLOODS)
def test_idle_connections_keep_nobody_out(tunnel, case, count):
    network, server, client = tunnel
    honest = next(HONEST)
    network.client.ip("address", "add", f"{honest}/32", "dev", "veth0")
    address, source, counter = FLOODS[case]
    source = source.format(next(NUMBERS))
    before = server.status()["listener"]
    connections = [one["connection"] for one in client.connections()]
    memory, begun, lines = resident(server), time.monotonic(), len(server.text().splitlines())
    with flood(network, address, source, count):
        wait_until(lambda: server.status()["listener"][counter] - before[counter] > count / 2, 30, "the crowd is there")
        assert server.status()["listener"]["handshakes"] >= (32 if counter == "source_full" else 128)
        took = seconds_until_in(network, honest)
        assert took < LET_IN, server.status()["listener"]
        for version in (4, 6):
            wait_until(lambda: network.ping(version), LET_IN, "packets pass")
        assert [one["connection"] for one in client.connections()] == connections
        assert resident(server) - memory < MEMORY
        assert len(server.text().splitlines()) - lines < LINES * (time.monotonic() - begun + 1)
    # And nothing of it is left.
    wait_until(lambda: server.status()["listener"]["handshakes"] == 0, 15, "no place is taken")
    assert not server.lines("ERROR|Traceback")


def answers(network, source):
    """Whether the server begins TLS with somebody without a certificate, before it refuses them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([handshake.ALPN])
    with contextlib.suppress(OSError, RemoteError), RawClient(network, "honest", source) as raw:
        raw.authenticate(context)
        return raw.ended()
    return False


def test_failures_cost_their_source_the_answer_and_nobody_else(tunnel):
    network, server, client = tunnel
    bad, good, known = next(HONEST), next(HONEST), "192.0.2.2"
    for address in (bad, good):
        network.client.ip("address", "add", f"{address}/32", "dev", "veth0")
    assert answers(network, bad), "the first time"
    wait_until(lambda: not answers(network, bad), 5, "it is turned away")
    assert server.lines(f"nobody at the address of {bad}:[0-9]+ is answered for [0-9]+ s")
    # Not even with a good certificate; but the addresses beside it, and one from which somebody got in.
    with pytest.raises((RemoteError, OSError)), RawClient(network, "honest", bad) as raw:
        raw.join()
    assert all(answers(network, known) for _ in range(10))
    assert seconds_until_in(network, good) < LET_IN
    wait_until(network.ping, LET_IN, "packets pass")
    assert len(client.connections()) == 4


def cpu_seconds(server):
    """User and system time of the main process, stat of proc(5)."""
    with open(f"/proc/{server.process.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_out_of_descriptors_it_neither_spins_nor_falls(tunnel):
    network, server, client = tunnel
    honest = next(HONEST)
    network.client.ip("address", "add", f"{honest}/32", "dev", "veth0")
    usual = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    in_use = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (in_use + 20, usual[1]))
    try:
        with flood(network, "192.0.2.1", "198.18.0.0/17", 100):
            wait_until(lambda: server.lines("cannot accept: Too many open files"), 10, "it is out of descriptors")
            used, begun = cpu_seconds(server), time.monotonic()
            wait_until(lambda: time.monotonic() - begun > 2, 5, "two seconds pass")
            assert cpu_seconds(server) - used < 0.2 * (time.monotonic() - begun)
            wait_until(network.ping, LET_IN, "packets pass")
            assert len(client.connections()) == 4
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, usual)
    assert seconds_until_in(network, honest) < LET_IN
    assert not server.lines("ERROR|Traceback")
