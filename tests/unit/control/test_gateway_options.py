"""control.gateway: what the options ask of the machine."""

import ipaddress
import logging
import sys
import types

import pytest

from bulkvpnd import config
from bulkvpnd.control import gateway
from bulkvpnd.host.firewall import FirewallError
from bulkvpnd.host.link import LinkError

INTERFACES = [ipaddress.ip_interface("10.86.0.1/24")]
NETWORK = ipaddress.ip_network("192.168.7.0/24")
SITE = types.SimpleNamespace(name="site", networks=(NETWORK,))
DEFAULTS = {"nat": False, "client_to_client": False, "routes": (), "clients": (), "multipath": (),
            "listen": (("::", 7443), ("192.0.2.1", 443), ("192.0.2.1", 7443)),
            "path": "server.conf"}


class Machine:
    """In place of host.changes.Changes, with the firewall, the ledger and the routes that it would change."""

    def __init__(self):
        self.ledger = self.firewall = self
        self.table = "bulkvpnd_server"
        self.rules = self.guarded = self.failure = None
        self.routes = []
        self.wanted = []
        self.refuses = None
        self.refused = {}

    def apply(self, part, objects):
        if self.failure:
            raise self.failure
        self.rules = [one["chain"]["name"] for one in objects if "chain" in one]
        shadows = [one["rule"]["expr"] for one in objects if "rule" in one and one["rule"]["chain"] == "shadow"]
        self.guarded = [expression[2]["match"]["right"] for expression in shadows]

    def make(self, change, networks):
        self.routes += networks
        return self.refused

    def give_up(self, keys):
        self.wanted = [key for key in self.wanted if key not in keys]

    def want(self, key, value):
        self.wanted.append(key)
        return types.SimpleNamespace(why_not=self.refuses)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(gateway.firewall, "forward_drops", lambda: ["inet fw, chain pass"])
    return Machine()


def apply(machine, **options):
    gateway.apply(types.SimpleNamespace(**{**DEFAULTS, **options}), machine, "bulk0", INTERFACES)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_server_that_is_no_gateway_forwards_nothing(machine, caplog):
    apply(machine)
    assert (machine.rules, machine.routes, machine.wanted) == (["own_addresses", "hairpin"], [], [])
    assert warnings(caplog) == []


def test_each_port_that_is_listened_on_is_guarded_once_where_there_is_nat(machine):
    apply(machine)
    assert machine.guarded == []
    apply(machine, nat=True)
    assert machine.guarded == [443, 7443]


@pytest.mark.parametrize("option", [{"nat": True}, {"client_to_client": True}, {"routes": (NETWORK,)},
                                    {"clients": (SITE,)}])
def test_what_makes_it_one(machine, caplog, option):
    apply(machine, **option)
    assert machine.wanted == ["net.ipv4.ip_forward"]
    (line,) = warnings(caplog)
    assert "drops what is forwarded" in line and "inet fw, chain pass" in line
    assert machine.routes == ([NETWORK] if "clients" in option else [])


def test_a_network_of_a_version_without_pool_is_forwarded_too(machine, monkeypatch):
    monkeypatch.setattr(gateway.gateway, "advertised_defaults", lambda: [])
    apply(machine, clients=(types.SimpleNamespace(name="site", networks=(ipaddress.ip_network("fd07::/64"),)),))
    assert machine.wanted == ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"]


def test_what_several_instances_carry_has_its_own_kind_of_route(machine):
    apply(machine, clients=(SITE,), multipath=(types.SimpleNamespace(prefix=NETWORK),))
    assert machine.routes == []


def test_a_network_that_is_somebody_elses_ends_the_start(machine):
    machine.refused = {NETWORK: "there is a route already, by eth0"}
    with pytest.raises(LinkError, match="^bulk0: route to 192.168.7.0/24: there is a route already, by eth0; "):
        apply(machine, clients=(SITE,))


class Routes:
    """In place of host.routes.Routes: the kernel's, of which one is somebody else's."""

    def __init__(self, led, refused):
        self.led, self.refused = led, refused

    def __call__(self, device):
        return self

    def apply(self, networks):
        self.led[:] = [network for network in networks if network not in self.refused]
        return {network: why for network, why in self.refused.items() if network in networks}


def test_other_networks_while_it_runs(machine, monkeypatch):
    other = ipaddress.ip_network("192.168.8.0/24")
    both = types.SimpleNamespace(name="both", networks=(NETWORK, other))
    led, refused = [], {}
    monkeypatch.setattr(gateway, "Routes", Routes(led, refused))

    def reapply(*clients):
        gateway.reapply(types.SimpleNamespace(**{**DEFAULTS, "clients": clients}), machine, "bulk0", INTERFACES)

    reapply()
    assert (led, machine.wanted, machine.rules) == ([], [], None)
    reapply(SITE)
    assert (led, machine.wanted) == ([NETWORK], ["net.ipv4.ip_forward"])
    refused[NETWORK] = "there is a route already, by eth0"
    with pytest.raises(LinkError, match="^bulk0: route to 192.168.7.0/24: there is a route already, by eth0; "):
        reapply(both)
    assert led == [other]
    refused.clear()
    reapply(both)
    assert led == [NETWORK, other]
    reapply()
    assert (led, machine.wanted) == ([], []), "nothing needs it any more"


def test_a_sysctl_that_cannot_be_set_is_one_line(machine, caplog):
    machine.refuses = "Read-only file system"
    apply(machine, nat=True)
    assert any(line.startswith("packets are not forwarded: ") for line in warnings(caplog))


def test_without_the_firewall_only_nat_fails(machine, caplog):
    machine.failure = FirewallError("nothing there")
    apply(machine)
    assert warnings(caplog) == ["no rules of nftables, so nothing but this daemon keeps clients apart: nothing there"]
    with pytest.raises(FirewallError):
        apply(machine, nat=True)


def test_nat_is_refused_beforehand_where_there_is_no_libnftables(monkeypatch):
    monkeypatch.setitem(sys.modules, "nftables", None)
    gateway.check(types.SimpleNamespace(**DEFAULTS))
    with pytest.raises(config.ConfigurationError, match=r"^server.conf: nat = yes: .*apt install python3-nftables$"):
        gateway.check(types.SimpleNamespace(**{**DEFAULTS, "nat": True}))


def test_a_firewall_that_cannot_be_looked_at_says_nothing(machine, monkeypatch, caplog):
    def fails():
        raise FirewallError("no")

    monkeypatch.setattr(gateway.firewall, "forward_drops", fails)
    apply(machine, nat=True)
    assert warnings(caplog) == []
