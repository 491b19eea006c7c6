"""The server as a gateway: a host beyond it, clients that may not see each other, networks behind clients.

    client ── 192.0.2.2 ═══ 192.0.2.1 ── server ── 203.0.113.1 ═══ 203.0.113.9 ── web
    other  ── 198.51.100.2 ═ 198.51.100.1 ─┘
      └─ 192.168.7.1, fd07::1: the networks behind it

The web host knows no way to the tunnel's addresses, as on the Internet.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket

import pytest
import snapshot
from harness import INNER, Daemon, inside, wait_until

from bulkvpnd.admin import namespaces

WEB = {4: "203.0.113.9", 6: "2001:db8:9::9"}
BEHIND = {4: "192.168.7.1", 6: "fd07::1"}
NETWORKS = ("192.168.7.0/24", "fd07::/64")
TABLE = "bulkvpnd_server"
FLAGS = ("--cipher=aes-256-gcm", "--workers=1", "--connections=1")


@pytest.fixture
def site(network):
    """The network with a web host and another client: (network, web, other)."""
    with contextlib.ExitStack() as stack:
        web = stack.enter_context(namespaces.Host(namespaces.unique_name("bulkvpn-test-web")))
        other = stack.enter_context(namespaces.Host(namespaces.unique_name("bulkvpn-test-o")))
        namespaces.link(network.server, web, ["203.0.113.1/24", "2001:db8:9::1/64"],
                        [f"{WEB[4]}/24", f"{WEB[6]}/64"], "veth1")
        namespaces.link(network.server, other, ["198.51.100.1/30"], ["198.51.100.2/30"], "veth2")
        for address in BEHIND.values():
            other.ip("address", "add", address, "dev", "lo")
        network.add_client("other", "198.51.100.1")
        wait_until(lambda: settled(network.server), 10, "the server's devices have their own addresses")
        yield network, web, other


def settled(host):
    """Whether every device has its link-local address, which comes a second or two after the device."""
    devices = json.loads(host.run(["ip", "-j", "-6", "address", "show", "scope", "link"]).stdout)
    addresses = [address for device in devices for address in device["addr_info"] if address]
    return len(addresses) == 3 and not any("tentative" in address for address in addresses)


def fixed(network, text):
    """Writes the files of the clients."""
    directory = network.directory / "server.clients.d"
    directory.mkdir(exist_ok=True)
    (directory / "fixed.conf").write_text(text)


def answers(host, address, source=None):
    """Whether `address` answers a ping from `host`."""
    from_source = ["-I", source] if source else []
    return host.run(["ping", "-n", "-c", 1, "-W", "1", *from_source, address], check=False).returncode == 0


def eventually(host, address, source=None):
    wait_until(lambda: answers(host, address, source), 10, f"{address} answers")


def route(host, *destinations):
    for destination in destinations:
        host.ip("route", "add", destination, "dev", "bulk0")


def serve(web, address):
    """A socket of the web host that answers one connection with its peer's address, in a namespace of its own."""
    with inside(web):
        listening = socket.create_server((address, 80), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    listening.settimeout(10)
    return listening


@contextlib.contextmanager
def connecting(host, source_port, address, port):
    """A TCP socket of `host` that tries to connect, from a port of its own choice."""
    with inside(host):
        sock = socket.socket()
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", source_port))
        sock.settimeout(10)
        sock.setblocking(False)
        sock.connect_ex((address, port))
        yield sock


def is_connected(sock):
    return bool(select.select([], [sock], [], 0)[1]) and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def sources(host):
    """The TCP ports that have tried to connect to `host` from the server's address, as its rule has counted."""
    found = json.loads(host.run(["nft", "-j", "list", "set", "ip", "quiet", "seen"]).stdout)["nftables"]
    return next(one["set"].get("elem", []) for one in found if "set" in one)


def fetch(host, listening, address):
    """One TCP connection from `host`, and whom the server saw."""
    with inside(host):
        client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    client.settimeout(10)
    with client:
        client.connect((address, 80))
        accepted, peer = listening.accept()
        with accepted:
            accepted.sendall(b"hello")
            assert client.recv(100) == b"hello"
    return peer[0]


def tables(host):
    found = json.loads(host.run(["nft", "-j", "list", "tables"]).stdout)["nftables"]
    return [one["table"]["name"] for one in found if "table" in one]


def drops(server, cause):
    return server.status()["drops"].get(cause, 0)


def started(network, other=None, *flags, client=True):
    server = network.start_server(*FLAGS, *flags).wait_ready()
    clients = []
    if client:
        clients.append(network.start_client(*FLAGS).wait_ready())
    if other:
        clients.append(network.start_client(*FLAGS, name="other", host=other).wait_ready())
    return server, *clients


def test_nat(site):
    """With it the web answers, over both versions, and sees the server's address only; without it nothing."""
    network, web, _ = site
    before = snapshot.take(network.server)
    server, _client = started(network)
    route(network.client, "203.0.113.0/24", "2001:db8:9::/64")
    for version in (4, 6):
        assert answers(network.client, INNER[version])
        assert not answers(network.client, WEB[version])
    assert server.stop() == 0

    server = network.start_server(*FLAGS, "--nat=yes").wait_ready()
    for version, gateway in ((4, "203.0.113.1"), (6, "2001:db8:9::1")):
        eventually(network.client, WEB[version])
        with serve(web, WEB[version]) as listening:
            assert fetch(network.client, listening, WEB[version]) == gateway
    # What goes through the tunnel keeps its address.
    assert TABLE in tables(network.server)
    assert server.stop() == 0
    assert not answers(network.client, WEB[4])
    assert snapshot.differences(before, snapshot.take(network.server)) == []


def test_no_client_shadows_the_listener(site):
    """CVE-2021-3773: a client connects with the listener's port as its own to a port of another host. When that host
    then connects to the listener from that port, the kernel takes it for the answer.

    First as it is without our rules: with the administrator's NAT. Then with ours, beside it and alone.
    """
    network, _, victim = site
    # As behind most routers, it does not answer what it did not ask for.
    victim.run(["nft", "add table ip quiet; add set ip quiet seen { type inet_service; flags dynamic; }; "
                       "add chain ip quiet in { type filter hook input priority 0; }; "
                       "add rule ip quiet in ip saddr 198.51.100.1 tcp flags & (syn | ack) == syn "
                       "add @seen { tcp sport } drop"])
    network.server.run(["nft", "add table ip own; add chain ip own post { type nat hook postrouting priority 99; }; "
                               "add rule ip own post oifname veth2 masquerade"])
    network.server.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])

    def tunnel(*flags):
        daemons = started(network, None, *flags)
        route(network.client, "198.51.100.0/30")
        eventually(network.client, "198.51.100.2")
        return daemons

    def dropped():
        rules = network.server.run(["nft", "list", "table", "inet", TABLE]).stdout
        return bool(re.search(r"tcp sport 7443 counter packets [1-9]\d* .* drop", rules))

    def shadowed(victims_port):
        """Whether the victim gets through to the attacker; else it is the listener that answers it."""
        victim.run(["nft", "flush", "set", "ip", "quiet", "seen"])
        with connecting(network.client, 7443, "198.51.100.2", victims_port) as attacker:
            wait_until(lambda: dropped() or sources(victim), 10, "the attacker's packet came as far as it gets")
            with connecting(victim, victims_port, "198.51.100.1", 7443) as sock:
                wait_until(lambda: is_connected(sock), 10, "somebody answers the victim")
                return is_connected(attacker)

    server, client = tunnel()
    assert shadowed(5001) and sources(victim) == [7443]
    assert client.stop() == 0 and server.stop() == 0

    server, client = tunnel("--nat=yes")
    assert not dropped()
    assert not shadowed(5002) and dropped() and not sources(victim)
    assert client.stop() == 0 and server.stop() == 0

    network.server.run(["nft", "delete", "table", "ip", "own"])
    tunnel("--nat=yes")
    assert not shadowed(5003) and not dropped()
    (port,) = sources(victim)
    assert 32768 <= port <= 65535


