"""HELLO, WELCOME and REFUSE: length-prefixed JSON inside TLS.

    client                                   server
      |------------- TLS 1.3, mutual ----------|
      | HELLO  ------------------------------->|  who joins what, and a random value
      |<------------------- WELCOME or REFUSE  |  session, token, index, random value, what is pushed
      |<------------ close_notify ------------>|
      |====== bulk frames, both ways ==========|

Each message is a 16-bit length and a JSON object of at most 16 KiB. A field that is missing or of the wrong type ends
the connection; one that is unknown is ignored, so that a later version may add some.
"""

import dataclasses
import ipaddress
import json
import re

from bulkvpnd.protocol.aead import CIPHERS
from bulkvpnd.protocol.errors import Refused, RemoteError
from bulkvpnd.protocol.keys import RANDOM_SIZE
from bulkvpnd.protocol.packet import OFFLOADS

VERSION = 1
ALPN = "bulkvpn/1"
PREFIX_SIZE = 2
MESSAGE_MAX = 16384
"""Bytes of JSON in a message (choice: a WELCOME with hundreds of routes fits)."""
SESSION_ID_SIZE = 16
TOKEN_SIZE = 32
CONNECTIONS_MAX = 64
POOL_PREFIX_MIN = 8
"""Bits (choice, also of the options pool-ipv4 and pool-ipv6): the client's kernel routes the whole prefix into the
tunnel, so with /0 a server could take all of its traffic unasked."""
ROUTES_MAX, DNS_MAX, DNS_SEARCH_MAX = 256, 8, 8
"""Pushed networks, name servers and search domains (choice: all of them at their longest fit a message)."""
DOMAIN_MAX = 253
"""Characters of a domain name (RFC 1035 section 2.3.4, without the root)."""
FRAME_SIZE_RANGE = (128 * 1024, 1024 * 1024)
"""Bytes of payload that both ends may agree on; the smaller wish counts."""
REKEY_BYTES_RANGE = (1 << 16, 1 << 36)
REKEY_INTERVAL_RANGE = (1, 86400)
"""Bytes of payload, and seconds, after which a sender replaces its key; the smaller wish counts (64 GiB are 2^32 blocks
of a cipher, far below where RFC 8446 section 5.5 asks for another key at this frame size)."""

REFUSALS = {
    # reason: (may the client try the same again later?, what it means, and what mends it)
    "version": (False, "it speaks another version of the protocol; install one version at both ends"),
    "cipher": (False, "it takes none of this end's ciphers; see the option cipher at both ends"),
    "busy": (True, "it has too much to do, or this client came too often"),
    "pool": (True, "every address of its pool is in use; there pool-ipv4 or pool-ipv6 has to be larger"),
    "session": (True, "it does not know the session any more"),
    "identity": (True, "a client of this name is connected already; there second-login says so"),
    "shutdown": (True, "it is stopping, or takes no new sessions for now"),
}


def encode(message):
    """A message object as the bytes that go over the wire, with their length in front."""
    body = json.dumps(message.to_json(), separators=(",", ":")).encode("ascii")
    return len(body).to_bytes(PREFIX_SIZE, "big") + body


def message_size(prefix):
    """Bytes of JSON that follow the 2 bytes `prefix`. Raises RemoteError before anything is stored for them."""
    size = int.from_bytes(prefix, "big")
    if not 2 <= size <= MESSAGE_MAX:
        raise RemoteError("handshake", f"a message of {size} bytes; 2 to {MESSAGE_MAX} are allowed")
    return size


def _unique(pairs):
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError
    return fields


def _no_constant(word):
    raise ValueError


