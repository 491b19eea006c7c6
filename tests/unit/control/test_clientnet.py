"""What a client has changed on its machine, and when: the hosts' parts are doubles that say what they are told."""

import dataclasses
import ipaddress
import logging
import types

import gevent
import gevent.event
import pytest
from doubles import Authority, Ledger, configuration, until

from bulkvpnd.control import clientnet
from bulkvpnd.control.clientnet import ClientNetwork
from bulkvpnd.host.changes import Changes
from bulkvpnd.host.firewall import Unavailable
from bulkvpnd.service import RATE_BURST

network, address = ipaddress.ip_network, ipaddress.ip_address
POOLS = ["10.86.0.0/24", "fd86::/64"]
"""Networks of the addresses of a session."""


class Part:
    """In place of Routes, Redirect and Dns. told: (name, arguments) of each call. answers: what apply() returns."""

    def __init__(self, name, told, answer):
        self._name, self._told, self._answer = name, told, answer
        self.answers = None  # or an Event that apply() waits for
        self.lost = False

    def apply(self, *arguments, **options):
        arguments = [list(map(str, one)) if isinstance(one, (list, tuple)) else one for one in arguments]
        self._told.append((self._name, *arguments, *options.values()))
        if self.answers:
            self.answers.wait()
        return self._answer

    def lasts(self):
        return not self.lost

    def undo(self):
        self._told.append((f"undo {self._name}",))


class Firewall:
    def __init__(self, told, exists=False, failure=None):
        self._told, self._exists, self._failure = told, exists, failure
        self.held = ()

    def exists(self):
        return self._exists

    def apply(self, part, objects):
        if self._failure:
            raise self._failure
        if part == "own-addresses":
            self.guarded = str(objects)
        else:
            self._told.append((part,))

    def hold(self, *parts):
        self.held = parts

    def undo(self):
        self._told.append(("undo table",))


@pytest.fixture
def make(tmp_path, monkeypatch):
    authority = Authority().issue("alice")
    kept = []

    def made(refused=(), dns_error=None, exists=False, failure=None, connected=(), why_not=None, **options):
        told = []
        monkeypatch.setattr(clientnet, "Routes", lambda device: Part("routes", told, dict(refused)))
        monkeypatch.setattr(clientnet, "Redirect", lambda device, mark: Part("full", told, None))
        monkeypatch.setattr(clientnet, "Dns", lambda device, name: Part("dns", told, dns_error))
        monkeypatch.setattr(clientnet, "redirect", types.SimpleNamespace(choose_mark=lambda: 7443,
                                                                         restore_mark=lambda mark: [mark]))
        monkeypatch.setattr(clientnet, "link", types.SimpleNamespace(
            set_addresses=lambda device, interfaces: told.append(("addresses", *map(str, interfaces)))))
        reached = [*map(network, connected)]
        monkeypatch.setattr(clientnet, "routes", types.SimpleNamespace(connected=lambda device: reached))
        text = {name: value for name, value in options.items() if not isinstance(value, tuple)}
        settings = configuration(tmp_path, "client", authority, remote="192.0.2.1", **text)
        settings = dataclasses.replace(settings, **{name: value for name, value in options.items() if name not in text})
        changes = Changes(Ledger(why_not), Firewall(told, exists, failure))
        kept.append(changes)
        changes.__enter__()
        client = ClientNetwork(settings, "bulk0", changes)
        client.told, client.changes, client.dns = told, changes, client._dns
        client.start()
        told[:] = [one for one in told if not one[0].startswith("undo")]
        return client

    yield made
    for changes in kept:
        changes.close()


def welcome(routes=(), dns=(), search=(), ipv4="10.86.0.2/24", ipv6="fd86::2/64"):
    return types.SimpleNamespace(
        routes=tuple(map(network, routes)), dns=tuple(map(address, dns)), dns_search=tuple(search),
        ipv4=ipv4 and ipaddress.ip_interface(ipv4), ipv6=ipv6 and ipaddress.ip_interface(ipv6),
    )


def named(client):
    """Waits for the name servers, as READY does."""
    ready = []
    client.came_up(lambda: ready.append(True))
    until(lambda: ready)


