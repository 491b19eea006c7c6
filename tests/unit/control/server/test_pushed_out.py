"""control.server: what a second login, a replacement and a revocation push out, and when."""

import datetime

import pytest
from doubles import DAY, HELLO, NOW, Routes, connected, establish, shaken, until
from logins import admit, closes, live, state

from bulkvpnd.protocol import handshake
from bulkvpnd.protocol.errors import Refused


def test_a_second_login_replaces_the_first_only_with_its_first_authentic_frame(site, server):
    first = live(site, server)
    before = state(server)
    second = admit(site, server)
    assert state(server)[0][0] == before[0][0] and not server.workers.told("detach")
    establish(server, second.number)
    assert [message["connection"] for message in server.workers.told("detach")] == [first.number]
    assert Routes(message for _, message in server.workers.sent).sessions == {second.message["session"]}


def test_a_connection_that_ends_after_its_session_does_not_bring_it_back(site, server):
    """Both have the same address, so a route to the old session would be a black hole for the new one."""
    first = live(site, server)
    second = live(site, server)
    closes(server, first.number, "closed: replaced", clean=True)
    routes = Routes(message for _, message in server.workers.sent)
    assert routes.sessions == set(routes.owners.values()) == {second.message["session"]}
    assert [session.is_live for session in server._sessions] == [True]
    closes(server, second.number)
    assert Routes(message for _, message in server.workers.sent).sessions == {second.message["session"]}


def test_a_replaced_connection_is_told_to_close(site, server):
    first = live(site, server)
    again = live(site, server, joins=first.welcome, index=0)
    assert [message["connection"] for message in server.workers.told("detach")] == [first.number]
    closes(server, first.number)
    assert [list(session.connections) for session in server._sessions] == [[again.number]]


# Revocation


def certificates(server):
    """{identity: what a revocation list calls the certificate of its session}."""
    return {one.session.identity: one.certificate for one in server._sessions.connections.values()}


def test_a_revoked_certificate_ends_its_session_and_no_other(site, server, caplog):
    alice, bob = live(site, server), live(site, server, "bob")
    more = live(site, server, joins=alice.welcome, index=1)
    pending = admit(site, server, joins=alice.welcome, index=2)
    revoked = certificates(server)["alice"]
    server.revoke(server._context, {certificates(server)["bob"][0]: None, (None, revoked[1]): None})
    assert not server.workers.told("detach")

    server.revoke(server._context, {revoked: None})
    told = [(message["connection"], message["reason"]) for message in server.workers.told("detach")]
    assert told == [(one.number, "refused") for one in (alice, more, pending)]
    assert Routes(message for _, message in server.workers.sent).sessions == {bob.message["session"]}
    assert "session of alice ended: its certificate was revoked" in caplog.text
    # What is still under way for it changes nothing, and nothing joins it any more.
    establish(server, pending.number)
    closes(server, alice.number)
    assert [session.identity for session in server._sessions] == ["bob"]
    with pytest.raises(Refused, match="session"):
        admit(site, server, joins=alice.welcome, index=3)


def test_a_certificate_that_is_revoked_during_its_handshake_gets_no_connection(site, server, caplog):
    first = live(site, server)
    revoked = certificates(server)["alice"]
    closes(server, first.number)
    with shaken(connected(server.port), site.clients["alice"]) as shake:
        shake.send(handshake.encode(HELLO))
        shake.receive_message()
        server.revoke(server._context, {revoked: None})
        shake.finish()
        until(lambda: "was revoked during the handshake" in caplog.text)
    assert len(server.workers.told("attach")) == 1 and not server._sessions.connections


def test_a_certificate_that_expires_ends_its_session(site, server, caplog):
    alice = live(site, server)
    more = live(site, server, joins=alice.welcome, index=1)
    server.expire(NOW + 10 * DAY - datetime.timedelta(seconds=1))
    assert not server.workers.told("detach")
    server.expire(NOW + 10 * DAY)
    told = [(message["connection"], message["reason"]) for message in server.workers.told("detach")]
    assert told == [(one.number, "refused") for one in (alice, more)] and not list(server._sessions)
    assert "session of alice ended: its certificate has expired" in caplog.text
    server.expire(NOW + 20 * DAY)
    assert caplog.text.count("has expired") == 1
