"""control.client over loopback: real TLS, a scripted server, and a double in place of the workers."""

import dataclasses
import datetime
import ipaddress
import logging
import time
import types

import gevent
import gevent.event
import pytest
from doubles import DAY, NOW, Network, Tun, Workers, establish, free_port, until
from scripted import WELCOME, Server, attached, clients, ends, granting, make_site

from bulkvpnd.control import client as client_module
from bulkvpnd.control.client import Client
from bulkvpnd.protocol import handshake, keys
from bulkvpnd.protocol.handshake import Refuse, Welcome


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_site(tmp_path_factory)


@pytest.fixture
def start(site, tmp_path, monkeypatch):
    with clients(site, tmp_path, monkeypatch) as start_client:
        yield start_client


# a session


def test_one_begins_and_the_others_join_with_the_token(start):
    client = start(count=4, script=lambda hello: granting(hello, connections=4))
    messages = attached(client, 4)
    first, *others = client.server.hellos
    assert (first.session, first.token) == (None, None)
    assert {(hello.session, hello.token) for hello in others} == {(WELCOME.session, WELCOME.token)}
    assert sorted(hello.index for hello in client.server.hellos) == [0, 1, 2, 3]
    # Connection i goes to worker i mod W; the device gets what the first WELCOME says, once.
    assert sorted(index for index, message in client.workers.sent if message["type"] == "attach") == [0, 0, 1, 1]
    assert client.link.calls == [("addresses", "bulk0", ["10.86.0.2/32"]), ("mtu", "bulk0", 1400)]
    agreed = [
        keys.traffic_secrets(hello_body, welcome_body, hello.random, Welcome.decode(welcome_body).random)
        for hello_body, welcome_body, hello in client.server.answers
    ]
    assert sorted((secrets["c2s"].hex(), secrets["s2c"].hex()) for secrets in agreed) == sorted(
        (message["secret_out"], message["secret_in"]) for message in messages
    )
    assert len({hello.random for hello in client.server.hellos}) == 4


def test_ready_is_said_once_and_with_the_first_authentic_frame(start, caplog):
    caplog.set_level(logging.INFO)
    client = start()
    messages = attached(client, 2)
    assert client.told == [] and client.summary() == "connecting"
    for message in messages:
        establish(client, message["connection"])
    assert client.told == ["ready"] and client.summary() == "connected, 2 of 2 connections"
    assert client.workers.told("session")[-1]["workers"] == [0, 1]
    assert caplog.text.count("connected to 127.0.0.1") == 1
    establish(client, 99)
    for message in messages:
        ends(client, message)
    assert caplog.text.count("no connection to the server is left") == 1
    establish(client, attached(client, 3)[2]["connection"])
    assert client.told == ["ready"] and caplog.text.count("connected to 127.0.0.1") == 2


def test_a_worker_speaks_for_its_own_connections_only(start, caplog):
    caplog.set_level(logging.INFO)
    client = start()
    message = attached(client, 2)[0]
    connection = client._connections[message["connection"]]
    other = 1 - connection.worker
    client.established(connection.number, other)
    assert not connection.is_live
    client.established(connection.number, connection.worker)
    assert connection.is_live
    client.closed({"connection": message["connection"], "reason": "not mine"}, other)
    assert message["connection"] in client._connections
    ends(client, message, "said\n\x1b[2J" + "x" * 1000)
    assert message["connection"] not in client._connections
    until(lambda: r"said\n\x1b[2Jxx" in caplog.text)
    assert "\x1b" not in caplog.text and "x" * 250 not in caplog.text


def test_what_the_routes_of_the_host_need_to_know(start):
    client = start()
    seen = []
    client.on_change = lambda: seen.append((client.carries(None), client.outer_addresses()))
    messages = attached(client, 2)
    assert not client.carries(None) and not client.outer_addresses()
    for message in messages:
        establish(client, message["connection"])
    ends(client, messages[0])
    assert client.carries(None) and client.outer_addresses() == {"127.0.0.1"}
    ends(client, messages[1])
    assert seen == [(True, {"127.0.0.1"}), (False, set())]