def test_nothing_is_done_unless_it_is_wanted(make):
    client = make()
    assert client.mark is None and client.told == []
    client.take(welcome())
    named(client)
    assert client.told == [("routes", POOLS), ("dns", [], [], False)]
    assert client.changes.firewall.held == ()


def test_addresses_in_the_tunnel_are_reached_by_the_tunnel(make):
    client = make()
    client.take(welcome(ipv6=None))
    assert "10.86.0.2" in client.changes.firewall.guarded and "fd86" not in client.changes.firewall.guarded
    client.take(welcome(ipv4="10.86.0.9/24"))
    assert all(one in client.changes.firewall.guarded for one in ("10.86.0.9", "fd86::2"))
    assert "10.86.0.2" not in client.changes.firewall.guarded


def test_pushed_routes_pass_the_policy(make, caplog):
    client = make(connected=["192.168.1.0/24"])
    client.know(["10.5.0.1", "fe80::1%eth0"])
    client.take(welcome(["10.1.0.0/16", "203.0.113.0/24", "192.168.0.0/16", "10.5.0.0/16", "fd00:1::/64"]))
    assert client.told[0] == ("routes", ["10.86.0.0/24", "10.1.0.0/16", "fd86::/64", "fd00:1::/64"])
    for line in ("203.0.113.0/24 through the tunnel: not in accept-routes",
                 "192.168.0.0/16 through the tunnel: it overlaps 192.168.1.0/24",
                 "10.5.0.0/16 through the tunnel: it covers the server's address 10.5.0.1"):
        assert f"no route to {line}" in caplog.text


def test_what_a_server_pushes_makes_few_lines(make, journal):
    client = make(refused={network("10.0.0.0/16"): "no"})
    pushed = [f"203.0.113.{at}/32" for at in range(100)] + [f"10.{at}.0.0/16" for at in range(100)]
    for _ in range(3 * RATE_BURST):
        client.take(welcome(pushed))
    assert len([one for one in journal.messages if one.startswith("no route to")]) == RATE_BURST
    assert len([one for one in journal.messages if one.startswith("routes through")]) == RATE_BURST
    assert all(len(one) < 1000 for one in journal.messages)
    assert "203.0.113.31/32, 68 more through the tunnel: not in accept-routes" in journal.messages[0]


@pytest.mark.parametrize(("ipv4", "led", "options", "why"), [
    ("10.86.0.2/24", True, {}, None),
    ("8.0.0.9/8", False, {}, "not in accept-routes; add it there"),
    ("8.0.0.9/8", True, {"accept_routes": "8.0.0.0/8"}, None),
    ("10.86.0.2/24", False, {"accept_routes": "none"}, "not in accept-routes; add it there"),
    ("10.0.0.2/8", False, {}, "it covers the server's address 10.5.0.1; the server has to use another network"),
    ("192.168.0.9/16", False, {}, "it overlaps 192.168.1.0/24, which this machine reaches directly; use another"),
    ("192.168.1.9/24", False, {}, "it overlaps 192.168.1.0/24, which this machine reaches directly; use another"),
    ("192.168.0.9/16", True, {"routes": (network("192.168.0.0/16"),)}, None),
])  # fmt: skip
def test_the_pool_is_a_route_like_any_other(make, caplog, ipv4, led, options, why):
    client = make(connected=["192.168.1.0/24"], **options)
    client.know(["10.5.0.1"])
    client.take(welcome(ipv4=ipv4, ipv6=None))
    pool = str(ipaddress.ip_interface(ipv4).network)
    assert client.told[0] == ("routes", [pool] if led else [])
    lines = [line for line in caplog.messages if line.startswith(f"no route to {pool} (the server's pool) thr")]
    assert [why in line for line in lines] == ([] if led else [True])


def test_a_pool_goes_when_the_server_turns_out_to_be_in_it(make, caplog):
    client = make()
    client.know(["203.0.113.1"])
    client.take(welcome(ipv6=None))
    client.know(["10.86.0.77"])
    assert client.told == [("routes", ["10.86.0.0/24"]), ("routes", [])]
    assert "(the server's pool) through the tunnel: it covers the server's address 10.86.0.77" in caplog.text


