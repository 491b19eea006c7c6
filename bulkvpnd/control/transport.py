"""Options of the outer TCP sockets, and how they are shown."""

import errno
import logging
import socket

log = logging.getLogger(__name__)

NOTSENT_LOWAT = 128 * 1024
"""Bytes that may wait unsent in the kernel: what waits, should wait where it can be controlled (DSVPN's value)."""
CONGESTION = {"auto": ("bbr", "cubic"), "bbr": ("bbr",), "cubic": ("cubic",), "system": ()}
"""What is set, one after the other. auto: a connection begins with cubic and its worker may go over to BBR
(dataplane/pathrate.py), which has to be in the kernel by then; only the main process may have it loaded."""
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_BUF_LOCK = 72
SOCK_SNDBUF_LOCK, SOCK_RCVBUF_LOCK = 1, 2
TCP_NOTSENT_LOWAT = 25
TCP_CA_NAME_MAX = 16
"""asm-generic/socket.h, linux/socket.h, linux/tcp.h, net/tcp.h; Python has no names for them."""


def mark(sock, value):
    """Marks what the socket sends, before it connects: the policy routing of a full tunnel leads it past the tunnel.

    value: for SO_MARK (socket(7)), None for none. Raises PermissionError without CAP_NET_ADMIN.
    """
    if value is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, value)


def tune(sock, configuration, sndbuf, rcvbuf, timeout):
    """Sets up a socket before it connects or listens; accepted sockets inherit all of it. A listening socket may be set
    up again, for what it accepts from then on.

    sndbuf, rcvbuf: bytes, or None for the kernel's autotuning. timeout: seconds that data may stay unacknowledged.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout * 1000)
    with _untouched(sock) as other:
        default = other.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, TCP_CA_NAME_MAX)
    try:
        # The default too: what is set up again may have another.
        for name in (default, *(name.encode("ascii") for name in CONGESTION[configuration.congestion])):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
    except OSError as error:
        log.debug("congestion = %s: %s; the host's default stays", configuration.congestion, error.strerror)
    set_buffers(sock, sndbuf, rcvbuf)


def set_buffers(sock, sndbuf, rcvbuf):
    """sndbuf, rcvbuf: bytes, or None for the kernel's autotuning, which a size that was set before has switched off."""
    for size, force, plain, lock in (
        (sndbuf, SO_SNDBUFFORCE, socket.SO_SNDBUF, SOCK_SNDBUF_LOCK),
        (rcvbuf, SO_RCVBUFFORCE, socket.SO_RCVBUF, SOCK_RCVBUF_LOCK),
    ):
        if size is None:
            _free_buffer(sock, plain, lock)
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:
            # Without CAP_NET_ADMIN the kernel caps the value at net.core.[rw]mem_max.
            sock.setsockopt(socket.SOL_SOCKET, plain, size)


def _free_buffer(sock, option, lock):
    """Back to the size that sockets begin with, and to autotuning, which needs Linux 5.14: without, a size stays."""
    try:
        locks = sock.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)
    except OSError:
        return
    if locks & lock:
        with _untouched(sock) as other:
            # The kernel shows twice what was set, socket(7).
            sock.setsockopt(socket.SOL_SOCKET, option, other.getsockopt(socket.SOL_SOCKET, option) // 2)
        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, locks & ~lock)


def _untouched(sock):
    """A socket of the same kind, which has what the host gives to all."""
    return socket.socket(sock.family, socket.SOCK_STREAM)


def cannot_listen(option, address, error):
    """An OSError of the kind of `error` that names option, value and mend. address: (host, port), of a socket."""
    mends = {
        errno.EADDRINUSE: f"; see who has it with: ss -ltnp 'sport = :{address[1]}'",
        errno.EADDRNOTAVAIL: "; no device here has that address yet, see: ip address",
        errno.EACCES: "; a port below 1024 needs a drop-in for the unit, see bulkvpnd(8)",
    }
    return type(error)(error.errno, f"{option} = {shown(address)}: {error.strerror}{mends.get(error.errno, '')}")


def endpoint(address):
    """(host, port) of a socket address, to connect to again: with the zone of a link-local one, as in fe80::1%2."""
    host, port, *rest = address
    zone = rest[1] if rest else 0
    return (f"{host}%{zone}" if zone else host), port


def shown(address):
    """A socket address as text: 192.0.2.1:7443 or [2001:db8::1]:7443; IPv4 that came over an IPv6 socket as IPv4."""
    host, port = address[:2]
    host = host.removeprefix("::ffff:") if "." in host else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_of(peer):
    """The address of an outer endpoint as shown() writes it; a zone is left out."""
    return peer.rpartition(":")[0].strip("[]").partition("%")[0]
