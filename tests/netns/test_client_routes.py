"""What a client takes of the routes and name servers that its server pushes, and what it sets itself.

Programs in the place of resolvectl and resolvconf write down how they are called.
"""

import json
import os
import signal

import pytest
import snapshot
from harness import wait_until

from bulkvpnd.admin import namespaces
from bulkvpnd.host.dns import RESOLVED

POOLS = {"10.86.0.0/24", "fd86::/64"}
RECORD = """#!/bin/sh
echo "{program} $*" >>{log}
if [ "$1" = -a ]; then cat >>{log}; fi
"""


def unchanged(before, host):
    changed = "\n".join(snapshot.differences(before, snapshot.take(host)))
    assert not changed, changed


def into_the_tunnel(host):
    """Networks with routes of ours."""
    return {
        entry["dst"]
        for family in ("-4", "-6")
        for entry in json.loads(host.ip("-j", family, "route", "show", "dev", "bulk0") or "[]")
        if entry["protocol"] == "86"
    }


def test_pushed_routes_by_the_policy(network):
    network.client.ip("address", "add", "172.16.5.1/24", "dev", "veth0")
    network.client.ip("route", "add", "10.9.0.0/16", "via", "192.0.2.1")
    before = snapshot.take(network.client)
    pushed = ["10.1.0.0/16", "fd00:1::/64", "203.0.113.0/24", "172.16.0.0/12", "10.9.0.0/16", "192.0.2.0/24"]
    network.start_server(*(f"--routes={one}" for one in pushed)).wait_ready()
    client = network.start_client("--accept-routes=private", "--accept-routes=192.0.2.0/24").wait_ready()
    assert into_the_tunnel(network.client) == POOLS | {"10.1.0.0/16", "fd00:1::/64"}
    for line in ("203.0.113.0/24 through the tunnel: not in accept-routes",
                 "172.16.0.0/12 through the tunnel: it overlaps 172.16.5.0/24, which this machine reaches directly",
                 "10.9.0.0/16 through the tunnel: there is a route already, by veth0",
                 "192.0.2.0/24 through the tunnel: it covers the server's address 192.0.2.1"):
        assert len(client.lines(f"no route to {line}")) == 1, client.text()
    client.wait_connections(4)
    assert client.stop() == 0
    unchanged(before, network.client)

    client = network.start_client("--accept-routes=none").wait_ready()
    assert into_the_tunnel(network.client) == set()
    assert client.stop() == 0


@pytest.mark.parametrize(("flags", "led"), [
    ([], False), (["--accept-routes=none"], False), (["--accept-routes=8.0.0.0/8"], True),
])  # fmt: skip
def test_a_pool_is_led_by_the_policy(network, flags, led):
    before = snapshot.take(network.client)
    network.start_server("--pool-ipv4=8.0.0.0/8").wait_ready()
    client = network.start_client(*flags).wait_ready()
    assert ("8.0.0.0/8" in network.client.ip("route")) == led
    assert len(client.lines(r"no route to 8.0.0.0/8 \(the server's pool\).*: not in accept-routes")) == (not led)
    assert client.status()["addresses"] == ["8.0.0.2/8", "fd86::2/64"]
    assert client.stop() == 0
    unchanged(before, network.client)


def test_a_pool_that_holds_the_server(network):
    """The connections stay outside, and the next pool that the server has is taken."""
    network.server.ip("address", "add", "198.51.100.1/32", "dev", "lo")
    network.client.ip("route", "add", "default", "via", "192.0.2.1")
    server = network.start_server("--pool-ipv4=198.51.0.0/16").wait_ready()
    client = network.start_client("--remote=198.51.100.1", "--accept-routes=private",
                                  "--accept-routes=198.51.0.0/16").wait_ready()
    client.wait_connections(4)
    assert "dev veth0" in network.client.ip("route", "get", "198.51.100.1")
    assert network.ping(6)
    assert len(client.lines(r"no route to 198.51.0.0/16 \(the server's pool\) through the tunnel: it covers the "
                            "server's address 198.51.100.1; the server has to use another network")) == 1
    assert server.stop() == 0
    server = network.start_server().wait_ready()
    wait_until(lambda: "10.86.0.0/24" in into_the_tunnel(network.client), 20, "another pool")
    client.wait_connections(4)
    assert network.ping(4)


def test_an_address_that_another_device_has(network):
    network.start_server().wait_ready()
    network.client.ip("address", "add", "10.86.0.2/32", "dev", "lo")
    client = network.start_client("--retry-max=1")
    line = ("connection 0 to 192.0.2.1:7443 failed: bulk0: address 10.86.0.2/32: lo has 10.86.0.2/32 already; "
            "choose another pool-ipv4 at the server, or remove that")
    wait_until(lambda: len(client.lines(line)) > 1, 20, "it says so, and comes again")
    assert client.status()["sessions"] == [] and "READY=1" not in client.notified()
    network.client.ip("address", "delete", "10.86.0.2/32", "dev", "lo")
    client.wait_ready().wait_connections(4)
    assert network.ping(4)


@pytest.mark.parametrize("local", ["10.86.0.129/24", "10.86.0.129/25", "10.9.0.1/8"])
def test_a_pool_that_is_a_network_here(network, local):
    network.client.ip("address", "add", local, "dev", "veth0")
    network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    assert into_the_tunnel(network.client) == {"fd86::/64"}
    assert len(client.lines(r"no route to 10.86.0.0/24 \(the server's pool\) through the tunnel: it overlaps 10.*, "
                            "which this machine reaches directly; use another network at one end, or set routes for "
                            "what is left of it")) == 1
    assert network.ping(6)
    assert client.stop() == 0
    if local != "10.86.0.129/24":
        client = network.start_client("--routes=10.86.0.0/24").wait_ready()
        assert into_the_tunnel(network.client) == POOLS and network.ping(4)
        assert not client.lines("no route")


