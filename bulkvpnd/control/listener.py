"""Accepting connections, and looking after them until they are authenticated.

    accept --> admission: a place? --> silent: a descriptor and a watcher --first byte--> a greenlet, and TLS in it

Whoever says nothing costs no more than that, and whoever has to go is reset, which leaves nothing in the kernel either.
"""

import dataclasses
import logging
import socket
import struct
import time

import gevent
from gevent import monkey
from gevent.hub import get_hub

from bulkvpnd import events
from bulkvpnd.control import transport
from bulkvpnd.protocol.errors import Refused, RemoteError

log = logging.getLogger(__name__)

BACKLOG = 4096
"""Connections that the kernel holds until they are accepted; net.core.somaxconn caps it, and is as much (choice)."""
ACCEPT_BATCH = 32
"""Connections accepted in one go, before everything else has its turn (choice)."""
ACCEPT_PAUSE = 0.1
"""Seconds after an error such as EMFILE; accepting again at once would only spin (choice)."""
REPORT_PERIOD = 5.0
"""Seconds between two lines of the log that tell what was dropped (choice)."""
SWEEP_PERIOD = 0.25
"""Seconds between two looks for silent connections whose time is up (choice)."""
_DROPPED = {
    # counter of admission: line of the log
    "crowded": "too many connections that are not authenticated: dropped %d, the last as %s came",
    "source_full": "too many connections of one address that are not authenticated: dropped %d, the last as %s came",
    "penalised": "connections after repeated failures from their address: dropped %d, the last of %s",
}
_READABLE = 1
"""EV_READ of libev(3)."""
_RESET = struct.pack("ii", 1, 0)
"""struct linger, socket(7): close() resets the connection, and drops what is unsent."""

# The plain socket for what has not said anything: gevent's brings two watchers of its own.
_socket = monkey.get_original("socket", "socket")


@dataclasses.dataclass(eq=False, slots=True)
class _Silent:
    """A connection that has said nothing yet. came: monotonic seconds."""

    sock: _socket
    address: tuple
    came: float
    watcher: object


