"""control.listener over loopback: who is let in and who goes, out of descriptors, both families, and clear errors."""

import gc
import logging
import resource
import time
import warnings
from socket import has_dualstack_ipv6

import gevent
import pytest
from doubles import connected, descriptors, free_port, until
from gevent import socket
from gevent.event import Event

from bulkvpnd.control import admission as admission_module
from bulkvpnd.control import listener as listener_module
from bulkvpnd.control.admission import Admission
from bulkvpnd.control.listener import Listener
from bulkvpnd.protocol.errors import RemoteError


class Handle:
    """Keeps each connection until it is let go; then its socket is closed."""

    def __init__(self):
        self.busy = []
        self.served = 0
        self.ended = 0
        self.go = Event()

    def __call__(self, sock, address, place):
        assert sock.recv(1)  # what stays unread would make a reset of the end
        self.busy.append(address)
        try:
            self.go.wait()
            self.served += 1
        finally:
            self.busy.remove(address)
            self.ended += 1


def living_greenlets():
    gc.collect()
    return sum(isinstance(one, gevent.Greenlet) and not one.dead for one in gc.get_objects())


def kept_places():
    gc.collect()
    return sum(isinstance(one, admission_module.Place) for one in gc.get_objects())


def connecting(port, host="127.0.0.1"):
    """A client that has begun to speak."""
    sock = connected(port, host)
    sock.sendall(b"x")
    return sock


def is_reset(sock):
    """Whether the other end resets the connection; False if it ends it in order."""
    try:
        return bool(sock.recv(1)) and None
    except ConnectionResetError:
        return True


@pytest.fixture
def listen():
    listeners = []

    def start(*addresses, places=(64, 100, 64), per_source=64, penalty_max=0, timeout=10, handle=None,
              prepare=lambda sock: None):
        admission = Admission(*places, per_source, penalty_max)
        listener = Listener(addresses, admission, timeout, prepare, handle or Handle())
        listeners.append(listener)
        listener.start()
        return listener

    yield start
    for listener in listeners:
        listener.stop()


def test_who_says_nothing_has_no_greenlet_and_is_reset_at_the_deadline(listen, caplog):
    port, handle = free_port(), Handle()
    listener = listen(("127.0.0.1", port), timeout=0.5, handle=handle)
    places, greenlets, begun = kept_places(), living_greenlets(), time.monotonic()
    clients = [connected(port) for _ in range(20)]
    until(lambda: listener.status()["handshakes"] == 20)
    assert living_greenlets() == greenlets and not handle.busy
    assert all(is_reset(client) for client in clients)
    assert 0.4 < time.monotonic() - begun < 8
    assert listener.status()["handshakes"] == 0 and listener.status()["failed"] == 20
    assert caplog.text.count("turned away: no complete handshake within 0 s") == 20
    assert kept_places() - places <= 1, "none but the last, which a loop has in a variable"


def test_the_deadline_counts_from_accept_and_not_from_the_first_byte(listen):
    port, handle = free_port(), Handle()
    listen(("127.0.0.1", port), timeout=3, handle=handle)
    begun = time.monotonic()
    with connected(port) as client:
        gevent.sleep(2.5)  # time itself is what is tested
        client.sendall(b"x")
        until(lambda: handle.busy)
        assert client.recv(1) == b""
    assert 2.9 < time.monotonic() - begun < 5.4


def test_the_first_byte_is_still_there_for_the_handler(listen):
    port, seen = free_port(), []
    listen(("127.0.0.1", port), handle=lambda sock, address, place: seen.append((sock.recv(9), address[0])))
    with connecting(port) as client:
        client.recv(1)
    assert seen == [(b"x", "127.0.0.1")]


def test_who_leaves_without_a_word_never_reaches_the_handler(listen, caplog):
    caplog.set_level(logging.INFO)
    port, handle = free_port(), Handle()
    listener = listen(("127.0.0.1", port), handle=handle)
    connected(port).close()
    until(lambda: listener.status()["failed"] == 1)
    assert handle.served == 0 and "the peer closed the connection during the handshake" in caplog.text
    assert [record.levelno for record in caplog.records if "turned away" in record.getMessage()] == [logging.INFO]


@pytest.mark.parametrize(("reason", "level"), [("left", logging.INFO), ("tls", logging.WARNING)])
def test_who_leaves_during_the_handshake_is_no_reason_to_warn(listen, caplog, reason, level):
    def fail(sock, address, place):
        raise RemoteError(reason, "why")

    caplog.set_level(logging.INFO)
    port = free_port()
    listener = listen(("127.0.0.1", port), handle=fail)
    with connecting(port):
        until(lambda: listener.status()["failed"] == 1)
    assert [record.levelno for record in caplog.records if "turned away: why" in record.getMessage()] == [level]


