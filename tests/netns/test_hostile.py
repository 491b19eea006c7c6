"""Bad input from the network: that connection ends with one clear log line, and nothing else is touched.

A healthy client stays connected all the time, while a stranger, and later a client with a good certificate and bad
manners, does one thing wrong at a time.
"""

import collections
import ipaddress
import re
import socket
import ssl
import struct
import time

import pytest
from harness import wait_until
from rawclient import RawClient

from bulkvpnd.protocol import frame, handshake, packet
from bulkvpnd.protocol.aead import TAG_SIZE
from bulkvpnd.protocol.errors import Refused, RemoteError
from bulkvpnd.service import RATE_BURST, RATE_PERIOD

FRAME_SIZE = 256 << 10


# What a stranger does, from the first byte on


def says_nothing(raw):
    """Until the server loses patience."""


def sends(data):
    return lambda raw: raw.socket.sendall(data)


def leaves_in_the_middle(raw):
    raw.socket.sendall(b"\x16\x03\x01\x02\x00\x01")
    raw.socket.shutdown(socket.SHUT_WR)


def has_no_certificate(raw):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([handshake.ALPN])
    # In TLS 1.3 a client is through before the server has looked at its certificate.
    raw.authenticate(context)


def has_certificate_of_another_authority(raw):
    context = raw.context("elsewhere")
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    raw.authenticate(context)


def has_certificate_of_a_server(raw):
    raw.authenticate(raw.context("impostor"))


def speaks_tls_1_2(raw):
    context = raw.context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(RemoteError, match="ALERT_PROTOCOL_VERSION"):
        raw.authenticate(context)


def speaks_another_protocol(raw):
    context = raw.context()
    context.set_alpn_protocols(["h2"])
    with pytest.raises(RemoteError, match="does not speak"):
        raw.authenticate(context)


# What a client does wrong in HELLO


def says(body):
    return lambda raw: raw.send_message(body)


def says_hello(**fields):
    return lambda raw: raw.send_hello(**fields)


def announces_more_than_allowed(raw):
    raw.send_message(bytes(handshake.MESSAGE_MAX + 1))


def leaves_in_the_middle_of_hello(raw):
    raw.send_in_tls(b"\x00\x50{")
    raw.socket.shutdown(socket.SHUT_WR)


# What a client does wrong with frames, once it is in


def cuts_a_frame_off(raw):
    raw.send(raw.seal(frame.PING, bytes(8))[:-5])
    raw.socket.shutdown(socket.SHUT_WR)


def changes_a_byte(raw):
    sealed = bytearray(raw.seal(frame.PING, bytes(8)))
    sealed[-1] ^= 1
    raw.send(sealed)


def changes_the_type(raw):
    sealed = bytearray(raw.seal(frame.PING, bytes(8)))
    sealed[0] = frame.PONG
    raw.send(sealed)


def replays(raw):
    sealed = raw.seal(frame.PING, bytes(8))
    raw.send(sealed)
    raw.receive_until(frame.PONG)
    raw.send(sealed)


def leaves_one_out(raw):
    raw.seal(frame.PING, bytes(8))
    raw.send(raw.seal(frame.PING, bytes(8)))


def swaps(raw):
    one, two = raw.seal(frame.PING, bytes(8)), raw.seal(frame.PING, bytes(8))
    raw.send(two, one)


def reflects(raw):
    """What the server said itself, at the same place of the other direction."""
    while raw.frames_sent < raw.frames_received:
        raw.send(raw.seal(frame.CONTROL, b""))
    raw.send(raw.receive_sealed())


def sends_what_another_connection_said(raw):
    with RawClient(raw.network, "mallory") as other:
        other.join(session=raw.welcome.session.hex(), token=raw.welcome.token.hex(), index=1)
        while other.frames_sent < raw.frames_sent:
            assert other.ping()
        # The same counter, and keys of another handshake.
        raw.send(other.seal(frame.PING, bytes(8)))
        leave(other)


def goes_on_with_an_old_key(raw):
    """After REKEY, without going on to the next traffic secret."""
    raw.send(raw.seal(frame.REKEY, b""), raw.seal(frame.PING, bytes(8)))


def replaces_its_key_all_the_time(raw):
    frames = []
    for _ in range(1000):
        frames.append(raw.seal(frame.REKEY, b""))
        raw._sealer.ratchet()
    raw.send(*frames)


# What a client does wrong in the payload of DATA: each is one change to what works