WRONG = {
    "cipher that was not offered": {"cipher": "chacha20-poly1305"},
    "another index": {"index": 1},
    "more connections than asked for": {"connections": 2},
    "larger frames than asked for": {"frame_size": 1 << 19},
    "keys for more bytes than asked for": {"rekey_bytes": (1 << 20) + 1},
    "keys for longer than asked for": {"rekey_interval": 901},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_welcome_that_does_not_answer_the_hello_is_not_taken(start, caplog, changes):
    good = {"connections": 1, "rekey_bytes": 1 << 20}
    client = start(count=1, script=lambda hello: granting(hello, **{**good, **changes}), rekey_bytes="1M")
    until(lambda: "WELCOME: does not answer the HELLO" in caplog.text)
    assert not client.workers.sent and not client.link.calls and client._welcome is None
    client.server.script = lambda hello: granting(hello, **good)
    (message,) = attached(client, 1)
    assert message["settings"]["rekey_bytes"] == 1 << 20


@pytest.mark.parametrize(
    "changes",
    [{"session": b"9" * 16}, {"ipv4": ipaddress.ip_interface("10.86.0.3/24")},
     {"ipv6": ipaddress.ip_interface("fd86::9/64")}],
)  # fmt: skip
def test_a_joining_connection_must_get_the_same_session(start, caplog, changes):
    client = start(script=lambda hello: granting(hello, **(changes if hello.session else {})))
    until(lambda: "WELCOME: does not answer the HELLO" in caplog.text)
    assert len(attached(client, 1)) == 1 and len(client.link.calls) == 2


@pytest.mark.parametrize("answer", [b"\0\7garbage", b"\0\2{}", b"\0\2[]", b"\xff\xff", b"\0\0",
                                    handshake.encode(Refuse("made up"))])  # fmt: skip
def test_a_bad_answer_costs_that_try_only(start, caplog, answer):
    client = start(count=1, script=lambda hello: answer)
    until(lambda: caplog.records)
    record = caplog.records[0]
    assert record.getMessage().startswith("connection 0 to 127.0.0.1:") and record.getMessage().isprintable()
    assert record.levelno == logging.WARNING and "made up" not in record.getMessage()
    client.server.script = lambda hello: granting(hello, connections=1)
    attached(client, 1)


def test_a_server_of_another_name_hears_no_hello(start, caplog):
    client = start(count=1, server_name="other")
    until(lambda: "the peer's certificate" in caplog.text)
    assert not client.server.hellos and not client.workers.sent


# refusals


def test_a_session_that_the_server_forgot_is_begun_again_at_once(start):
    client = start()
    messages = attached(client, 2)
    # The server restarts: it knows nothing any more.
    client.server.script = lambda hello: (
        granting(hello, session=b"8" * 16) if hello.session in (None, b"8" * 16) else Refuse("session")
    )
    begun = time.monotonic()
    for message in messages:
        ends(client, message)
    attached(client, 4)
    assert time.monotonic() - begun < 1
    assert client._welcome.session == b"8" * 16
    assert client.link.calls.count(("addresses", "bulk0", ["10.86.0.2/32"])) == 2


@pytest.mark.parametrize(("reason", "level"), [
    ("session", logging.INFO), ("busy", logging.INFO), ("pool", logging.INFO), ("shutdown", logging.INFO),
    ("version", logging.ERROR), ("cipher", logging.ERROR),
])  # fmt: skip
def test_a_refused_client_never_hammers(start, caplog, reason, level):
    caplog.set_level(logging.INFO)
    client = start(count=1, script=lambda hello: Refuse(reason), replace={"retry_max": 0.3})
    until(lambda: len(client.server.tries) >= 4)
    gaps = [later - earlier for earlier, later in zip(client.server.tries, client.server.tries[1:])]
    assert min(gaps) > 0.01 and gaps[2] > 0.04
    assert {record.levelno for record in caplog.records if "refuses" in record.getMessage()} == {level}


def test_status_says_why_there_is_no_connection(start):
    client = start(count=1, script=lambda hello: Refuse("pool"), replace={"retry_max": 0.05})
    until(lambda: client.status({})["failure"])
    assert client.status({})["failure"].startswith(f"127.0.0.1:{client.server.port}: ")
    assert "pool: every address of its pool is in use; there pool-ipv4" in client.status({})["failure"]
    client.server.script = lambda hello: granting(hello, connections=1)
    establish(client, attached(client, 1)[0]["connection"])
    assert client.status({})["failure"] is None


def test_a_reset_does_not_hide_the_reason_before_it(start, caplog):
    """A server resets whoever has failed before."""
    client = start(count=1, script=lambda hello: Refuse("pool"), replace={"retry_max": 0.05})
    until(lambda: client.status({})["failure"])
    client.server.resets = True
    until(lambda: "failed: Connection reset by peer" in caplog.text)
    assert "pool" in client.status({})["failure"]
    client.server.resets = False
    client.server.script = lambda hello: b"\0\0"
    until(lambda: "pool" not in client.status({})["failure"], "the next reason takes its place")


def test_a_reset_is_a_reason_where_there_is_no_other(start):
    client = start(count=1)
    client.server.resets = True
    until(lambda: client.status({})["failure"])
    assert client.status({})["failure"].endswith(": Connection reset by peer")


def test_a_frame_of_a_session_that_is_gone_already_breaks_nothing(start):
    """Joining is refused while the first connection still waits for its first authentic frame."""
    client = start(script=lambda hello: Refuse("session") if hello.session else granting(hello))
    first = attached(client, 1)[0]
    client._set_session(None)
    establish(client, first["connection"])
    assert client.told == ["ready"] and client.summary() == "connected, 1 of 2 connections"
    assert client.status({})["sessions"] == [] or client._welcome
    client.worker_ready(0)


def test_a_session_that_is_replaced_during_a_join_gets_no_connection(start, caplog):
    hold = gevent.event.Event()

    def script(hello):
        if hello.session:
            hold.wait()
        return granting(hello)

    client = start(script=script)
    attached(client, 1)
    until(lambda: len(client.server.hellos) == 2)
    client._set_session(dataclasses.replace(WELCOME, session=b"7" * 16))
    hold.set()
    until(lambda: "the session was replaced while this connection joined it" in caplog.text)
    assert len(client.workers.told("attach")) == 1


def test_whom_the_server_does_not_want_waits_for_another_session(start):
    grant = [2]
    client = start(count=4, script=lambda hello: granting(hello, connections=grant[0], session=bytes([grant[0]]) * 16))
    messages = attached(client, 2)
    gevent.sleep(0.05)
    assert sorted(hello.index for hello in client.server.hellos) == [0, 1]
    # A new server wants more.
    grant[0] = 4
    old = bytes([2]) * 16
    client.server.script = lambda hello: (
        Refuse("session") if hello.session == old else granting(hello, connections=4, session=b"4" * 16)
    )
    for message in messages:
        ends(client, message)
    attached(client, 6)
    assert {hello.index for hello in client.server.hellos} == {0, 1, 2, 3}


# pauses


def gaps_of(client, count):
    until(lambda: len(client.server.tries) > count, seconds=10)
    return [later - earlier for earlier, later in zip(client.server.tries, client.server.tries[1:])][:count]


def test_pauses_double_with_jitter_up_to_retry_max(start):
    pauses = []

    def wait(seconds):
        """In place of the event that ends a pause."""
        pauses.append(seconds)
        gevent.sleep(0)

    client = start(count=1, script=lambda hello: b"\0\0", replace={"retry_max": 0.1})
    client._reloaded = types.SimpleNamespace(wait=wait)
    until(lambda: len(pauses) >= 10, "ten tries", 10)
    parts = [pause / full for pause, full in zip(pauses, [0.02, 0.04, 0.08, *[0.1] * 7])]
    assert all(0.499 < part < 1.001 for part in parts) and max(parts) - min(parts) > 0.01


def test_a_failure_that_took_long_is_no_success(start, monkeypatch):
    monkeypatch.setattr(client_module, "LIVED", 0.05)
    client = start(count=1, script=lambda hello: gevent.sleep(0.1) or b"\0\0", replace={"retry_max": 10})
    assert gaps_of(client, 5)[4] > 0.1 + 0.5 * 0.02 * 2**4


def test_silence_ends_at_the_deadline(start, caplog):
    client = start(count=1, script=lambda hello: None, handshake_timeout=1)
    until(lambda: "no answer within 1 s" in caplog.text)
    assert len(client.server.tries) == 1


@pytest.mark.parametrize("lived", [False, True])
def test_a_connection_that_lived_makes_the_next_pause_short(start, monkeypatch, lived):
    monkeypatch.setattr(client_module, "LIVED", 0 if lived else 100)
    client = start(count=1, script=lambda hello: granting(hello, connections=1), replace={"retry_max": 10})
    for count in range(1, 6):
        ends(client, attached(client, count)[-1])
    begun = time.monotonic()
    attached(client, 6)
    # The fifth pause: 0.01 to 0.02 s, or 0.16 to 0.32 s.
    assert (time.monotonic() - begun < 0.12) == lived


# addresses


def test_each_remote_is_tried_in_turn(start, site, tmp_path, caplog):
    nobody = free_port()
    client = start(count=1, script=lambda hello: granting(hello, connections=1), remote=f"127.0.0.1:{nobody}")
    until(lambda: f"connection 0 to 127.0.0.1:{nobody} failed: Connection refused" in caplog.text)
    other = Server(site.server, lambda hello: granting(hello, connections=1))
    replaced = dataclasses.replace(
        client._configuration, remote=(("a" * 64, 1), ("nosuchhost.invalid", 2), ("127.0.0.1", other.port))
    )
    second = Client(replaced, client._context, Tun(), ("aes-256-gcm",), lambda: None, None)
    second.workers, second.network = Workers(1), Network()
    second.start()
    attached(second, 1)
    assert "label" in caplog.text and "nosuchhost.invalid: " in caplog.text
    second._connections.clear()
    second.stop()
    second.workers.close()
    other.stop()


def test_our_own_bug_costs_one_try_and_not_the_dialler(start, caplog):
    client = start(count=1, script=lambda hello: granting(hello, connections=1), remote="127.0.0.1:1")
    until(lambda: "Connection refused" in caplog.text)
    tun, client._tun = client._tun, None
    client._configuration = dataclasses.replace(client._configuration, remote=(("127.0.0.1", client.server.port),))
    client._greenlets.append(gevent.spawn(client._dial_forever, 0))
    until(lambda: "internal error with connection 0" in caplog.text)
    client._tun = tun
    attached(client, 1)


def test_addresses_that_the_device_refuses_stop_the_daemon(start):
    client = start(count=1, script=lambda hello: None)
    client.link.failure = "bulk0: address 10.86.0.2/24: no"
    client.server.script = lambda hello: granting(hello, connections=1)
    client._greenlets.append(gevent.spawn(client._dial_forever, 0))
    until(lambda: client.told)
    assert client.told[0] == "bulk0: address 10.86.0.2/24: no" and not client.workers.sent


def test_an_address_that_another_device_has_is_waited_for(start, caplog):
    client = start(count=1, script=lambda hello: None)
    client.link.taken = 2
    client.server.script = lambda hello: granting(hello, connections=1)
    client._greenlets.append(gevent.spawn(client._dial_forever, 0))
    attached(client, 1)
    assert caplog.text.count("failed: taken") == 2 and client.told == []
    assert client.link.calls == [("addresses", "bulk0", ["10.86.0.2/32"]), ("mtu", "bulk0", 1400)]


def test_without_ipv6_a_session_has_ipv4_alone(start, caplog):
    both = {"ipv6": ipaddress.ip_interface("fd86::2/64")}
    client = start(script=lambda hello: granting(hello, **both))
    client.link.ipv6 = False
    messages = attached(client, 2)
    lines = [line for line in caplog.messages if "no IPv6" in line]
    assert len(lines) == 1 and lines[0].startswith("bulk0: address fd86::2/64: this machine has no IPv6, so the tunnel")
    assert client.link.calls[0] == ("addresses", "bulk0", ["10.86.0.2/32"])
    assert client.status({})["addresses"] == ["10.86.0.2/24"]
    # What is switched on meanwhile is for the next session.
    client.link.ipv6 = True
    ends(client, messages[1])
    attached(client, 3)
    assert "does not answer" not in caplog.text


def test_a_session_of_ipv6_alone_needs_it(start, caplog):
    client = start(count=1, script=lambda hello: None)
    client.link.ipv6 = False
    client.server.script = lambda hello: granting(hello, ipv4=None, ipv6=ipaddress.ip_interface("fd86::2/64"),
                                                  connections=1)
    client._greenlets.append(gevent.spawn(client._dial_forever, 0))
    until(lambda: "failed: bulk0: address fd86::2/64: this machine has no IPv6; the server needs a pool" in caplog.text)
    client.link.ipv6 = True
    attached(client, 1)


# replacement


def test_each_connection_is_replaced_one_at_a_time(start):
    client = start(replace={"replace_interval": 0.1})
    first = attached(client, 2)
    for message in first:
        assert not message["replaces"]
        establish(client, message["connection"])
    fresh = attached(client, 3)[2]
    hello = client.server.hellos[-1]
    assert fresh["replaces"] and hello.replaces and hello.session == WELCOME.session
    assert fresh["index"] == hello.index and fresh["secret_out"] not in [message["secret_out"] for message in first]
    # Until it is up and the old one has gone, no other is due.
    gevent.sleep(0.15)
    establish(client, fresh["connection"])
    gevent.sleep(0.15)
    assert len(client.workers.told("attach")) == 3
    (old,) = [message for message in first if message["index"] == fresh["index"]]
    ends(client, old, "moved")
    assert attached(client, 4)[3]["index"] == 1 - fresh["index"]
    assert client.told == ["ready"] and not client.workers.told("detach")


def test_a_replacement_that_fails_leaves_the_old_one(start, caplog):
    client = start(count=1, replace={"replace_interval": 0.05}, script=lambda hello: granting(hello, connections=1))
    (first,) = attached(client, 1)
    establish(client, first["connection"])
    client.server.script = lambda hello: Refuse("busy")
    until(lambda: caplog.text.count("it cannot be replaced") >= 2)
    assert list(client._connections) == [first["connection"]] and not client.workers.told("detach")
    client.server.script = lambda hello: granting(hello, connections=1)
    second = attached(client, 2)[1]
    # Nor does one whose first frame never comes.
    ends(client, second, "timeout")
    third = attached(client, 3)[2]
    assert third["replaces"] and first["connection"] in client._connections
    # The old one goes before the new one is up: the new one is what there is.
    ends(client, first)
    establish(client, third["connection"])
    fourth = attached(client, 4)[3]
    assert fourth["replaces"]


def test_nothing_is_replaced_where_it_is_not_wanted(start):
    client = start(count=1, replace_interval=0, script=lambda hello: granting(hello, connections=1))
    (first,) = attached(client, 1)
    establish(client, first["connection"])
    assert client._configuration.replace_interval == 0
    gevent.sleep(0.1)
    assert len(client.workers.told("attach")) == 1


# revocation


def test_connections_to_a_revoked_server_end(start):
    client = start()
    messages = attached(client, 2)
    (certificate,) = {one.certificate for one in client._connections.values()}
    client.revoke(client._context, {(certificate[0], certificate[1] + 1): None})
    assert not client.workers.told("detach")
    client.revoke(client._context, {certificate: None})
    told = sorted((message["connection"], message["reason"]) for message in client.workers.told("detach"))
    assert told == sorted((message["connection"], "refused") for message in messages)
    ends(client, messages[0])
    until(lambda: len(client.server.hellos) == 3)
    gevent.sleep(0.05)
    assert len(client.workers.told("attach")) == 2, "one that was under way gets no connection"


def test_connections_to_a_server_whose_certificate_expires_end(start, caplog):
    client = start()
    messages = attached(client, 2)
    client.expire(NOW + 10 * DAY)
    assert not client.workers.told("detach"), "those that wait for their first frame have their own time"
    for message in messages:
        establish(client, message["connection"])
    client.expire(NOW + 10 * DAY - datetime.timedelta(seconds=1))
    assert not client.workers.told("detach")
    # One that was renewed cuts nothing.
    client._connections[messages[0]["connection"]].expires += DAY
    client.expire(NOW + 10 * DAY)
    assert not client.workers.told("detach")
    client.expire(NOW + 11 * DAY)
    told = sorted((message["connection"], message["reason"]) for message in client.workers.told("detach"))
    assert told == sorted((message["connection"], "refused") for message in messages)
    assert "the server's certificate has expired; 2 connections end" in caplog.text


# workers


def test_a_worker_that_died_has_its_connections_made_again(start):
    client = start()
    messages = attached(client, 2)
    for message in messages:
        establish(client, message["connection"])
    client.workers.all[0].ready.clear()
    client.worker_lost(0)
    assert client.workers.told("session")[-1]["workers"] == [1]
    gevent.sleep(0.05)
    assert len(client.workers.told("attach")) == 2  # nothing while there is no worker
    client.workers.all[0].ready.set()
    client.worker_ready(0)
    assert client.workers.told("session", 0)[-1]["workers"] == [1]
    attached(client, 3)
    assert client.server.hellos[-1].session == WELCOME.session


def test_a_worker_that_takes_nothing_is_asked_again(start):
    client = start(count=1, script=lambda hello: None)
    client.workers.takes = False
    client.server.script = lambda hello: granting(hello, connections=1)
    client._greenlets.append(gevent.spawn(client._dial_forever, 0))
    until(lambda: len(client.server.hellos) >= 3)
    assert not client._connections
    client.workers.takes = True
    attached(client, 1)


def test_stop_says_goodbye(start):
    client = start()
    for message in attached(client, 2):
        gevent.spawn_later(0.05, ends, client, message)
    begun = time.monotonic()
    client.stop()
    assert time.monotonic() - begun < 1
    assert [message["reason"] for message in client.workers.told("detach")] == ["shutdown"] * 2
    tries = len(client.server.tries)
    gevent.sleep(0.1)
    assert len(client.server.tries) == tries


def test_status_shows_what_lives_and_no_secret(start):
    client = start()
    assert client.status({}) == {"addresses": [], "sessions": [], "failure": None}
    messages = attached(client, 2)
    establish(client, messages[0]["connection"])
    report = client.status({messages[0]["connection"]: {"bytes_in": 3}})
    assert report["addresses"] == ["10.86.0.2/24"] and report["pushed_dns"] == []
    (connection,) = report["sessions"][0]["connections"]
    assert connection["bytes_in"] == 3 and connection["peer"] == f"127.0.0.1:{client.server.port}"
    assert (report["sessions"][0]["bytes_in"], report["sessions"][0]["agreed_connections"]) == (3, 2)
    ends(client, messages[0])
    assert client.status({})["sessions"][0]["bytes_in"] == 5
    assert WELCOME.token.hex() not in repr(report)


# changed while it runs


def test_a_server_that_starts_again_is_found_soon(start, monkeypatch):
    client = start(count=1, script=lambda hello: granting(hello, connections=1), retry_max=60)
    tries = []
    opened = client._open

    def opening(remote):
        tries.append(time.monotonic())
        return opened(remote)

    monkeypatch.setattr(client, "_open", opening)
    message, = attached(client, 1)
    establish(client, message["connection"])
    client.server.stop()
    ends(client, message, "closed by the peer: shutdown")
    # Doubled, the tenth pause would be of 5 s at least.
    until(lambda: len(tries) >= 12, "many tries", 5)
    assert max(b - a for a, b in zip(tries, tries[1:])) < 0.5
    assert min(b - a for a, b in zip(tries, tries[1:])) >= 0.01, "but not without a pause"


def test_one_that_stays_away_is_asked_less_often(start, monkeypatch):
    monkeypatch.setattr(client_module, "RESTART_TIME", 0.1)
    client = start(count=1, script=lambda hello: granting(hello, connections=1), retry_max=60)
    message, = attached(client, 1)
    establish(client, message["connection"])
    tries = []
    monkeypatch.setattr(client, "_open", lambda remote: tries.append(time.monotonic()) or refuse())

    def refuse():
        raise ConnectionRefusedError(111, "Connection refused")

    ends(client, message, "closed by the peer: shutdown")
    until(lambda: len(tries) > 3 and tries[-1] - tries[-2] > 0.3, "pauses that grow", 10)


def test_another_remote_is_tried_at_once(start, monkeypatch):
    monkeypatch.setattr(client_module, "PAUSE_MIN", 1000)
    client = start(count=1, script=lambda hello: granting(hello, connections=1), remote=f"127.0.0.1:{free_port()}")
    until(lambda: client.status({})["failure"])
    client.reconfigure(dataclasses.replace(client._configuration, remote=(("127.0.0.1", client.server.port),)))
    attached(client, 1)


def test_a_connection_is_replaced_by_one_to_another_remote(start, site):
    client = start(count=1, script=lambda hello: granting(hello, connections=1), replace={"replace_interval": 0.1})
    other = Server(site.server, lambda hello: granting(hello, connections=1))
    try:
        (message,) = attached(client, 1)
        client.reconfigure(dataclasses.replace(client._configuration, remote=(("127.0.0.1", other.port),)))
        establish(client, message["connection"])
        assert attached(client, 2)[1]["replaces"]
        assert len(client.server.hellos) == 1 and other.hellos[0].replaces
    finally:
        other.stop()


def forgets(hello, known=b"8" * 16):
    """A server that does not know the session any more, and begins another with as many connections as are wished."""
    return granting(hello, session=known, connections=hello.connections) if hello.session in (None, known) else \
        Refuse("session")


def test_fewer_connections_from_the_next_session_on(start):
    client = start(count=4, script=lambda hello: granting(hello, connections=4))
    messages = sorted(attached(client, 4), key=lambda message: message["index"])
    client.reconfigure(dataclasses.replace(client._configuration, connections=2))
    gevent.sleep(0.05)
    assert len(client._connections) == 4 and not client.workers.told("detach"), "who is connected stays so"
    client.server.script = forgets
    # Those that are too many are the first to hear that there is no session any more; they begin none.
    for message in messages[2:]:
        ends(client, message)
    until(lambda: client._welcome is None)
    for message in messages[:2]:
        ends(client, message)
    attached(client, 6)
    gevent.sleep(0.05)
    assert [hello.index for hello in client.server.hellos if hello.session == b"8" * 16] in ([0], [1])
    assert sorted(one.index for one in client._connections.values()) == [0, 1]


def test_more_connections_from_the_next_session_on(start):
    client = start(count=2)
    messages = attached(client, 2)
    client.reconfigure(dataclasses.replace(client._configuration, connections=3))
    gevent.sleep(0.05)
    assert len(client.server.hellos) == 2
    client.server.script = forgets
    for message in messages:
        ends(client, message)
    attached(client, 5)
    assert sorted(one.index for one in client._connections.values()) == [0, 1, 2]
    assert client._welcome.connections == 3


def test_terms_are_those_of_the_session_and_hooks_hear_of_the_tunnel(start):
    client = start(count=2)
    told = []
    client.tell = lambda event, **values: told.append((event, values["addresses"]))
    messages = attached(client, 2)
    for message in messages:
        establish(client, message["connection"])
    assert told == [("up", "10.86.0.2/24")]
    client.reconfigure(dataclasses.replace(client._configuration, rekey_interval=60, rekey_bytes=1 << 20))
    assert client.network.calls[-1][0] == "reconfigure"
    first = client.server.hellos[0]
    ends(client, messages[1])
    attached(client, 3)
    joined = client.server.hellos[-1]
    assert joined.session and (joined.rekey_interval, joined.rekey_bytes) == (WELCOME.rekey_interval,
                                                                              WELCOME.rekey_bytes)
    assert first.rekey_interval != 60
    establish(client, client.workers.told("attach")[-1]["connection"])
    ends(client, messages[0])
    assert told == [("up", "10.86.0.2/24")]
    ends(client, client.workers.told("attach")[2])
    assert told[1:] == [("down", "10.86.0.2/24")]