@pytest.mark.parametrize("is_allowed", [False, True])
def test_client_to_client(site, is_allowed):
    network, _, other = site
    fixed(network, "[client other]\nipv4 = 10.86.0.77\nipv6 = fd86::77\nnetworks = 192.168.7.0/24\n")
    server, *_ = started(network, other, f"--client-to-client={'yes' if is_allowed else 'no'}")
    route(network.client, "192.168.7.0/24")
    assert answers(network.client, INNER[4]) and answers(other, INNER[6])
    targets = ["10.86.0.77", "fd86::77", BEHIND[4]]
    if is_allowed:
        for target in targets:
            eventually(network.client, target)
        assert drops(server, "client_to_client") == 0
        return
    # Whatever else on the machine forwards.
    for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        network.server.run(["sysctl", "-qw", f"{key}=1"])
    for target in targets:
        before = drops(server, "client_to_client")
        assert not answers(network.client, target)
        assert drops(server, "client_to_client") > before
    assert answers(network.server, "10.86.0.77") and answers(network.server, BEHIND[4])


@pytest.mark.parametrize("is_allowed", [False, True])
def test_hairpin_through_the_kernel(site, is_allowed):
    """What the daemon cannot see: a packet for an address outside that a rule of the administrator's sends back into
    the tunnel, to another client."""
    network, _, other = site
    fixed(network, "[client other]\nipv4 = 10.86.0.77\n")
    network.server.run(["nft", "add table ip own; add chain ip own pre { type nat hook prerouting priority dstnat; }; "
                               "add rule ip own pre ip daddr 203.0.113.1 dnat to 10.86.0.77"])
    network.server.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
    mine = network.server.run(["nft", "list", "table", "ip", "own"]).stdout
    started(network, other, f"--client-to-client={'yes' if is_allowed else 'no'}")
    route(network.client, "203.0.113.0/24")
    assert answers(network.client, INNER[4])
    assert answers(network.client, "203.0.113.1") == is_allowed
    rules = network.server.run(["nft", "list", "table", "inet", TABLE]).stdout
    counted = re.search(r'iifname "bulk0" oifgroup 7443 counter packets [1-9]\d* .* drop', rules)
    assert bool(counted) != is_allowed
    assert network.server.run(["nft", "list", "table", "ip", "own"]).stdout == mine