@pytest.mark.parametrize(("error", "reason"), [(OSError(32, "Broken pipe"), "Broken pipe"),
                                               (OSError("no number"), "the socket failed")])  # fmt: skip
def test_a_socket_that_fails_is_told_of_by_its_reason(listen, caplog, error, reason):
    def fail(sock, address, place):
        sock.recv(1)
        raise error

    caplog.set_level(logging.INFO)
    port = free_port()
    listen(("127.0.0.1", port), handle=fail)
    with connecting(port) as client:
        client.recv(1)
    until(lambda: f"turned away: {reason}" in caplog.text)
    (record,) = [record for record in caplog.records if "turned away" in record.getMessage()]
    assert record.levelno == logging.INFO


@pytest.mark.parametrize(("limit", "why"), [({"places": (4, 100, 4)}, "crowded"), ({"per_source": 4}, "source_full")])
def test_a_crowd_of_the_silent_keeps_nobody_out(listen, limit, why):
    """Nor who comes from the same address, behind a NAT."""
    port, handle = free_port(), Handle()
    listener = listen(("127.0.0.1", port), **limit, handle=handle)
    crowd = [connected(port) for _ in range(4)]
    until(lambda: listener.status()["handshakes"] == 4)
    for _ in range(3):
        with connecting(port) as client:
            until(lambda: handle.busy, "it is served")
            handle.go.set()
            assert client.recv(1) == b""
            handle.go.clear()
    # One for one, and who was longest silent first.
    assert is_reset(crowd[0])
    expected = {"handshakes": 3, "admitted": 7, "crowded": 0, "source_full": 0, "penalised": 0, "failed": 0}
    assert listener.status() == {**expected, why: 1}
    for client in crowd:
        client.close()


def test_who_speaks_is_left_in_peace_and_the_newcomer_is_dropped(listen):
    port, handle = free_port(), Handle()
    listen(("127.0.0.1", port), places=(3, 100, 3), handle=handle)
    clients = [connecting(port) for _ in range(3)]
    until(lambda: len(handle.busy) == 3)
    assert is_reset(connected(port))
    handle.go.set()
    assert [client.recv(1) for client in clients] == [b""] * 3
    assert handle.served == 3


def test_who_speaks_for_too_long_loses_its_place(listen, monkeypatch):
    monkeypatch.setattr(admission_module, "PATIENCE", 0.0)
    port, handle = free_port(), Handle()
    listener = listen(("127.0.0.1", port), places=(2, 100, 2), handle=handle)
    clients = [connecting(port) for _ in range(2)]
    until(lambda: len(handle.busy) == 2)
    with connecting(port) as newcomer:
        assert is_reset(clients[0])
        until(lambda: handle.ended == 1, "the greenlet of who was dropped has ended")
        handle.go.set()
        assert newcomer.recv(1) == clients[1].recv(1) == b""
    assert handle.served == 2 and listener.status()["failed"] == 0


def test_what_has_ended_is_not_kept(listen):
    """Its place, its greenlet and its socket: a server goes on for months."""
    port, handle = free_port(), Handle()
    handle.go.set()
    listener = listen(("127.0.0.1", port), handle=handle)
    places, greenlets, open_before = kept_places(), living_greenlets(), len(descriptors())
    for _ in range(5):
        with connecting(port) as client:
            assert client.recv(1) == b""
    until(lambda: not listener.status()["handshakes"])
    until(lambda: living_greenlets() == greenlets, "their greenlets have ended")
    assert len(descriptors()) == open_before
    assert kept_places() <= places


def test_sockets_are_closed_and_not_left_to_be_found(listen, monkeypatch):
    """By the collector, who would take its time in another Python."""
    monkeypatch.setattr(admission_module, "PATIENCE", 0.0)
    port, handle = free_port(), Handle()
    listener = listen(("127.0.0.1", port), places=(1, 100, 1), timeout=0.3, handle=handle)
    gc.collect()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        first = connecting(port)
        until(lambda: handle.busy)
        second = connected(port)
        assert is_reset(first), "it spoke, and lost its place"
        assert is_reset(second), "it was silent until the deadline"
        third = connected(port)
        until(lambda: listener.status()["handshakes"] == 1)
        listener.stop()
        assert is_reset(third)
        gc.collect()
    assert [str(one.message) for one in found] == []


def test_one_line_tells_of_all_that_were_dropped(listen, caplog, monkeypatch):
    monkeypatch.setattr(listener_module, "REPORT_PERIOD", 0.0)
    monkeypatch.setattr(listener_module, "SWEEP_PERIOD", 0.3)
    port = free_port()
    listen(("127.0.0.1", port), places=(1, 100, 1))
    for count in (3, 2):
        clients = [connected(port) for _ in range(count)]
        until(lambda: "dropped" in caplog.text)
        (record,) = [record for record in caplog.records if "dropped" in record.getMessage()]
        # The first time nobody had to go for the first.
        assert "dropped 2," in record.getMessage() and record.REASON == "crowded"
        assert record.PEER == "{}:{}".format(*clients[-1].getsockname())
        caplog.clear()


