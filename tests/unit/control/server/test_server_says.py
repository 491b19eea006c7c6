"""control.server: what status, routes, log and hooks learn of it."""

import collections
import ipaddress
import json
import logging

import pytest
from doubles import establish
from logins import FIXED, admit, closes, lines, live

from bulkvpnd import events
from bulkvpnd.protocol.errors import Refused
from bulkvpnd.service import RATE_BURST


def test_status_shows_what_lives_and_no_secret(site, server):
    first = live(site, server)
    admit(site, server, "bob")
    report = server.status({first.number: {"bytes_out": 7}})
    (session,) = report["sessions"]
    assert (session["identity"], session["addresses"]) == ("alice", ["10.86.0.2"])
    assert session["connections"] == [
        {"index": 0, "worker": 0, "peer": session["connections"][0]["peer"], "bytes_out": 7}
    ]
    assert (session["bytes_out"], session["bytes_in"], session["agreed_connections"]) == (7, 0, 4)
    assert server.summary() == "1 sessions, 1 connections"
    closes(server, first.number)
    (session,) = server.status({})["sessions"]
    assert session["bytes_in"] == 5 and session["connections"] == []
    text = json.dumps(report)
    assert first.welcome.token.hex() not in text and first.welcome.session.hex() not in text


def test_what_the_routes_of_the_host_need_to_know(site, start):
    """A network is carried while the client that has it is connected, whoever else is."""
    server = start(clients=FIXED)
    network = FIXED[0].networks[0]
    seen = []
    server.on_change = lambda: seen.append(server.carries(network))
    live(site, server, "bob")
    assert not server.carries(network) and server.carries(FIXED[1].networks[0])
    assert server.outer_addresses() == {"127.0.0.1"}
    admitted = live(site, server, "alice")
    assert server.carries(network) and not server.carries(ipaddress.ip_network("192.168.9.0/24"))
    closes(server, admitted.number)
    assert not server.carries(network) and server.carries(FIXED[1].networks[0])
    assert seen[0] is False and True in seen and seen[-1] is False


def test_lines_of_events_carry_their_ids(site, server, caplog):
    caplog.set_level(logging.INFO)
    live(site, server)
    server.commands["disconnect"]({"identity": "alice"})
    server.commands["drain"]({})
    with pytest.raises(Refused):
        admit(site, server)
    found = [(record.MESSAGE_ID, getattr(record, "IDENTITY", None)) for record in caplog.records
             if hasattr(record, "MESSAGE_ID")]
    assert found == [(events.ID[name], identity) for name, identity in
                     (("client-connected", "alice"), ("session-ended", "alice"), ("draining", None),
                      ("client-refused", "alice"))]


def test_hooks_hear_of_clients_once_each(site, server):
    told = []
    server.tell = lambda event, **values: told.append((event, values.get("identity"), values["addresses"]))
    pending = admit(site, server)
    assert told == [], "nothing is authentic yet"
    establish(server, pending.number)
    live(site, server, joins=pending.welcome, index=1)
    assert told == [("client-connect", "alice", "10.86.0.2")]
    server.closed({"connection": pending.number, "reason": "over", "counters": {}, "blame": None, "clean": True},
                  server._sessions.connections[pending.number].worker)
    live(site, server, joins=pending.welcome)
    assert len(told) == 1, "a connection is no session"
    live(site, server)
    assert told[1:] == [("client-disconnect", "alice", "10.86.0.2"), ("client-connect", "alice", "10.86.0.2")]
    live(site, server, "bob")
    server._sessions.connections.clear()
    server.stop()
    assert told[3:] == [("client-connect", "bob", "10.86.0.3"), ("client-disconnect", "alice", "10.86.0.2"),
                        ("client-disconnect", "bob", "10.86.0.3"), ("down", None, "10.86.0.1/24")]


def test_one_that_comes_again_and_again_makes_few_lines(site, server, journal):
    for _ in range(3 * RATE_BURST):
        closes(server, live(site, server, offloads=()).number, blame="frame")
    kinds = collections.Counter(record.lineno for record in lines(journal))
    assert len(kinds) == 4 and set(kinds.values()) == {RATE_BURST}
    # Nobody else's are among those that are left out.
    journal.clear()
    live(site, server, "bob")
    assert "bob connected from" in journal.text
