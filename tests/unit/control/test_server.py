"""control.server over loopback: real TLS, real certificates, and a double in place of the workers."""

import contextlib
import dataclasses
import gc
import ipaddress
import json
import logging
import os
import time
import types

import gevent
import pytest
from doubles import (
    HELLO, Authority, Link, Routes, Tun, Workers, configuration, connected, context, descriptors, free_port, shaken,
    until,
)  # fmt: skip
from gevent import socket

from bulkvpnd import events, service
from bulkvpnd.control import server as server_module
from bulkvpnd.control.admission import Pace
from bulkvpnd.control.clients import Client
from bulkvpnd.control.server import Server
from bulkvpnd.control.session import PENDING_MAX
from bulkvpnd.control.status import CommandError
from bulkvpnd.control.tls import make_context
from bulkvpnd.protocol import handshake, keys
from bulkvpnd.protocol.errors import Refused, RemoteError
from bulkvpnd.protocol.handshake import Welcome


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """One authority, the server's end, and the TLS contexts of three clients."""
    authority = Authority()
    directory = tmp_path_factory.mktemp("site")
    clients = {name: context(directory, "client", authority.issue(name)) for name in ("alice", "bob", "carol")}
    return types.SimpleNamespace(authority=authority, server=authority.issue("server", "server"), clients=clients)


@pytest.fixture
def start(site, tmp_path, monkeypatch):
    """Starts a server with options. It gets the attributes port, link, workers."""
    running = []

    def start_server(ciphers=("aes-256-gcm",), workers=2, clients=(), **options):
        link = Link()
        monkeypatch.setattr(server_module, "link", link)
        monkeypatch.setattr(server_module.gateway, "reapply", lambda *arguments: None)
        port = free_port()
        settings = configuration(tmp_path, "server", site.server, listen=f"127.0.0.1:{port}", **options)
        settings = dataclasses.replace(settings, clients=clients)
        ready = []
        server = Server(settings, make_context(settings), Tun(), ciphers, lambda: ready.append(1), None)
        server.workers = Workers(workers)
        server.start()
        assert ready == [1]
        server.port, server.link = port, link
        running.append(server)
        return server

    yield start_server
    for server in running:
        # Nobody reports the end of connections here; stopping is not to wait for it.
        server._sessions.connections.clear()
        server.stop()
        server.workers.close()


@pytest.fixture
def server(start):
    return start()


@dataclasses.dataclass
class Admitted:
    """What a client has after WELCOME."""

    welcome: Welcome
    secrets: dict
    sock: socket.socket
    number: int
    message: dict


def admit(site, server, name="alice", joins=None, behind=b"", **changes):
    """One connection from connect to its worker. joins: Welcome of the session to join. Raises Refused."""
    if joins:
        changes = {"session": joins.session, "token": joins.token, **changes}
    hello = dataclasses.replace(HELLO, **changes)
    sock = connected(server.port)
    before = len(server.workers.told("attach"))
    with shaken(sock, site.clients[name]) as shake:
        body = handshake.encode(hello)
        shake.send(body)
        answer = shake.receive_message()
        welcome = Welcome.decode(answer)
        shake.finish()
        sock.sendall(behind)
        until(lambda: len(server.workers.told("attach")) > before, "a worker got the connection")
        kept = socket.socket(fileno=os.dup(sock.fileno()))
    secrets = keys.traffic_secrets(body[handshake.PREFIX_SIZE :], answer, hello.random, welcome.random)
    message = server.workers.told("attach")[-1]
    return Admitted(welcome, secrets, kept, message["connection"], message)


def live(site, server, *arguments, **changes):
    """As admit; its first authentic frame has come."""
    admitted = admit(site, server, *arguments, **changes)
    server.established(admitted.number)
    server._pool.flush()  # what writes the lease has a descriptor
    return admitted


def closes(server, number, reason="gone", clean=False, blame=None):
    connection = server._sessions.connections.get(number)
    message = {"connection": number, "reason": reason, "clean": clean, "blame": blame, "counters": {"bytes_in": 5}}
    server.closed(message, connection.worker if connection else 0)


def state(server):
    """Everything that a connection could have changed."""
    sessions = [
        (session.number, session.identity, session.is_live, session.idle_since, sorted(session.connections))
        for session in server._sessions
    ]
    return sessions, sorted(server._sessions.connections), len(server.workers.sent), dict(server._pool._leases)


def lines(caplog):
    return [record for record in caplog.records if record.levelno >= logging.INFO]


# admission