def test_lines_about_drops_are_some_time_apart(listen, caplog, monkeypatch):
    monkeypatch.setattr(listener_module, "REPORT_PERIOD", 30.0)
    monkeypatch.setattr(listener_module, "SWEEP_PERIOD", 0.01)
    port = free_port()
    listener = listen(("127.0.0.1", port), places=(2, 100, 2), timeout=0.1)
    for _ in range(2):
        # The first is dropped for the third, the others when it looks for those whose time is up, and writes lines.
        assert all([is_reset(one) for one in [connected(port) for _ in range(3)]])
    assert listener.status()["crowded"] == 2
    assert caplog.text.count("dropped 1, the last as") == caplog.text.count("dropped") == 1


def test_what_was_reported_is_not_reported_again(listen, caplog, monkeypatch):
    monkeypatch.setattr(listener_module, "REPORT_PERIOD", 0.0)
    monkeypatch.setattr(listener_module, "SWEEP_PERIOD", 0.01)
    port = free_port()
    listen(("127.0.0.1", port), places=(2, 100, 2), timeout=0.1)
    assert all([is_reset(one) for one in [connected(port) for _ in range(3)]])
    assert is_reset(connected(port)), "it has looked once more"
    assert caplog.text.count("dropped") == 1


def fail(sock, address, place):
    """A handler to whom nobody is good enough."""
    sock.recv(1)
    raise RemoteError("tls", "no TLS at all")


@pytest.mark.parametrize(("limits", "why"), [
    ({"places": (1, 100, 1)}, "too many connections that are not authenticated: dropped 1,"),
    ({"per_source": 1}, "too many connections of one address that are not authenticated: dropped 1,"),
    ({"penalty_max": 5}, "connections after repeated failures from their address: dropped 1,"),
])  # fmt: skip
def test_each_kind_of_drop_has_its_line(listen, caplog, limits, why):
    port = free_port()
    listener = listen(("127.0.0.1", port), **limits, handle=fail)
    with connecting(port) if "penalty_max" in limits else connected(port):
        if "penalty_max" in limits:
            until(lambda: listener.status()["failed"] == 1)
        with connected(port):
            until(lambda: why in caplog.text)


def is_silent(port):
    assert is_reset(connected(port))


def speaks(port):
    with connecting(port) as client:
        assert client.recv(1) == b""


@pytest.mark.parametrize(("client", "handle", "level", "most", "count"), [
    # Until the sum of admission.PENALTIES is 15 seconds or `most`; what has passed since the first is off it.
    (lambda port: connected(port).close(), fail, logging.INFO, 3, 4),
    (speaks, fail, logging.WARNING, 600, 4),
    (is_silent, fail, logging.WARNING, 600, 2),
    (speaks, Handle(), logging.WARNING, 600, 2),
], ids=["left", "failed", "silent for too long", "speaking for too long"])  # fmt: skip
def test_each_way_to_fail_has_its_price(listen, caplog, monkeypatch, client, handle, level, most, count):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(listener_module, "SWEEP_PERIOD", 0.01)
    port = free_port()
    listener = listen(("127.0.0.1", port), penalty_max=most, timeout=0.2, handle=handle)
    for number in range(1, count + 1):
        assert "is answered" not in caplog.text, number
        client(port)
        until(lambda: listener.status()["failed"] == number)
    until(lambda: caplog.text.count("nobody at the address of 127.0.0.1:") == 1)
    assert {record.levelno for record in caplog.records if "turned away" in record.getMessage()} == {level}


def test_failures_add_up_to_a_penalty(listen, caplog):
    port = free_port()
    listener = listen(("127.0.0.1", port), penalty_max=600, handle=fail)
    for _ in range(4):
        with connecting(port) as client:
            client.recv(1)
    until(lambda: "nobody at the address of" in caplog.text)
    with connected(port) as client:
        assert is_reset(client)
    assert listener.status()["failed"] == 4 and listener.status()["penalised"] == 1


def test_whatever_the_handler_raises_ends_there(listen, caplog):
    def fail(sock, address, place):
        sock.recv(1)
        raise RuntimeError("a bug of ours")

    port = free_port()
    listen(("127.0.0.1", port), places=(1, 100, 1), handle=fail)
    for _ in range(3):
        with connecting(port) as sock:
            assert sock.recv(1) == b""
    assert caplog.text.count("internal error with a connection from 127.0.0.1:") == 3