def test_servers_that_routes_spare_are_bounded(make):
    client = make()
    client.know([f"10.5.{at}.1" for at in range(clientnet.SERVERS_MAX + 1)])
    client.take(welcome([f"10.5.{at}.0/24" for at in (0, clientnet.SERVERS_MAX - 1, clientnet.SERVERS_MAX)]))
    assert [one for one in client.told[0][1] if one.startswith("10.5.")] == [f"10.5.{clientnet.SERVERS_MAX}.0/24"]


def test_what_several_instances_carry_together_gets_no_route_of_one(make):
    client = make(multipath=["10.1.0.0/16 weight 2"], routes=(network("10.1.0.0/16"), network("10.3.0.0/16")))
    client.know(["203.0.113.1"])
    client.take(welcome(["10.1.0.0/16", "10.2.0.0/16"]))
    assert client.told[0] == ("routes", ["10.3.0.0/16", "10.86.0.0/24", "10.2.0.0/16", "fd86::/64"])


def test_own_routes_are_led_around_the_server(make):
    client = make(routes=(network("198.51.100.0/30"),), connected=["198.51.100.0/24"])
    client.know(["::ffff:198.51.100.2"])
    client.take(welcome())
    assert client.told[0] == ("routes", ["198.51.100.0/31", "198.51.100.3/32", *POOLS])
    # Another address of the server is found later, when the first does not answer.
    client.know(["203.0.113.9"])
    assert len([one for one in client.told if one[0] == "routes"]) == 1
    client.know(["198.51.100.3"])
    assert client.told[-1] == ("routes", ["198.51.100.0/31", *POOLS])


def test_a_version_that_the_session_lacks_gets_no_routes(make, caplog):
    client = make(routes=(network("fd00:1::/64"), network("10.1.0.0/16")))
    client.take(welcome(ipv6=None))
    assert client.told[0] == ("routes", ["10.1.0.0/16", "10.86.0.0/24"])
    assert "no route to fd00:1::/64 through the tunnel: the tunnel carries no IPv6" in caplog.text


def test_what_the_kernel_refuses_is_said(make, caplog):
    caplog.set_level(logging.INFO)
    client = make(routes=(network("10.1.0.0/16"), network("10.2.0.0/16")), refused={network("10.1.0.0/16"): "taken"})
    client.take(welcome())
    assert "no route to 10.1.0.0/16 through the tunnel: taken" in caplog.text
    assert "routes through the tunnel: 10.2.0.0/16" in caplog.text


def test_full_tunnel(make):
    client = make(redirect_gateway="yes")
    assert client.mark == 7443 and client.told == [("full-tunnel",)]
    client.take(welcome(ipv6=None))
    assert ("full", {4}) in client.told
    client.take(welcome())
    assert ("full", {4, 6}) in client.told
    named(client)
    assert client.told[-1] == ("dns", [], [], True)


def test_a_device_that_was_down(make):
    client = make(redirect_gateway="yes", routes=(network("10.1.0.0/16"),))
    client.told.clear()
    client.restore()
    assert client.told == [], "there is no session"
    client.take(welcome(ipv6=None, dns=["10.86.0.1"]))
    named(client)
    client.told.clear()
    client.restore()
    assert client.told == [("addresses", "10.86.0.2/32"), ("routes", ["10.1.0.0/16", "10.86.0.0/24"]), ("full", {4})]


def test_the_kill_switch_is_closed_first_and_held_from_the_first_session_on(make):
    client = make(redirect_gateway="yes", kill_switch="yes")
    assert client.told[0] == ("kill-switch",)
    assert client.changes.firewall.held == ()
    client.take(welcome())
    named(client)
    assert client.changes.firewall.held == ("kill-switch",)


def test_a_kill_switch_that_a_crash_left_is_held_at_once(make):
    assert make(redirect_gateway="yes", kill_switch="yes", exists=True).changes.firewall.held == ("kill-switch",)


def test_without_nftables(make, caplog):
    missing = Unavailable("nftables: missing; run: apt install python3-nftables")
    make(redirect_gateway="yes", failure=missing)
    assert "answers of the server will be dropped: nftables: missing" in caplog.text
    make(failure=missing).take(welcome())
    assert "may reach the addresses in the tunnel: nftables: missing" in caplog.text
    with pytest.raises(Unavailable):
        make(redirect_gateway="yes", kill_switch="yes", failure=missing)


