"""HELLO, join, first frame and lease as one machine: real messages, keys, frames and leases, in any order, and somebody
on the path who repeats whatever was ever sent and has a valid certificate of their own.

What TLS does is assumed: it says whose certificate it is, and nobody else reads or writes inside it.
"""

import contextlib
import dataclasses
import ipaddress
import pathlib
import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from bulkvpnd.control.pool import Pool
from bulkvpnd.control.session import Sessions
from bulkvpnd.protocol import frame, handshake, keys
from bulkvpnd.protocol.aead import SLACK, TAG_SIZE
from bulkvpnd.protocol.errors import Refused, RemoteError

GRACE, PENDING = 30, 5
NETWORK = ipaddress.ip_network("10.86.0.0/29")  # five addresses for clients
HONEST = ("alice", "bob")
IDENTITIES = st.sampled_from((*HONEST, "mallory"))


@dataclasses.dataclass(eq=False)
class End:
    """The client's end of a connection, and what the server has of it."""

    identity: str
    hello: handshake.Hello
    welcome: handshake.Welcome
    sealer: keys.Sealer
    opener: keys.Opener
    connection: object
    sent: list = dataclasses.field(default_factory=list)  # frames, as they were sealed
    taken: int = 0  # frames that the server took


class AnyOrder(RuleBasedStateMachine):
    ends = Bundle("ends")

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.path = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()), "leases.json")
        self.randoms = 0
        self.now = 0.0
        self.hellos = []  # bytes that were ever sent inside a TLS
        self.frames = [bytes(TAG_SIZE + 4)]
        self.restart()

    def teardown(self):
        self.stack.close()

    def random(self, size):
        self.randoms += 1
        return self.randoms.to_bytes(size, "big")

    @rule()
    def restart(self):
        """The server begins anew: it knows leases, and no session of before."""
        self.sessions = Sessions(Pool([NETWORK], self.path), GRACE, 2, PENDING)
        self.up = []
        self.proven = set()  # numbers of sessions of which a frame has opened

    # What a server and its workers do.

    def serve(self, identity, body):
        """(session, connection, welcome) for a HELLO that came in the TLS of `identity`. Raises Refused."""
        hello = handshake.Hello.decode(body)
        if hello.session is None:
            terms = {"connections": hello.connections}
            session = self.sessions.begin(identity, self.random(16), self.random(32), terms, "source", self.now)
        else:
            session = self.sessions.join(identity, hello.session, hello.token, hello.index)
        connection = self.sessions.add(session, hello.index, "peer", self.now)
        return session, connection, handshake.Welcome(
            session=session.id, token=session.token, index=hello.index, random=self.random(32), cipher="aes-256-gcm",
            connections=session.terms["connections"], frame_size=hello.frame_size, offloads=(),
            ipv4=session.interfaces[4], ipv6=None, mtu=1400, sndbuf=None, rcvbuf=None, keepalive=10,
            keepalive_timeout=30, rekey_bytes=1 << 36, rekey_interval=900,
        )  # fmt: skip

    def receive(self, end, sealed):
        """A frame, header and all, comes in on a connection. Returns whether it was taken."""
        out = memoryview(bytearray(len(sealed) + SLACK))
        try:
            kind, size = frame.unpack_header(sealed, 0, 1 << 17)
            if size != len(sealed) - frame.HEADER_SIZE:
                raise RemoteError("length", "cut off")
            end.opener.open_into(sealed[: frame.HEADER_SIZE], memoryview(sealed)[frame.HEADER_SIZE :], out)
        except RemoteError:
            self.close(end)
            return False
        end.taken += 1
        assert sealed == end.sent[end.taken - 1]
        self.proven.add(end.connection.session.number)
        result = self.sessions.established(end.connection.number)
        if result:
            _, replaced, ended = result
            gone = [*replaced, *(one for session in ended for one in session.connections.values())]
            for other in [other for other in self.up if other.connection in gone]:
                self.close(other)
        connection = end.connection
        assert connection.is_live or connection.session.is_ended or connection.number not in self.sessions.connections
        return True

    def close(self, end):
        self.sessions.closed(end.connection.number, self.now)
        if end in self.up:
            self.up.remove(end)

    # What clients do.

    def dial(self, identity, session, token, index):
        hello = handshake.Hello(session, token, index, self.random(32), ("aes-256-gcm",), 2, 1 << 17, (),
                                1 << 36, 900, False)
        body = handshake.encode(hello)[handshake.PREFIX_SIZE :]
        self.hellos.append(body)
        before = self.live()
        try:
            _, connection, welcome = self.serve(identity, body)
        except Refused:
            assert self.live() == before
            return multiple()
        assert self.live() == before, "half a handshake changed something"
        answer = handshake.encode(welcome)[handshake.PREFIX_SIZE :]
        secret = keys.traffic_secrets(body, answer, hello.random, welcome.random)[keys.CLIENT_TO_SERVER]
        end = End(identity, hello, welcome, keys.Sealer(welcome.cipher, secret), keys.Opener(welcome.cipher, secret),
                  connection)
        self.up.append(end)
        return end

    @rule(target=ends, identity=IDENTITIES, index=st.integers(0, 1))
    def begin(self, identity, index):
        return self.dial(identity, None, None, index)

    @rule(target=ends, end=ends, index=st.integers(0, 1))
    def join(self, end, index):
        return self.dial(end.identity, end.welcome.session, end.welcome.token, index)

    @rule(end=ends, bit=st.integers(0, 255))
    def join_with_a_wrong_token(self, end, bit):
        token = (int.from_bytes(end.welcome.token, "big") ^ 1 << bit).to_bytes(32, "big")
        assert not isinstance(self.dial(end.identity, end.welcome.session, token, 0), End)

    @rule(target=ends, end=ends, token=st.booleans(), index=st.integers(0, 3))
    def join_with_somebody_elses(self, end, token, index):
        """Whoever knows a session, even with its token, and has another certificate."""
        identity = "mallory" if end.identity != "mallory" else "bob"
        made = self.dial(identity, end.welcome.session, end.welcome.token if token else bytes(32), index)
        assert not isinstance(made, End), f"{identity} joined a session of {end.identity}"
        return multiple()

    @rule(end=ends, arrives=st.booleans())
    def send(self, end, arrives):
        payload = self.random(8)
        header = frame.pack_header(frame.PING, len(payload))
        out = memoryview(bytearray(len(payload) + TAG_SIZE + SLACK))
        sealed = header + bytes(out[: end.sealer.seal_into(header, payload, out)])
        end.sent.append(sealed)
        self.frames.append(sealed)
        if arrives and end in self.up:
            lost = len(end.sent) - 1 - end.taken
            assert self.receive(end, sealed) == (not lost), "a frame is taken in its turn, and in no other"

    # What somebody on the path does.

    @rule(end=ends)
    def repeat_a_frame_at_once(self, end):
        self.send(end, True)
        if end in self.up:
            assert not self.receive(end, end.sent[-1]), "a frame was taken twice"

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def repeat_a_frame(self, data):
        """Any frame of any connection on any connection: only the next one of that very connection is taken."""
        end = data.draw(st.sampled_from(self.up))
        sealed = data.draw(st.sampled_from(end.sent or self.frames) | st.sampled_from(self.frames))
        expected = end.sent[end.taken : end.taken + 1] == [sealed]
        before = self.live()
        others = {key: value for key, value in before.items() if key != end.connection.number}
        assert self.receive(end, sealed) == expected
        if not expected:
            assert {key: value for key, value in self.live().items() if key != end.connection.number} == others

    @precondition(lambda self: self.hellos)
    @rule(data=st.data())
    def repeat_a_hello(self, data):
        """In a TLS of their own, since they have no other's: it makes at most a connection of their own."""
        before, body = self.live(), data.draw(st.sampled_from(self.hellos))
        try:
            session, connection, _ = self.serve("mallory", body)
        except Refused:
            pass
        else:
            assert session.identity == "mallory"
            self.sessions.closed(connection.number, self.now)
        assert self.live() == before

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def cut(self, data):
        self.close(data.draw(st.sampled_from(self.up)))

    @rule(seconds=st.sampled_from([0.5, PENDING, GRACE]))
    def pass_time(self, seconds):
        self.now += seconds
        self.sessions.expire(self.now)

    def live(self):
        """{number of a live connection: (whose, session, index, address)}"""
        return {
            number: (one.session.identity, one.session.number, one.index, one.session.interfaces[4])
            for number, one in self.sessions.connections.items()
            if one.is_live
        }

    @invariant()
    def only_a_frame_of_its_own_made_a_session_live(self):
        assert {session.number for session in self.sessions if session.is_live} <= self.proven

    @invariant()
    def one_owner_for_each_address(self):
        owners = {}
        for session in self.sessions:
            assert owners.setdefault(session.interfaces[4], session.identity) == session.identity

    @invariant()
    def one_live_connection_for_each_index(self):
        places = [(session, index) for _, session, index, _ in self.live().values()]
        assert len(set(places)) == len(places)


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
