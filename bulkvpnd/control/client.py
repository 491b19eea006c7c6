"""The client: one dialler for each connection of its one session.

    dialler 0 .. N-1, each for ever:
        resolve --> connect --> TLS 1.3 --> HELLO --> WELCOME --> attach to worker i mod W --> wait until it ends --.
           ^                                                                                      |                 |
           |                        every replace-interval: another of this index, and the old one goes             |
           '---- pause, doubling with jitter, back to the start after a connection that lived <--------------------'

The first that gets through begins the session; the others join it, at the same server: while a session has a
connection, all go to the address of that one. When it has none left, the remotes are tried in turn, and the first
server that answers either knows the session or begins another.
"""

import collections
import dataclasses
import itertools
import logging
import os
import random
import socket
import time

import gevent
from gevent.event import AsyncResult, Event
from gevent.lock import Semaphore

from bulkvpnd import events
from bulkvpnd.control import tls, transport
from bulkvpnd.control.clientnet import ClientNetwork, own_addresses
from bulkvpnd.control.status import session_report
from bulkvpnd.host import link
from bulkvpnd.protocol import handshake, keys
from bulkvpnd.protocol.errors import Refused, RemoteError
from bulkvpnd.service import REASON_MAX, printable

log = logging.getLogger(__name__)

PAUSE_MIN = 0.5
"""Seconds before the first new try (choice)."""
RESTART_TIME = 15.0
"""Seconds for which the pauses stay short after a server said goodbye or a connection that had worked ended, where
nothing listens: it may be starting again (choice: twice what a start takes on a slow machine)."""
SHUTDOWN = "closed by the peer: shutdown"
"""What a worker reports of a CLOSE with this reason."""
LIVED = 10.0
"""Seconds after which a connection counts as one that worked: the next pause is short again (choice)."""
EARLY = 0.2
"""The part of replace-interval by which chance makes it shorter: not all connections are due at once (choice)."""
REPLACED_MAX = 30.0
"""Seconds after which the next connection may be replaced although the last is not through yet (choice)."""
SESSION_NUMBER = 1
"""The worker's name for the session; a client has one at a time, and it always carries everything."""


