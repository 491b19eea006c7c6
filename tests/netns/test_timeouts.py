"""How long a server's kernel remembers what it forwards for clients, and what it forwards otherwise.

    client ── tunnel ── server ── out0 198.51.100.1 ═══ 198.51.100.2 out0 ── beyond
"""

import json
import sys

import pytest
import snapshot
from harness import wait_until

from bulkvpnd.admin import namespaces

BEYOND = "198.51.100.2"
PORT = "9000"
TABLE = "bulkvpnd_server/timeouts"
ENTRIES = """
import json
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket
with NFCTSocket() as sock:
    entries = [
        [entry.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_NUM"),
         entry.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_SRC_PORT"),
         entry.get_attr("CTA_TIMEOUT")]
        for entry in sock.dump()
    ]
print(json.dumps(entries))
"""
LISTEN = f"""
import socket
with socket.create_server(("", {PORT})) as server:
    accepted = [server.accept() for _ in range(2)]
    accepted[0][0].recv(1)
"""
CONNECT = f"""
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.sendto(b"x", ("{BEYOND}", {PORT}))
with socket.create_connection(("{BEYOND}", {PORT}), 10) as tcp:
    print(tcp.getsockname()[1], udp.getsockname()[1], flush=True)
    sys.stdin.read()
"""
# IPPROTO_TCP, IPPROTO_UDP: seconds of the kernel for an established connection, and for a datagram without an answer
TCP, UDP = 6, 17
KERNELS = {TCP: 432000, UDP: 30}
SHORT = {TCP: 7440, UDP: 15}


@pytest.fixture
def beyond(network):
    with namespaces.Host(namespaces.unique_name("bulkvpn-test-ct")) as host:
        namespaces.link(network.server, host, ["198.51.100.1/24"], [f"{BEYOND}/24"], "out0")
        host.ip("route", "add", "default", "via", "198.51.100.1")
        network.client.ip("route", "add", f"{BEYOND}/32", "via", "192.0.2.1")
        network.server.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"])
        # Somebody has to ask for connections to be tracked, as translation does.
        network.server.run(["nft", "add table inet somebody; "
                            "add chain inet somebody forward { type filter hook forward priority 0; }; "
                            "add rule inet somebody forward ct state invalid drop"])
        yield host


def timeouts(network, beyond):
    """{protocol: seconds} of one connection and of one datagram, from the client to the host beyond."""
    listening = beyond.start([sys.executable, "-c", LISTEN])
    wait_until(lambda: beyond.listening(PORT), 10, "it listens")
    connecting = network.client.start([sys.executable, "-c", CONNECT], stdin=-1, stdout=-1)
    ports = [int(port) for port in connecting.stdout.readline().split()]
    entries = json.loads(network.server.run([sys.executable, "-c", ENTRIES]).stdout)
    for process in (connecting, listening):
        namespaces.end(process)
    return {protocol: seconds for protocol, port, seconds in entries if port in ports}


def about(expected):
    return {protocol: pytest.approx(seconds, abs=8) for protocol, seconds in expected.items()}


def test_short_for_the_tunnel_alone(network, beyond):
    before = snapshot.take(network.server)
    assert timeouts(network, beyond) == about(KERNELS)
    server = network.start_server("--nat", "yes").wait_ready()
    assert TABLE in network.server.run(["nft", "list", "tables"]).stdout
    # Not through the tunnel yet.
    assert timeouts(network, beyond) == about(KERNELS)
    client = network.start_client().wait_ready()
    network.client.ip("route", "replace", f"{BEYOND}/32", "dev", "bulk0")
    assert timeouts(network, beyond) == about(SHORT)
    assert client.stop() == 0 and server.stop() == 0
    assert snapshot.differences(before, snapshot.take(network.server)) == []


@pytest.mark.parametrize("flags", [("--nat", "no"), ("--nat", "yes", "--conntrack-timeouts", "system"),
                                   ("--nat", "yes", "--tuning", "no")])
def test_not_without_translation_and_not_when_told_otherwise(network, flags):
    server = network.start_server(*flags).wait_ready()
    assert TABLE not in network.server.run(["nft", "list", "tables"]).stdout
    assert server.stop() == 0


def test_a_table_that_a_crash_left_goes_with_the_next_start(network):
    before = snapshot.take(network.server)
    network.start_server("--nat", "yes").wait_ready().kill()
    assert TABLE in network.server.run(["nft", "list", "tables"]).stdout
    server = network.start_server("--nat", "no").wait_ready()
    assert TABLE not in network.server.run(["nft", "list", "tables"]).stdout
    assert server.stop() == 0
    assert snapshot.differences(before, snapshot.take(network.server)) == []


def test_the_table_can_be_printed_and_read_again(network):
    server = network.start_server("--nat", "yes").wait_ready()
    text = network.server.run(["nft", "list", "table", "inet", TABLE]).stdout
    network.server.run(["nft", "-c", "-f", "-"], input=text, stdin=None)
    assert server.stop() == 0