def second_server(network, *flags):
    """Another instance on the server's host, with the same clients and an address of each that is known."""
    shutil.copy(network.directory / "server.conf", network.directory / "second.conf")
    return Daemon(network.server, network.directory, "second",
                  [*FLAGS, "--device=bulk1", "--listen=[::]:7444", "--pool-ipv4=10.87.0.0/24", "--pool-ipv6=fd87::/64",
                   *flags]).wait_ready()


@pytest.mark.parametrize(("first", "second"), [("no", "no"), ("no", "yes"), ("yes", "no"), ("yes", "yes")])
def test_clients_of_two_servers_on_one_machine(site, first, second):
    """Each instance that says no keeps its clients apart from those of the other, in both directions."""
    network, _, other = site
    for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        network.server.run(["sysctl", "-qw", f"{key}=1"])
    network.start_server(*FLAGS, f"--client-to-client={first}").wait_ready()
    server = second_server(network, f"--client-to-client={second}")
    network.start_client(*FLAGS).wait_ready()
    network.start_client(*FLAGS, "--remote=198.51.100.1:7444", name="other", host=other).wait_ready()
    route(network.client, "10.87.0.0/24", "fd87::/64")
    route(other, "10.86.0.0/24", "fd86::/64")
    assert answers(network.client, INNER[4]) and answers(other, "fd87::1")
    one, two = ("10.86.0.2", "fd86::2"), ("10.87.0.2", "fd87::2")
    for host, targets in ((network.client, two), (other, one)):
        assert [answers(host, target) for target in targets] == [first == second == "yes"] * 2
    if first != second:
        # Questions, and not only the answers to them, in both directions.
        table = TABLE if first == "no" else "bulkvpnd_second"
        rules = network.server.run(["nft", "list", "chain", "inet", table, "hairpin"]).stdout
        assert len(re.findall(r"counter packets [1-9]\d* .* drop", rules)) == 2, rules
    assert not server.lines("ERROR|Traceback")


def test_the_tunnels_address_is_not_for_other_networks(site):
    network, web, _ = site
    web.ip("route", "add", "10.86.0.0/24", "via", "203.0.113.1")
    web.ip("route", "add", "fd86::/64", "via", "2001:db8:9::1")
    network.server.ip("address", "add", "10.86.0.9/32", "dev", "lo")
    assert answers(web, "10.86.0.9")
    server, _client = started(network)
    assert answers(network.client, INNER[4]) and answers(network.client, INNER[6])
    assert answers(network.server, INNER[4]) and answers(network.server, INNER[6])
    assert not answers(web, INNER[4]) and not answers(web, INNER[6])


