"""Sessions and their connections, as the main process of a server knows them. No sockets, no clock: time is passed in.

    HELLO without session --> begin --> session pending --first authentic frame--> live --no connection--> grace
    HELLO with session    --> join  --> connection pending --first authentic frame--> live          |
                                                                                        ended <-----'

Until a connection's first authentic frame has arrived it changes nothing: no route, no earlier connection, no earlier
session of the same identity.
"""

import collections
import dataclasses
import datetime
import hmac
import itertools

from bulkvpnd.protocol.errors import Refused

PENDING_MAX = 4
"""Sessions of an identity that may wait for their first frame, and connections of a session beyond one for each index
(choice)."""
PARALLEL_MAX = 16
"""Sessions that one identity may have where they run in parallel: each takes an address of the pool (choice)."""


@dataclasses.dataclass(eq=False, slots=True)
class Connection:
    """One connection of a session. number: unique in this process. worker: index. peer: text. since: seconds.
    certificate, expires: what a revocation list calls the one that it was made with, and when that ends, aware
    datetime."""

    number: int
    session: "Session"
    index: int
    worker: int
    peer: str
    since: float
    certificate: tuple
    expires: datetime.datetime
    is_live: bool = False


@dataclasses.dataclass(eq=False, slots=True)
class Session:
    """What one identity has with the server.

    id, token: bytes. interfaces: {4 | 6: ipaddress interface}. terms: what was agreed for all its connections (cipher,
    frame_size, offloads, connections). offset: worker of its connection 0. idle_since: when its last live connection
    went, None while it has one. lease: what its addresses are leased to, the identity or identity#number. networks:
    those behind it. is_ended: nothing may join it or speak for it any more, whatever is still under way. counted: what
    its former connections carried, by the counters' names.
    """

    number: int
    identity: str
    id: bytes
    token: bytes = dataclasses.field(repr=False)
    interfaces: dict
    terms: dict
    offset: int
    since: float
    idle_since: float | None
    lease: str
    networks: tuple = ()
    is_live: bool = False
    is_ended: bool = False
    connections: dict = dataclasses.field(default_factory=dict)  # number: Connection
    counted: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def live_connections(self):
        return [connection for connection in self.connections.values() if connection.is_live]

    @property
    def workers(self):
        """Indexes of the workers that have a live connection."""
        return sorted({connection.worker for connection in self.live_connections})


