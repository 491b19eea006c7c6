"""No ping before the tunnel, ping while it is there, none after it."""

import json

import pytest
from harness import INNER, wait_until

from bulkvpnd.admin import namespaces


@pytest.mark.parametrize("remote", ["192.0.2.1", "[2001:db8::1]"])
def test_tunnel_comes_and_goes(network, remote):
    (network.directory / "client.conf").unlink()
    network.pki("add", "outer", "--remote", remote, "--output", str(network.directory / "client.conf"))
    assert not network.ping(4, count=1)
    assert not network.ping(6, count=1)
    server = network.start_server().wait_ready()
    assert not network.ping(4, count=1)
    client = network.start_client().wait_ready()

    client.wait_connections(4)
    assert network.ping(4) and network.ping(6)
    device = json.loads(network.client.ip("-j", "link", "show", "dev", "bulk0"))[0]
    assert (device["mtu"], device["txqlen"]) == (1500, 9000)
    status = wait_until(lambda: (now := server.status())["sessions"] and now, 5, "a session at the server")
    assert status["sessions"][0]["addresses"] == ["10.86.0.2", "fd86::2"]
    assert {one["worker"] for one in status["sessions"][0]["connections"]} == {
        worker["index"] for worker in status["workers"]
    }

    assert client.stop() == 0
    assert not network.ping(4, count=1)
    assert "bulk0" not in network.client.ip("-br", "link")
    assert not (client.runtime / "status.sock").exists()
    assert server.stop() == 0
    assert "bulk0" not in network.server.ip("-br", "link")


def test_a_link_local_remote(network):
    """All connections go where the first one went, by the interface that the zone names."""
    for host, address in ((network.server, "fe80::1/64"), (network.client, "fe80::2/64")):
        host.ip("address", "add", address, "dev", "veth0", "nodad")
    network.start_server().wait_ready()
    client = network.start_client("--remote=[fe80::1%veth0]").wait_ready()
    client.wait_connections(4)
    assert not client.lines("failed")


@pytest.mark.parametrize("which", ["all", "default"])
@pytest.mark.parametrize("end", ["server", "client"])
def test_a_host_without_ipv6(network, end, which):
    """The files that pki makes have a pool of IPv6; such a host goes on with IPv4, and says so once."""
    host = getattr(network, end)
    host.run(["sysctl", "-q", "-w", f"net.ipv6.conf.{which}.disable_ipv6=1"])
    server = network.start_server("--nat=yes").wait_ready()
    client = network.start_client("--redirect-gateway=yes").wait_ready()
    client.wait_connections(4)
    assert network.ping(4) and not network.ping(6, count=1)
    warnings = [*server.lines("WARNING"), *client.lines("WARNING")]
    assert [f"bulkvpnd@{end}" in line and "this machine has no IPv6, so " in line for line in warnings] == [True]
    assert client.status()["addresses"] == ["10.86.0.2/24"]
    assert client.stop() == 0 and server.stop() == 0


def test_a_host_without_ipv6_and_nothing_else(network):
    text = (network.directory / "server.conf").read_text()
    (network.directory / "server.conf").write_text(
        "".join(line for line in text.splitlines(True) if not line.startswith("pool-ipv4")))
    network.server.run(["sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1"])
    server = network.start_server()
    wait_until(lambda: namespaces.exited(server.process), 20, "it gives up")
    assert server.lines("ERROR: pool-ipv6 = fd86::/64: this machine has no IPv6; give a pool-ipv4, or switch it on")
    assert server.stop() == 1


@pytest.mark.parametrize(("server_flags", "client_flags"), [
    ([], []),
    (["--workers=2"], ["--connections=1", "--workers=1"]),
    (["--cipher=chacha20-poly1305"], []),
    (["--cipher=aes-256-gcm", "--frame-size=128K"], []),
    (["--rekey-bytes=64K"], ["--rekey-bytes=64K"]),
])  # fmt: skip
def test_iperf_both_ways(network, server_flags, client_flags):
    server = network.start_server(*server_flags).wait_ready()
    client = network.start_client(*client_flags).wait_ready()
    before = client.wait_connections(1 if "--connections=1" in client_flags else 4)
    for address in INNER.values():
        for direction in ([], ["--reverse"]):
            listening = network.server.start(["iperf3", "--server", "--one-off", "--bind", address])
            wait_until(lambda: network.server.listening(5201), 10, "iperf3 listens")
            report = network.client.run(["iperf3", "--json", "-c", address, "-t", "1", "-P", "2", *direction])
            assert json.loads(report.stdout)["end"]["sum_received"]["bytes"] > 0
            listening.wait(10)
    after = client.connections()
    assert [one["peer"] for one in after] == [one["peer"] for one in before]
    assert all(one["age"] > 2 for one in after), "a connection was re-made"
    assert server.stop() == 0 and client.stop() == 0