def test_a_worker_gets_the_socket_the_keys_and_what_came_behind(site, server):
    admitted = admit(site, server, index=2)
    message = admitted.message
    assert bytes.fromhex(message["secret_in"]) == admitted.secrets["c2s"]
    assert bytes.fromhex(message["secret_out"]) == admitted.secrets["s2c"]
    assert message["secret_in"] != message["secret_out"]
    admitted.sock.sendall(b"frames")
    assert server.workers.sockets[admitted.number].recv(100) == b"frames"
    assert (admitted.welcome.index, admitted.welcome.connections, admitted.welcome.cipher) == (2, 4, "aes-256-gcm")
    assert [str(admitted.welcome.ipv4), admitted.welcome.ipv6] == ["10.86.0.2/24", None]
    # Until its first authentic frame nobody is told of the session.
    assert not server.workers.told("session")
    server.established(admitted.number)
    assert [message["workers"] for message in server.workers.told("session")] == [[0], [0]]


def test_the_smaller_wish_counts(site, start):
    server = start(connections=3, frame_size="256K")
    welcome = admit(site, server, connections=2, frame_size=1 << 19).welcome
    assert (welcome.connections, welcome.frame_size) == (2, 1 << 18)
    welcome = admit(site, server, "bob", connections=64, frame_size=1 << 17).welcome
    assert (welcome.connections, welcome.frame_size) == (3, 1 << 17)


@pytest.mark.parametrize(("wish", "agreed"), [((1 << 20, 60), (1 << 20, 60)), ((1 << 36, 86400), (1 << 30, 900))])
def test_keys_are_used_no_longer_than_either_end_wants(site, start, wish, agreed):
    server = start(rekey_bytes="1G")
    admitted = admit(site, server, rekey_bytes=wish[0], rekey_interval=wish[1])
    settings = admitted.message["settings"]
    assert (admitted.welcome.rekey_bytes, admitted.welcome.rekey_interval) == agreed
    assert (settings["rekey_bytes"], settings["rekey_interval"]) == agreed


def test_what_is_pushed_besides_the_addresses(site, start):
    server = start(routes=["192.168.7.0/24", "fd00:7::/64"], dns=["10.86.0.1"], dns_search=["example.org", "test"])
    welcome = admit(site, server).welcome
    assert [str(network) for network in welcome.routes] == ["192.168.7.0/24", "fd00:7::/64"]
    assert [str(address) for address in welcome.dns] == ["10.86.0.1"]
    assert welcome.dns_search == ("example.org", "test")


FIXED = (
    Client("alice", {4: ipaddress.ip_address("10.86.0.77")}, (ipaddress.ip_network("192.168.7.0/24"),)),
    Client("bob", {}, (ipaddress.ip_network("fd07::/64"), ipaddress.ip_network("192.168.8.0/24"))),
)


def test_a_client_with_an_address_and_a_network_of_its_own(site, start):
    server = start(clients=FIXED, routes=["192.168.0.0/16", "192.168.7.0/24", "192.168.7.128/25", "fd07::/64"])
    alice, bob, carol = (live(site, server, name) for name in ("alice", "bob", "carol"))
    assert [str(one.welcome.ipv4) for one in (alice, bob, carol)] == ["10.86.0.77/24", "10.86.0.2/24", "10.86.0.3/24"]
    # Workers learn of the networks with every connection and every session.
    networks = [["192.168.7.0/24"], ["fd07::/64", "192.168.8.0/24"], []]
    for kind in ("attach", "session"):
        told = {message["session"]: message["networks"] for message in server.workers.told(kind)}
        assert list(told.values()) == networks
    assert [one["networks"] for one in server.status({})["sessions"]] == networks
    # A client is not told to look in the tunnel for what is behind itself.
    pushed = [[str(route) for route in one.welcome.routes] for one in (alice, bob, carol)]
    assert pushed == [
        ["192.168.0.0/16", "fd07::/64"],
        ["192.168.0.0/16", "192.168.7.0/24", "192.168.7.128/25"],
        ["192.168.0.0/16", "192.168.7.0/24", "192.168.7.128/25", "fd07::/64"],
    ]


def test_the_first_of_parallel_sessions_has_what_is_fixed(site, start):
    server = start(clients=FIXED, second_login="parallel")
    first, second = live(site, server), live(site, server)
    assert [str(one.welcome.ipv4.ip) for one in (first, second)] == ["10.86.0.77", "10.86.0.2"]
    assert [message["networks"] for message in server.workers.told("attach")] == [["192.168.7.0/24"], []]