def test_a_sysctl_that_cannot_be_set(make, caplog):
    make(redirect_gateway="yes", why_not="Read-only file system")
    assert "src_valid_mark: is 0, not 1: Read-only file system" in caplog.text


@pytest.mark.parametrize(
    ("options", "servers", "domains"),
    [
        ({}, ["10.86.0.1"], ["corp.example"]),
        ({"accept_dns": "no"}, [], []),
        ({"dns": (address("10.9.9.9"),)}, ["10.9.9.9"], ["corp.example"]),
        ({"dns_search": ("own.example",), "accept_dns": "no"}, [], ["own.example"]),
    ],
)
def test_name_servers(make, options, servers, domains):
    client = make(**options)
    client.take(welcome(dns=["10.86.0.1"], search=["corp.example"]))
    named(client)
    assert client.told[-1] == ("dns", servers, domains, False)
    assert set(map(str, client.resolver.tunnel_servers)) == set(servers), "they are behind the tunnel"


def test_name_servers_are_set_when_they_change(make):
    client = make()
    for servers, calls in ((["10.86.0.1"], 1), (["10.86.0.1"], 1), (["10.86.0.7"], 2)):
        client.take(welcome(dns=servers))
        named(client)
        assert len([one for one in client.told if one[0] == "dns"]) == calls


def test_name_servers_that_were_lost_are_set_again_by_a_reload(make):
    client = make()
    client.take(welcome(dns=["10.86.0.1"]))
    for lost, calls in ((False, 1), (True, 2)):
        client.dns.lost = lost
        client.reconfigure(client._configuration)
        named(client)
        assert len([one for one in client.told if one[0] == "dns"]) == calls


def test_name_servers_that_could_not_be_set_are_tried_again_by_the_next_session(make, caplog):
    client = make(dns_error="no resolver")
    for calls in (1, 2):
        client.take(welcome(dns=["10.86.0.1"]))
        named(client)
        assert len([one for one in client.told if one[0] == "dns"]) == calls
    assert "name servers 10.86.0.1, domains none: not set: no resolver" in caplog.text


def test_a_resolver_that_does_not_answer_does_not_keep_the_start_waiting(make, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    client = make()
    monkeypatch.setattr(clientnet, "NAMING_WAIT", 0.1)
    client.dns.answers = gevent.event.Event()
    client.take(welcome(dns=["10.86.0.1"]))
    named(client)
    assert "no answer within" in caplog.text and "name servers 10.86.0.1" not in caplog.text
    client.dns.answers.set()
    until(lambda: "name servers 10.86.0.1, domains none" in caplog.text)


def test_the_end_comes_before_the_name_servers(make, monkeypatch):
    client = make()
    client.dns.answers = gevent.event.Event()
    client.take(welcome(dns=["10.86.0.1"]))
    ready = []
    client.came_up(lambda: ready.append(True))
    gevent.sleep(0)
    client.changes.close()
    assert not ready, "what stops does not become ready"


def test_the_end_undoes_in_the_reverse_order(make):
    client = make(redirect_gateway="yes", kill_switch="yes")
    client.take(welcome())
    gevent.sleep(0)
    client.told.clear()
    client.changes.close()
    assert client.told == [("undo dns",), ("undo full",), ("undo routes",), ("undo table",)]


def test_another_configuration_is_in_force_at_once(make):
    client = make(routes=(network("192.168.7.0/24"),))
    other = dataclasses.replace(client._configuration, routes=(network("192.168.8.0/24"),), dns=(address("10.86.0.1"),))
    client.reconfigure(other)
    assert client.told == [], "there is no session"
    client.reconfigure(dataclasses.replace(other, routes=(network("192.168.7.0/24"),), dns=()))
    client.take(welcome())
    named(client)
    assert client.told == [("routes", ["192.168.7.0/24", *POOLS]), ("dns", [], [], False)]
    client.told.clear()
    client.reconfigure(client._configuration)
    named(client)
    assert client.told == []
    client.reconfigure(other)
    named(client)
    assert client.told == [("routes", ["192.168.8.0/24", *POOLS]), ("dns", ["10.86.0.1"], [], False)]
    client.reconfigure(dataclasses.replace(other, routes=()))
    named(client)
    assert client.told[2:] == [("routes", POOLS)]