def echo_request(source):
    """An ICMP echo request (RFC 792, RFC 4443) to the server's inner address of the same version."""
    source = ipaddress.ip_address(source)
    if source.version == 6:
        icmp = bytearray(struct.pack(">BBHHH", 128, 0, 0, 1, 1) + b"is anybody there")
        pair = source.packed + ipaddress.ip_address("fd86::1").packed
        # RFC 8200 section 8.1: the pseudo-header counts too.
        struct.pack_into(">H", icmp, 2, checksum(pair + struct.pack(">II", len(icmp), 58) + icmp))
        return struct.pack(">IHBB", 6 << 28, len(icmp), 58, 64) + pair + bytes(icmp)
    icmp = bytearray(struct.pack(">BBHHH", 8, 0, 0, 1, 1) + b"is anybody there")
    struct.pack_into(">H", icmp, 2, checksum(icmp))
    ip = bytearray(struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 0, 0, 64, 1, 0,
                               source.packed, ipaddress.ip_address("10.86.0.1").packed))
    struct.pack_into(">H", ip, 10, checksum(ip))
    return bytes(ip + icmp)


def checksum(data):
    """RFC 1071, of an even number of bytes."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    return ~(total % 0xFFFF) & 0xFFFF


def entry(ip, vnet=packet.VNET_NONE, lie=0):
    return struct.pack(">I", len(vnet + ip) + lie) + vnet + ip


def puts(payload):
    return lambda raw: raw.send(raw.seal(frame.DATA, payload))


def puts_entry(vnet=(0,) * 6, lie=0):
    return lambda raw: puts(entry(echo_request(raw.ipv4), packet.VNET.pack(*vnet), lie))(raw)


CASES = {
    # stage: {case: (what is done, what the log says)}. Each stage has at most as many cases as the log's rate limit
    # lets through at once.
    "stranger": {
        "says nothing": (says_nothing, "no complete handshake within 2 s"),
        "garbage": (sends(bytes(range(1, 256)) * 16), "TLS: "),
        "broken TLS": (sends(b"\x16\x03\x01\x00\x80\x01\x00\x00\x7c\x03\x03" + bytes(123)), "TLS: "),
        "frame without handshake": (sends(frame.pack_header(frame.PING, 8) + bytes(8 + TAG_SIZE)), "TLS: "),
        "cut off": (leaves_in_the_middle, "the peer closed the connection during the handshake"),
        "no certificate": (has_no_certificate, "TLS: PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        "another authority": (has_certificate_of_another_authority, "the peer's certificate: .+"),
        "certificate of a server": (has_certificate_of_a_server, "the peer's certificate: .+"),
        "TLS 1.2": (speaks_tls_1_2, "TLS: UNSUPPORTED_PROTOCOL"),
        "another protocol": (speaks_another_protocol, f"the peer does not speak {handshake.ALPN}"),
    },
    "HELLO": {
        "not JSON": (says(b"GET / HTTP/1.1\r\n\r\n"), "a message is not JSON"),
        "nested": (says(b"[" * 16000), "a message is not JSON"),
        "not an object": (says(b'["version", 1]'), "a message is not a JSON object"),
        "wrong type": (says_hello(index="0"), "HELLO: index should be a whole number from 0 to 63"),
        "true is no number": (says_hello(connections=True), "HELLO: connections should be a whole number"),
        "half a random value": (says_hello(random="00" * 16), "HELLO: random should be 32 bytes"),
        "session without token": (says_hello(session="00" * 16), "HELLO: session and token go together"),
        "too large": (announces_more_than_allowed, "a message of 16385 bytes; 2 to 16384 are allowed"),
        "cut off": (leaves_in_the_middle_of_hello, "before it asked for a session"),
        "index too high": (says_hello(index=4), "HELLO: index beyond the number of connections"),
    },
    "frame": {
        "truncated": (cuts_a_frame_off, "the peer closed it without CLOSE"),
        "oversized": (sends(frame.pack_header(frame.DATA, FRAME_SIZE + 1)), "DATA frame of .+ outside"),
        "huge": (sends(b"\x01\xff\xff\xff"), "DATA frame of 16777215 bytes, outside"),
        "zero length": (sends(b"\x01\x00\x00\x00"), "DATA frame of 0 bytes, outside"),
        "unknown type": (sends(b"\x63\x00\x00\x20" + bytes(32)), "unknown frame type 99"),
        "not sealed": (sends(frame.pack_header(frame.PING, 8) + bytes(8 + TAG_SIZE)), "a frame is not authentic"),
        "changed byte": (changes_a_byte, "a frame is not authentic"),
        "changed type": (changes_the_type, "a frame is not authentic"),
    },
    "frame out of place": {
        "replayed": (replays, "a frame is not authentic"),
        "one left out": (leaves_one_out, "a frame is not authentic"),
        "swapped": (swaps, "a frame is not authentic"),
        "reflected": (reflects, "a frame is not authentic"),
        "of another connection": (sends_what_another_connection_said, "a frame is not authentic"),
        "old key": (goes_on_with_an_old_key, "a frame is not authentic"),
        "new keys": (replaces_its_key_all_the_time, "the peer replaces its key before it is due"),
    },
    "entry": {
        "none": (puts(b""), "DATA frame without a packet"),
        "cut off": (puts(b"\x00\x00"), "an entry is cut off"),
        "lies high": (puts_entry(lie=1), "an entry's length is wrong"),
        "lies low": (puts_entry(lie=-30), "an entry's length is wrong"),
        "lies very high": (puts_entry(lie=0xFFFFFF00), "an entry's length is wrong"),
        "of zero bytes": (puts(bytes(4)), "an entry's length is wrong"),
        "unknown flags": (puts_entry((0x80, 0, 0, 0, 0, 0)), "virtio_net_hdr: unknown flags"),
        "unknown super-packet": (puts_entry((1, 0x7F, 0, 100, 20, 2)), "virtio_net_hdr: unknown type of super-packet"),
        "checksum outside": (puts_entry((1, 0, 0, 0, 20, 1000)), "virtio_net_hdr: checksum outside the packet"),
    },
}


def mallory_is_in(raw):
    raw.join()
    assert raw.ping()


END = "( turned away: | refused: | ended: | left )"
"""How a line of the log goes on that tells of a connection's end."""
BEFORE = {"stranger": lambda raw: None, "HELLO": RawClient.authenticate, "frame": mallory_is_in,
          "frame out of place": mallory_is_in, "entry": mallory_is_in}  # fmt: skip