def test_where_no_client_may_send(start):
    server = start(pool_ipv6="fd86::/64", clients=FIXED)
    server.worker_ready(1)
    assert server.workers.sent == [(1, {
        "type": "isolate",
        "networks": ["10.86.0.0/24", "fd86::/64", "192.168.7.0/24", "fd07::/64", "192.168.8.0/24"],
        "exempt": ["10.86.0.1", "fd86::1"],
    })]
    server = start(client_to_client="yes", clients=FIXED)
    server.worker_ready(1)
    assert not server.workers.sent


def test_nothing_is_pushed_unasked(site, server):
    welcome = admit(site, server).welcome
    assert (welcome.routes, welcome.dns, welcome.dns_search) == ((), (), ())


def test_the_device_gets_the_first_addresses(start):
    server = start(pool_ipv6="fd86::/64")
    assert server.link.calls == [("addresses", "bulk0", ["10.86.0.1/24", "fd86::1/64"])]


def test_the_device_of_a_crashed_run_may_take_a_moment_to_go(start, monkeypatch):
    server = start()
    applied = []
    monkeypatch.setattr(server_module.gateway, "apply", lambda *arguments: applied.append(arguments[2]))
    server.link.taken = 3
    server.prepare()
    assert applied == ["bulk0"]
    monkeypatch.setattr(server_module, "CRASH_SECONDS", 0.1)
    server.link.taken = 10**6
    with pytest.raises(server.link.LinkError):
        server.prepare()
    assert applied == ["bulk0"]


def test_join_goes_to_the_next_worker_with_keys_of_its_own(site, server):
    first = live(site, server)
    second = live(site, server, joins=first.welcome, index=1)
    assert second.welcome.session == first.welcome.session and second.welcome.ipv4 == first.welcome.ipv4
    assert {first.message["secret_in"], first.message["secret_out"]}.isdisjoint(
        {second.message["secret_in"], second.message["secret_out"]}
    )
    attached = [(index, message["session"]) for index, message in server.workers.sent if message["type"] == "attach"]
    assert attached == [(0, 1), (1, 1)]
    assert server.workers.told("session")[-1]["workers"] == [0, 1]


# refusals


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
    assert (record.IDENTITY, record.REASON, record.limited) == (who, reason, True)
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
    server.established(10**6)
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
    server.established(waiting[0].number)
    for number in range(30):
        with contextlib.suppress(Refused):
            admit(site, server, joins=waiting[0].welcome, index=number % 4)
    assert len(server._sessions.connections) == 1 + PENDING_MAX - 1 + HELLO.connections + PENDING_MAX
    live(site, server, "bob")


def raw_message(body):
    return len(body).to_bytes(2, "big") + body


def json_hello(**changes):
    return raw_message(json.dumps({**HELLO.to_json(), **changes}).encode())


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
    assert record.limited and record.getMessage().isprintable() and len(record.getMessage()) < 200
    assert state(server) == before
    live(site, server, "bob")


def test_a_version_that_this_end_lacks_is_refused(site, server):
    with shaken(connected(server.port), site.clients["alice"]) as shake:
        shake.send(json_hello(version=2))
        with pytest.raises(Refused, match="version"):
            Welcome.decode(shake.receive_message())


NO_TLS = {
    "nothing": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HELLO without TLS": handshake.encode(HELLO),
    "a frame": b"\0\0\0\x20" + bytes(32),
    "TLS garbage": b"\x16\x03\x01\x02\0" + b"\xff" * 512,
    "a record too large": b"\x16\x03\x03\xff\xff" + bytes(66000),
    "an alert": b"\x15\x03\x03\0\2\2\x28",
    "application data": b"\x17\x03\x03\0\x20" + bytes(32),
}
RESET = b"\1\0\0\0\0\0\0\0"
"""SO_LINGER of no time: closing sends a reset, socket(7)."""


