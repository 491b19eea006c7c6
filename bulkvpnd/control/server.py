"""The server: accepts, authenticates, and gives each connection to a worker.

    accept --> TLS 1.3 --> HELLO --> session begun or joined --> WELCOME --> close_notify
                                                                               |
           worker <-- attach: socket and keys over the link <-----------------'
             |
             '--> established: first authentic frame --> routed, and what it replaces is closed
"""

import logging
import os
import time

import gevent

from bulkvpnd import events
from bulkvpnd.control import gateway, tls, transport
from bulkvpnd.control.admission import Admission, Pace
from bulkvpnd.control.listener import Listener
from bulkvpnd.control.pool import Pool
from bulkvpnd.control.session import Sessions
from bulkvpnd.control.status import CommandError, session_report
from bulkvpnd.host import link
from bulkvpnd.protocol import handshake, keys
from bulkvpnd.protocol.errors import Refused, RemoteError
from bulkvpnd.service import REASON_MAX, printable

log = logging.getLogger(__name__)

CRASH_SECONDS = 2.0
"""Seconds that another device may still have our addresses: that of a crashed run goes with the last of its workers
(choice)."""
OTHERS_SHOWN = 3
"""Parts of a pool that other devices have, of which one line of the log tells (choice)."""
PENDING_SECONDS = 5.0
"""Seconds that a connection may wait for its first authentic frame (choice)."""
PACE_PAUSE = 1.0
"""Seconds that a client waits for the answer when its identity makes connections too often (choice)."""