def test_site_to_site(site):
    """The network behind a client is reached, both ways, and nobody else speaks for it."""
    network, web, other = site
    fixed(network, "[client other]\nipv4 = 10.86.0.77\n" + "".join(f"networks = {one}\n" for one in NETWORKS))
    before = snapshot.take(network.server)
    server, client, _ = started(network, other, "--routes=203.0.113.0/24", "--routes=192.168.7.0/24")
    assert [one["networks"] for one in server.status()["sessions"] if one["identity"] == "other"] == [list(NETWORKS)]
    for version in (4, 6):
        assert answers(network.server, BEHIND[version])
        assert answers(other, INNER[version], BEHIND[version])
    # A client that claims an address of that network is not heard.
    network.client.ip("address", "add", "192.168.7.66/32", "dev", "bulk0")
    assert answers(network.client, INNER[4])
    assert not answers(network.client, INNER[4], "192.168.7.66")
    assert drops(server, "foreign_source") > 0
    # Nor one that is in no network of its client's.
    other.ip("address", "add", "192.168.8.1/32", "dev", "lo")
    count = drops(server, "foreign_source")
    assert not answers(other, INNER[4], "192.168.8.1")
    assert drops(server, "foreign_source") > count
    # A host beyond the server that knows the way.
    web.ip("route", "add", "192.168.7.0/24", "via", "203.0.113.1")
    assert not answers(web, BEHIND[4])
    route(other, "203.0.113.0/24")
    assert answers(web, BEHIND[4])
    assert server.stop() == 0
    assert snapshot.differences(before, snapshot.take(network.server)) == []


def test_other_clients_while_it_runs(site):
    """Address and network of one client change at a reload; the other's session goes on."""
    network, _, other = site
    fixed(network, "[client other]\nipv4 = 10.86.0.77\nnetworks = 192.168.7.0/24\n")
    before = snapshot.take(network.server)
    server, client, fixed_client = started(network, other)
    assert answers(network.server, BEHIND[4]) and not answers(network.server, BEHIND[6])
    stays = [one["session"] for one in server.status()["sessions"] if one["identity"] == "client"]

    def reloaded(text, line):
        fixed(network, text)
        count = len(server.lines(line))
        os.kill(server.process.pid, signal.SIGHUP)
        wait_until(lambda: len(server.lines(line)) > count, 10, line)

    def route_of(address):
        return network.server.run(["ip", "route", "get", address], check=False).stdout

    def forwarding():
        keys = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
        return network.server.run(["sysctl", "-n", *keys]).stdout.split()

    reloaded("[client other]\nipv4 = 10.86.0.300\n",
             r"not reloaded, the former configuration stays in force: .*fixed\.conf:2: ipv4 = 10\.86\.0\.300")
    assert answers(network.server, BEHIND[4])
    reloaded(f"[client other]\nipv4 = 10.86.0.78\nnetworks = {NETWORKS[1]}\n",
             "reloaded: in force: server.clients.d; after a restart: nothing")
    wait_until(lambda: "10.86.0.78/24" in fixed_client.status()["addresses"], 10, "it is back with another address")
    eventually(network.server, BEHIND[6])
    assert "bulk0" not in route_of(BEHIND[4])
    # Nobody else's packets are heard from there, and its own are not any more from what it had.
    assert not answers(other, INNER[4], BEHIND[4])
    assert drops(server, "foreign_source") > 0
    # A route of somebody else's is in the way: that is said, and not all of it is done.
    network.server.ip("route", "add", NETWORKS[0], "dev", "veth1", "metric", "50")
    reloaded(f"[client other]\nipv4 = 10.86.0.78\nnetworks = {NETWORKS[0]}\n",
             r"reloaded, but not all of it could be applied: bulk0: route to 192\.168\.7\.0/24: there is a route")
    network.server.ip("route", "del", NETWORKS[0], "dev", "veth1")
    reloaded(f"[client other]\nipv4 = 10.86.0.78\nnetworks = {NETWORKS[0]}\n", "reloaded: in force: nothing new")
    eventually(network.server, BEHIND[4])
    assert [one["session"] for one in server.status()["sessions"] if one["identity"] == "client"] == stays
    assert len(client.lines("connected to")) == 1 and answers(network.client, INNER[4])
    # With the last network goes what only it needed.
    assert forwarding() == ["1", "1"]
    reloaded("", "reloaded: in force: server.clients.d")
    assert forwarding() == ["0", "0"]
    assert server.stop() == 0
    assert snapshot.differences(before, snapshot.take(network.server)) == []


