"""The links that the systems are measured on, each a server and its clients in namespaces of their own.

    plain     client ── veth ── server                         as fast as the kernel
    besieged  client and flood.py ── veth ── server            the same
    shaped    client ── veth ── server                         100 Mbit/s each way
    lossy     client ── veth ── relay ── veth ── server        40 ms round trip, random loss, see relay.py
    star      client 0..N-1 ── veth ── bridge of the server    for many clients

On the shaped and the lossy link the hosts have the congestion control of a plain Debian, cubic; elsewhere this
machine's own, which the report names.
"""

import contextlib
import dataclasses
import ipaddress
import pathlib
import sys

from bulkvpnd.admin import namespaces

SERVER_ADDRESS, CLIENT_ADDRESS = "192.0.2.1", "192.0.2.2"
"""TEST-NET-1 of RFC 5737; the lossy link's far side is in TEST-NET-2."""
FAR_ADDRESS, FAR_ROUTER = "198.51.100.2", "198.51.100.1"
FLOOD_NETWORK = "198.18.0.0/15"
"""Of RFC 2544: the client host floods from here."""
STAR_NETWORK = ipaddress.ip_network("192.0.2.0/24")

ALLOWED = pathlib.Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
"""See tcp(7)."""

RATE = "100mbit"
SHAPER = ("tbf", "rate", RATE, "burst", "32kb", "latency", "50ms")
"""A FIFO of 50 ms behind a token bucket, the example of tc-tbf(8): half of what 1000 packets on such a card take."""

DELAY = 0.02
"""Seconds in each direction of the lossy link."""
LINE = ("tbf", "rate", "300mbit", "burst", "64kb", "latency", "50ms")
"""The lossy link's line: below what the relay can carry, so that losses are the ones that were asked for (choice)."""
RELAY_TIMEOUT = 10
"""Seconds in which the relay must be ready."""


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """server: namespaces.Host. clients: list of them. address: of the server, as the clients reach it."""

    server: namespaces.Host
    clients: list
    address: str


@contextlib.contextmanager
def plain(wait):
    """Two hosts on a veth pair. wait: Trial-like wait(condition, seconds), for links that take time to come up."""
    with _host("server") as server, _host("client") as client:
        namespaces.link(server, client, [f"{SERVER_ADDRESS}/30"], [f"{CLIENT_ADDRESS}/30"])
        yield Network(server, [client], SERVER_ADDRESS)


@contextlib.contextmanager
def shaped(wait):
    with plain(wait) as network:
        for host in (network.server, *network.clients):
            _take_cubic(host)
            host.run(["tc", "qdisc", "replace", "dev", "veth0", "root", *SHAPER])
        yield network


@contextlib.contextmanager
def besieged(wait):
    with plain(wait) as network:
        for host in network.clients:
            host.ip("route", "add", "local", FLOOD_NETWORK, "dev", "lo")
        network.server.ip("route", "add", FLOOD_NETWORK, "via", CLIENT_ADDRESS)
        yield network


def lossy(per_mille):
    """A link that loses `per_mille` of 1000 packets in each direction, at random."""

    @contextlib.contextmanager
    def link(wait):
        with _host("server") as server, _host("relay") as relay, _host("client") as client:
            relay.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0",
                       "net.ipv4.conf.default.rp_filter=0"])
            for host, device, addresses in ((client, "veth0", (SERVER_ADDRESS, CLIENT_ADDRESS)),
                                            (server, "veth1", (FAR_ROUTER, FAR_ADDRESS))):
                namespaces.link(relay, host, *([f"{address}/30"] for address in addresses), device)
                _take_cubic(host)
                host.ip("route", "add", "default", "via", addresses[0])
                for end in (relay, host):
                    # Loss must meet packets as a wire has them, not the kernel's super-packets.
                    end.run(["ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off"])
                host.run(["tc", "qdisc", "replace", "dev", device, "root", *LINE])
            _start_relay(relay, wait, per_mille)
            yield Network(server, [client], FAR_ADDRESS)

    return link


def _start_relay(relay, wait, per_mille):
    """Each way: in by a veth, by a rule to one delay device, out of the other one DELAY later, on by the main table."""
    for number in (0, 1):
        relay.ip("tuntap", "add", f"delay{number}", "mode", "tun")
        relay.ip("link", "set", f"delay{number}", "txqueuelen", 10000, "up")
        relay.ip("rule", "add", "iif", f"veth{number}", "lookup", 100 + number)
        relay.ip("route", "add", "default", "dev", f"delay{number}", "table", 100 + number)
    if per_mille:
        relay.run(["nft", "-f", "-"], stdin=None, input=(
            "table inet loss { chain forward { type filter hook forward priority 0;"
            f' iifname "veth*" numgen random mod 1000 < {per_mille} counter drop; }}; }}\n'
        ))
    process = relay.start([sys.executable, "-m", "benchmarks.relay", "delay0", "delay1", DELAY],
                          cwd=pathlib.Path(__file__).parents[1])
    # The devices have a carrier as soon as the relay has opened them.
    if not wait(lambda: all("NO-CARRIER" not in relay.ip("link", "show", f"delay{number}") for number in (0, 1))
                or namespaces.exited(process), RELAY_TIMEOUT):
        raise namespaces.CommandError("benchmarks.relay: was not ready in time")


def star(count):
    """`count` clients on a bridge of the server."""

    @contextlib.contextmanager
    def link(wait):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(_host("server"))
            server.ip("link", "add", "bridge0", "type", "bridge")
            server.ip("address", "add", f"{SERVER_ADDRESS}/24", "dev", "bridge0")
            server.ip("link", "set", "bridge0", "up")
            clients = []
            for number in range(count):
                client = stack.enter_context(_host(f"client{number}"))
                address = f"{STAR_NETWORK[number + 2]}/24"
                # The same name at both ends, and the server's must differ from one another.
                namespaces.link(server, client, [], [address], f"veth{number}")
                server.ip("link", "set", f"veth{number}", "master", "bridge0")
                clients.append(client)
            yield Network(server, clients, SERVER_ADDRESS)

    return link


def _host(role):
    return namespaces.Host(namespaces.unique_name(f"bulkvpn-bench-{role}"))


def _take_cubic(host):
    """A machine with another default may forbid it to namespaces; the list of what is allowed is the machine's only."""
    listed = ALLOWED.read_text()
    if "cubic" not in listed.split():
        ALLOWED.write_text(f"{listed.strip()} cubic")
    try:
        host.run(["sysctl", "-qw", "net.ipv4.tcp_congestion_control=cubic"])
    finally:
        ALLOWED.write_text(listed)


CLIENT_COUNTS = (1, 4, 16, 64)
LINKS = {
    # name: (context manager that makes it, what the report says of it)
    "plain": (plain, "a veth pair, as fast as the kernel"),
    "besieged": (besieged, "the plain link, and 10,000 connections from as many addresses that never say a word"),
    "shaped": (shaped, "100 Mbit/s each way: tc tbf with a FIFO of 50 ms at both ends; cubic"),
    "lossy01": (lossy(1), "300 Mbit/s, 40 ms round trip, 0.1 % random loss each way; cubic"),
    "lossy": (lossy(10), "300 Mbit/s, 40 ms round trip, 1 % random loss each way; cubic"),
    **{f"star{count}": (star(count), f"{count} clients on a bridge of the server") for count in CLIENT_COUNTS},
}
