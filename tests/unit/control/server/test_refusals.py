"""control.server: who is refused, and that this changes nothing for anybody else."""

import contextlib
import logging
import time

import pytest
from doubles import HELLO, connected, establish, shaken, until
from logins import admit, json_hello, lines, live, raw_message, state

from bulkvpnd.control import server as server_module
from bulkvpnd.control.admission import Pace
from bulkvpnd.control.session import PENDING_MAX
from bulkvpnd.protocol import handshake
from bulkvpnd.protocol.errors import Refused, RemoteError
from bulkvpnd.protocol.handshake import Welcome


def flipped(data, bit=0):
    return (int.from_bytes(data, "big") ^ 1 << bit).to_bytes(len(data), "big")


REFUSALS = {
    # name: (reason, who, changes from HELLO, given alice's WELCOME)
    "wrong token": ("session", "alice", lambda own: {"session": own.session, "token": flipped(own.token)}),
    "token's last bit": ("session", "alice", lambda own: {"session": own.session, "token": flipped(own.token, 255)}),
    "unknown session": ("session", "alice", lambda own: {"session": flipped(own.session), "token": own.token}),
    "another certificate": ("session", "bob", lambda own: {"session": own.session, "token": own.token}),
    "index beyond": ("session", "alice", lambda own: {"session": own.session, "token": own.token, "index": 4}),
    "cipher of the session": ("cipher", "alice",
                              lambda own: {"session": own.session, "token": own.token, "ciphers": ()}),
    "no cipher in common": ("cipher", "bob", lambda own: {"ciphers": ("chacha20-poly1305",)}),
    "pool": ("pool", "carol", lambda own: {}),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_refuse_names_the_reason_and_changes_nothing(site, start, caplog, case):
    reason, who, changes = case
    server = start(pool_ipv4="10.86.0.0/30")  # one client
    first = live(site, server)
    caplog.set_level(logging.INFO)
    caplog.clear()
    before = state(server)
    with pytest.raises(Refused) as caught:
        admit(site, server, who, **changes(first.welcome))
    assert caught.value.reason == reason
    (record,) = lines(caplog)
    assert (record.IDENTITY, record.REASON) == (who, reason)
    assert state(server) == before
    live(site, server, joins=first.welcome, index=1)


def test_an_identity_that_connects_too_often_waits_and_is_refused_and_others_are_not(site, server, monkeypatch):
    monkeypatch.setattr(server_module, "PACE_PAUSE", 0.2)
    server._pace = Pace(burst=2, rate=0)
    first = live(site, server)
    live(site, server, joins=first.welcome, index=1)
    before, begun = state(server), time.monotonic()
    with pytest.raises(Refused, match="busy"):
        admit(site, server, joins=first.welcome, index=2)
    assert time.monotonic() - begun >= 0.2
    # It keeps its place while it waits, so a source cannot have more of these than places.
    sock = connected(server.port)
    with shaken(sock, site.clients["alice"]) as shake:
        shake.send(handshake.encode(HELLO))
        until(lambda: server.status({})["listener"]["handshakes"] == 1)
    assert state(server)[:2] == before[:2]
    live(site, server, "bob")


def test_who_leaves_without_hello_has_had_a_handshake_too(site, server, monkeypatch):
    monkeypatch.setattr(server_module, "PACE_PAUSE", 0.2)
    server._pace = Pace(burst=2, rate=0)

    def gone():
        listener = server.status({})["listener"]
        return listener["admitted"] if not listener["handshakes"] else None

    for number in (1, 2, 3):
        begun = time.monotonic()
        with shaken(connected(server.port), site.clients["alice"]):
            pass
        until(lambda: gone() == number, "it has gone")
    assert time.monotonic() - begun >= 0.2, "its place is kept for a time"
    with pytest.raises(Refused, match="busy"):
        admit(site, server)
    live(site, server, "bob")


def test_what_others_have_is_not_in_the_reach_of_a_client(site, server):
    """Every way to become a connection that replaces another: only that of the same session does."""
    alice = [live(site, server)]
    alice += [live(site, server, joins=alice[0].welcome, index=index) for index in (1, 2, 3)]
    bob = live(site, server, "bob")
    for index in range(4):
        with contextlib.suppress(Refused):
            live(site, server, "bob", joins=alice[0].welcome, index=index)
        with contextlib.suppress(Refused):
            live(site, server, "bob", joins=bob.welcome, index=index)
        with contextlib.suppress(Refused):
            live(site, server, "bob", index=index)
    # What a worker might report of connections that are not there changes nothing either.
    establish(server, 10**6)
    assert not {one.number for one in alice} & {one["connection"] for one in server.workers.told("detach")}
    shown = {session["identity"]: session for session in server.status({})["sessions"]}
    assert [one["index"] for one in shown["alice"]["connections"]] == [0, 1, 2, 3]
    assert len(shown["bob"]["connections"]) == 1


def test_no_client_has_more_sessions_and_connections_than_its_bounds(site, server):
    """Sessions that wait for their first frame, and connections of one that do: see PENDING_MAX."""
    waiting = []
    for _ in range(20):
        with contextlib.suppress(Refused):
            waiting.append(admit(site, server))
    assert len(waiting) == PENDING_MAX and len(list(server._sessions)) == PENDING_MAX
    establish(server, waiting[0].number)
    for number in range(30):
        with contextlib.suppress(Refused):
            admit(site, server, joins=waiting[0].welcome, index=number % 4)
    assert len(server._sessions.connections) == 1 + PENDING_MAX - 1 + HELLO.connections + PENDING_MAX
    live(site, server, "bob")


BAD_HELLOS = {
    "not JSON": raw_message(b"not JSON at all"),
    "not an object": raw_message(b"[1, 2]"),
    "deep nesting": raw_message(b"[" * 16000),
    "too large": (16385).to_bytes(2, "big") + b" " * 16385,
    "empty": raw_message(b""),
    "random is short": json_hello(random="00"),
    "random is a number": json_hello(random=1),
    "index below zero": json_hello(index=-1),
    "index is a truth value": json_hello(index=True),
    "index beyond the wished number": json_hello(index=3, connections=2),
    "session without token": json_hello(session="00" * 16),
    "token without session": json_hello(token="00" * 32),
    "ciphers is a word": json_hello(ciphers="aes-256-gcm"),
    "frame size": json_hello(frame_size=1 << 31),
    "no connections": json_hello(connections=0),
}


@pytest.mark.parametrize("data", BAD_HELLOS.values(), ids=BAD_HELLOS)
def test_a_bad_hello_ends_its_connection_and_nothing_else(site, server, caplog, data):
    live(site, server)
    before = state(server)
    caplog.set_level(logging.INFO)
    caplog.clear()
    with shaken(connected(server.port), site.clients["bob"]) as shake:
        shake.send(data)
        with pytest.raises((RemoteError, ConnectionResetError)):
            shake.receive_message()
    (record,) = lines(caplog)
    assert record.getMessage().startswith("connection from 127.0.0.1:") and "HELLO" in record.getMessage() or (
        "a message" in record.getMessage()
    )
    assert record.getMessage().isprintable() and len(record.getMessage()) < 200
    assert state(server) == before
    live(site, server, "bob")


def test_a_version_that_this_end_lacks_is_refused(site, server):
    with shaken(connected(server.port), site.clients["alice"]) as shake:
        shake.send(json_hello(version=2))
        with pytest.raises(Refused, match="version"):
            Welcome.decode(shake.receive_message())
