"""The rules of a gateway, and the order of its sysctls; what the kernel makes of them is in tests/netns."""

import ipaddress

import pytest
from nftdouble import Nft

from bulkvpnd.host import gateway
from bulkvpnd.host.firewall import DROP, Firewall

INTERFACES = [ipaddress.ip_interface("10.86.0.1/24"), ipaddress.ip_interface("fd86::1/64")]


@pytest.mark.parametrize(
    ("nat", "client_to_client", "expected"),
    [
        (False, False, ["own_addresses", "hairpin"]),
        (True, False, ["own_addresses", "hairpin", "nat", "shadow"]),
        (False, True, ["own_addresses"]),
        (True, True, ["own_addresses", "nat", "shadow"]),
    ],
)
def test_chains(nat, client_to_client, expected):
    nft = Nft()
    Firewall("server", nft).apply("gateway", gateway.rules("bulk0", INTERFACES, nat, client_to_client, [7443]))
    assert nft.chains("bulkvpnd_server") == expected


def test_neither_this_server_s_clients_nor_another_s_are_reached():
    """By the device itself, or by any of the group that all servers' devices are in."""
    expressions = [one["rule"]["expr"] for one in gateway.rules("bulk0", INTERFACES, False, False, [7443])
                   if "rule" in one and one["rule"]["chain"] == "hairpin"]
    matched = [{part["match"]["left"]["meta"]["key"]: part["match"]["right"] for part in one if "match" in part}
               for one in expressions]
    assert matched == [{"iifname": "bulk0", "oifgroup": 7443}, {"iifgroup": 7443, "oifname": "bulk0"}]
    assert all(tuple(one[2:]) == DROP for one in expressions)


def test_one_rule_for_each_version_that_there_is():
    for count in (1, 2):
        rules = gateway.rules("bulk0", INTERFACES[:count], True, True, [7443, 8443])
        # For each port that is listened on one more, and one for all others.
        expected = ["own_addresses"] * count + ["nat"] * 3 * count + ["shadow"] * 2
        assert [one["rule"]["chain"] for one in rules if "rule" in one] == expected


@pytest.mark.parametrize("port", [1, 443, 7443, 32767, 32768, 40000, 65535])
def test_no_client_gets_the_port_that_is_listened_on(port):
    special, general = [one["rule"]["expr"] for one in gateway.masquerade("bulk0", INTERFACES[:1], [port])
                        if "rule" in one and one["rule"]["chain"] == "nat"]
    first, last = special[-1]["masquerade"]["port"]["range"]
    assert 1024 <= first < last <= 65535 and not first <= port <= last
    assert general[-1] == {"masquerade": None}


class Ledger:
    """In place of host.sysctl.Ledger: what was wanted, in order."""

    def __init__(self, values):
        self.values = values
        self.wanted = []

    def read(self, key):
        if key not in self.values:
            raise FileNotFoundError(key)
        return self.values[key]

    def want(self, key, value):
        self.wanted.append((key, value))
        return key


@pytest.mark.parametrize("versions", [[4], [6], [4, 6]])
def test_forwarding_of_the_versions_in_use(versions, monkeypatch):
    monkeypatch.setattr(gateway, "advertised_defaults", lambda: ["eth0", "eth1", "gone"])
    ledger = Ledger({"net/ipv6/conf/eth0/accept_ra": "1", "net/ipv6/conf/eth1/accept_ra": "0"})
    outcomes = gateway.forward(ledger, versions)
    # Before forwarding, at which the kernel forgets the default route that it heard of.
    first = [("net/ipv6/conf/eth0/accept_ra", "2")] if 6 in versions else []
    keys = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
    assert ledger.wanted == first + [(keys[version], "1") for version in versions]
    assert outcomes == [key for key, _ in ledger.wanted]
