"""Options of the outer sockets, on real sockets. Buffers: beyond the kernel's limit where that is allowed."""

import errno
import os
import pathlib
import socket
import types

import pytest

from bulkvpnd.control import transport
from bulkvpnd.dataplane import tcpinfo

CASES = {
    # socket option: (its forcing twin, the kernel's limit for everybody)
    socket.SO_SNDBUF: (transport.SO_SNDBUFFORCE, "wmem_max"),
    socket.SO_RCVBUF: (transport.SO_RCVBUFFORCE, "rmem_max"),
}


def limit(name):
    path = pathlib.Path("/proc/sys/net/core", name)
    if not path.exists():
        pytest.skip(f"this network namespace has no {path}")
    return int(path.read_text())


def may_force(force):
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, 65536)
        except PermissionError:
            return False
    return True


@pytest.mark.parametrize("option", CASES)
def test_as_large_as_allowed(option):
    force, name = CASES[option]
    wanted = 2 * limit(name)
    with socket.socket() as sock:
        transport.set_buffers(sock, wanted, wanted)
        # The kernel shows twice what was set, socket(7).
        got = sock.getsockopt(socket.SOL_SOCKET, option) // 2
    assert got == (wanted if may_force(force) else limit(name))


@pytest.mark.parametrize("option", CASES)
def test_auto_leaves_it_to_the_kernel(option):
    with socket.socket() as touched, socket.socket() as untouched:
        transport.set_buffers(touched, None, None)
        values = [sock.getsockopt(socket.SOL_SOCKET, option) for sock in (touched, untouched)]
    assert values[0] == values[1]


def listening():
    sock = socket.create_server(("127.0.0.1", 0))
    tune(sock, "system")
    return sock


def accepted(listener):
    """(send buffer, receive buffer) of a connection that it accepts now."""
    with socket.create_connection(listener.getsockname()), listener.accept()[0] as sock:
        return [sock.getsockopt(socket.SOL_SOCKET, option) for option in CASES]


def test_a_listener_gives_its_buffers_and_autotuning_back():
    listener, untouched = listening(), listening()
    with listener, untouched:
        try:
            listener.getsockopt(socket.SOL_SOCKET, transport.SO_BUF_LOCK)
        except OSError:
            pytest.skip("needs Linux 5.14")
        transport.set_buffers(listener, 65536, 32768)
        assert accepted(listener) == [131072, 65536]
        transport.set_buffers(listener, None, 32768)
        assert accepted(listener) == [accepted(untouched)[0], 65536]
        transport.set_buffers(listener, None, None)
        assert accepted(listener) == accepted(untouched)
        assert listener.getsockopt(socket.SOL_SOCKET, transport.SO_BUF_LOCK) == 0


@pytest.mark.parametrize(("wanted", "expected"), [("auto", "cubic"), ("bbr", "bbr"), ("cubic", "cubic")])
def test_congestion_control(wanted, expected):
    if expected not in pathlib.Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split():
        pytest.skip(f"this kernel has no {expected}, or has not loaded it: modprobe tcp_{expected}")
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        tune(sock, wanted)
        assert tcpinfo.congestion_control(sock) == expected


@pytest.mark.parametrize("wanted", ["system", "frobnicate"])
def test_the_hosts_congestion_control_also_where_it_was_another(monkeypatch, wanted):
    monkeypatch.setitem(transport.CONGESTION, "frobnicate", ("frobnicate", "reno"))
    with socket.socket() as sock, socket.socket() as untouched:
        default = tcpinfo.congestion_control(untouched)
        if default == "reno":
            pytest.skip("reno is this host's default, and the only one that every kernel has")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        tune(sock, wanted)
        assert tcpinfo.congestion_control(sock) == default


def tune(sock, congestion):
    transport.tune(sock, types.SimpleNamespace(congestion=congestion), None, None, 30)


@pytest.mark.parametrize(("number", "mend"), [
    (errno.EADDRINUSE, "; see who has it with: ss -ltnp 'sport = :443'"), (errno.EACCES, "; a port below 1024 needs"),
    (errno.EADDRNOTAVAIL, "; no device here has that address"), (errno.ENOBUFS, ""),
])  # fmt: skip
def test_why_nobody_can_listen_there_names_option_value_and_mend(number, mend):
    error = transport.cannot_listen("listen", ("::1", 443), OSError(number, os.strerror(number)))
    assert error.errno == number and error.strerror.startswith(f"listen = [::1]:443: {os.strerror(number)}{mend}")


@pytest.mark.parametrize(("address", "endpoint"), [
    (("192.0.2.1", 7443), ("192.0.2.1", 7443)), (("2001:db8::1", 7443, 0, 0), ("2001:db8::1", 7443)),
    (("fe80::1", 7443, 0, 3), ("fe80::1%3", 7443)),
])  # fmt: skip
def test_an_endpoint_has_its_zone(address, endpoint):
    assert transport.endpoint(address) == endpoint