class Listener:
    """Listens on every configured address.

    admission: control.admission.Admission. timeout: seconds from accept until handle has to be done. prepare(sock):
    sets options before listening. handle(sock, address, place): authenticates and goes on from there, in a greenlet of
    its own; whatever it raises ends there, and the socket is closed behind it.
    """

    def __init__(self, addresses, admission, timeout, prepare, handle):
        self._addresses = addresses
        self._admission = admission
        self._timeout = timeout
        self._prepare = prepare
        self._handle = handle
        self._sockets = []
        self._watchers = []
        self._sweeper = None
        self._last_dropped = {}  # counter of admission: address
        self._reported, self._reported_at = dict.fromkeys(_DROPPED, 0), 0.0
        self._silent = {}  # Place: _Silent
        self._speaking = {}  # Place: (greenlet, socket)

    def start(self):
        """Raises OSError that names the address."""
        for host, port in self._addresses:
            for family, address in self._resolve(host, port):
                sock = _socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
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
                    raise transport.cannot_listen("listen", address, error) from None
                log.info("listening on %s", transport.shown(address))
        self._loop = get_hub().loop
        for sock in self._sockets:
            watcher = self._loop.io(sock.fileno(), _READABLE)
            self._watchers.append(watcher)
            self._watch(sock, watcher)
        self._sweeper = gevent.spawn(self._sweep)

    def reconfigure(self, timeout):
        """Another timeout, and what prepare() sets now, for connections accepted from now on."""
        self._timeout = timeout
        for sock in self._sockets:
            self._prepare(sock)

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

    # From accept to the first byte

    def _accept(self, sock, watcher):
        # In the hub, where nothing may wait: neither here nor until the first byte there is a greenlet to switch to.
        for _ in range(ACCEPT_BATCH):
            try:
                # What accept() is made of; that would make gevent's socket of it, once Python is patched.
                descriptor, address = sock._accept()
            except BlockingIOError:
                break
            except OSError as error:
                # Above all EMFILE, which would be the same at once. None of a connection that died before it was taken:
                # Linux hands it over, whatever accept(2) says of ECONNABORTED and EPROTO.
                log.warning("cannot accept: %s", error.strerror)
                watcher.stop()
                gevent.spawn_later(ACCEPT_PAUSE, self._watch, sock, watcher)
                break
            self._take_in(_socket(sock.family, socket.SOCK_STREAM, 0, descriptor), address)

    def _take_in(self, sock, address):
        now = time.monotonic()
        place, victim, why = self._admission.arrive(address[0], now)
        if why:
            self._last_dropped[why] = address
        if victim:
            self._drop(victim)
        if place is None:
            _reset(sock)
            return
        watcher = self._loop.io(sock.fileno(), _READABLE)
        self._silent[place] = _Silent(sock, address, now, watcher)
        watcher.start(self._on_first_bytes, place)

    def _on_first_bytes(self, place):
        # In the hub, where nothing may wait.
        silent = self._end_silence(place)
        self._admission.speaks(place, time.monotonic())
        # The same descriptor; only now it is worth a socket that can wait.
        sock = socket.socket(silent.sock.family, socket.SOCK_STREAM, 0, silent.sock.detach())
        greenlet = gevent.spawn(self._serve, sock, silent.address, silent.came, place)
        self._speaking[place] = greenlet, sock

    def _watch(self, sock, watcher):
        if watcher in self._watchers:
            watcher.start(self._accept, sock, watcher)

    def _end_silence(self, place):
        silent = self._silent.pop(place)
        silent.watcher.close()
        return silent

    def _drop(self, place):
        """Ends a connection that has lost its place."""
        if place in self._silent:
            _reset(self._end_silence(place).sock)
        elif place in self._speaking:
            greenlet, sock = self._speaking.pop(place)
            greenlet.kill(block=False)
            # A greenlet that never ran would leave it open.
            _reset(sock)

    def _sweep(self):
        """What says nothing until its time is up. Whoever speaks has a greenlet that looks at the clock."""
        while True:
            gevent.sleep(SWEEP_PERIOD)
            now = time.monotonic()
            if self._last_dropped and now - self._reported_at >= REPORT_PERIOD:
                self._reported_at = now
                self._report_drops()
            for place in self._admission.overdue(now - self._timeout):
                self._admission.leave(place)
                silent = self._end_silence(place)
                _reset(silent.sock)
                self._turned_away(silent.address, place, "timeout", self._too_late())

    def _report_drops(self):
        """One line for all since the last: a line for each would cost more than the connection itself."""
        for why, address in self._last_dropped.items():
            count = self._admission.counters[why]
            peer = transport.shown(address)
            log.warning(_DROPPED[why], count - self._reported[why], peer, extra={"PEER": peer, "REASON": why})
            self._reported[why] = count
        self._last_dropped.clear()

    # From the first byte on

    def _serve(self, sock, address, came, place):
        how = reason = None
        has_left = False
        try:
            with sock, gevent.Timeout(max(0.0, came + self._timeout - time.monotonic())):
                if not sock.recv(1, socket.MSG_PEEK):
                    how, reason = "left", "the peer closed the connection during the handshake"
                else:
                    self._handle(sock, address, place)
        except gevent.Timeout:
            how, reason = "timeout", self._too_late()
        except (RemoteError, Refused) as error:
            how, reason, has_left = "failed", str(error), error.reason == "left"
        except OSError as error:
            how, reason = "left", error.strerror or "the socket failed"
        except Exception:
            log.exception("internal error with a connection from %s", transport.shown(address))
        finally:
            self._speaking.pop(place, None)
            self._admission.leave(place)
        if how:
            self._turned_away(address, place, how, reason, has_left or how == "left")

    def _too_late(self):
        return "no complete handshake within %d s" % self._timeout

    def _turned_away(self, address, place, how, reason, has_left=False):
        """has_left: nothing is wrong with it, as when a client is stopped while it connects."""
        peer = transport.shown(address)
        log.log(logging.INFO if has_left else logging.WARNING, "connection from %s turned away: %s", peer, reason,
                extra={"PEER": peer, "REASON": reason, "MESSAGE_ID": events.ID["turned-away"]})
        seconds = self._admission.failed(place, how, time.monotonic())
        if seconds:
            log.warning("nobody at the address of %s is answered for %.0f s, after repeated failures", peer, seconds,
                        extra={"PEER": peer})

    def status(self):
        """How many are under way, and what became of the others."""
        return {"handshakes": len(self._admission), **self._admission.counters}

    def stop(self):
        if self._sweeper:
            self._sweeper.kill(block=False)
        while self._watchers:
            self._watchers.pop().close()
        for place in list(self._silent):
            self._admission.leave(place)
            self._drop(place)
        for sock in self._sockets:
            sock.close()


def _reset(sock):
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    finally:
        sock.close()