def test_a_clients_address_is_not_for_its_neighbours(network):
    """The class of CVE-2019-14899: who shares a network with the client, here the server's machine, outside the tunnel.
    """
    def answers(address):
        return network.server.run(["ping", "-n", "-c", 1, "-W", "1", address], check=False).returncode == 0

    inner, others = ("10.86.0.2", "fd86::2"), ("10.99.0.9", "fd99::9")
    for address, other, way in zip(inner, others, ("192.0.2.2", "2001:db8::2"), strict=True):
        network.client.ip("address", "add", other, "dev", "lo")
        network.server.ip("route", "add", other, "via", way)
    network.start_server().wait_ready()
    network.start_client().wait_ready()
    assert all(map(answers, (*inner, *others))), "those of the tunnel through the tunnel"
    for address, way in zip(inner, ("192.0.2.2", "2001:db8::2"), strict=True):
        network.server.ip("route", "add", address, "via", way)
    assert [*map(answers, (*inner, *others))] == [False, False, True, True]


def test_own_routes_lead_around_the_server(network):
    """192.0.2.0/29 has the server in it: its connections stay outside, and the rest of the network does not."""
    before = snapshot.take(network.client)
    network.start_server().wait_ready()
    client = network.start_client("--routes=192.0.2.0/29", "--routes=fd00:1::/64").wait_ready()
    client.wait_connections(4)
    # 192.0.2.0/30 is that of veth0, which is longer than none of these.
    assert into_the_tunnel(network.client) == POOLS | {"192.0.2.0", "192.0.2.2/31", "192.0.2.4/30", "fd00:1::/64"}
    assert "dev veth0" in network.client.ip("route", "get", "192.0.2.1")
    assert "dev bulk0" in network.client.ip("route", "get", "192.0.2.5")
    assert network.ping()
    # After a crash they are gone with the device.
    client.kill()
    wait_until(lambda: "bulk0" not in network.client.ip("-br", "link"), 20, "its workers are gone")
    assert "proto 86" not in network.client.ip("route") + network.client.ip("-6", "route")
    assert network.start_client().wait_ready().stop() == 0
    unchanged(before, network.client)


@pytest.fixture
def recorded(network, tmp_path, monkeypatch):
    """Gives install(program, fails) and calls(), what the programs were called with since."""
    if RESOLVED.exists():
        pytest.skip("systemd-resolved runs here, and the daemon would ask that")
    log, directory = tmp_path / "calls", tmp_path / "bin"
    directory.mkdir()

    def install(program, fails=""):
        (directory / program).write_text(RECORD.format(program=program, log=log) + fails)
        (directory / program).chmod(0o755)

    def calls():
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return install, calls


def test_name_servers_by_resolvconf(network, recorded):
    install, calls = recorded
    install("resolvconf")
    before = snapshot.take(network.client)
    network.start_server("--dns=10.86.0.1", "--dns-search=corp.example").wait_ready()
    client = network.start_client().wait_ready()
    assert calls() == ["resolvconf -a tun.bulkvpnd-client -m 0 -x", "nameserver 10.86.0.1", "search corp.example"]
    assert client.stop() == 0
    assert calls() == ["resolvconf -d tun.bulkvpnd-client -f"]

    client = network.start_client("--dns=10.86.0.53").wait_ready()
    assert calls() == ["resolvconf -a tun.bulkvpnd-client -m 0 -x", "nameserver 10.86.0.53", "search corp.example"]
    assert client.stop() == 0
    calls()

    client = network.start_client("--accept-dns=no").wait_ready()
    assert client.stop() == 0
    assert calls() == []
    unchanged(before, network.client)


def test_name_servers_that_cannot_be_set_are_one_line(network, recorded):
    install, calls = recorded
    install("resolvconf", fails='echo "resolvconf: cannot write" >&2; exit 1\n')
    network.start_server("--dns=10.86.0.1").wait_ready()
    client = network.start_client().wait_ready()
    assert len(client.lines("name servers 10.86.0.1, domains none: not set: resolvconf: resolvconf: cannot write")) == 1
    assert network.ping(), "the tunnel is there all the same"
    assert client.stop() == 0


def test_an_interface_that_is_taken_away(network):
    """It ends the daemon, and the rules of the full tunnel go with it."""
    before = snapshot.take(network.client)
    network.start_server().wait_ready()
    client = network.start_client("--redirect-gateway=yes").wait_ready()
    network.client.ip("link", "delete", "bulk0")
    wait_until(lambda: namespaces.exited(client.process), 20, "it ends")
    assert client.stop() == 1
    assert client.lines("stopping: the TUN device bulk0 was removed")
    unchanged(before, network.client)


def test_the_address_in_the_tunnel_is_not_reached_another_way(network):
    """From the network that the client is in: here the server's machine, past its own tunnel."""
    network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    assert network.ping()
    network.server.ip("route", "add", "10.86.0.2/32", "via", "192.0.2.2", "dev", "veth0")
    ask = ["ping", "-n", "-c", "1", "-W", "1", "-I", "192.0.2.1", "10.86.0.2"]
    assert network.server.run(ask, check=False).returncode != 0
    # The main process would put it back.
    os.kill(client.process.pid, signal.SIGSTOP)
    network.client.run(["nft", "delete", "table", "inet", "bulkvpnd_client"])
    assert network.server.run(ask, check=False).returncode == 0, "it was the rule that dropped it"
    os.kill(client.process.pid, signal.SIGCONT)
    assert client.stop() == 0