def test_a_fixed_address_is_kept_from_others(site):
    network, _, other = site
    fixed(network, "[client other]\nipv4 = 10.86.0.2\nipv6 = fd86::2\n")
    server, _, fixed_client = started(network, other)
    addresses = {one["identity"]: one["addresses"] for one in server.status()["sessions"]}
    assert addresses == {"client": ["10.86.0.3", "fd86::3"], "other": ["10.86.0.2", "fd86::2"]}
    assert fixed_client.status()["addresses"] == ["10.86.0.2/24", "fd86::2/64"]


def test_nothing_is_left_after_a_crash_and_a_restart(site):
    network, _, other = site
    fixed(network, "[client other]\nnetworks = 192.168.7.0/24\n")
    before = snapshot.take(network.server)
    server = network.start_server(*FLAGS, "--nat=yes", "--client-to-client=yes").wait_ready()
    server.kill()
    wait_until(lambda: "bulk0" not in network.server.ip("link"), 10, "the device is gone with the last worker")
    assert TABLE in tables(network.server)
    # Without what the crashed one wanted: only the next start can know.
    fixed(network, "")
    server = network.start_server(*FLAGS).wait_ready()
    chains = network.server.run(["nft", "list", "table", "inet", TABLE]).stdout
    assert "hairpin" in chains and "masquerade" not in chains
    assert network.server.run(["sysctl", "-n", "net.ipv4.ip_forward"]).stdout.strip() == "0"
    assert server.stop() == 0
    assert snapshot.differences(before, snapshot.take(network.server)) == []


def test_what_something_else_removes_comes_back(site):
    """NAT, isolation of clients and timeouts after nft flush ruleset, as Debian's /etc/nftables.conf does it."""
    network, web, _ = site
    before = snapshot.take(network.server)
    server, _client = started(network, None, "--nat=yes")
    route(network.client, "203.0.113.0/24")
    eventually(network.client, WEB[4])
    running = snapshot.take(network.server)
    for count in (1, 2):
        network.server.run(["nft", "flush", "ruleset"])
        wait_until(lambda: len(tables(network.server)) == 2, 10, "the tables are there again")
        assert not (changed := "\n".join(snapshot.differences(running, snapshot.take(network.server)))), changed
        eventually(network.client, WEB[4])
        assert len(server.lines(f"nftables table inet {TABLE}: something else removed it")) == count
    assert server.stop() == 0
    assert snapshot.differences(before, snapshot.take(network.server)) == []


def test_a_device_that_was_down_has_addresses_and_routes_again(site):
    network, _, other = site
    fixed(network, "[client other]\n" + "".join(f"networks = {one}\n" for one in NETWORKS))
    before = snapshot.take(network.server)
    server, *_ = started(network, other)
    running = snapshot.take(network.server)
    assert all(answers(network.server, BEHIND[version]) for version in (4, 6))
    network.server.ip("link", "set", "bulk0", "down")
    wait_until(lambda: server.lines("device bulk0 is down"), 10, "it is said")
    assert not answers(network.server, BEHIND[4])
    network.server.ip("link", "set", "bulk0", "up")
    wait_until(lambda: server.lines("device bulk0 is up again"), 10, "it is put back")
    for version in (4, 6):
        eventually(network.server, BEHIND[version])
        assert answers(network.client, INNER[version])
    assert not (changed := "\n".join(snapshot.differences(running, snapshot.take(network.server)))), changed
    # What nobody tells of is put back by a reload.
    network.server.ip("address", "flush", "dev", "bulk0")
    assert not answers(network.client, INNER[4])
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: server.lines("reloaded: in force: nothing new"), 10, "it is reloaded")
    assert answers(network.client, INNER[4]) and answers(network.client, INNER[6])
    assert not (changed := "\n".join(snapshot.differences(running, snapshot.take(network.server)))), changed
    assert server.stop() == 0
    assert snapshot.differences(before, snapshot.take(network.server)) == []


