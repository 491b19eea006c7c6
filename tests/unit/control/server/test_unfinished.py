"""control.server: handshakes that take too long, and what happens to those during which something ends."""

import logging
import time

import gevent
import pytest
from doubles import connected, establish, shaken, until
from logins import admit, closes, json_hello, lines, live, state

from bulkvpnd.control import server as server_module
from bulkvpnd.protocol.errors import RemoteError


def test_one_deadline_over_the_whole_handshake(site, start, caplog):
    """Silence in any phase and dribbling through any of them: all end at the deadline, which counts from accept."""
    server = start(handshake_timeout=1)
    honest = live(site, server)
    before = state(server)[0]
    client_hello = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"

    def silent(sock):
        return until(lambda: not sock.recv(1))

    def dribbles_tls(sock):
        for at in range(len(client_hello)):
            sock.sendall(client_hello[at : at + 1])
            gevent.sleep(0.15)

    def silent_after_tls(sock):
        with shaken(sock, site.clients["bob"]) as shake:
            shake.receive_message()

    def dribbles_hello(sock):
        with shaken(sock, site.clients["bob"]) as shake:
            for byte in json_hello():
                shake.send(bytes([byte]))
                gevent.sleep(0.15)

    def no_close_notify(sock):
        with shaken(sock, site.clients["bob"]) as shake:
            shake.send(json_hello())
            shake.receive_message()
            until(lambda: not sock.recv(100))

    def refused_and_no_close_notify(sock):
        with shaken(sock, site.clients["bob"]) as shake:
            shake.send(json_hello(version=9))
            shake.receive_message()
            until(lambda: not sock.recv(100))

    def until_cut(phase):
        begun = time.monotonic()
        with connected(server.port) as sock:
            with pytest.raises((RemoteError, OSError)):
                phase(sock)
                raise ConnectionResetError  # the peer closed it in good order
        return time.monotonic() - begun

    phases = (silent, dribbles_tls, silent_after_tls, dribbles_hello, no_close_notify, refused_and_no_close_notify)
    cut = [gevent.spawn(until_cut, phase) for phase in phases]
    gevent.joinall(cut, raise_error=True)
    for phase, greenlet in zip(phases, cut, strict=True):
        assert 0.8 < greenlet.value < 2, phase.__name__
    # The one that was refused had its line then.
    until(lambda: caplog.text.count("no complete handshake within 1 s") == len(phases) - 1, "a line for each other")
    # Only the one that got a WELCOME had begun a session, and it has no connection.
    assert [one for one in state(server)[0] if one[1] == "alice"] == before
    assert [one[2:] for one in state(server)[0] if one[1] == "bob"][0][0] is False
    assert not server.workers.told("attach")[1:]
    live(site, server, joins=honest.welcome, index=1)


def test_a_deadline_that_strikes_while_the_link_is_full_leaves_no_connection_behind(site, start):
    server = start(handshake_timeout=1)
    server.workers.send = lambda *arguments: gevent.sleep(100)
    with shaken(connected(server.port), site.clients["alice"]) as shake:
        shake.send(json_hello())
        shake.receive_message()
        shake.finish()
        until(lambda: server._sessions.connections, "it is being handed over")
        until(lambda: not server._sessions.connections, "it is forgotten")


def test_a_connection_whose_worker_is_gone_is_closed(site, server):
    server.workers.takes = False
    with shaken(connected(server.port), site.clients["alice"]) as shake:
        shake.send(json_hello())
        shake.receive_message()
        shake.finish()
        assert shake._socket.recv(1) == b""
    assert not server._sessions.connections


def test_a_session_that_ends_during_the_handshake_gets_no_connection(site, server, caplog):
    first = live(site, server)
    with shaken(connected(server.port), site.clients["alice"]) as shake:
        shake.send(json_hello(session=first.welcome.session.hex(), token=first.welcome.token.hex(), index=1))
        shake.receive_message()
        live(site, server)  # the same identity logs in again
        shake.finish()
        assert shake._socket.recv(1) == b""
    until(lambda: "the session ended before" in caplog.text)
    assert len(server.workers.told("attach")) == 2


@pytest.mark.parametrize("established", [False, True])
def test_what_waits_too_long_for_its_first_frame_is_cut(site, start, monkeypatch, established):
    monkeypatch.setattr(server_module, "PENDING_SECONDS", 0.1)
    server = start()
    admitted = admit(site, server)
    if established:
        establish(server, admitted.number)
        kept = admit(site, server, joins=admitted.welcome, index=1)
        admitted = kept
    (order,) = until(lambda: server.workers.told("detach"))
    assert (order["connection"], order["reason"]) == (admitted.number, "timeout")
    closes(server, admitted.number)
    if established:
        assert [session.is_live for session in server._sessions] == [True]
    else:
        until(lambda: not list(server._sessions), "the session is over")
        assert len(server.workers.told("forget")) == 2


def test_who_is_known_and_leaves_has_failed_at_nothing(site, server, caplog):
    """As bulkvpnctl doctor does. A stranger who leaves has."""
    caplog.set_level(logging.INFO)
    with shaken(connected(server.port), site.clients["alice"]):
        pass
    until(lambda: "left" in caplog.text, "a line of it")
    [line] = lines(caplog)[-1:]
    assert line.getMessage().startswith("alice from 127.0.0.1:") and line.IDENTITY == "alice"
    assert line.levelno == logging.INFO and server.status({})["listener"]["failed"] == 0
    connected(server.port).close()
    until(lambda: server.status({})["listener"]["failed"] == 1)