class Watched:
    """The server and a healthy client, and what may not change on them.

    drops: packets that have to be dropped meanwhile, by cause.
    """

    def __init__(self, network, server, client):
        self.network = network
        self._server = server
        self._client = client
        self.drops = collections.Counter()
        self._log_size = len(server.text())
        self._before = self._picture()

    def _picture(self):
        status = self._server.status()
        (session,) = [one for one in status["sessions"] if one["identity"] == "client"]
        return {
            "drops": status["drops"],
            "workers": [(one["pid"], one["restarts"], one["alive"]) for one in status["workers"]],
            "session": (session["session"], session["addresses"]),
            "connections": [(one["connection"], one["peer"], one["worker"]) for one in session["connections"]],
            "client's": [(one["connection"], one["worker"]) for one in self._client.connections()],
        }

    def wait_routed(self, raw):
        """Waits until answers find their way: the workers learn it from the main process."""
        wait_until(lambda: raw.address in {one["peer"] for one in self._server.connections()}, 10, "it is routed")

    def check(self):
        """That nothing else changed."""
        for cause, count in self.drops.items():
            self._before["drops"][cause] += count
        assert self._picture() == self._before
        assert self.network.ping(), "the healthy client has no answer"
        assert not self.lines("ERROR|Traceback")

    def lines(self, pattern):
        return [line for line in self._server.text()[self._log_size :].splitlines() if re.search(pattern, line)]

    def one_line(self, pattern):
        """Waits for a line with `pattern`. Returns it; fails if there is another."""
        wait_until(lambda: self.lines(pattern), 10, f"a line with {pattern}")
        lines = self.lines(pattern)
        assert len(lines) == 1, lines
        return lines[0]


@pytest.fixture(scope="module")
def tunnels(shared_network):
    """A function that gives the server and the healthy client of a stage: a fresh log, with all of its rate limit."""
    running = {}

    def stop():
        for daemon in reversed(running.popitem()[1] if running else ()):
            assert daemon.stop() == 0

    def of(stage):
        if stage not in running:
            stop()
            server = shared_network.start_server("--handshake-timeout=2").wait_ready()
            running[stage] = server, shared_network.start_client().wait_ready()
            running[stage][1].wait_connections(4)
        return running[stage]

    assert all(len(cases) <= RATE_BURST for cases in CASES.values())
    yield of
    stop()


@pytest.fixture(scope="module")
def strangers(shared_network):
    """Identities besides the healthy client's: two good ones, one of another authority, one with a server's."""
    for name in ("mallory", "eve"):
        shared_network.add_client(name)
    directory = shared_network.directory
    elsewhere = directory / "elsewhere"
    shared_network.pki("init", "--pool-ipv4", "10.86.0.0/24", directory=elsewhere)
    shared_network.pki("add", "mallory", "--remote", "192.0.2.1", "--output", str(directory / "elsewhere.conf"),
                       directory=elsewhere)
    impostor, server = ((directory / name).read_text() for name in ("mallory.conf", "server.conf"))
    for block in (r"<certificate>.*</certificate>", r"<key>.*</key>"):
        impostor = re.sub(block, re.search(block, server, re.DOTALL)[0], impostor, flags=re.DOTALL)
    (directory / "impostor.conf").touch(0o600)
    (directory / "impostor.conf").write_text(impostor)


