"""control.exporter: the metrics over HTTP, by hand."""

import errno
import socket

import gevent
import gevent.socket
import pytest
from doubles import free_port

from bulkvpnd.control import exporter as module
from bulkvpnd.control.exporter import Exporter

REPORT = {"instance": "server", "version": "1", "mode": "server", "since": 5, "device": "bulk0", "workers": [],
          "drops": {}, "sessions": []}  # fmt: skip


@pytest.fixture(params=["127.0.0.1", "::1"])
def serving(request, monkeypatch):
    monkeypatch.setattr(module, "REQUEST_TIME", 0.3)
    address = request.param, free_port(request.param)
    exporter = Exporter(address, lambda: REPORT)
    with pytest.raises(ConnectionRefusedError):
        gevent.socket.create_connection(address)
    exporter.start()
    with gevent.Timeout(20):
        yield address
    exporter.stop()
    with pytest.raises(ConnectionRefusedError):
        gevent.socket.create_connection(address)


def ask(address, request=b"GET /metrics HTTP/1.0\r\n\r\n"):
    with gevent.socket.create_connection(address) as sock:
        sock.sendall(request)
        return everything(sock)


def everything(sock):
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def test_it_serves_what_the_report_says(serving):
    answer = ask(serving)
    assert answer.startswith(b"HTTP/1.1 200") and b'bulkvpn_start_time_seconds{instance="server"} 5.0' in answer


@pytest.mark.parametrize("garbage", [b"\0\xff" * 2000, b"GET " + b"x" * 100_000 + b" HTTP/1.0\r\n\r\n", b"\r\n\r\n"])
def test_garbage_hurts_nobody(serving, garbage, capsys):
    assert b"200 OK" not in ask(serving, garbage)
    assert ask(serving).startswith(b"HTTP/1.1 200")
    assert capsys.readouterr() == ("", "")


def test_those_who_say_nothing_make_place(serving):
    idle = [gevent.socket.create_connection(serving) for _ in range(2 * module.REQUESTS_MAX)]
    try:
        assert ask(serving).startswith(b"HTTP/1.1 200")
        assert all(everything(sock) == b"" for sock in idle)
    finally:
        for sock in idle:
            sock.close()


def test_only_so_many_are_answered_at_a_time(serving, monkeypatch):
    monkeypatch.setattr(module, "REQUEST_TIME", 60)
    idle = [gevent.socket.create_connection(serving) for _ in range(module.REQUESTS_MAX)]
    answer = gevent.spawn(ask, serving)
    try:
        assert not answer.join(0.3) and not answer.ready()
        idle.pop().close()
        assert answer.get(timeout=5).startswith(b"HTTP/1.1 200")
    finally:
        for sock in idle:
            sock.close()


def test_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        exporter = Exporter(taken.getsockname(), dict)
        with pytest.raises(OSError, match=r"metrics = 127\.0\.0\.1:\d+: Address already in use") as caught:
            exporter.start()
        assert caught.value.errno == errno.EADDRINUSE
        exporter.stop()