class Client:
    """The role `mode = client`. on_ready(): called when the first connection carries traffic.

    workers, changes (host.changes.Changes, for what it changes on the machine while it runs): set by the main process
    before prepare. network: a ClientNetwork; prepare() makes it unless it is there. on_change(): called when carries()
    may have changed. on_addresses(addresses): called with those of a server before it is connected to. tell(event,
    **values): of control.hooks.Hooks.
    """

    def __init__(self, configuration, context, tun, ciphers, on_ready, on_failure):
        self._configuration = configuration
        self._context = context
        self._tun = tun
        self._ciphers = ciphers
        self._on_ready = on_ready
        self._on_failure = on_failure
        self.workers = None
        self.changes = None
        self.on_addresses = lambda addresses: None
        self.on_change = lambda: None
        self.tell = lambda event, **values: None
        self.network = None
        self._welcome = None  # of the present session; None while there is none
        self._lacks_ipv6 = False  # whether it is without the IPv6 that the server gave
        self._server = None  # the address and port of the server that has it
        self._remote = None  # of those that are configured, the one that led there
        self._turn = 0  # which remote is tried next, while the session has no connection
        self._failure = None  # why there is no connection, for status
        self._session_since = 0.0
        self._counted = collections.Counter()  # what its former connections carried
        self._begin = Semaphore(1)
        self._replacing = Semaphore(1)
        self._changed = Event()  # set, and replaced by a new one, when the session changes
        self._reloaded = Event()  # likewise, when another configuration is in force
        self._numbers = itertools.count(1)
        self._connections = {}  # number: _Connection
        self._greenlets = []
        self._revoked = {}
        self._was_ready = False
        self._was_up = False
        self.commands = {}

    def prepare(self):
        """What has to be on the machine before anything else runs. Raises FirewallError."""
        self.network = self.network or ClientNetwork(self._configuration, self._tun.name, self.changes)
        self.network.start()

    def start(self):
        log.info("device %s, %d workers, connecting to %s", self._tun.name, len(self.workers),
                 ", ".join(transport.shown(remote) for remote in self._configuration.remote))
        self._spawn_diallers()

    def reconfigure(self, configuration):
        """Another configuration, whose options that need a restart are the same, is in force."""
        if configuration.remote != self._configuration.remote:
            self._turn = 0
        self._configuration = configuration
        self.network.reconfigure(configuration)
        self._spawn_diallers()
        reloaded, self._reloaded = self._reloaded, Event()
        reloaded.set()

    def restore(self):
        """The device is up again, without what it lost while it was down. Raises LinkError, OSError."""
        self.network.restore()

    def _spawn_diallers(self):
        """As many as there may be connections. Where there are more already, those wait that have none to make."""
        for index in range(len(self._greenlets), self._configuration.connections):
            self._greenlets.append(gevent.spawn(self._dial_forever, index))

    # One dialler

    def _dial_forever(self, index):
        pause, hurry_until = PAUSE_MIN, 0.0
        while True:
            tried, is_down = [], False
            try:
                connection = self._dial(index, tried)
                if connection is None:
                    # Another session may have more connections.
                    self._changed.wait()
                    continue
                connection = self._keep(index, connection)
                ended = connection.ended.get()
                log.info("connection %d ended: %s", index, ended, extra={"CONNECTION": index, "REASON": ended})
                if ended == SHUTDOWN or time.monotonic() - connection.since > LIVED:
                    pause, hurry_until = PAUSE_MIN, time.monotonic() + RESTART_TIME
                if ended == SHUTDOWN and self._is_of_session(connection):
                    # It has ended the session, so there is nothing to join.
                    self._set_session(None)
                tried.clear()  # it was right
            except Refused as refused:
                retry, _ = handshake.REFUSALS[refused.reason]
                log.log(logging.INFO if retry else logging.ERROR, "connection %d: %s", index, refused,
                        extra={"CONNECTION": index, "REASON": refused.reason,
                               "MESSAGE_ID": events.ID["server-refused"]})
                self._failure = f"{transport.shown(tried[-1])}: {refused}"
            except gevent.Timeout:
                self._failed(index, tried[-1], f"no answer within {self._configuration.handshake_timeout} s")
            except (RemoteError, OSError) as error:
                is_down = isinstance(error, ConnectionRefusedError)
                # A server resets whoever has failed before: that must not hide with what.
                says_why = not (self._failure and isinstance(error, ConnectionResetError))
                self._failed(index, tried[-1], getattr(error, "strerror", None) or str(error), says_why)
            except Exception:
                # Our own bug: it may cost this try, never the dialler.
                log.exception("internal error with connection %d", index, extra={"CONNECTION": index})
            if tried and tried[-1] == self._next_remote() and not self._is_carried():
                # Once, if several diallers have tried it.
                self._turn += 1
            # Jitter: a server that comes back must not meet all of its clients in the same instant.
            if self._reloaded.wait(pause * random.uniform(0.5, 1.0)):
                # What was wrong may have been mended.
                pause = PAUSE_MIN
            # To ask whether anything listens costs nobody anything, so a restart is found out soon.
            elif not (is_down and time.monotonic() < hurry_until):
                pause = min(2 * pause, self._configuration.retry_max)

    def _next_remote(self):
        remotes = self._configuration.remote
        return remotes[self._turn % len(remotes)]

    def _is_of_session(self, connection):
        return self._welcome is not None and connection.welcome.session == self._welcome.session

    def _is_carried(self):
        """Whether the session has a connection, or one whose first frame is awaited."""
        return any(self._is_of_session(one) for one in self._connections.values())

    def _failed(self, index, remote, reason, says_why=True):
        if says_why:
            self._failure = f"{transport.shown(remote)}: {reason}"
        log.warning("connection %d to %s failed: %s", index, transport.shown(remote), reason,
                    extra={"CONNECTION": index, "PEER": transport.shown(remote), "REASON": reason,
                           "MESSAGE_ID": events.ID["connection-failed"]})

    def _dial(self, index, tried):
        """Begins the session or joins it. Returns the connection, None if the session is to have fewer.

        tried: gets the remotes that were tried, the last one at the end.
        """
        while True:
            session = self._welcome
            if index >= (session or self._configuration).connections:
                return None
            if session is None:
                # One dialler begins the session; the others wait here and join it.
                with self._begin:
                    if self._welcome is None:
                        tried.append(self._next_remote())
                        return self._connect(index, tried[-1], None)
                continue
            tried.append(self._server if self._is_carried() else self._next_remote())
            try:
                return self._connect(index, tried[-1], session)
            except Refused as refused:
                if refused.reason != "session":
                    raise
            if self._welcome is session and (tried[-1] == self._server or not self._is_carried()):
                log.info("connection %d: the server does not know the session any more", index,
                         extra={"CONNECTION": index})
                self._set_session(None)
            # Else another dialler has found the session's server meanwhile.

    def _keep(self, index, connection):
        """Replaces the connection in time, and what took its place, until one ends. Returns that one."""
        pause = PAUSE_MIN
        delay = self._life()
        while True:
            connection.ended.wait(delay)
            if connection.ended.ready():
                return connection
            with self._replacing:
                fresh = self._replace(index, connection)
            if fresh is not None:
                connection, pause = fresh, PAUSE_MIN
                delay = self._life()
            else:
                delay = pause * random.uniform(0.5, 1.0)
                pause = min(2 * pause, max(self._configuration.retry_max, PAUSE_MIN))

    def _life(self):
        """Seconds until a connection that is new now is replaced, None for never."""
        interval = self._configuration.replace_interval
        return interval * random.uniform(1 - EARLY, 1) if interval else None

    def _replace(self, index, old):
        """Make before break: another connection takes the place of `old`. Returns it, None if it could not."""
        session, remotes = self._welcome, self._configuration.remote
        if old.ended.ready() or not self._is_of_session(old):
            return None
        # The server may have another address now, by which it is configured; if it is another server, it refuses.
        is_given = self._remote in remotes
        remote = self._server if is_given else remotes[0]
        try:
            fresh = self._connect(index, remote, session, replaces=True)
        except Refused as refused:
            self._failed(index, remote, f"it cannot be replaced: {refused}")
        except gevent.Timeout:
            self._failed(index, remote, "it cannot be replaced: no answer in time")
        except (RemoteError, OSError) as error:
            self._failed(index, remote, f"it cannot be replaced: {getattr(error, 'strerror', None) or error}")
        else:
            gevent.wait([fresh.settled, fresh.ended], timeout=REPLACED_MAX, count=1)
            if fresh.is_live:
                log.debug("connection %d is a new one", index, extra={"CONNECTION": index})
                old.ended.wait(REPLACED_MAX)
            # The server cuts what has to wait too long for its first frame.
            if not fresh.ended.ready():
                if not is_given and self._is_of_session(fresh):
                    self._server, self._remote = fresh.server, remote
                return fresh
        return None

    def _set_session(self, welcome):
        self._welcome = welcome
        self._session_since = time.monotonic()
        self._counted.clear()
        changed, self._changed = self._changed, Event()
        changed.set()

    def _connect(self, index, remote, session, replaces=False):
        """session: the WELCOME that began the session to join, None to begin one. replaces: one that lives."""
        worker = index % len(self.workers)
        if not self.workers.all[worker].ready.wait(10):
            raise OSError(f"worker {worker} is not running")
        sock = self._open(remote)
        with sock:
            with gevent.Timeout(self._configuration.handshake_timeout):
                shake = tls.Handshake(sock, self._context, self._configuration.server_name)
                shake.authenticate()
                hello = self._hello(index, session, replaces)
                encoded = handshake.encode(hello)
                shake.send(encoded)
                welcome_body = shake.receive_message()
                welcome = self._possible(handshake.Welcome.decode(welcome_body), session)
                self._check(welcome, hello, session)
                head = shake.finish()
            if self._welcome is not session:
                raise OSError("the session was replaced while this connection joined it")
            if shake.certificate in self._revoked:
                raise RemoteError("certificate", "the server's certificate: was revoked during the handshake")
            secrets = keys.traffic_secrets(encoded[handshake.PREFIX_SIZE :], welcome_body, hello.random, welcome.random)
            transport.set_buffers(sock, welcome.sndbuf, welcome.rcvbuf)
            if session is None:
                self._take(welcome)
            if remote != self._server and (session is None or not self._is_carried()):
                self._server, self._remote = transport.endpoint(sock.getpeername()), remote
            return self._attach(sock, index, worker, welcome, secrets, head, shake, replaces)

    def _open(self, remote):
        """A connected socket, of the first address of `remote` that answers. Raises OSError."""
        last = OSError("no address")
        found = self.network.resolver.find(*remote)
        addresses = [address[0] for _, address in found]
        self.network.know(addresses)
        self.on_addresses(addresses)
        welcome = self._welcome
        for family, address in found:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                transport.mark(sock, self.network.mark)
                transport.tune(sock, self._configuration, welcome and welcome.sndbuf, welcome and welcome.rcvbuf,
                               welcome.keepalive_timeout if welcome else self._configuration.handshake_timeout)
                sock.settimeout(self._configuration.handshake_timeout)
                sock.connect(address)
                sock.settimeout(None)
                return sock
            except OSError as error:
                sock.close()
                last = error
        raise last

    def _hello(self, index, session, replaces):
        # The terms of a session hold for all of its connections, whatever the configuration says by now.
        terms = session or self._configuration
        return handshake.Hello(
            session=session and session.session,
            token=session and session.token,
            index=index,
            random=os.urandom(keys.RANDOM_SIZE),
            ciphers=self._ciphers,
            connections=terms.connections,
            frame_size=terms.frame_size,
            rekey_bytes=terms.rekey_bytes,
            rekey_interval=terms.rekey_interval,
            offloads=self._tun.offloads,
            replaces=replaces,
        )

    def _possible(self, welcome, session):
        """The server's answer without IPv6 where this machine has none. What was so when the session began counts for
        all of its connections. Raises OSError where nothing would be left."""
        if session is None:
            self._lacks_ipv6 = welcome.ipv6 is not None and not link.has_ipv6(self._tun.name)
        if not self._lacks_ipv6:
            return welcome
        what = f"{self._tun.name}: address {welcome.ipv6}: this machine has no IPv6"
        if welcome.ipv4 is None:
            raise OSError(f"{what}; the server needs a pool-ipv4, or switch it on here, {link.MEND_IPV6}")
        if session is None:
            log.warning("%s, so the tunnel carries IPv4 alone; switch it on, %s", what, link.MEND_IPV6)
        return dataclasses.replace(welcome, ipv6=None)

    def _check(self, welcome, hello, session):
        """The server's answer against what was asked: what it pushes beyond that is not accepted."""
        if (
            welcome.cipher not in hello.ciphers
            or welcome.index != hello.index
            or welcome.connections > hello.connections
            or welcome.frame_size > hello.frame_size
            or welcome.rekey_bytes > hello.rekey_bytes
            or welcome.rekey_interval > hello.rekey_interval
            or session is not None
            and (welcome.session != session.session or (welcome.ipv4, welcome.ipv6) != (session.ipv4, session.ipv6))
        ):
            raise RemoteError("handshake", "WELCOME: does not answer the HELLO")

    def _take(self, welcome):
        """A new session: the device gets its addresses, and the network what they bring."""
        interfaces = own_addresses(welcome)
        try:
            link.check_addresses(self._tun.name, interfaces)
        except link.LinkError as error:
            # Tried again as any other failure: the other device may go, and the server may give another address.
            raise OSError(str(error)) from None
        try:
            link.set_addresses(self._tun.name, interfaces)
            link.set_mtu(self._tun.name, welcome.mtu)
            self.network.take(welcome)
        except link.LinkError as error:
            self._on_failure(str(error))
            raise OSError(str(error)) from None
        if self._tun.offloads and "tso" not in welcome.offloads:
            log.info("the server takes no super-packets: packets go one by one, at a fraction of the speed")
        self._set_session(welcome)

    def _attach(self, sock, index, worker, welcome, secrets, head, shake, replaces):
        connection = _Connection(next(self._numbers), index, worker, sock.getpeername(), welcome, shake)
        self._connections[connection.number] = connection
        message = {
            "type": "attach",
            "connection": connection.number,
            "index": connection.index,
            **self._described(),
            "cipher": welcome.cipher,
            "secret_in": secrets[keys.SERVER_TO_CLIENT].hex(),
            "secret_out": secrets[keys.CLIENT_TO_SERVER].hex(),
            "head": head.hex(),
            "replaces": replaces,
            "settings": {
                "frame_size": welcome.frame_size,
                "offloads": self._tun.offloads,
                "peer_offloads": welcome.offloads,
                "keepalive": welcome.keepalive,
                "keepalive_timeout": welcome.keepalive_timeout,
                "rekey_bytes": welcome.rekey_bytes,
                "rekey_interval": welcome.rekey_interval,
                "sndbuf": welcome.sndbuf,
                "congestion": self._configuration.congestion,
                "queue_target": self._configuration.queue_target / 1000,
                "queue_interval": self._configuration.queue_interval / 1000,
            },
        }
        if not self.workers.send(worker, message, [sock.fileno()]):
            self._end(connection, f"worker {worker} is gone")
        return connection

    # What workers report

    def _reported(self, number, worker):
        """The connection, or None: a worker speaks for its own only."""
        connection = self._connections.get(number)
        return connection if connection is not None and connection.worker == worker else None

    def established(self, number, worker):
        connection = self._reported(number, worker)
        if connection is None:
            return
        connection.is_live = True
        self._failure = None
        connection.settled.set()
        self._announce()
        if not self._was_up:
            self._was_up = True
            self.on_change()
            # Its own: the present session may be another by now, or none.
            welcome = connection.welcome
            addresses = " and ".join(str(one.ip) for one in (welcome.ipv4, welcome.ipv6) if one)
            log.info("connected to %s with %s, %d connections, cipher %s", connection.peer, addresses,
                     welcome.connections, welcome.cipher,
                     extra={"PEER": connection.peer, "MESSAGE_ID": events.ID["connected"]})
            self.tell("up", addresses=_addresses(welcome), peer=connection.peer)
        if not self._was_ready:
            self._was_ready = True
            self.network.came_up(self._on_ready)

    def closed(self, message, worker):
        connection = self._reported(message["connection"], worker)
        if connection is not None:
            self._counted.update(message["counters"])
            self._end(connection, printable(message["reason"], REASON_MAX))
            self._announce()

    def worker_ready(self, index):
        if self._welcome is not None:
            self.workers.send(index, self._session_message())

    def worker_lost(self, index):
        for connection in [one for one in self._connections.values() if one.worker == index]:
            self._end(connection, f"worker {index} is gone")
        self._announce()

    def _end(self, connection, reason):
        self._connections.pop(connection.number, None)
        connection.ended.set(reason)
        if self._was_up and not any(one.is_live for one in self._connections.values()):
            self._was_up = False
            self.tell("down", addresses=_addresses(connection.welcome), peer=connection.peer)
            self.on_change()
            log.warning("no connection to the server is left; trying again",
                        extra={"MESSAGE_ID": events.ID["disconnected"]})

    def revoke(self, context, revoked):
        """Another revocation list is in force. context, revoked: of control.revocation.Revocations."""
        self._context, self._revoked = context, revoked
        self._cut([one for one in self._connections.values() if one.certificate in revoked], "was revoked")

    def expire(self, now):
        """Ends what a server's certificate that has expired by `now`, aware datetime, was good for; the newest counts,
        as for a server."""
        live = [one for one in self._connections.values() if one.is_live]
        if live and max(one.expires for one in live) <= now:
            self._cut(live, "has expired")

    def _cut(self, found, why):
        if found:
            log.warning("the server's certificate %s; %d connections end", why, len(found))
        for connection in found:
            self.workers.send(connection.worker,
                              {"type": "detach", "connection": connection.number, "reason": "refused"})

    # What workers are told

    def _described(self):
        return {"session": SESSION_NUMBER, "addresses": [], "any_address": True, "networks": []}

    def _session_message(self):
        workers = sorted({one.worker for one in self._connections.values() if one.is_live})
        return {"type": "session", **self._described(), "workers": workers}

    def _announce(self):
        self.workers.broadcast(self._session_message())

    # What the routes of this host need to know

    def carries(self, prefix):
        """Whether packets to `prefix`, an ipaddress network, get through now."""
        return self._was_up

    def outer_addresses(self):
        """The far ends of the connections, text."""
        return {transport.address_of(one.peer) for one in self._connections.values() if one.is_live}

    def stop(self):
        """Says goodbye to the server; at most two seconds."""
        gevent.killall(self._greenlets, block=False)
        for connection in list(self._connections.values()):
            self.workers.send(connection.worker,
                              {"type": "detach", "connection": connection.number, "reason": "shutdown"})
        with gevent.Timeout(2, False):
            while self._connections:
                gevent.sleep(0.01)
        for connection in list(self._connections.values()):
            # Its worker is too slow to say so.
            self._end(connection, "stopped")

    # What is shown

    def summary(self):
        live = [one for one in self._connections.values() if one.is_live]
        if not live:
            return "connecting"
        return f"connected, {len(live)} of {live[-1].welcome.connections} connections"

    def status(self, reported):
        """reported: {connection number: what its worker says}."""
        welcome = self._welcome
        if welcome is None:
            return {"addresses": [], "sessions": [], "failure": self._failure}
        session = session_report(
            {
                "identity": self._configuration.server_name,
                "session": SESSION_NUMBER,
                "addresses": [str(one.ip) for one in (welcome.ipv4, welcome.ipv6) if one],
                "cipher": welcome.cipher,
                "offload": list(welcome.offloads),
                "agreed_connections": welcome.connections,
                "age": round(time.monotonic() - self._session_since, 3),
            },
            [
                {"index": one.index, "worker": one.worker, "peer": one.peer, **reported.get(one.number, {})}
                for one in self._connections.values()
                if one.is_live
            ],
            self._counted,
        )
        return {"addresses": [str(one) for one in (welcome.ipv4, welcome.ipv6) if one], "sessions": [session],
                "failure": self._failure, "pushed_dns": [str(one) for one in welcome.dns]}


def _addresses(welcome):
    """For a hook."""
    return " ".join(str(one) for one in (welcome.ipv4, welcome.ipv6) if one)


class _Connection:
    """One connection that a worker has. address: of the server's end. welcome: what was agreed. shake: the
    tls.Handshake, of which certificate and expires are kept. settled: set when its first authentic frame has come.
    ended: gets the reason when it is over."""

    def __init__(self, number, index, worker, address, welcome, shake):
        self.number = number
        self.index = index
        self.worker = worker
        self.server = transport.endpoint(address)
        self.peer = transport.shown(address)
        self.welcome = welcome
        self.certificate, self.expires = shake.certificate, shake.expires
        self.since = time.monotonic()
        self.is_live = False
        self.settled = Event()
        self.ended = AsyncResult()
