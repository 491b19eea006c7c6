"""Accepting connections, and no more at a time than can be looked after."""

import errno
import logging
import socket

import gevent
from gevent.lock import BoundedSemaphore
from gevent.socket import wait_read

from bulkvpnd.control import transport

log = logging.getLogger(__name__)

BACKLOG = 512
"""Connections that the kernel holds while max-handshakes are under way; net.core.somaxconn caps it (choice)."""
ACCEPT_PAUSE = 0.1
"""Seconds after an error such as EMFILE; accepting again at once would only spin (choice)."""


class Listener:
    """Listens on every configured address.

    prepare(sock): sets options before listening. handle(sock, address): runs in a greenlet of its own and owns the
    socket; whatever it raises ends there.
    """

    def __init__(self, addresses, max_handshakes, prepare, handle):
        self._addresses = addresses
        self._slots = BoundedSemaphore(max_handshakes)
        self._prepare = prepare
        self._handle = handle
        self._sockets = []
        self._greenlets = []

    def start(self):
        """Raises OSError that names the address."""
        for host, port in self._addresses:
            for family, address in self._resolve(host, port):
                sock = socket.socket(family, socket.SOCK_STREAM)
                self._sockets.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # [::] takes IPv4 too, as its help says.
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address[0] == "::" else 1)
                self._prepare(sock)
                try:
                    sock.bind(address)
                    sock.listen(BACKLOG)
                except OSError as error:
                    raise type(error)(error.errno, f"listen = {transport.shown(address)}: {error.strerror}") from None
                log.info("listening on %s", transport.shown(address))
        self._greenlets = [gevent.spawn(self._accept, sock) for sock in self._sockets]

    @staticmethod
    def _resolve(host, port):
        if host == "*":
            host = "::"
        if host == "::" and not socket.has_dualstack_ipv6():
            host = "0.0.0.0"
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (socket.gaierror, UnicodeError) as error:
            # UnicodeError: a label of no or more than 63 characters.
            raise OSError(f"listen = {host}:{port}: {getattr(error, 'strerror', error)}") from None
        return dict.fromkeys((family, address) for family, _, _, _, address in found)

    def _accept(self, sock):
        while True:
            # Somebody first, a slot for him then: one that waits for connections must not keep it from other addresses.
            wait_read(sock.fileno())
            self._slots.acquire()
            try:
                accepted, address = sock.accept()
            except OSError as error:
                self._slots.release()
                if error.errno == errno.EBADF:
                    return
                # ECONNABORTED and EPROTO belong to a connection that died before it was taken, accept(2). Anything
                # else, above all EMFILE, would be the same at once.
                if error.errno not in (errno.ECONNABORTED, errno.EPROTO):
                    log.warning("cannot accept: %s", error.strerror, extra={"limited": True})
                    gevent.sleep(ACCEPT_PAUSE)
                continue
            gevent.spawn(self._serve, accepted, address)

    def _serve(self, sock, address):
        try:
            self._handle(sock, address)
        except Exception:
            log.exception("internal error with a connection from %s", transport.shown(address),
                          extra={"limited": True})
        finally:
            self._slots.release()

    def stop(self):
        gevent.killall(self._greenlets, block=False)
        for sock in self._sockets:
            sock.close()
