"""control.server: workers that die, connections and sessions that end, and the end of the server itself."""

import logging
import time

import gevent
import pytest
from doubles import Routes, Tun, Workers, configuration, connected, shaken, until
from logins import admit, closes, json_hello, live

from bulkvpnd.control.server import Server
from bulkvpnd.protocol.errors import Refused
from bulkvpnd.protocol.handshake import Welcome


def test_a_worker_that_died_takes_its_connections_with_it(site, server):
    first = live(site, server)
    second = live(site, server, joins=first.welcome, index=1)
    server.worker_lost(0)
    assert list(server._sessions.connections) == [second.number]
    assert server.workers.told("session", 1)[-1]["workers"] == [1]
    # Its successor learns where no client may send, and of the session.
    server.workers.sent.clear()
    server.worker_ready(0)
    assert [(index, message["type"], message.get("workers")) for index, message in server.workers.sent] == [
        (0, "isolate", None), (0, "session", [1])
    ]


def test_a_successor_does_not_learn_of_sessions_that_wait_or_ended(site, server):
    live(site, server)
    admit(site, server, "bob")
    present = live(site, server)
    server.workers.sent.clear()
    server.worker_ready(0)
    assert [message["session"] for message in server.workers.told("session")] == [present.message["session"]]


def test_a_worker_may_die_before_the_server_starts(site, tmp_path):
    settings = configuration(tmp_path, "server", site.server)
    server = Server(settings, None, Tun(), ("aes-256-gcm",), None, None)
    server.workers = Workers()
    server.worker_lost(0)
    server.worker_ready(0)
    assert server.status({})["sessions"] == []
    server.stop()


@pytest.mark.parametrize(
    ("end", "level"),
    [
        ({"clean": True}, None),
        ({"clean": False}, logging.INFO),
        ({"clean": False, "blame": "peer"}, logging.WARNING),
        ({"clean": False, "blame": "own"}, logging.WARNING),
    ],
)
def test_how_a_connection_ended_decides_the_level(site, server, caplog, end, level):
    admitted = live(site, server)
    caplog.set_level(logging.INFO)
    caplog.clear()
    closes(server, admitted.number, "why", **end)
    levels = [record.levelno for record in caplog.records if "ended: why" in record.getMessage()]
    assert levels == [level] * (level is not None)
    closes(server, admitted.number, "why", **end)
    assert len([record for record in caplog.records if "ended: why" in record.getMessage()]) == len(levels)


def test_a_worker_speaks_for_its_own_connections_only(site, server, caplog):
    caplog.set_level(logging.INFO)
    number = admit(site, server).number
    connection = server._sessions.connections[number]
    server.established(number, connection.worker + 1)
    assert not connection.is_live
    server.established(number, connection.worker)
    assert connection.is_live
    message = {"connection": number, "reason": "not mine", "clean": False, "blame": None}
    server.closed(message, connection.worker + 1)
    assert number in server._sessions.connections and "not mine" not in caplog.text
    closes(server, number, "said\n\x1b[2J" + "x" * 1000)
    assert number not in server._sessions.connections
    assert r"said\n\x1b[2Jxx" in caplog.text and "\x1b" not in caplog.text and "x" * 250 not in caplog.text


def test_a_session_without_connection_ends_after_its_grace_time(site, start, caplog):
    caplog.set_level(logging.INFO)
    server = start(grace=0)
    closes(server, live(site, server).number)
    assert "alice has no connection left; its session ends in 0 s" in caplog.text
    until(lambda: not list(server._sessions))
    until(lambda: "session of alice ended" in caplog.text)
    assert Routes(message for _, message in server.workers.sent).sessions == set()
    # The lease stays.
    assert str(live(site, server, "bob").welcome.ipv4.ip) == "10.86.0.3"
    assert str(live(site, server).welcome.ipv4.ip) == "10.86.0.2"


def test_stop_says_goodbye_and_waits_for_the_answers(site, server):
    admitted = live(site, server)
    gevent.spawn_later(0.05, closes, server, admitted.number, "closed: shutdown", True)
    begun = time.monotonic()
    server.stop()
    assert time.monotonic() - begun < 1
    assert [message["reason"] for message in server.workers.told("detach")] == ["shutdown"]
    with pytest.raises(ConnectionRefusedError):
        connected(server.port)


def test_stop_does_not_wait_for_ever(site, server):
    live(site, server)
    begun = time.monotonic()
    server.stop()
    assert 1.5 < time.monotonic() - begun < 3


def test_who_comes_while_it_stops_is_refused(site, server):
    with shaken(connected(server.port), site.clients["alice"]) as shake:
        server.stop()
        shake.send(json_hello())
        with pytest.raises(Refused, match="shutdown"):
            Welcome.decode(shake.receive_message())
