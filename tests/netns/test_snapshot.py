"""The snapshot sees what it is for, each kind of change; and a host that nobody touches stays the same."""

import pytest
import snapshot

CHANGES = {
    # what is done on the host: what undoes it
    ("ip", "link", "set", "veth0", "mtu", "1400"): ("ip", "link", "set", "veth0", "mtu", "1500"),
    ("ip", "link", "set", "veth0", "txqueuelen", "9"): ("ip", "link", "set", "veth0", "txqueuelen", "1000"),
    ("ip", "address", "add", "198.51.100.1/32", "dev", "lo"): ("ip", "address", "del", "198.51.100.1/32", "dev", "lo"),
    ("ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.2"): ("ip", "route", "del", "198.51.100.0/24"),
    ("ip", "-6", "route", "add", "2001:db8:9::/48", "dev", "veth0", "table", "77"): (
        "ip", "-6", "route", "del", "2001:db8:9::/48", "table", "77"),
    ("ip", "rule", "add", "fwmark", "7", "lookup", "77"): ("ip", "rule", "del", "fwmark", "7", "lookup", "77"),
    ("ip", "-6", "rule", "add", "fwmark", "7", "lookup", "77"): (
        "ip", "-6", "rule", "del", "fwmark", "7", "lookup", "77"),
    ("ip", "nexthop", "add", "id", "7", "dev", "veth0"): ("ip", "nexthop", "del", "id", "7"),
    ("nft", "add", "table", "inet", "somebody"): ("nft", "delete", "table", "inet", "somebody"),
    ("sh", "-c", "echo 1 >/proc/sys/net/ipv4/fib_multipath_hash_policy"): (
        "sh", "-c", "echo 0 >/proc/sys/net/ipv4/fib_multipath_hash_policy"),
    ("ethtool", "-K", "veth0", "rx-udp-gro-forwarding", "on"): (
        "ethtool", "-K", "veth0", "rx-udp-gro-forwarding", "off"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_a_change_is_seen_and_so_is_its_undo(shared_network, change):
    host = shared_network.server
    before = snapshot.take(host)
    assert snapshot.differences(before, snapshot.take(host)) == []
    host.run(change)
    try:
        assert snapshot.differences(before, snapshot.take(host)) != []
    finally:
        host.run(CHANGES[change])
    assert snapshot.differences(before, snapshot.take(host)) == []


def test_a_tunnel_that_came_and_went_is_not_a_difference(shared_network):
    """Negative control: what a daemon of today leaves behind is nothing, and while it runs there is a lot."""
    hosts = (shared_network.server, shared_network.client)
    before = [snapshot.take(host) for host in hosts]
    server = shared_network.start_server().wait_ready()
    client = shared_network.start_client().wait_ready()
    assert all(snapshot.differences(old, snapshot.take(host)) for old, host in zip(before, hosts))
    assert client.stop() == 0 and server.stop() == 0
    assert [snapshot.differences(old, snapshot.take(host)) for old, host in zip(before, hosts)] == [[], []]