class Sessions:
    """All sessions of a server. pool: of leases. grace: seconds that a session lives without a connection.

    second_login: what happens to a second session of an identity. "replace": it ends the first, with its first
    authentic frame. "refuse": it is not begun while the first has a connection or waits for one. "parallel": both live,
    with addresses of their own.
    """

    def __init__(self, pool, grace, workers, max_pending_seconds, second_login="replace"):
        self._pool = pool
        self.set_rules(grace, second_login)
        self._workers = workers
        self._max_pending_seconds = max_pending_seconds
        self._numbers = itertools.count(1)
        self._offsets = {}
        self._by_id = {}
        self.connections = {}

    def set_rules(self, grace, second_login):
        """Other rules from now on; sessions that run in parallel go on with the addresses that they have."""
        self._grace = grace
        self._second_login = second_login

    def __iter__(self):
        return iter(list(self._by_id.values()))

    def begin(self, identity, session_id, token, terms, source, now):
        """A new session, pending. source: the connecting address, text, whose clients go round robin over the workers.

        Raises Refused: "pool", "identity" for a second login that is not wanted, or "busy" when too many sessions of
        this identity wait for their first frame.
        """
        others = [session for session in self if session.identity == identity]
        if self._second_login == "refuse" and any(one.live_connections or not one.is_live for one in others):
            raise Refused("identity", "this identity is connected already (second-login = refuse)")
        if sum(not session.is_live for session in others) >= PENDING_MAX:
            raise Refused("busy", "too many sessions of this identity wait for their first frame")
        lease = self._lease(identity, others)
        interfaces = self._pool.lease(lease)
        if len(self._offsets) > 4096:
            self._offsets.clear()
        offset = self._offsets.get(source, len(self._offsets)) % self._workers
        self._offsets[source] = offset + 1
        session = Session(next(self._numbers), identity, session_id, token, interfaces, terms, offset, now, now, lease)
        self._by_id[session.id] = session
        return session

    def _lease(self, identity, others):
        """What a session's addresses are leased to: an identity's sessions share them, or each has a number."""
        if self._second_login != "parallel":
            return identity
        taken = {session.lease for session in others}
        # No name of a certificate has a #.
        for lease in (identity, *(f"{identity}#{number}" for number in range(2, PARALLEL_MAX + 1))):
            if lease not in taken:
                return lease
        raise Refused("busy", f"this identity has {PARALLEL_MAX} sessions already")

    def join(self, identity, session_id, token, index):
        """The session that a further connection names. Whatever is wrong is refused in the same way."""
        session = self._by_id.get(session_id)
        # Compared even when there is no such session, so that the answer takes the same time.
        token_fits = hmac.compare_digest(session.token if session else bytes(len(token)), token)
        if session is None or not token_fits or session.identity != identity or index >= session.terms["connections"]:
            raise Refused("session", "no such session")
        if sum(not connection.is_live for connection in session.connections.values()) >= (
            session.terms["connections"] + PENDING_MAX
        ):
            raise Refused("busy", "too many connections of this session wait for their first frame")
        return session

    def add(self, session, index, peer, now, certificate=None, expires=None):
        """A connection whose handshake is done; it is pending. Returns it.

        Raises Refused("session") if the session ended during that handshake.
        """
        if session.is_ended:
            raise Refused("session", "the session ended before the handshake was done")
        worker = (session.offset + index) % self._workers
        connection = Connection(next(self._numbers), session, index, worker, peer, now, certificate, expires)
        session.connections[connection.number] = connection
        self.connections[connection.number] = connection
        return connection

    def established(self, number):
        """The first authentic frame of connection `number` arrived.

        Returns (connection, replaced connections, ended sessions), or None if it or its session is gone already.
        """
        connection = self.connections.get(number)
        if connection is None or connection.is_live or connection.session.is_ended:
            return None
        session = connection.session
        replaced = [other for other in session.live_connections if other.index == connection.index]
        ended = []
        if not session.is_live:
            session.is_live = True
            self._pool.settle(session.lease)
            ended = [other for other in self if other.identity == session.identity and other is not session]
        connection.is_live = True
        session.idle_since = None
        if self._second_login == "parallel":
            ended = []
        return connection, replaced, [other for other in ended if self._end(other)]

    def closed(self, number, now):
        """Connection `number` ended. Returns it, or None if it was forgotten already."""
        connection = self.connections.pop(number, None)
        if connection is not None:
            session = connection.session
            session.connections.pop(number, None)
            # One that was pending never counted: it must not make the grace time longer.
            if connection.is_live and not session.live_connections:
                session.idle_since = now
        return connection

    def expire(self, now):
        """Ends sessions without connection whose grace time is over. Returns them."""
        over = [
            session
            for session in self
            if session.idle_since is not None
            and not session.connections
            and now - session.idle_since >= (self._grace if session.is_live else self._max_pending_seconds)
        ]
        return [session for session in over if self._end(session)]

    def end_revoked(self, revoked):
        """Ends sessions that have a connection whose certificate is in `revoked`. Returns them."""
        return self.end(
            session
            for session in self
            if any(connection.certificate in revoked for connection in session.connections.values())
        )

    def end_expired(self, now):
        """Ends sessions whose certificate has expired by `now`, aware datetime. Returns them.

        The newest with which a live connection was made counts, so that one that was renewed cuts nothing.
        """
        return self.end(
            session
            for session in self
            if session.live_connections and max(one.expires for one in session.live_connections) <= now
        )

    def end(self, sessions):
        """Ends those of the sessions that have not ended yet. Returns them."""
        return [session for session in sessions if self._end(session)]

    def _end(self, session):
        if self._by_id.pop(session.id, None) is None:
            return False
        session.is_ended = True
        self._pool.release(session.lease)
        return True
