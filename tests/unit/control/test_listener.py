"""control.listener over loopback: how many at a time, out of descriptors, both families, and clear errors."""

import resource
import time
from socket import has_dualstack_ipv6

import gevent
import pytest
from doubles import connected, free_port, until
from gevent import socket
from gevent.event import Event

from bulkvpnd.control.listener import Listener


class Handle:
    """Keeps each connection until it is let go; then its socket is closed."""

    def __init__(self):
        self.busy = []
        self.served = 0
        self.go = Event()

    def __call__(self, sock, address):
        with sock:
            self.busy.append(address)
            self.go.wait()
            self.busy.remove(address)
            self.served += 1


@pytest.fixture
def listen():
    listeners = []

    def start(*addresses, max_handshakes=64, handle=None, prepare=lambda sock: None):
        listener = Listener(addresses, max_handshakes, prepare, handle or Handle())
        listeners.append(listener)
        listener.start()
        return listener

    yield start
    for listener in listeners:
        listener.stop()


def test_no_more_at_a_time_than_max_handshakes(listen):
    port, handle = free_port(), Handle()
    listen(("127.0.0.1", port), max_handshakes=3, handle=handle)
    clients = [connected(port) for _ in range(8)]
    until(lambda: len(handle.busy) == 3)
    gevent.sleep(0.02)
    assert len(handle.busy) == 3
    # The others wait with the kernel, and each gets its turn.
    handle.go.set()
    until(lambda: handle.served == 8)
    for client in clients:
        client.close()


def test_an_address_without_callers_keeps_no_slot_from_the_others(listen):
    ports, handle = [free_port() for _ in range(3)], Handle()
    handle.go.set()
    listen(*(("127.0.0.1", port) for port in ports), max_handshakes=1, handle=handle)
    for port in ports[::-1] + ports:
        with connected(port) as sock:
            assert sock.recv(1) == b""
    assert handle.served == 6


def test_whatever_the_handler_raises_ends_there(listen, caplog):
    def fail(sock, address):
        with sock:
            raise RuntimeError("a bug of ours")

    port = free_port()
    listen(("127.0.0.1", port), max_handshakes=1, handle=fail)
    for _ in range(3):
        with connected(port) as sock:
            assert sock.recv(1) == b""
    assert caplog.text.count("internal error with a connection from 127.0.0.1:") == 3
    assert all(record.limited for record in caplog.records)


def test_out_of_descriptors_it_pauses_and_then_goes_on(listen, caplog):
    port, handle = free_port(), Handle()
    handle.go.set()
    listen(("127.0.0.1", port), handle=handle)
    client = socket.socket()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        client.connect(("127.0.0.1", port))
        used, begun = time.process_time(), time.monotonic()
        until(lambda: caplog.text.count("cannot accept") == 3)
        # Two pauses between three tries, in which it does nothing.
        assert time.monotonic() - begun > 0.15 and all(record.limited for record in caplog.records)
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
        with connected(port, address) as sock:
            assert sock.recv(1) == b""
    assert handle.served == 2


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
        (("nosuchhost.invalid", 7443), r"listen = nosuchhost\.invalid:7443: "),
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


def test_stop_closes_and_serves_nobody_more(listen):
    port, handle = free_port(), Handle()
    listener = listen(("127.0.0.1", port), handle=handle)
    listener.stop()
    with pytest.raises(ConnectionRefusedError):
        connected(port)
    assert not handle.busy
