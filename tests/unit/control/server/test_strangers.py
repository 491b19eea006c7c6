"""control.server: bytes of those who have no certificate reach no parser, and leave nothing behind."""

import contextlib
import gc
import logging

import pytest
from doubles import HELLO, connected, descriptors, establish, shaken, until
from gevent import socket
from logins import lines, live, raw_message, state

from bulkvpnd import service
from bulkvpnd.protocol import handshake

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
    # Nothing is wrong with who only goes; whether a reset is faster than what was sent before it, nobody knows.
    levels = {logging.WARNING} if data else {logging.INFO}
    assert record.levelno in (levels | {logging.INFO} if end == "reset" else levels)
    assert record.REASON and record.getMessage().isprintable()
    assert state(server) == before
    until(lambda: len(descriptors()) == open_before, "its descriptor is closed")


def test_many_bad_connections_make_few_lines(start, journal):
    server = start(penalty_max=0)
    journal.clear()
    for _ in range(40):
        with connected(server.port) as sock:
            sock.sendall(b"garbage that is no TLS record")
            last_words(sock)
    until(lambda: not server._listener.status()["handshakes"], "all are dealt with")
    assert len(lines(journal)) == service.RATE_BURST


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


# Replay


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
    establish(server, message["connection"])
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