def _object(body):
    try:
        # RFC 8259, sections 4 and 6: names that come twice are read differently by different readers, and NaN is no
        # number; Python takes both unless it is told.
        fields = json.loads(bytes(body).decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    # RecursionError: nesting as deep as 16 KiB of brackets.
    except (ValueError, RecursionError):
        raise RemoteError("handshake", "a message is not JSON") from None
    if not isinstance(fields, dict):
        raise RemoteError("handshake", "a message is not a JSON object")
    return fields


_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
"""RFC 1123 section 2.1; no underscore, no dot at the end: it goes into files that other programs read."""


def _is_elsewhere(address):
    """Whether an address can be another host's, beyond the link. One that stands for an IPv4 address is not asked."""
    own = address.is_multicast or address.is_loopback or address.is_unspecified or address.is_link_local
    return not (own or getattr(address, "ipv4_mapped", None))


def _network(text):
    # What ipaddress would take besides: no length at all, a mask for it, a zone behind a percent sign.
    if not re.fullmatch(r"[0-9a-fA-F.:]{2,45}/[0-9]{1,3}", text):
        raise ValueError
    value = ipaddress.ip_network(text)
    if value.prefixlen < POOL_PREFIX_MIN or not _is_elsewhere(value.network_address):
        raise ValueError
    return value


def _unicast_address(text):
    if not re.fullmatch(r"[0-9a-fA-F.:]{2,45}", text):
        raise ValueError
    value = ipaddress.ip_address(text)
    if not _is_elsewhere(value):
        raise ValueError
    return value


def _domain(text):
    if len(text) > DOMAIN_MAX or not _DOMAIN.fullmatch(text):
        raise ValueError
    return text


class _Fields:
    """Typed access to a JSON object; whatever is wrong becomes a RemoteError that names the field, not the value."""

    def __init__(self, message, fields):
        self._message = message
        self._fields = fields

    def _wrong(self, name, expected):
        return RemoteError("handshake", f"{self._message}: {name} should be {expected}")

    def _value(self, name):
        if name not in self._fields:
            raise RemoteError("handshake", f"{self._message}: {name} is missing")
        return self._fields[name]

    def integer(self, name, low, high):
        value = self._value(name)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, f"a whole number from {low} to {high}")
        return value

    def boolean(self, name):
        value = self._value(name)
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value

    def optional_integer(self, name, low, high):
        return None if self._value(name) is None else self.integer(name, low, high)

    def octets(self, name, size):
        value = self._value(name)
        if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", value):
            raise self._wrong(name, f"{size} bytes in lower-case hexadecimal")
        return bytes.fromhex(value)

    def optional_octets(self, name, size):
        return None if self._value(name) is None else self.octets(name, size)

    def word(self, name, known):
        value = self._value(name)
        if not isinstance(value, str) or value not in known:
            raise self._wrong(name, "one of " + ", ".join(known))
        return value

    def words(self, name, known):
        """Known words of a list, in its order; unknown ones are for later versions and left out."""
        value = self._value(name)
        if not isinstance(value, list) or len(value) > 64 or not all(isinstance(word, str) for word in value):
            raise self._wrong(name, "a list of at most 64 words")
        return tuple(dict.fromkeys(word for word in value if word in known))

    def offloads(self, name):
        """Words of OFFLOADS. Super-packets count only beside csum, because each of them lacks its checksum."""
        words = self.words(name, OFFLOADS)
        return words if "csum" in words else ()

    def _list(self, name, most, parse, expected):
        """What `parse`, which raises ValueError, makes of each text of a list; one that comes twice counts once."""
        value = self._value(name)
        try:
            if not isinstance(value, list) or len(value) > most or not all(isinstance(one, str) for one in value):
                raise ValueError
            return tuple(dict.fromkeys(parse(one) for one in value))
        except ValueError:
            raise self._wrong(name, f"a list of at most {most} {expected}") from None

    def networks(self, name, most):
        return self._list(name, most, _network, "unicast networks without host bits")

    def addresses(self, name, most):
        return self._list(name, most, _unicast_address, "unicast addresses")

    def domains(self, name, most):
        return self._list(name, most, _domain, "domain names of letters, digits, hyphens and dots")

    def interface(self, name, version):
        """An address with its prefix length, or None."""
        value = self._value(name)
        if value is None:
            return None
        cls = {4: ipaddress.IPv4Interface, 6: ipaddress.IPv6Interface}[version]
        try:
            # What ipaddress would take besides: a mask for the length, a zone behind a percent sign.
            if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F.:]{2,45}/[0-9]{1,3}", value):
                raise ValueError
            parsed = cls(value)
        except ValueError:
            raise self._wrong(name, f"an IPv{version} address and prefix length") from None
        address = parsed.ip
        if address.is_multicast or address.is_loopback or address.is_unspecified:
            raise self._wrong(name, f"a unicast IPv{version} address and prefix length")
        if parsed.network.prefixlen < POOL_PREFIX_MIN:
            raise self._wrong(name, f"an address with a prefix length of at least {POOL_PREFIX_MIN}")
        return parsed


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """What a client says first. session, token: None to begin a session. random: 32 bytes. offloads: what this
    end can take. frame_size: bytes. rekey_bytes, rekey_interval: for how many bytes and seconds a key may be used.
    replaces: this connection is to take over from one of the same index that lives."""

    session: bytes | None
    token: bytes | None = dataclasses.field(repr=False)
    index: int
    random: bytes = dataclasses.field(repr=False)
    ciphers: tuple
    connections: int
    frame_size: int
    offloads: tuple
    rekey_bytes: int
    rekey_interval: int
    replaces: bool

    def to_json(self):
        return {
            "version": VERSION,
            "session": self.session and self.session.hex(),
            "token": self.token and self.token.hex(),
            "index": self.index,
            "random": self.random.hex(),
            "ciphers": list(self.ciphers),
            "connections": self.connections,
            "frame_size": self.frame_size,
            "offload": list(self.offloads),
            "rekey_bytes": self.rekey_bytes,
            "rekey_interval": self.rekey_interval,
            "replaces": self.replaces,
        }

    @classmethod
    def decode(cls, body):
        """body: the JSON bytes. Raises RemoteError, or Refused("version") for a version that this end lacks."""
        fields = _Fields("HELLO", _object(body))
        if fields.integer("version", 0, 1 << 31) != VERSION:
            raise Refused("version", f"this end speaks version {VERSION} only")
        session = fields.optional_octets("session", SESSION_ID_SIZE)
        token = fields.optional_octets("token", TOKEN_SIZE)
        if (session is None) != (token is None):
            raise RemoteError("handshake", "HELLO: session and token go together")
        replaces = fields.boolean("replaces")
        if replaces and session is None:
            raise RemoteError("handshake", "HELLO: replaces a connection of no session")
        return cls(
            session=session,
            token=token,
            index=fields.integer("index", 0, CONNECTIONS_MAX - 1),
            random=fields.octets("random", RANDOM_SIZE),
            ciphers=fields.words("ciphers", tuple(CIPHERS)),
            connections=fields.integer("connections", 1, CONNECTIONS_MAX),
            frame_size=fields.integer("frame_size", *FRAME_SIZE_RANGE),
            offloads=fields.offloads("offload"),
            rekey_bytes=fields.integer("rekey_bytes", *REKEY_BYTES_RANGE),
            rekey_interval=fields.integer("rekey_interval", *REKEY_INTERVAL_RANGE),
            replaces=replaces,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer. ipv4, ipv6: the client's address with the pool's prefix length, or None. sndbuf, rcvbuf:
    bytes, or None for the kernel's autotuning. keepalive, keepalive_timeout, rekey_interval: seconds. frame_size, mtu,
    rekey_bytes: bytes.
    routes: networks behind the server, dns: addresses of name servers, dns_search: domain names. The client decides
    which of these it takes."""

    session: bytes
    token: bytes = dataclasses.field(repr=False)
    index: int
    random: bytes = dataclasses.field(repr=False)
    cipher: str
    connections: int
    frame_size: int
    offloads: tuple
    ipv4: ipaddress.IPv4Interface | None
    ipv6: ipaddress.IPv6Interface | None
    mtu: int
    sndbuf: int | None
    rcvbuf: int | None
    keepalive: int
    keepalive_timeout: int
    rekey_bytes: int
    rekey_interval: int
    routes: tuple = ()
    dns: tuple = ()
    dns_search: tuple = ()

    def to_json(self):
        return {
            "message": "WELCOME",
            "session": self.session.hex(),
            "token": self.token.hex(),
            "index": self.index,
            "random": self.random.hex(),
            "cipher": self.cipher,
            "connections": self.connections,
            "frame_size": self.frame_size,
            "offload": list(self.offloads),
            "ipv4": self.ipv4 and str(self.ipv4),
            "ipv6": self.ipv6 and str(self.ipv6),
            "mtu": self.mtu,
            "sndbuf": self.sndbuf,
            "rcvbuf": self.rcvbuf,
            "keepalive": self.keepalive,
            "keepalive_timeout": self.keepalive_timeout,
            "routes": [str(network) for network in self.routes],
            "dns": [str(address) for address in self.dns],
            "dns_search": list(self.dns_search),
            "rekey_bytes": self.rekey_bytes,
            "rekey_interval": self.rekey_interval,
        }

    @classmethod
    def decode(cls, body):
        """body: the JSON bytes. Raises RemoteError, or Refused when the server sent REFUSE."""
        fields = _Fields("WELCOME", _object(body))
        if fields.word("message", ("WELCOME", "REFUSE")) == "REFUSE":
            reason = fields.word("reason", tuple(REFUSALS))
            raise Refused(reason, f"the server refuses: {reason}: {REFUSALS[reason][1]}")
        welcome = cls(
            session=fields.octets("session", SESSION_ID_SIZE),
            token=fields.octets("token", TOKEN_SIZE),
            index=fields.integer("index", 0, CONNECTIONS_MAX - 1),
            random=fields.octets("random", RANDOM_SIZE),
            cipher=fields.word("cipher", tuple(CIPHERS)),
            connections=fields.integer("connections", 1, CONNECTIONS_MAX),
            frame_size=fields.integer("frame_size", *FRAME_SIZE_RANGE),
            offloads=fields.offloads("offload"),
            ipv4=fields.interface("ipv4", 4),
            ipv6=fields.interface("ipv6", 6),
            mtu=fields.integer("mtu", 1280, 65521),
            sndbuf=fields.optional_integer("sndbuf", 16384, 1 << 28),
            rcvbuf=fields.optional_integer("rcvbuf", 16384, 1 << 28),
            keepalive=fields.integer("keepalive", 1, 3600),
            keepalive_timeout=fields.integer("keepalive_timeout", 2, 7200),
            routes=fields.networks("routes", ROUTES_MAX),
            dns=fields.addresses("dns", DNS_MAX),
            dns_search=fields.domains("dns_search", DNS_SEARCH_MAX),
            rekey_bytes=fields.integer("rekey_bytes", *REKEY_BYTES_RANGE),
            rekey_interval=fields.integer("rekey_interval", *REKEY_INTERVAL_RANGE),
        )
        if welcome.ipv4 is None and welcome.ipv6 is None:
            raise RemoteError("handshake", "WELCOME: has no address")
        return welcome


@dataclasses.dataclass(frozen=True, slots=True)
class Refuse:
    """reason: one of REFUSALS."""

    reason: str

    def to_json(self):
        return {"message": "REFUSE", "reason": self.reason}


def agree_cipher(preferred, offered):
    """The first of the server's preference that the client offers. Raises Refused("cipher")."""
    for cipher in preferred:
        if cipher in offered:
            return cipher
    raise Refused("cipher", "no cipher in common")