def last_words(sock):
    """What the other end says until it ends the connection, or resets it."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(4096):
            said += part
    return said


@pytest.mark.parametrize("end", ["half-closed", "closed", "reset"])
@pytest.mark.parametrize("data", NO_TLS.values(), ids=NO_TLS)
def test_no_byte_without_tls_reaches_a_parser(site, server, caplog, data, end):
    """The class of CVE-2023-40217: what is sent before the handshake is never read as if it were authenticated."""
    live(site, server)
    before, open_before = state(server), len(descriptors())
    caplog.clear()
    caplog.set_level(logging.INFO)
    with connected(server.port) as sock:
        sock.sendall(data)
        if end == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        elif end == "half-closed":
            with contextlib.suppress(OSError):
                # It may be faster.
                sock.shutdown(socket.SHUT_WR)
            assert len(last_words(sock)) < 16, "more than an alert"
    (record,) = until(lambda: lines(caplog), "one line")
    assert record.levelno == logging.WARNING and record.limited and record.REASON and record.getMessage().isprintable()
    assert state(server) == before
    until(lambda: len(descriptors()) == open_before, "its descriptor is closed")


def test_many_bad_connections_make_few_lines(start, caplog, request):
    server = start(penalty_max=0)
    thin_out = service.RateLimit()
    caplog.handler.addFilter(thin_out)
    request.addfinalizer(lambda: caplog.handler.removeFilter(thin_out))
    for _ in range(40):
        with connected(server.port) as sock:
            sock.sendall(b"garbage that is no TLS record")
            last_words(sock)
    until(lambda: not server._listener.status()["handshakes"], "all are dealt with")
    assert len(lines(caplog)) == service.RATE_BURST


def test_a_refused_connection_keeps_nothing(site, server):
    """10 of each kind of failure leave no descriptor, no greenlet, no session."""
    live(site, server)
    gc.collect()
    before, open_before = state(server), len(descriptors())
    for _ in range(10):
        with shaken(connected(server.port), site.clients["bob"]) as shake:
            shake.send(raw_message(b"garbage"))
        connected(server.port).close()
    until(lambda: not server._listener.status()["handshakes"])
    assert state(server) == before and len(descriptors()) == open_before


# deadlines


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
        server.established(admitted.number)
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


# a second login


def test_a_second_login_replaces_the_first_only_with_its_first_authentic_frame(site, server):
    first = live(site, server)
    before = state(server)
    second = admit(site, server)
    assert state(server)[0][0] == before[0][0] and not server.workers.told("detach")
    server.established(second.number)
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


# revocation


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
    server.established(pending.number)
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


def test_a_worker_is_told_that_a_connection_replaces_another(site, server):
    first = live(site, server)
    assert not first.message["replaces"]
    assert live(site, server, joins=first.welcome, replaces=True).message["replaces"]


# replay


class Recorder:
    """A socket that keeps what went over it, both ways."""

    def __init__(self, sock):
        self._socket = sock
        self.sent = self.received = b""

    def sendall(self, data):
        self.sent += data
        self._socket.sendall(data)

    def recv(self, size):
        data = self._socket.recv(size)
        self.received += data
        return data

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._socket.close()


def records(stream):
    """A TLS stream, record by record (RFC 8446 section 5.1)."""
    while stream:
        size = 5 + int.from_bytes(stream[3:5], "big")
        yield stream[:size]
        stream = stream[size:]


def test_a_recorded_handshake_says_nothing_to_a_server(site, server, caplog):
    """Every byte of a connection that got in, again: as it was, in another order, in part, and the other way round."""
    recorder = Recorder(connected(server.port))
    with shaken(recorder, site.clients["alice"]) as shake:
        shake.send(handshake.encode(HELLO))
        shake.receive_message()
        shake.finish()
        (message,) = until(lambda: server.workers.told("attach"))
    server.established(message["connection"])
    before = state(server)

    said = list(records(recorder.sent))
    assert len(said) > 3
    orders = [said, said * 2, said[::-1], said[1:], said[:1] + said[:1], list(records(recorder.received))]
    orders += [said[:at] + said[at + 1 :] for at in range(len(said))]
    for order in orders:
        with connected(server.port) as sock:
            sock.sendall(b"".join(order))
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
    assert state(server) == before
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# workers


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


# the end


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


@pytest.mark.parametrize(
    ("end", "level"),
    [
        ({"clean": True}, None),
        ({"clean": False}, logging.INFO),
        ({"clean": False, "blame": "peer"}, logging.WARNING),
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
    number = live(site, server).number
    connection = server._sessions.connections[number]
    message = {"connection": number, "reason": "not mine", "clean": False, "blame": None}
    server.closed(message, connection.worker + 1)
    assert number in server._sessions.connections and "not mine" not in caplog.text
    closes(server, number, "said\n\x1b[2J" + "x" * 1000)
    assert number not in server._sessions.connections
    assert r"said\n\x1b[2Jxx" in caplog.text and "\x1b" not in caplog.text and "x" * 250 not in caplog.text


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


# Changed while it runs


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
    server.established(pending.number)
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