def test_out_of_descriptors_it_pauses_and_then_goes_on(listen, caplog):
    port, handle = free_port(), Handle()
    handle.go.set()
    listen(("127.0.0.1", port), handle=handle)
    client = socket.socket()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        client.connect(("127.0.0.1", port))
        client.sendall(b"x")
        used, begun = time.process_time(), time.monotonic()
        until(lambda: caplog.text.count("cannot accept") == 3)
        # Two pauses between three tries, in which it does nothing.
        assert time.monotonic() - begun > 0.15
        assert time.process_time() - used < 0.15
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    with client:
        assert client.recv(1) == b""
    assert handle.served == 1


@pytest.mark.parametrize("host", ["*", "::"])
def test_one_line_listens_on_both_families(listen, host):
    if not has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    port, handle = free_port(), Handle()
    handle.go.set()
    listen((host, port), handle=handle)
    for address in ("127.0.0.1", "::1"):
        with connecting(port, address) as sock:
            assert sock.recv(1) == b""
    assert handle.served == 2


@pytest.mark.parametrize(("host", "is_alone"), [("::", 0), ("::1", 1)])
def test_what_takes_ipv4_too_does_not_depend_on_the_machine(listen, host, is_alone):
    """net.ipv6.bindv6only decides where a socket does not (ipv6(7))."""
    if not has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    seen = []
    listen((host, free_port()),
           prepare=lambda sock: seen.append(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)))
    assert seen == [is_alone]


def test_an_ipv6_address_takes_no_ipv4_and_leaves_the_port_to_it(listen):
    if not has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    port = free_port()
    listen(("::1", port))
    listen(("127.0.0.1", port))


def test_prepare_comes_before_listening(listen):
    seen = []
    listen(("127.0.0.1", free_port()),
           prepare=lambda sock: seen.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)))
    assert seen == [0]


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("203.0.113.9", 7443), r"listen = 203\.0\.113\.9:7443: Cannot assign"),
        (("nosuchhost.invalid", 7443), r"listen = nosuchhost\.invalid:7443: [A-Z][a-z]"),
        (("a" * 64, 7443), "listen = a{64}:7443: .*label"),
        (("a..b", 7443), r"listen = a\.\.b:7443: .*label"),
    ],
)
def test_an_error_names_the_address(listen, address, text):
    with pytest.raises(OSError, match=text):
        listen(address)


def test_a_port_that_is_taken_is_named(listen):
    port = free_port()
    listen(("127.0.0.1", port))
    with pytest.raises(OSError, match=rf"listen = 127\.0\.0\.1:{port}: Address already in use"):
        listen(("127.0.0.1", port))


def test_an_address_is_free_again_at_once(listen):
    """In spite of connections that the kernel still waits for (TIME_WAIT, where this end closed first)."""
    port, handle = free_port(), Handle()
    handle.go.set()
    listener = listen(("127.0.0.1", port), handle=handle)
    with connecting(port) as client:
        assert client.recv(1) == b""
    listener.stop()
    listen(("127.0.0.1", port))


def test_reconfigured_it_goes_by_another_timeout_and_other_options(listen):
    port, prepared = free_port(), []
    listener = listen(("127.0.0.1", port), timeout=60, prepare=prepared.append)
    (sock,) = prepared
    listener.reconfigure(0.2)
    assert prepared == [sock, sock]
    assert is_reset(connected(port))


def test_what_was_stopped_hears_nothing_of_others(listen, caplog):
    """Their sockets get the numbers that its own had."""
    port = free_port()
    listener = listen(("127.0.0.1", port))
    silent = connected(port)
    until(lambda: listener.status()["handshakes"] == 1)
    listener.stop()
    assert is_reset(silent)
    pairs = [socket.socketpair() for _ in range(8)]
    readers = [gevent.spawn(one.recv, 1) for one, _ in pairs]
    gevent.idle()
    for _, other in pairs:
        other.sendall(b"x")
    assert [reader.get(timeout=5) for reader in readers] == [b"x"] * 8
    assert caplog.text.count("cannot accept") == 0 and listener.status()["handshakes"] == 0
    for one in (end for pair in pairs for end in pair):
        one.close()


def test_stop_closes_and_serves_nobody_more(listen):
    port, handle = free_port(), Handle()
    greenlets = living_greenlets()
    listener = listen(("127.0.0.1", port), handle=handle)
    silent = connected(port)
    until(lambda: listener.status()["handshakes"] == 1)
    listener.stop()
    assert is_reset(silent)
    with pytest.raises(ConnectionRefusedError):
        connected(port)
    assert not handle.busy and listener.status()["handshakes"] == 0
    until(lambda: living_greenlets() == greenlets, "nothing of it runs")