FAULTS = {
    # name: (made on the server's host, clients, flags, line of the log)
    "an address that is taken": (
        ["ip", "address", "add", "10.86.0.1/32", "dev", "lo"], "", [],
        r"bulk0: address 10\.86\.0\.1/24: lo has 10\.86\.0\.1/32 already; choose another pool-ipv4",
    ),
    "a network that is taken": (
        ["ip", "address", "add", "fd86::7/64", "dev", "veth1"], "", [],
        r"bulk0: address fd86::1/64: veth1 has fd86::7/64 already; choose another pool-ipv6",
    ),
    "a route to a network that is taken": (
        ["ip", "route", "add", "10.86.0.0/24", "via", "192.0.2.2"], "", [],
        r"bulk0: address 10\.86\.0\.1/24: veth0 has a route to 10\.86\.0\.0/24 already; choose another pool-ipv4 at "
        "the server, or remove that",
    ),
    "a route that is there": (
        ["ip", "route", "add", "192.168.7.0/24", "dev", "veth1", "metric", "50"],
        "[client other]\nnetworks = 192.168.8.0/24\nnetworks = 192.168.7.0/24\n", [],
        r"bulk0: route to 192\.168\.7\.0/24: there is a route already, by veth1",
    ),
    "a network inside the pool": (
        ["true"], "[client other]\n\nnetworks = 10.86.0.128/25\n", [],
        r"fixed\.conf:3: networks = 10\.86\.0\.128/25: overlaps pool-ipv4 = 10\.86\.0\.0/24; give another network",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_start_that_fails_leaves_nothing(site, name):
    command, clients, flags, line = FAULTS[name]
    network, *_ = site
    network.server.run(command)
    fixed(network, clients)
    before = snapshot.take(network.server)
    server = network.start_server(*FLAGS, "--nat=yes", *flags)
    wait_until(lambda: namespaces.exited(server.process), 30, "it gives up")
    assert server.lines(line), server.text()
    assert server.stop() == (78 if "fixed" in line else 1)
    assert snapshot.differences(before, snapshot.take(network.server)) == []


OTHERS = {
    # made on the server's host: what a warning says
    "ip address add 10.86.0.129/25 dev veth0": "veth0 has 10.86.0.128/25;",
    "ip route add 10.86.0.64/26 via 192.0.2.2": "veth0 has 10.86.0.64/26;",
    "ip address add 10.86.0.77/32 dev lo": "lo has 10.86.0.77/32;",
    "ip address add 10.86.0.77/8 dev veth0": "veth0 has 10.86.0.77/32;",
    "ip address add 10.9.9.9/8 dev veth0": None,
    "true": None,
}


@pytest.mark.parametrize("command", OTHERS)
def test_what_other_devices_have_of_a_pool_is_a_warning(site, command):
    network, *_ = site
    network.server.run(command.split())
    server = network.start_server(*FLAGS).wait_ready()
    begin = "WARNING: pool-ipv4 = 10.86.0.0/24: not all of it leads into the tunnel: "
    assert len(server.lines(begin + (OTHERS[command] or ""))) == (OTHERS[command] is not None)
    assert server.stop() == 0


def test_without_nftables(site, tmp_path):
    """NAT is refused before anything is touched; everything else works, and the log says what does not."""
    network, *_ = site
    (tmp_path / "nftables").mkdir()
    (tmp_path / "nftables" / "__init__.py").write_text("raise ImportError('not here')\n")
    path = f"{tmp_path}:{namespaces.__file__.rpartition('/bulkvpnd/')[0]}"
    before = snapshot.take(network.server)
    server = network.start_server(*FLAGS, "--nat=yes", environment={"PYTHONPATH": path})
    wait_until(lambda: namespaces.exited(server.process), 30, "it gives up")
    assert server.lines(r"server\.conf: nat = yes: nftables: .*; run: apt install python3-nftables")
    assert server.stop() == 78
    assert snapshot.differences(before, snapshot.take(network.server)) == []
    server = network.start_server(*FLAGS, environment={"PYTHONPATH": path}).wait_ready()
    assert server.lines("no rules of nftables, so nothing but this daemon keeps clients apart: .*apt install")
    assert tables(network.server) == []
    assert server.stop() == 0


def test_a_firewall_that_drops_what_is_forwarded_is_named(network):
    network.server.run(["nft", "add table inet fw; "
                               "add chain inet fw pass { type filter hook forward priority 0; policy drop; }"])
    server = network.start_server(*FLAGS).wait_ready()
    assert not server.lines("drops what is forwarded")
    assert server.stop() == 0
    server = network.start_server(*FLAGS, "--nat=yes").wait_ready()
    assert server.lines("the firewall of this machine drops what is forwarded .* table inet fw, chain pass")
    assert server.stop() == 0
