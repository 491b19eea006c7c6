"""Many clients on one server: each has its own addresses, keeps them, and the workers share them evenly.

    client 1 ── veth1 198.51.100.6  ═══ 198.51.100.5  veth1 ──.
    client 2 ── veth2 198.51.100.10 ═══ 198.51.100.9  veth2 ──┼── server
    …                                                         │
    client 8 ── veth8 198.51.100.34 ═══ 198.51.100.33 veth8 ──'
"""

import collections
import contextlib
import re

import pytest
from harness import INNER, wait_until
from rawclient import RawClient

from bulkvpnd.admin import namespaces
from bulkvpnd.protocol import frame
from bulkvpnd.protocol.errors import Refused

CLIENTS = 8
CONNECTIONS = 3
"""Of each client; odd, so that one client alone cannot be even over two workers."""


@pytest.fixture
def crowd(network):
    """The network with a host for each of eight more clients: {name: host}."""
    with contextlib.ExitStack() as stack:
        hosts = {}
        for number in range(1, CLIENTS + 1):
            name, address = f"client{number}", f"198.51.100.{4 * number + 1}"
            host = stack.enter_context(namespaces.Host(namespaces.unique_name(f"bulkvpn-test-{number}")))
            namespaces.link(network.server, host, [f"{address}/30"], [f"198.51.100.{4 * number + 2}/30"],
                            f"veth{number}")
            network.add_client(name, address)
            hosts[name] = host
        yield network, hosts


def start(network, hosts, names):
    clients = {
        name: network.start_client("--workers=1", f"--connections={CONNECTIONS}", "--cipher=aes-256-gcm", name=name,
                                   host=hosts[name])
        for name in names
    }  # fmt: skip
    for client in clients.values():
        client.wait_ready().wait_connections(CONNECTIONS)
    return clients


def leases(server):
    return {session["identity"]: tuple(session["addresses"]) for session in server.status()["sessions"]}


def answers(host):
    return all(
        host.run(["ping", "-n", "-c", 1, "-W", "1", address], check=False).returncode == 0 for address in INNER.values()
    )


def test_eight_clients(crowd):
    network, hosts = crowd
    flags = ("--workers=2", "--cipher=aes-256-gcm")
    server = network.start_server(*flags).wait_ready()
    assert not any(answers(host) for host in hosts.values())
    clients = start(network, hosts, hosts)

    first = leases(server)
    assert first.keys() == hosts.keys()
    assert len({address for addresses in first.values() for address in addresses}) == 2 * CLIENTS, "a lease of its own"
    assert all(answers(host) for host in hosts.values())
    load = collections.Counter(connection["worker"] for connection in server.connections())
    assert load == {0: CLIENTS * CONNECTIONS // 2, 1: CLIENTS * CONNECTIONS // 2}, "evenly over the workers"

    # Two come back in the other order than they first came.
    for name in ("client2", "client1"):
        assert clients.pop(name).stop() == 0
    wait_until(lambda: not any(one["connections"] for one in server.status()["sessions"]
                               if one["identity"] in ("client1", "client2")), 10, "the server sees them leave")
    for name in ("client2", "client1"):
        clients.update(start(network, hosts, [name]))
    assert leases(server) == first

    assert server.stop() == 0
    server = network.start_server(*flags).wait_ready()
    for client in clients.values():
        client.wait_connections(CONNECTIONS, 40)
    assert leases(server) == first
    assert all(answers(host) for host in hosts.values())


@pytest.fixture(scope="module")
def server(shared_network):
    """With room for one client."""
    file = shared_network.directory / "server.conf"
    text = re.sub(r"(?m)^pool-ipv4 = .*", "pool-ipv4 = 10.86.0.0/30", file.read_text())
    file.write_text(re.sub(r"(?m)^pool-ipv6 = .*\n", "", text))
    shared_network.add_client("other")
    server = shared_network.start_server("--grace=1").wait_ready()
    yield server
    assert server.stop() == 0


def test_second_login_takes_over_with_its_first_frame(shared_network, server):
    """Of the same identity: until its first authentic frame it may be anybody's replay and changes nothing."""
    with RawClient(shared_network, "client") as first, RawClient(shared_network, "client") as second:
        address = first.join().ipv4
        assert first.ping()
        before = server.status()["sessions"]
        assert len(before) == 1

        assert second.join().ipv4 == address
        assert first.ping()
        ((one,), (same,)) = before, server.status()["sessions"]
        assert [same[name] for name in ("session", "addresses")] == [one[name] for name in ("session", "addresses")]
        assert [connection["peer"] for connection in same["connections"]] == [first.address]

        assert second.ping()
        assert first.receive_until(frame.CLOSE) == b"replaced"
        assert first.ended()
        (now,) = server.status()["sessions"]
        assert now["session"] != one["session"] and now["addresses"] == one["addresses"]
        assert [connection["peer"] for connection in now["connections"]] == [second.address]
        second.send(second.seal(frame.CLOSE, b"done"))
    wait_until(lambda: not server.status()["sessions"], 10, "the session ends")


def test_full_pool(shared_network, server):
    """Who comes too late is told so, keeps trying, and is in when there is room."""
    with RawClient(shared_network, "client") as first:
        address = first.join().ipv4
        assert first.ping()
        with RawClient(shared_network, "other") as other, pytest.raises(Refused, match="pool"):
            other.join()
        assert server.lines(f"other from {re.escape(other.address)} refused: every address of the pool is in use")
        late = shared_network.start_client("--connections=1", "--retry-max=1", name="other")
        wait_until(lambda: late.lines("connection 0: the server refuses: pool"), 10, "the client is told")
        assert first.ping()
        assert "READY=1" not in late.notified()
        first.send(first.seal(frame.CLOSE, b"done"))
    late.wait_ready(15)
    assert late.status()["addresses"] == [str(address)]
    assert not server.lines("turned away"), "a refusal is one line, not two"
    assert late.stop() == 0
    wait_until(lambda: not server.status()["sessions"], 10, "the session ends")