@pytest.fixture
def stage():
    """For tests that are not of the table: the one that still runs behind it."""
    return list(CASES)[-1]


@pytest.fixture
def watched(shared_network, tunnels, strangers, stage):
    made = Watched(shared_network, *tunnels(stage))
    yield made
    made.check()


@pytest.mark.parametrize(("stage", "case"), [(stage, case) for stage, cases in CASES.items() for case in cases])
def test_ends_that_connection_and_nothing_else(watched, stage, case):
    act, reason = CASES[stage][case]
    with RawClient(watched.network, "mallory") as raw:
        BEFORE[stage](raw)
        act(raw)
        assert raw.ended()
    assert re.search(END + reason, watched.one_line(re.escape(raw.address) + END))


@pytest.mark.parametrize("wrong", ["token", "certificate", "session"])
def test_joining_needs_session_certificate_and_token(watched, wrong):
    with RawClient(watched.network, "mallory") as first, RawClient(watched.network, "mallory") as good:
        welcome = first.join()
        assert first.ping()
        ticket = {"session": welcome.session.hex(), "token": welcome.token.hex(), "index": 1}
        assert good.join(**ticket).index == 1 and good.ping()

        bad = {"token": {"token": "00" * 32}, "session": {"session": "00" * 16}, "certificate": {}}[wrong]
        with RawClient(watched.network, "eve" if wrong == "certificate" else "mallory") as raw:
            with pytest.raises(Refused, match="session"):
                raw.join(**{**ticket, **bad})
            assert raw.ended()
        assert watched.one_line(re.escape(raw.address) + END).endswith("no such session")
        assert first.ping() and good.ping()
        leave(first, good)


def leave(*raws):
    for raw in raws:
        raw.send(raw.seal(frame.CLOSE, b"done"))
        assert raw.ended()


@pytest.mark.parametrize(("fields", "reason"), [({"version": 2}, "version"), ({"ciphers": ["rot13"]}, "cipher")])
def test_what_cannot_be_agreed_is_refused_by_name(watched, fields, reason):
    with RawClient(watched.network, "mallory") as raw:
        with pytest.raises(Refused, match=reason):
            raw.join(**fields)
        assert raw.ended()
    assert " refused: " in watched.one_line(re.escape(raw.address) + END)


FOREIGN = {
    "of another client": ("10.86.0.2", "fd86::2"),
    "of the server": ("10.86.0.1", "fd86::1"),
    "unknown": ("192.0.2.2", "2001:db8::2"),
    "the network": ("10.86.0.0", "fd86::"),
    "broadcast": ("10.86.0.255", "255.255.255.255"),
    "multicast": ("224.0.0.1", "ff02::1"),
    "loopback": ("127.0.0.1", "::1"),
    "link-local": ("169.254.1.1", "fe80::1"),
    "unspecified": ("0.0.0.0", "::"),
    "IPv4 in IPv6": ("::ffff:10.86.0.2", "64:ff9b::10.86.0.2"),
}


@pytest.mark.parametrize("source", FOREIGN)
def test_foreign_source_is_dropped_and_counted(watched, source):
    with RawClient(watched.network, "mallory") as raw:
        mallory_is_in(raw)
        watched.wait_routed(raw)
        # The same packet from the right source works, so what follows fails for its source alone.
        for own in (raw.ipv4, str(raw.welcome.ipv6.ip)):
            raw.send(raw.seal(frame.DATA, entry(echo_request(own))))
            assert echo_request(own)[-16:] in raw.receive_until(frame.DATA)

        watched.drops["no_source" if source == "unspecified" else "foreign_source"] += 2
        raw.send(raw.seal(frame.DATA, b"".join(entry(echo_request(address)) for address in FOREIGN[source])))
        assert raw.ping(), "the connection should go on"
        leave(raw)


def test_log_of_strangers_is_limited(watched):
    begun = time.monotonic()
    for _ in range(3 * RATE_BURST):
        with RawClient(watched.network, "mallory") as raw:
            raw.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert raw.ended()
    written = len(watched.lines("turned away"))
    assert written <= RATE_BURST * (1 + (time.monotonic() - begun) / RATE_PERIOD)
