"""control.server: another configuration while it runs, and the administrator's commands."""

import contextlib
import dataclasses
import ipaddress
import logging
import time

import pytest
from doubles import connected
from gevent import socket
from logins import FIXED, admit, live

from bulkvpnd.control import server as server_module
from bulkvpnd.control.clients import Client
from bulkvpnd.control.status import CommandError
from bulkvpnd.protocol.errors import Refused


def test_another_configuration_is_for_what_comes_then(site, start):
    server = start(routes="192.168.7.0/24")
    first = live(site, server)
    assert [str(one) for one in first.welcome.routes] == ["192.168.7.0/24"]
    assert (first.welcome.keepalive, first.message["settings"]["keepalive"]) == (5, 5)
    server.reconfigure(dataclasses.replace(
        server._configuration, routes=(ipaddress.ip_network("192.168.8.0/24"),), keepalive=3, rekey_interval=60,
        second_login="refuse", handshake_timeout=1, queue_target=9,
    ))
    assert first.number in server._sessions.connections, "who is there stays"
    joined = live(site, server, joins=first.welcome, index=1)
    assert (joined.welcome.keepalive, joined.message["settings"]["queue_target"]) == (3, 0.009)
    assert joined.welcome.rekey_interval == first.welcome.rekey_interval, "a session keeps its terms"
    with pytest.raises(Refused, match="identity"):
        admit(site, server)
    other = live(site, server, "bob")
    assert [str(one) for one in other.welcome.routes] == ["192.168.8.0/24"]
    assert other.welcome.rekey_interval == 60
    with connected(server.port) as sock:
        begun = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        assert 0.5 < time.monotonic() - begun < 3, "the new handshake-timeout"


def test_sockets_of_another_configuration(site, start):
    server = start(sndbuf="64K", congestion="cubic")

    def made(who):
        """What is pushed, what the socket of the new connection has, what its worker is told."""
        admitted = admit(site, server, who)
        size = server.workers.sockets[admitted.number].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        settings = admitted.message["settings"]
        # The kernel shows twice what was set, socket(7).
        return admitted.welcome.sndbuf, admitted.welcome.rcvbuf, size // 2, settings["sndbuf"], settings["congestion"]

    assert made("alice") == (65536, None, 65536, 65536, "cubic")
    server.reconfigure(dataclasses.replace(server._configuration, sndbuf=32768, rcvbuf=98304, congestion="auto"))
    assert made("bob") == (32768, 98304, 32768, 32768, "auto")


def test_other_numbers_of_connections_are_for_other_sessions(site, start):
    server = start(connections=2)
    first = live(site, server)
    server.reconfigure(dataclasses.replace(server._configuration, connections=3))
    assert live(site, server, joins=first.welcome, index=1).welcome.connections == 2
    assert live(site, server, "bob").welcome.connections == 3


def test_who_gets_another_address_or_network_comes_again_with_it(site, start, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    applied = []
    server = start(clients=FIXED)
    monkeypatch.setattr(server_module.gateway, "reapply", lambda *arguments: applied.append(arguments[0].clients))
    told = []
    server.tell = lambda event, **values: told.append((event, values.get("identity"), values.get("networks")))
    alice, bob, carol = (live(site, server, name) for name in ("alice", "bob", "carol"))
    waiting = admit(site, server, "bob")
    assert [str(one.welcome.ipv4.ip) for one in (alice, bob, carol)] == ["10.86.0.77", "10.86.0.2", "10.86.0.3"]
    del told[:]
    # Alice's network becomes bob's, her address nobody's; carol keeps what she has.
    other = (Client("alice", {}, ()), Client("bob", {4: ipaddress.ip_address("10.86.0.77")}, FIXED[0].networks))
    server.reconfigure(dataclasses.replace(server._configuration, clients=other))
    assert applied == [other]
    detached = {(one["connection"], one["reason"]) for one in server.workers.told("detach")}
    assert detached == {(one.number, "shutdown") for one in (alice, bob, waiting)}
    assert caplog.text.count("ended: the addresses or networks of this client have changed") == 3
    assert sorted(told) == [("client-disconnect", "alice", "192.168.7.0/24"),
                            ("client-disconnect", "bob", "fd07::/64 192.168.8.0/24")], "what they had"
    # Before anybody has them, every worker knows whose way is barred where.
    (index, first), (_, second) = [(at, one) for at, one in server.workers.sent if one["type"] == "isolate"]
    assert index == 0 and first == second and first["networks"] == ["10.86.0.0/24", "192.168.7.0/24"]
    with pytest.raises(Refused, match="session"):
        admit(site, server, joins=alice.welcome, index=1)
    again = [live(site, server, name) for name in ("alice", "bob")]
    assert [str(one.welcome.ipv4.ip) for one in again] == ["10.86.0.2", "10.86.0.77"]
    assert [one.message["networks"] for one in again] == [[], ["192.168.7.0/24"]]
    assert live(site, server, "carol", joins=carol.welcome, index=1).welcome.ipv4 == carol.welcome.ipv4


def test_who_has_what_becomes_anothers_is_sent_away(site, start):
    server = start(second_login="parallel")
    first, second, bob = live(site, server), live(site, server), live(site, server, "bob")
    assert str(second.welcome.ipv4.ip) == "10.86.0.3"
    fixed = (Client("carol", {4: second.welcome.ipv4.ip}, ()),)
    server.reconfigure(dataclasses.replace(server._configuration, clients=fixed))
    assert [one["connection"] for one in server.workers.told("detach")] == [second.number]
    assert live(site, server, "carol").welcome.ipv4 == second.welcome.ipv4
    assert {first.number, bob.number} <= set(server._sessions.connections)


def test_disconnected_by_name(site, server):
    alice, bob = live(site, server), live(site, server, "bob")
    with pytest.raises(CommandError, match="no session of carol"):
        server.commands["disconnect"]({"identity": "carol"})
    with pytest.raises(CommandError):
        server.commands["disconnect"]({})
    assert server.workers.told("detach") == []
    assert server.commands["disconnect"]({"identity": "alice"}) == {"ended": 1}
    assert [one["connection"] for one in server.workers.told("detach")] == [alice.number]
    with pytest.raises(Refused, match="session"):
        admit(site, server, joins=alice.welcome)
    assert [one["identity"] for one in server.status({})["sessions"]] == ["bob"]
    assert live(site, server).welcome.ipv4 == alice.welcome.ipv4, "it may come again"
    assert bob.number in server._sessions.connections


def test_drained(site, server):
    alice = live(site, server)
    assert not server.status({})["draining"]
    assert server.commands["drain"]({}) == {"draining": True, "sessions": 1}
    assert server.status({})["draining"] and "draining" in server.summary()
    with pytest.raises(Refused, match="shutdown"):
        admit(site, server, "bob")
    live(site, server, joins=alice.welcome, index=1)
    assert server.commands["drain"]({"off": True}) == {"draining": False, "sessions": 1}
    live(site, server, "bob")