class Server:
    """The role `mode = server`. on_ready(): called once.

    workers, changes (host.changes.Changes, for what it changes on the machine while it runs): set by the main process
    before start. on_change(): called when carries() may have changed. tell(event, **values): of control.hooks.Hooks.
    """

    def __init__(self, configuration, context, tun, ciphers, on_ready, on_failure):
        self._configuration = configuration
        self._context = context
        self._tun = tun
        self._ciphers = ciphers
        self._on_ready = on_ready
        self._stopping = False
        self._is_draining = False
        self._present = {}  # number: Session, of those that hooks were told of
        self._revoked = {}
        self.workers = None
        self.changes = None
        self.on_change = lambda: None
        self.tell = lambda event, **values: None
        self._pool = self._make_pool(configuration.pool_ipv6)
        self._networks = _networks(configuration)
        self._admission = Admission(*configuration.max_handshakes, configuration.max_handshakes_per_source,
                                    configuration.penalty_max)
        self._pace = Pace()
        self._listener = Listener(configuration.listen, self._admission, configuration.handshake_timeout,
                                  self._prepare, self._admit)
        self._sessions = None
        self.commands = {"disconnect": self._disconnect, "drain": self._drain}

    def prepare(self):
        """What has to be on the machine before anything else runs. Raises LinkError or FirewallError."""
        self._leave_out_ipv6()
        interfaces = self._pool.server_interfaces
        deadline = time.monotonic() + CRASH_SECONDS
        while True:
            try:
                link.check_addresses(self._tun.name, interfaces)
                link.check_networks(self._tun.name, interfaces)
                break
            except link.LinkError:
                if time.monotonic() > deadline:
                    raise
                gevent.sleep(0.05)
        self._warn_of_others(interfaces)
        gateway.apply(self._configuration, self.changes, self._tun.name, interfaces)

    def _leave_out_ipv6(self):
        """Where this machine has none: clients would only wait for what they send by it."""
        network = self._configuration.pool_ipv6
        if network is None or link.has_ipv6(self._tun.name):
            return
        what = f"pool-ipv6 = {network}: this machine has no IPv6"
        if self._configuration.pool_ipv4 is None:
            raise link.LinkError(f"{what}; give a pool-ipv4, or switch it on, {link.MEND_IPV6}")
        log.warning("%s, so clients get IPv4 alone; take it out, or switch it on, %s", what, link.MEND_IPV6)
        self._pool = self._make_pool(None)

    def _make_pool(self, pool_ipv6):
        configuration = self._configuration
        return Pool((configuration.pool_ipv4, pool_ipv6), configuration.state_directory / "leases.json",
                    _fixed_addresses(configuration))

    def _warn_of_others(self, interfaces):
        for interface in interfaces:
            found = link.inside(self._tun.name, interface.network)
            if found:
                log.warning("pool-ipv%d = %s: not all of it leads into the tunnel: %s%s; choose another pool, or "
                            "remove that; see: ip route show root %s", interface.version, interface.network,
                            ", ".join(f"{holder} has {part}" for part, holder in found[:OTHERS_SHOWN]),
                            f" and {len(found) - OTHERS_SHOWN} more" if len(found) > OTHERS_SHOWN else "",
                            interface.network)

    def start(self):
        """Raises OSError or LinkError."""
        configuration = self._configuration
        self._sessions = Sessions(self._pool, configuration.grace, len(self.workers), PENDING_SECONDS,
                                  configuration.second_login)
        link.set_addresses(self._tun.name, self._pool.server_interfaces)
        self._listener.start()
        gevent.spawn(self._tick_loop)
        log.info("ready: device %s with %s, %d workers, cipher %s", self._tun.name,
                 " and ".join(map(str, self._pool.server_interfaces)), len(self.workers), self._ciphers[0])
        self._on_ready()
        self._tell("up")

    def _prepare(self, sock):
        configuration = self._configuration
        transport.tune(sock, configuration, configuration.sndbuf, configuration.rcvbuf, configuration.keepalive_timeout)

    def reconfigure(self, configuration):
        """Another configuration, whose options that need a restart are the same, is in force."""
        former, self._configuration = self._configuration, configuration
        self._admission.set_limits(*configuration.max_handshakes, configuration.max_handshakes_per_source,
                                   configuration.penalty_max)
        self._listener.reconfigure(configuration.handshake_timeout)
        if self._sessions is not None:
            self._sessions.set_rules(configuration.grace, configuration.second_login)
        if configuration.clients != former.clients:
            self._replace_clients()
        gateway.reapply(configuration, self.changes, self._tun.name, self._pool.server_interfaces)

    def restore(self):
        """The device is up again, without what it lost while it was down. Raises LinkError, OSError."""
        link.set_addresses(self._tun.name, self._pool.server_interfaces)
        gateway.lead(self._configuration, self._tun.name)

    def _replace_clients(self):
        """What single clients have is another: the sessions that it touches end, and begin again with that."""
        self._pool.set_fixed(_fixed_addresses(self._configuration))
        self._networks = _networks(self._configuration)
        for index in range(len(self.workers)):
            self._isolate(index)
        self._end([one for one in self._sessions or () if one.interfaces != self._pool.addresses(one.lease)
                   or one.networks != self._networks.get(one.lease, ())],
                  "the addresses or networks of this client have changed")

    # One connection, from accept to its worker

    def _admit(self, sock, address, place):
        peer = transport.shown(address)
        shake = tls.Handshake(sock, self._context)
        identity = shake.authenticate()
        self._admission.authenticated(place, identity, time.monotonic())
        # Before HELLO: who leaves without one has had a handshake too.
        is_too_often = not self._pace.allows(identity, time.monotonic())
        if is_too_often:
            # It keeps its place meanwhile, and there are few for one source: so it cannot come back at once.
            gevent.sleep(PACE_PAUSE)
        try:
            hello_body = shake.receive_message()
        except RemoteError as error:
            if error.reason != "left":
                raise
            # Nothing is wrong with who it is: a client that is stopped, or a doctor's look at the port.
            log.info("%s from %s left before it asked for a session", identity, peer,
                     extra={"IDENTITY": identity, "PEER": peer, "REASON": error.reason})
            return
        try:
            if is_too_often:
                raise Refused("busy", "too many handshakes of this identity")
            hello = handshake.Hello.decode(hello_body)
            session = self._session_for(identity, hello, address[0])
        except Refused as refused:
            log.info("%s from %s refused: %s", identity, peer, refused,
                     extra={"IDENTITY": identity, "PEER": peer, "REASON": refused.reason,
                            "MESSAGE_ID": events.ID["client-refused"]})
            shake.send(handshake.encode(handshake.Refuse(refused.reason)))
            try:
                shake.finish()
            except (RemoteError, OSError, gevent.Timeout):
                # It has been told, and the log too; how it leaves is its own affair.
                pass
            return
        welcome = self._welcome(session, hello)
        encoded = handshake.encode(welcome)
        shake.send(encoded)
        head = shake.finish()
        secrets = keys.traffic_secrets(hello_body, encoded[handshake.PREFIX_SIZE :], hello.random, welcome.random)
        if shake.certificate in self._revoked:
            raise RemoteError("certificate", "the peer's certificate: was revoked during the handshake")
        self._attach(sock, session, hello, peer, secrets, head, shake)

    def _session_for(self, identity, hello, source):
        if self._stopping:
            raise Refused("shutdown", "the server is stopping")
        if hello.session is not None:
            session = self._sessions.join(identity, hello.session, hello.token, hello.index)
            # The terms are the session's; a joining connection that could not keep them would break it later.
            if session.terms["cipher"] not in hello.ciphers:
                raise Refused("cipher", "the session's cipher is not offered")
            return session
        if self._is_draining:
            raise Refused("shutdown", "no new sessions are accepted: bulkvpnctl drain")
        configuration = self._configuration
        terms = {
            "cipher": handshake.agree_cipher(self._ciphers, hello.ciphers),
            "connections": min(configuration.connections, hello.connections),
            "frame_size": min(configuration.frame_size, hello.frame_size),
            "rekey_bytes": min(configuration.rekey_bytes, hello.rekey_bytes),
            "rekey_interval": min(configuration.rekey_interval, hello.rekey_interval),
            "peer_offloads": hello.offloads,
        }
        if hello.index >= terms["connections"]:
            raise RemoteError("handshake", "HELLO: index beyond the number of connections")
        session = self._sessions.begin(identity, os.urandom(handshake.SESSION_ID_SIZE),
                                       os.urandom(handshake.TOKEN_SIZE), terms, source, time.monotonic())
        # Of several sessions of one identity, the first has them, as its addresses.
        session.networks = self._networks.get(session.lease, ())
        return session

    def _welcome(self, session, hello):
        configuration = self._configuration
        return handshake.Welcome(
            session=session.id,
            token=session.token,
            index=hello.index,
            random=os.urandom(keys.RANDOM_SIZE),
            cipher=session.terms["cipher"],
            connections=session.terms["connections"],
            frame_size=session.terms["frame_size"],
            offloads=self._tun.offloads,
            ipv4=session.interfaces.get(4),
            ipv6=session.interfaces.get(6),
            mtu=configuration.mtu,
            sndbuf=configuration.sndbuf,
            rcvbuf=configuration.rcvbuf,
            keepalive=configuration.keepalive,
            keepalive_timeout=configuration.keepalive_timeout,
            rekey_bytes=session.terms["rekey_bytes"],
            rekey_interval=session.terms["rekey_interval"],
            routes=self._routes_for(session),
            dns=configuration.dns,
            dns_search=configuration.dns_search,
        )

    def _routes_for(self, session):
        """The pushed routes, without those to the client's own networks: it must not send these into the tunnel."""
        own = self._networks.get(session.identity, ())
        return tuple(
            route for route in self._configuration.routes
            if not any(route.version == network.version and route.subnet_of(network) for network in own)
        )

    def _attach(self, sock, session, hello, peer, secrets, head, shake):
        configuration = self._configuration
        connection = self._sessions.add(session, hello.index, peer, time.monotonic(), shake.certificate,
                                        shake.expires)
        message = {
            "type": "attach",
            "connection": connection.number,
            "index": connection.index,
            **self._described(session),
            "cipher": session.terms["cipher"],
            "secret_in": secrets[keys.CLIENT_TO_SERVER].hex(),
            "secret_out": secrets[keys.SERVER_TO_CLIENT].hex(),
            "head": head.hex(),
            "replaces": hello.replaces,
            "settings": {
                "frame_size": session.terms["frame_size"],
                "offloads": self._tun.offloads,
                "peer_offloads": session.terms["peer_offloads"],
                "keepalive": configuration.keepalive,
                "keepalive_timeout": configuration.keepalive_timeout,
                "rekey_bytes": session.terms["rekey_bytes"],
                "rekey_interval": session.terms["rekey_interval"],
                "sndbuf": configuration.sndbuf,
                "congestion": configuration.congestion,
                "queue_target": configuration.queue_target / 1000,
                "queue_interval": configuration.queue_interval / 1000,
            },
        }
        sent = False
        try:
            sent = self.workers.send(connection.worker, message, [sock.fileno()])
        finally:
            # That worker is being replaced, or the deadline struck while its link was full; the client comes again.
            if not sent:
                self._sessions.closed(connection.number, time.monotonic())

    # What workers report

    def established(self, number, worker):
        result = self._sessions.established(number) if self._reported(number, worker) else None
        if result is None:
            return
        connection, replaced, ended = result
        session = connection.session
        for other in replaced:
            self._detach(other, "replaced")
        self._forget(ended, "replaced")
        self._announce(session)
        if session.number not in self._present:
            self._present[session.number] = session
            self._tell_of("client-connect", session, peer=connection.peer)
        if len(session.live_connections) == 1 and not replaced:
            addresses = " and ".join(str(interface.ip) for interface in session.interfaces.values())
            log.info("%s connected from %s with %s", session.identity, connection.peer, addresses,
                     extra={**_fields(connection), "MESSAGE_ID": events.ID["client-connected"]})
            if self._tun.offloads and "tso" not in session.terms["peer_offloads"]:
                log.info("%s takes no super-packets: packets go one by one, at a fraction of the speed",
                         session.identity, extra=_fields(connection))
        log.debug("connection %d of %s is up on worker %d", connection.index, session.identity, connection.worker,
                  extra=_fields(connection))

    def _reported(self, number, worker):
        """The connection, or None: a worker speaks for its own only."""
        connection = self._sessions.connections.get(number)
        return connection if connection is not None and connection.worker == worker else None

    def closed(self, message, worker):
        connection = self._reported(message["connection"], worker)
        if connection is None:
            return
        self._sessions.closed(connection.number, time.monotonic())
        session = connection.session
        reason = printable(message["reason"], REASON_MAX)
        session.counted.update(message["counters"])
        level = logging.WARNING if message["blame"] else logging.DEBUG if message["clean"] else logging.INFO
        log.log(level, "connection %d of %s from %s ended: %s", connection.index, session.identity, connection.peer,
                reason, extra={**_fields(connection), "REASON": reason})
        self._announce(session)
        if not session.connections and session.is_live and not session.is_ended:
            log.info("%s has no connection left; its session ends in %d s", session.identity,
                     self._configuration.grace, extra={"IDENTITY": session.identity, "SESSION": session.number,
                                                       "MESSAGE_ID": events.ID["client-silent"]})

    def worker_ready(self, index):
        """A worker that is new, also one that took another's place, learns what holds and which sessions there are."""
        self._isolate(index)
        for session in self._sessions or ():
            if _is_routed(session):
                self.workers.send(index, self._session_message(session))

    def worker_lost(self, index):
        if self._sessions is None:
            # It died while the others were still starting.
            return
        now = time.monotonic()
        touched = set()
        for connection in [one for one in self._sessions.connections.values() if one.worker == index]:
            self._sessions.closed(connection.number, now)
            touched.add(connection.session)
        for session in touched:
            self._announce(session)

    def revoke(self, context, revoked):
        """Another revocation list is in force. context, revoked: of control.revocation.Revocations."""
        self._context, self._revoked = context, revoked
        if self._sessions is None:
            return
        self._cut(self._sessions.end_revoked(revoked), "was revoked", "revoked")

    def expire(self, now):
        """Ends what certificates that have expired by `now`, aware datetime, were good for."""
        if self._sessions is not None:
            self._cut(self._sessions.end_expired(now), "has expired", "expired")

    def _cut(self, ended, why, reason):
        for session in ended:
            log.warning("session of %s ended: its certificate %s", session.identity, why,
                        extra={"IDENTITY": session.identity, "SESSION": session.number, "REASON": reason,
                               "MESSAGE_ID": events.ID["session-ended"]})
        self._forget(ended, "refused")

    # What the administrator orders

    def _disconnect(self, request):
        """Ends the sessions of one identity, which may come again."""
        identity = request.get("identity")
        ended = self._end([one for one in self._sessions or () if one.identity == identity],
                          "disconnected by the administrator")
        if not ended:
            raise CommandError(f"no session of {printable(identity)}; bulkvpnctl status shows who is connected")
        return {"ended": len(ended)}

    def _end(self, sessions, reason):
        """Ends sessions of clients that shall come again at once. Returns those that had not ended yet."""
        ended = self._sessions.end(sessions) if sessions else []
        for session in ended:
            log.info("session of %s ended: %s", session.identity, reason,
                     extra={"IDENTITY": session.identity, "SESSION": session.number, "REASON": "administrator",
                            "MESSAGE_ID": events.ID["session-ended"]})
        self._forget(ended, "shutdown")
        return ended

    def _drain(self, request):
        """Accepts no new sessions, or does so again with {"off": true}. Returns how many sessions there are."""
        is_draining = not request.get("off")
        if is_draining != self._is_draining:
            self._is_draining = is_draining
            log.info("new sessions are %s", "refused from now on; those that there are go on" if is_draining
                     else "accepted again", extra={"MESSAGE_ID": events.ID["draining"]})
        return {"draining": self._is_draining, "sessions": sum(one.is_live for one in self._sessions or ())}

    # What workers are told

    def _isolate(self, index):
        """Where it lets no client's packets go: to other clients."""
        if self._configuration.client_to_client:
            return
        own = self._pool.server_interfaces
        behind = [network for networks in self._networks.values() for network in networks]
        self.workers.send(index, {"type": "isolate",
                                  "networks": [str(one) for one in (*(one.network for one in own), *behind)],
                                  "exempt": [str(one.ip) for one in own]})

    def _session_message(self, session):
        return {"type": "session", **self._described(session), "workers": session.workers}

    def _described(self, session):
        return {
            "session": session.number,
            "addresses": [interface.ip.packed.hex() for interface in session.interfaces.values()],
            "any_address": False,
            "networks": [str(network) for network in session.networks],
        }

    def _announce(self, session):
        # What a connection reports after its session ended must not bring that back: its addresses may be another's.
        if _is_routed(session):
            self.workers.broadcast(self._session_message(session))
        self.on_change()

    def _forget(self, sessions, reason):
        for session in sessions:
            for connection in list(session.connections.values()):
                self._detach(connection, reason)
            self.workers.broadcast({"type": "forget", "session": session.number})
            self._went(session)

    def _went(self, session):
        if self._present.pop(session.number, None):
            self._tell_of("client-disconnect", session)

    def _tell_of(self, event, session, **values):
        addresses = " ".join(str(interface.ip) for interface in session.interfaces.values())
        networks = " ".join(map(str, session.networks))
        self.tell(event, identity=session.identity, addresses=addresses, networks=networks, **values)

    def _tell(self, event):
        self.tell(event, addresses=" ".join(map(str, self._pool.server_interfaces)))

    def _detach(self, connection, reason):
        self.workers.send(connection.worker, {"type": "detach", "connection": connection.number, "reason": reason})

    def _tick_loop(self):
        while not self._stopping:
            gevent.sleep(1)
            now = time.monotonic()
            for session in (expired := self._sessions.expire(now)):
                if session.is_live:
                    log.info("session of %s ended", session.identity,
                             extra={"IDENTITY": session.identity, "SESSION": session.number, "REASON": "timeout",
                                    "MESSAGE_ID": events.ID["session-ended"]})
            self._forget(expired, "timeout")
            for connection in list(self._sessions.connections.values()):
                if not connection.is_live and now - connection.since > PENDING_SECONDS:
                    self._detach(connection, "timeout")

    # What the routes of this host need to know

    def carries(self, prefix):
        """Whether packets to `prefix`, an ipaddress network, get through now: a client is connected that has it."""
        return any(
            _is_routed(session) and session.live_connections and prefix in session.networks
            for session in self._sessions or ()
        )

    def outer_addresses(self):
        """The far ends of the connections, text."""
        connections = self._sessions.connections.values() if self._sessions else ()
        return {transport.address_of(one.peer) for one in connections if one.is_live}

    def stop(self):
        """Says goodbye to every client; at most two seconds."""
        self._stopping = True
        self._listener.stop()
        if self._sessions is None:
            return
        for connection in list(self._sessions.connections.values()):
            self._detach(connection, "shutdown")
        with gevent.Timeout(2, False):
            while self._sessions.connections:
                gevent.sleep(0.01)
        for session in list(self._present.values()):
            self._went(session)
        self._tell("down")
        self._pool.flush()

    # What is shown

    def summary(self):
        sessions = [session for session in self._sessions if session.is_live]
        connections = sum(len(session.live_connections) for session in sessions)
        return f"{len(sessions)} sessions, {connections} connections" + (", draining" if self._is_draining else "")

    def status(self, reported):
        """reported: {connection number: what its worker says}."""
        return {
            "addresses": [str(interface) for interface in self._pool.server_interfaces],
            "listen": [transport.shown(address) for address in self._configuration.listen],
            "listener": self._listener.status(),
            "draining": self._is_draining,
            "sessions": [
                session_report(
                    {
                        "identity": session.identity,
                        "session": session.number,
                        "addresses": [str(interface.ip) for interface in session.interfaces.values()],
                        "networks": [str(network) for network in session.networks],
                        "cipher": session.terms["cipher"],
                        "offload": list(session.terms["peer_offloads"]),
                        "agreed_connections": session.terms["connections"],
                        "age": round(time.monotonic() - session.since, 3),
                    },
                    [
                        {"index": one.index, "worker": one.worker, "peer": one.peer, **reported.get(one.number, {})}
                        for one in session.live_connections
                    ],
                    session.counted,
                )
                for session in self._sessions or ()
                if session.is_live
            ],
        }


def _fixed_addresses(configuration):
    return {client.name: client.addresses for client in configuration.clients}


def _networks(configuration):
    return {client.name: client.networks for client in configuration.clients}


def _is_routed(session):
    """Whether workers may send packets to its connections."""
    return session.is_live and not session.is_ended


def _fields(connection):
    return {
        "IDENTITY": connection.session.identity,
        "SESSION": connection.session.number,
        "CONNECTION": connection.index,
        "WORKER": connection.worker,
        "PEER": printable(connection.peer),
    }
