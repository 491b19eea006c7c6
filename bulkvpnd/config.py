"""The one table of options, and what is made from it.

Every option is a key of ``/etc/bulkvpn/NAME.conf`` and a flag of bulkvpnd(8). The parser, ``--help``, the commented
example files in ``etc/bulkvpn/`` and the check of the man page all come from `OPTIONS`.

    file, command line --> ConfigArgParse --> raw strings --> Option.parse --> Configuration (frozen)

An error names file, line, key and value and says what would be right; the callers end with exit status 78 (EX_CONFIG
of sysexits.h(3)) for the file and 64 (EX_USAGE) for the command line, before anything on the machine is touched.
"""

import argparse
import dataclasses
import errno
import ipaddress
import os
import pathlib
import re
import stat
from collections import OrderedDict
from collections.abc import Callable

import configargparse

from bulkvpnd import __version__

CONFIGURATION_DIRECTORY = pathlib.Path("/etc/bulkvpn")
DEFAULT_PORT = 7443
"""Choice: above 1023, so that the service needs no CAP_NET_BIND_SERVICE, and free in Debian's /etc/services."""

FRAME_SIZE_MIN = 128 * 1024
"""Bytes; a frame must hold one super-packet (64 KiB) and leave room to fill the rest from the next batch."""
FRAME_SIZE_MAX = 1024 * 1024
MULTIPATH_WEIGHT_MAX = 256
"""What every kernel with several next hops can have (struct nexthop_grp of linux/nexthop.h)."""
MAX_FILE_SIZE = 1024 * 1024
"""Bytes of a configuration, certificate or key file; more is a mistake (choice)."""

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What an identity may be called: printable in any log and safe as a file name."""


class ConfigurationError(Exception):
    """A configuration that cannot be used.

    message: one line for the administrator. on_command_line: a flag is to blame, not a file.
    """

    def __init__(self, message, on_command_line=False):
        # Arguments and file names may hold control characters; the message stays one line.
        super().__init__("".join(one if one.isprintable() else ascii(one)[1:-1] for one in message))
        self.on_command_line = on_command_line


# Kinds of value: each turns the raw string into the value, or raises ValueError with what would be right.


def choice(*values):
    def parse(raw):
        if raw not in values:
            raise ValueError("one of: " + ", ".join(values))
        return raw

    return parse


def boolean(raw):
    """yes or no."""
    if raw not in ("yes", "no"):
        raise ValueError("yes or no")
    return raw == "yes"


def integer(low, high, unit=""):
    expected = f"a whole number{' of ' + unit if unit else ''} from {low} to {high}"

    def parse(raw):
        if not re.fullmatch(r"[0-9]{1,18}", raw) or not low <= int(raw) <= high:
            raise ValueError(expected)
        return int(raw)

    return parse


def _scaled(units, low, high, expected):
    pattern = re.compile(r"([0-9]{1,18})\s*(" + "|".join(filter(None, units)) + ")?")

    def parse(raw):
        match = pattern.fullmatch(raw)
        value = int(match[1]) * units[match[2] or ""] if match else -1
        if not low <= value <= high:
            raise ValueError(expected)
        return value

    return parse


def size(low, high):
    """Bytes; K, M and G are powers of 1024."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return _scaled(units, low, high, f"a number of bytes from {low} to {high}; K, M or G may follow")


def duration(low, high):
    """Seconds; s, m, h and d may follow."""
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
    return _scaled(units, low, high, f"a number of seconds from {low} to {high}; s, m, h or d may follow")


def or_auto(parse):
    """The value `parse` makes, or None for ``auto``."""

    def with_auto(raw):
        if raw == "auto":
            return None
        try:
            return parse(raw)
        except ValueError as error:
            raise ValueError(f"auto, or {error}") from None

    return with_auto


def early_drop(raw):
    """START:RATE:FULL as three integers, or N as N:100:N: MaxStartups of sshd_config(5)."""
    match = re.fullmatch(r"([0-9]{1,5})(?::([0-9]{1,3}):([0-9]{1,5}))?", raw)
    start, rate, full = (int(one or 0) for one in match.groups()) if match else (0, 0, 0)
    if match and match[2] is None:
        rate, full = 100, start
    if not (1 <= start <= full <= 10000 and 1 <= rate <= 100):
        raise ValueError("START:RATE:FULL, connections, percent, connections, or one number of connections, "
                         "from 1 to 10000, for example 64:30:256")
    return start, rate, full


def endpoint(raw):
    """HOST, HOST:PORT, [IPV6] or [IPV6]:PORT as (host, port)."""
    expected = "HOST[:PORT], with an IPv6 address in brackets, for example vpn.example.org:7443 or [2001:db8::1]:7443"
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([A-Za-z0-9._-]+|\*))(?::([0-9]{1,5}))?", raw)
    if not match:
        raise ValueError(expected)
    port = int(match[3]) if match[3] else DEFAULT_PORT
    if not 1 <= port <= 65535:
        raise ValueError(expected)
    if match[1]:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            raise ValueError(expected) from None
    return (match[1] or match[2], port)


def socket_address(raw):
    """ADDRESS:PORT or [IPV6]:PORT, numbers only, as (address, port)."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", raw)
    try:
        address = str(ipaddress.IPv6Address(match[1]) if match[1] else ipaddress.IPv4Address(match[2]))
        if not 1 <= int(match[3]) <= 65535:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError("ADDRESS:PORT in numbers, for example 127.0.0.1:9743 or [::1]:9743") from None
    return (address, int(match[3]))


def network(version, longest):
    cls = {4: ipaddress.IPv4Network, 6: ipaddress.IPv6Network}[version]
    example = {4: "10.86.0.0/24", 6: "fd86:1:2:3::/64"}[version]
    expected = f"an IPv{version} network with no host bits set, /{longest} or larger, for example {example}"

    def parse(raw):
        try:
            value = cls(raw)
        except ValueError:
            raise ValueError(expected) from None
        if value.prefixlen > longest or value.prefixlen < 8 or value.is_multicast or value.is_loopback:
            raise ValueError(expected)
        return value

    return parse


def pushed_network(raw):
    """A network of either version that a client can be told to route into the tunnel."""
    try:
        value = ipaddress.ip_network(raw) if "/" in raw and "%" not in raw else None
    except ValueError:
        value = None
    if value is None or value.prefixlen < 8 or not _is_elsewhere(value.network_address):
        raise ValueError("a network with no host bits set, /8 or smaller, for example 192.168.7.0/24 or fd00:7::/64")
    return value


PRIVATE = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))
"""RFC 1918, RFC 4193: a server that may push routes to these takes nothing of the Internet."""


def any_network(raw):
    """A network of either version, of any size."""
    try:
        value = ipaddress.ip_network(raw) if "/" in raw and "%" not in raw else None
    except ValueError:
        value = None
    if value is None or value.is_multicast:
        raise ValueError("a network with no host bits set, for example 192.168.7.0/24 or fd00:7::/64")
    return value


def route_policy(raw):
    """Networks: a tuple, since one word may stand for several."""
    words = {"private": PRIVATE, "none": ()}
    if raw in words:
        return words[raw]
    try:
        return (any_network(raw),)
    except ValueError as error:
        raise ValueError(f"private, none, or {error}") from None


def name_server(raw):
    try:
        value = ipaddress.ip_address(raw)
    except ValueError:
        value = None
    if value is None or "%" in raw or not _is_elsewhere(value):
        raise ValueError("the IP address of a name server, for example 10.86.0.1; no loopback or link-local address")
    return value


def _is_elsewhere(address):
    """As bulkvpnd.protocol.handshake has it: what clients would not take is refused before it is pushed."""
    own = address.is_multicast or address.is_loopback or address.is_unspecified or address.is_link_local
    return not (own or getattr(address, "ipv4_mapped", None))


def domain(raw):
    """A domain name: labels of RFC 1123 section 2.1, at most 253 characters."""
    label = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    if len(raw) > 253 or not re.fullmatch(rf"{label}(?:\.{label})*", raw):
        raise ValueError("a domain name of letters, digits, hyphens and dots, for example example.org")
    return raw


@dataclasses.dataclass(frozen=True, slots=True)
class Multipath:
    """A prefix that this instance carries together with others. weight: its share. source: address, or None."""

    prefix: object
    weight: int
    source: object

    def __str__(self):
        return f"{self.prefix} weight {self.weight}" + (f" source {self.source}" if self.source else "")


def multipath(raw):
    """PREFIX [weight W] [source ADDRESS]"""
    expected = ("PREFIX [weight 1 to 256] [source ADDRESS], with no host bits set in PREFIX, "
                "for example 10.2.0.0/16 weight 1")
    match = re.fullmatch(r"(\S+/[0-9]{1,3})(?:\s+weight\s+([0-9]{1,3}))?(?:\s+source\s+(\S+))?", raw)
    try:
        prefix = ipaddress.ip_network(match[1])
        source = ipaddress.ip_address(match[3]) if match[3] else None
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    weight = int(match[2] or 1)
    if not 1 <= weight <= MULTIPATH_WEIGHT_MAX or (source and source.version != prefix.version):
        raise ValueError(expected)
    if prefix.is_multicast or prefix.is_loopback or prefix.is_link_local:
        raise ValueError(expected)
    return Multipath(prefix, weight, source)


def device_name(raw):
    """Up to 15 bytes: IFNAMSIZ - 1 of net/if.h; %d asks the kernel for the first free number."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}|[A-Za-z0-9_.-]{1,13}%d", raw) or raw in (".", ".."):
        raise ValueError("an interface name of at most 15 characters, for example bulk0 or bulk%d")
    return raw


def interface_name(raw):
    """The name of a device that is there already."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", raw) or raw in (".", ".."):
        raise ValueError("an interface name of at most 15 characters, for example eth0")
    return raw


def certificate_name(raw):
    if not NAME.fullmatch(raw):
        raise ValueError("a name of 1 to 64 letters, digits, dots, underscores and hyphens")
    return raw


def path(raw):
    if not raw.startswith("/") or "\0" in raw:
        raise ValueError("an absolute path")
    return pathlib.Path(raw)


_PEM = re.compile(r"\s*-----BEGIN [A-Z0-9 ]+-----\n[A-Za-z0-9+/=\s]+-----END [A-Z0-9 ]+-----\s*", re.MULTILINE)


def pem(raw):
    """PEM text between <key> and </key>, or the path of a file with it: (path or None, text or None)."""
    if "-----BEGIN" in raw:
        if not all(_PEM.fullmatch(part + "-----\n") for part in _pem_parts(raw)):
            raise ValueError("PEM text, from -----BEGIN to -----END")
        return (None, raw)
    if not raw or "\n" in raw or "\0" in raw:
        raise ValueError("the path of a PEM file, or PEM text between <NAME> and </NAME> lines")
    return (pathlib.Path(raw), None)


def _pem_parts(raw):
    """Each PEM block up to its last dashes."""
    blocks = re.split(r"(-----END [A-Z0-9 ]+)-----\s*", raw.strip() + "\n")
    return ["".join(blocks[at : at + 2]) for at in range(0, len(blocks) - 1, 2)] or [""]


RESTART = "restart"
NOW, CONNECTIONS, SESSIONS = "at once", "connections made from then on", "sessions begun from then on"
RELOADS = (RESTART, NOW, CONNECTIONS, SESSIONS)
"""When a change of an option takes effect, as messages and the manual say it."""
PUSHED = {"server": SESSIONS, "client": NOW}
"""What a server tells its clients when their session begins, and a client does by itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option: a key of the file and a flag.

    parse: raw string to value, ValueError says what is right. default: raw string, or None if there is none.
    role: the mode that knows it, None for both. repeat: may stand several times, the value is a tuple, of at
    most `most`.
    secret: the value never appears in a message. reload: when a change takes effect on a reload, one of RELOADS, or
    {role: one of RELOADS}; RESTART means not before the instance is started again.
    """

    name: str
    parse: Callable
    default: str | None
    metavar: str
    group: str
    help: str
    role: str | None = None
    repeat: bool = False
    secret: bool = False
    most: int = 64
    reload: str | dict = RESTART

    @property
    def field(self):
        return self.name.replace("-", "_")

    def reload_of(self, role):
        """When a change takes effect in an instance of this role, server or client: one of RELOADS."""
        return self.reload if isinstance(self.reload, str) else self.reload.get(role, RESTART)


OPTIONS = (
    Option("mode", choice("server", "client"), None, "server|client", "General",
           "the role of this instance"),
    Option("device", device_name, "bulk%d", "NAME", "General",
           "name of the TUN device; %d becomes the first free number"),
    Option("log-level", choice("debug", "info", "warning", "error"), "info", "LEVEL", "General",
           "the least severe messages that are logged: debug, info, warning or error",
           reload=NOW),
    Option("metrics", socket_address, None, "ADDRESS:PORT", "General",
           "where to serve metrics for Prometheus over HTTP, without any authentication; none without it",
           reload=NOW),
    Option("listen", endpoint, "[::]:7443", "ADDRESS[:PORT]", "Network",
           "address and TCP port to accept connections on; [::] means all addresses, IPv4 too; may be repeated",
           role="server", repeat=True),
    Option("remote", endpoint, None, "HOST[:PORT]", "Network",
           "the server to connect to; may be repeated, each is tried in turn",
           role="client", repeat=True, reload=CONNECTIONS),
    Option("pool-ipv4", network(4, 30), None, "NETWORK", "Network",
           "addresses inside the tunnel: the server takes the first, each client leases one",
           role="server"),
    Option("pool-ipv6", network(6, 126), None, "NETWORK", "Network",
           "IPv6 addresses inside the tunnel: the server takes the first, each client leases one",
           role="server"),
    Option("nat", boolean, "no", "yes|no", "Network",
           "masquerade the clients' addresses behind this machine's when their packets leave by another interface",
           role="server"),
    Option("client-to-client", boolean, "no", "yes|no", "Network",
           "whether clients may reach each other through this server",
           role="server"),
    Option("routes", pushed_network, None, "NETWORK", "Network",
           "a network to reach through the tunnel; a server pushes it to its clients; may be repeated",
           repeat=True, most=256, reload=PUSHED),
    Option("accept-routes", route_policy, "private", "NETWORK|private|none", "Network",
           "pushed routes are taken if they are inside NETWORK; private stands for the private networks of RFC 1918 "
           "and RFC 4193; may be repeated",
           role="client", repeat=True, reload=NOW),
    Option("redirect-gateway", boolean, "no", "yes|no", "Network",
           "full tunnel: send everything through the tunnel, IPv4 and IPv6",
           role="client"),
    Option("kill-switch", boolean, "no", "yes|no", "Network",
           "let nothing leave this machine but through the tunnel, also while there is none; needs redirect-gateway",
           role="client"),
    Option("local-networks", any_network, None, "NETWORK", "Network",
           "a network that is reached outside the tunnel in spite of the kill switch; may be repeated",
           role="client", repeat=True),
    Option("dns", name_server, None, "ADDRESS", "Network",
           "a name server to ask through the tunnel; a server pushes it to its clients; may be repeated",
           repeat=True, most=8, reload=PUSHED),
    Option("dns-search", domain, None, "DOMAIN", "Network",
           "a domain to complete names with and to ask these name servers about; a server pushes it to its clients; "
           "may be repeated",
           repeat=True, most=8, reload=PUSHED),
    Option("accept-dns", boolean, "yes", "yes|no", "Network",
           "take the name servers and domains that the server pushes, where dns and dns-search do not say otherwise",
           role="client", reload=NOW),
    Option("mtu", integer(1280, 65521, "bytes"), "1500", "BYTES", "Network",
           "MTU of the TUN device; pushed to clients. The outer connection is a stream, so 1500 fits any path"),
    Option("txqueuelen", integer(1, 100000, "packets"), "9000", "PACKETS", "Network",
           "length of the transmit queue of the TUN device"),
    Option("multipath", multipath, None, "PREFIX weight W", "Network",
           "carry PREFIX together with other instances on this host, each with its share of the flows, while the "
           "tunnel is up; source ADDRESS behind it is what this host's own packets get; may be repeated",
           repeat=True),
    Option("ca", pem, None, "PEM", "Identity",
           "certificate of the authority that signed both ends: a path, or inline between <ca> and </ca>",
           reload=CONNECTIONS),
    Option("certificate", pem, None, "PEM", "Identity",
           "certificate of this end: a path, or inline between <certificate> and </certificate>",
           reload=CONNECTIONS),
    Option("key", pem, None, "PEM", "Identity",
           "private key of this end: a path, or inline between <key> and </key>; others must not be able to read it",
           secret=True, reload=CONNECTIONS),
    Option("crl", pem, None, "PEM", "Identity",
           "revocation list (CRL) of the authority: a path, or inline between <crl> and </crl>; "
           "a certificate on it is refused, and all are when the list has expired",
           reload=NOW),
    Option("second-login", choice("replace", "refuse", "parallel"), "replace", "replace|refuse|parallel", "Identity",
           "a second session of one identity replaces the first, is refused while the first is connected, or runs "
           "beside it with an address of its own",
           role="server", reload=NOW),
    Option("server-name", certificate_name, "server", "NAME", "Identity",
           "the name that the server's certificate must carry",
           role="client", reload=CONNECTIONS),
    Option("connections", integer(1, 64, "connections"), "4", "N", "Performance",
           "parallel TCP connections of a session; the smaller of the two ends' values counts",
           reload=SESSIONS),
    Option("workers", or_auto(integer(1, 64, "processes")), "auto", "N|auto", "Performance",
           "worker processes; auto means one for each CPU, but not more than connections"),
    Option("offload", boolean, "yes", "yes|no", "Performance",
           "take super-packets of up to 64 KiB from the kernel and give them to it"),
    Option("cipher", choice("auto", "aes-256-gcm", "chacha20-poly1305"), "auto", "CIPHER", "Performance",
           "auto measures at start which of aes-256-gcm and chacha20-poly1305 is faster on this CPU; "
           "otherwise the one to insist on"),
    Option("frame-size", size(FRAME_SIZE_MIN, FRAME_SIZE_MAX), "256K", "BYTES", "Performance",
           "largest bulk frame; the smaller of the two ends' values counts"),
    Option("sndbuf", or_auto(size(16384, 1 << 28)), "auto", "BYTES|auto", "Performance",
           "send buffer of each connection, pushed to clients; auto keeps the kernel's autotuning",
           role="server", reload=CONNECTIONS),
    Option("rcvbuf", or_auto(size(16384, 1 << 28)), "auto", "BYTES|auto", "Performance",
           "receive buffer of each connection, pushed to clients; auto keeps the kernel's autotuning",
           role="server", reload=CONNECTIONS),
    Option("congestion", choice("auto", "bbr", "cubic", "system"), "auto", "NAME", "Performance",
           "TCP congestion control of the connections: bbr, cubic, system for the host's default, or auto: cubic as "
           "long as the path is short and fast, else bbr; where the kernel lacks it, the host's default stays",
           reload=CONNECTIONS),
    Option("queue-target", integer(1, 1000, "milliseconds"), "5", "MILLISECONDS", "Performance",
           "how long packets of a flow may wait for their connection; longer for a whole queue-interval, and some are "
           "marked (ECN) or dropped",
           reload=CONNECTIONS),
    Option("queue-interval", integer(10, 10000, "milliseconds"), "100", "MILLISECONDS", "Performance",
           "how long the wait may be above queue-target; about the longest round trip of what goes through the tunnel",
           reload=CONNECTIONS),
    Option("tuning", boolean, "yes", "yes|no", "Tuning",
           "tune the kernel while the daemon runs, with the options of this group; `bulkvpnctl tune show` tells what "
           "is found, wanted and set"),
    Option("socket-memory", size(65536, 1 << 30), "16M", "BYTES", "Tuning",
           "at least this much may each TCP socket of the machine buffer: net.core.rmem_max and wmem_max, and the "
           "third value of net.ipv4.tcp_rmem and tcp_wmem"),
    Option("option-memory", size(4096, 1 << 30), "128K", "BYTES", "Tuning",
           "at least this much memory may each socket have for options: net.core.optmem_max"),
    Option("backlog", integer(1, 1000000, "packets"), "10000", "PACKETS", "Tuning",
           "at least so many packets may wait for a CPU: net.core.netdev_max_backlog"),
    Option("rp-filter", choice("loose", "system"), "loose", "loose|system", "Tuning",
           "loose takes packets from the tunnel also where the route back leads elsewhere just now; system leaves it "
           "to the host's rp_filter"),
    Option("wan-interface", or_auto(interface_name), "auto", "NAME|auto", "Tuning",
           "the interface that leads to the other end; auto finds it by the routes"),
    Option("wan-mtu", integer(1280, 65521, "bytes"), None, "BYTES", "Tuning",
           "MTU to give that interface; without it there is only a warning when it is not 1500"),
    Option("udp-gro-forwarding", boolean, "yes", "yes|no", "Tuning",
           "put UDP packets that come in by that interface together before they are forwarded, on a server that "
           "forwards",
           role="server"),
    Option("conntrack-timeouts", choice("short", "system"), "short", "short|system", "Tuning",
           "short makes a server that translates addresses forget connections of its clients sooner after their end",
           role="server"),
    Option("keepalive", duration(1, 3600), "5", "SECONDS", "Timing",
           "how often a connection sends a PING, which keeps it alive and measures its round trip; pushed to clients",
           role="server", reload=CONNECTIONS),
    Option("keepalive-timeout", duration(2, 7200), "20", "SECONDS", "Timing",
           "a connection from which nothing came for this long is dead; pushed to clients",
           role="server", reload=CONNECTIONS),
    Option("handshake-timeout", duration(1, 120), "10", "SECONDS", "Timing",
           "TLS handshake and HELLO must be done within this time, counted from accept or connect",
           reload=NOW),
    Option("retry-max", duration(1, 3600), "30", "SECONDS", "Timing",
           "longest pause before a lost connection is tried again; pauses double from half a second, with jitter",
           role="client", reload=NOW),
    Option("grace", duration(0, 86400), "30", "SECONDS", "Timing",
           "how long a session lives without any connection",
           role="server", reload=NOW),
    Option("rekey-bytes", size(1 << 16, 1 << 36), "64G", "BYTES", "Timing",
           "a direction of a connection gets its next key after this many bytes; the smaller of the two ends' values "
           "counts",
           reload=SESSIONS),
    Option("rekey-interval", duration(1, 86400), "15m", "SECONDS", "Timing",
           "a direction of a connection gets its next key after this time; the smaller of the two ends' values counts",
           reload=SESSIONS),
    Option("replace-interval", duration(0, 604800), "1h", "SECONDS", "Timing",
           "each connection is replaced by a new one, with keys from a fresh exchange, after this time, and no packet "
           "is lost; 0 means never",
           role="client", reload=CONNECTIONS),
    Option("max-handshakes", early_drop, "64:30:256", "START:RATE:FULL", "Limits",
           "connections that may be unauthenticated at the same time: from START on one is dropped with a chance of "
           "RATE percent, which grows to 100 at FULL",
           role="server", reload=NOW),
    Option("max-handshakes-per-source", integer(1, 10000, "handshakes"), "32", "N", "Limits",
           "how many of these may come from one IPv4 address or IPv6 /64",
           role="server", reload=NOW),
    Option("penalty-max", duration(0, 86400), "10m", "SECONDS", "Limits",
           "longest time for which a source whose handshakes keep failing is turned away; 0 turns nobody away",
           role="server", reload=NOW),
    Option("on-up", path, None, "PROGRAM", "Hooks",
           "program to start when the tunnel is up: a server is ready, a client has its first connection",
           reload=NOW),
    Option("on-down", path, None, "PROGRAM", "Hooks",
           "program to start when the tunnel is down: a server stops, a client has no connection left",
           reload=NOW),
    Option("on-client-connect", path, None, "PROGRAM", "Hooks",
           "program to start when the session of a client has begun",
           role="server", reload=NOW),
    Option("on-client-disconnect", path, None, "PROGRAM", "Hooks",
           "program to start when the session of a client has ended, not when it is only silent for a while",
           role="server", reload=NOW),
    Option("runtime-directory", path, None, "DIRECTORY", "Files",
           "where the status socket lives; default $RUNTIME_DIRECTORY of systemd, else /run/bulkvpnd/NAME"),
    Option("state-directory", path, None, "DIRECTORY", "Files",
           "where leases are kept; default $STATE_DIRECTORY of systemd, else /var/lib/bulkvpnd/NAME"),
)
BY_NAME = {option.name: option for option in OPTIONS}
GROUPS = tuple(dict.fromkeys(option.group for option in OPTIONS))

Configuration = dataclasses.make_dataclass(
    "Configuration",
    [("name", str), ("path", pathlib.Path), *((option.field, object) for option in OPTIONS), ("clients", tuple, ())],
    frozen=True,
    slots=True,
    repr=False,
)
Configuration.__doc__ = """Every option's value, with the instance's name and the file it came from.

clients: what is fixed for single clients, control.clients.Client; the main process reads that.
"""


class FileParser(configargparse.ConfigFileParser):
    """``key = value`` lines, ``#`` comments, and PEM text between ``<key>`` and ``</key>`` lines.

    name: the file, for messages. Remembers in `lines` where each key stood, {key: [line, ...]}, so that every later
    error can say it.
    """

    def __init__(self):
        self.name = ""
        self.lines = {}

    def get_syntax_description(self):
        return "The file has lines of the form key = value; see bulkvpn.conf(5)."

    def parse(self, stream):
        """Returns {key: value or list of values}; raises ConfigurationError."""
        items = OrderedDict()
        lines = enumerate(stream, 1)
        for number, line in lines:
            where = f"{self.name}:{number}"
            line = line.strip()
            if not line or line.startswith(("#", ";")):
                continue
            tag = re.fullmatch(r"<([a-z0-9-]+)>", line)
            if tag:
                key, value = tag[1], self._block(number, tag[1], lines)
            else:
                key, equals, value = (part.strip() for part in line.partition("="))
                if not equals:
                    raise ConfigurationError(f"{where}: {_shown_line(line)}: not understood; write key = value")
                if "-----BEGIN" in value:
                    raise ConfigurationError(f"{where}: PEM text goes on lines of its own, between <key> and </key>")
            option = BY_NAME.get(key)
            if option is None:
                raise ConfigurationError(f"{where}: {_shown_line(key)}: unknown option{_similar(key)}")
            if key in items and not option.repeat:
                raise ConfigurationError(
                    f"{where}: {key}: given twice, first on line {self.lines[key][0]}; keep one of them"
                )
            self.lines.setdefault(key, []).append(number)
            if option.repeat:
                items.setdefault(key, []).append(value)
            else:
                items[key] = value
        return items

    def _block(self, first, key, lines):
        text = []
        for _, line in lines:
            if line.strip() == f"</{key}>":
                return "".join(text)
            text.append(line)
        raise ConfigurationError(f"{self.name}:{first}: <{key}>: never closed; end the block with a line </{key}>")


class Parser(configargparse.ArgumentParser):
    """ConfigArgParse's parser, with errors raised instead of printed."""

    def error(self, message):
        raise ConfigurationError(f"{message}; see bulkvpnd --help", on_command_line=True)


def _config_argument(args):
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("-c", "--config")
    try:
        return finder.parse_known_args(args)[0].config
    except argparse.ArgumentError:
        return None  # the parser proper says what is wrong


def build_parser():
    """The parser of bulkvpnd(8), from OPTIONS. Returns (parser, FileParser)."""
    parser = Parser(
        prog="bulkvpnd",
        description="Bulk VPN daemon: moves packets in bulk over parallel TCP connections.",
        epilog="The manual is bulkvpnd(8); every option can stand in the file too, see bulkvpn.conf(5).",
        config_file_parser_class=FileParser,
        add_config_file_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", metavar="FILE", required=True, is_config_file_arg=True,
                        help="configuration file, usually /etc/bulkvpn/NAME.conf")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--version", action="version", version=f"bulkvpnd {__version__}")
    for group in GROUPS:
        section = parser.add_argument_group(group)
        for option in (option for option in OPTIONS if option.group == group):
            section.add_argument(
                f"--{option.name}",
                metavar=option.metavar,
                action="append" if option.repeat else "store",
                help=help_text(option).replace("%", "%%"),
            )
    return parser, parser._config_file_parser  # the only way to reach the instance that remembers the lines


def help_text(option):
    """The option's help with its role and default, as ``--help`` and the example files show it."""
    notes = [f"{option.role} only"] if option.role else []
    if option.default is not None:
        notes.append(f"default {option.default}")
    return option.help + (f" ({'; '.join(notes)})" if notes else "")


def load(arguments, text=None):
    """Reads the command line and the file it names.

    arguments: list of str, without the program's name. text: what the file says, where it need not be read.
    Returns (Configuration, argparse.Namespace).
    Raises ConfigurationError; SystemExit for --help and --version.
    """
    if "--" in arguments:
        # ConfigArgParse would add the file's settings behind it, and argparse would then print them all, the key too.
        raise ConfigurationError("--: there is nothing but options; see bulkvpnd --help", on_command_line=True)
    parser, file_parser = build_parser()
    # Read here and not by ConfigArgParse so that a credential of systemd can stand in for the file, and so that the
    # owner and mode are checked on the descriptor that is read.
    name = _config_argument(arguments)
    file = file_parser.name = pathlib.Path(name or "")
    informs = {"-h", "--help", "--version"} & set(arguments)
    if text is None:
        text = read_secret_file(file) if name and not informs else ""
    namespace = parser.parse_args(arguments, config_file_contents=text, env_vars={})
    from_file = set()
    for source, settings in parser.get_source_to_settings_dict().items():
        if source.startswith("config_file"):
            from_file.update(settings)
    values = {}
    for option in OPTIONS:
        raw = getattr(namespace, option.field)
        lines = file_parser.lines.get(option.name) if option.name in from_file else None
        values[option.field] = value_of(option, raw, file, lines)
    configuration = Configuration(name=file.name.removesuffix(".conf"), path=file, **values)
    _check_together(configuration, file, file_parser.lines, from_file, namespace)
    return _with_directories(configuration), namespace


def value_of(option, raw, file, lines):
    """The option's value. raw: str or None, a list of them where it may be repeated. lines: where they stand in `file`,
    None for the command line. Raises ConfigurationError."""
    if raw is None:
        if option.default is None:
            return () if option.repeat else None
        raw = [option.default] if option.repeat else option.default
    parsed = []
    if option.repeat and len(raw) > option.most:
        where = f"{file}:{lines[option.most]}: {option.name}" if lines else f"--{option.name}"
        raise ConfigurationError(f"{where}: given {len(raw)} times; at most {option.most} are allowed",
                                 on_command_line=not lines)
    for at, one in enumerate(raw if option.repeat else [raw]):
        try:
            parsed.append(option.parse(one))
        except ValueError as error:
            where = f"{file}:{lines[at]}: {option.name}" if lines else f"--{option.name}"
            hidden = option.secret or "PRIVATE KEY" in one
            # A key may have been pasted without its first line, and where a certificate belongs.
            shown = "" if hidden else f" = {_shown_line(one) if option.parse is pem else escaped(one)}"
            raise ConfigurationError(f"{where}{shown}: should be {error}", on_command_line=not lines) from None
    return tuple(parsed) if option.repeat else parsed[0]


def _check_together(configuration, file, lines, from_file, namespace):
    """What single values cannot tell: the mode's needs, and pairs that contradict each other."""
    mode = configuration.mode
    if mode is None:
        raise ConfigurationError(f"{file}: mode: missing; write mode = server or mode = client")
    for option in OPTIONS:
        if option.role not in (None, mode) and getattr(namespace, option.field) is not None:
            in_file = option.name in from_file
            where = f"{file}:{lines[option.name][0]}: {option.name}" if in_file else f"--{option.name}"
            raise ConfigurationError(
                f"{where}: is for mode = {option.role}, and this is mode = {mode}; take it out",
                on_command_line=not in_file,
            )
    needed = {"server": ("ca", "certificate", "key"), "client": ("remote", "ca", "certificate", "key")}[mode]
    for name in needed:
        if not getattr(configuration, BY_NAME[name].field):
            raise ConfigurationError(f"{file}: {name}: missing; mode = {mode} needs it, see bulkvpn.conf(5)")
    if mode == "server" and not (configuration.pool_ipv4 or configuration.pool_ipv6):
        raise ConfigurationError(f"{file}: pool-ipv4: missing; give pool-ipv4, pool-ipv6 or both")
    _check_multipath(configuration, file, lines.get("multipath") if "multipath" in from_file else None)
    if configuration.kill_switch and not configuration.redirect_gateway:
        raise ConfigurationError(
            f"{file}: kill-switch = yes: without a full tunnel it would cut this machine off; "
            "add redirect-gateway = yes"
        )
    if mode == "server" and configuration.keepalive_timeout <= configuration.keepalive:
        raise ConfigurationError(
            f"{file}: keepalive-timeout = {configuration.keepalive_timeout}: should be longer than "
            f"keepalive = {configuration.keepalive}"
        )


def _check_multipath(configuration, file, lines):
    """lines: where the values stand in the file, None for the command line."""
    pools = {"pool-ipv4": configuration.pool_ipv4, "pool-ipv6": configuration.pool_ipv6}
    seen = set()
    for at, wish in enumerate(configuration.multipath):
        where = f"{file}:{lines[at]}: multipath" if lines else "--multipath"
        if wish.prefix in seen:
            raise ConfigurationError(f"{where} = {wish.prefix}: given twice; keep one of them", not lines)
        seen.add(wish.prefix)
        for name, pool in pools.items():
            if pool and pool.version == wish.prefix.version and wish.prefix.subnet_of(pool):
                raise ConfigurationError(
                    f"{where} = {wish.prefix}: is inside {name} = {pool}, which is this instance's alone; "
                    "give a network behind the tunnel", not lines
                )


def _with_directories(configuration):
    def directory(value, variable, parent):
        # systemd joins several directories with a colon; the unit gives one.
        given = os.environ.get(variable, "").partition(":")[0]
        return value or pathlib.Path(given or f"{parent}/{configuration.name}")

    return dataclasses.replace(
        configuration,
        runtime_directory=directory(configuration.runtime_directory, "RUNTIME_DIRECTORY", "/run/bulkvpnd"),
        state_directory=directory(configuration.state_directory, "STATE_DIRECTORY", "/var/lib/bulkvpnd"),
    )


def credential_of(file):
    """systemd's copy of the file in $CREDENTIALS_DIRECTORY, as old as the start of the unit; None if there is none."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    copy = pathlib.Path(credentials, file.name) if credentials else None
    return copy if copy and copy.exists() else None


_MENDS = {
    errno.EACCES: "run it as root, or let its user read the file and enter the directories above it",
    errno.ELOOP: "a symbolic link is not followed; give the file itself",
}


def open_regular(file, flags=0):
    """A descriptor for reading a regular file. flags: more of open(2). Raises OSError, ConfigurationError."""
    # Nonblocking: nobody may ever write to a pipe of that name.
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigurationError(f"{file}: is not a regular file; give the file itself")
    return descriptor


def bounded_text(stream, file):
    """The text of a binary stream, UTF-8 with any kind of line end, at most MAX_FILE_SIZE bytes.

    file: path, for messages. Raises OSError, ConfigurationError.
    """
    raw = stream.read(MAX_FILE_SIZE + 1)
    if len(raw) > MAX_FILE_SIZE:
        raise ConfigurationError(f"{file}: has more than {MAX_FILE_SIZE} bytes, the most that is read; is it the right "
                                 "file?")
    try:
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file}: is not UTF-8 text; is it the right file?") from None


def read_secret_file(file, original=False):
    """Opens a file that may hold a private key, checked on the descriptor that is then read.

    file: path. systemd's copy of it, see credential_of, is read in its place unless `original`.
    Returns its text. Raises ConfigurationError with the command that mends it.
    """
    try:
        source = None if original else credential_of(file)
        with os.fdopen(open_regular(source or file, os.O_NOFOLLOW), "rb") as stream:
            status = os.fstat(stream.fileno())
            text = bounded_text(stream, file)
    except OSError as error:
        mend = _MENDS.get(error.errno, "give the path of a file that can be read")
        raise ConfigurationError(f"{file}: cannot be read: {error.strerror}; {mend}") from None
    if "PRIVATE KEY-----" in text:
        if status.st_uid not in (0, os.geteuid()):
            raise ConfigurationError(
                f"{file}: holds a private key and belongs to user id {status.st_uid}; run: chown root {file}"
            )
        # A group may read, so that root:bulkvpnd 0640 works; nobody else, and only the owner may write.
        if status.st_mode & 0o027:
            raise ConfigurationError(
                f"{file}: holds a private key and has mode {stat.S_IMODE(status.st_mode):04o}, "
                f"so others can read or change it; run: chmod 600 {file}"
            )
    return text


def read_items(file, text=None):
    """What a configuration says, option by option, raw and in its order.

    file: path. text: what it says, where it need not be read. Returns ({option: value, or list of values where it may
    be repeated}, {option: [line, ...]}). Raises ConfigurationError.
    """
    parser = FileParser()
    parser.name = file
    text = read_secret_file(file) if text is None else text
    return parser.parse(text.splitlines(keepends=True)), parser.lines


def pem_path(configuration, name):
    """The file that the option `name` (ca, certificate, key or crl) stands for; None if it is inline or not given.

    A relative path counts from the configuration's directory.
    """
    file, _ = getattr(configuration, BY_NAME[name].field) or (None, None)
    return file and configuration.path.parent / file


def pem_text(configuration, name):
    """PEM text of the option `name` (ca, certificate, key or crl), read from its file where it is not inline.

    Raises ConfigurationError.
    """
    _, text = getattr(configuration, BY_NAME[name].field)
    if text is not None:
        return text
    file = pem_path(configuration, name)
    text = read_secret_file(file)
    if "-----BEGIN" not in text:
        raise ConfigurationError(f"{configuration.path}: {name} = {file}: has no PEM text; it begins with "
                                 "-----BEGIN")
    return text


def escaped(value):
    """A value as a message shows it: on one line, escaped and cut."""
    value = value.encode("unicode_escape").decode("ascii")
    return value if len(value) <= 64 else value[:61] + "..."


def _shown_line(text):
    """Like `_shown`, but nothing of what may be a key that was pasted without its <key> line."""
    return "(hidden)" if re.search(r"[A-Za-z0-9+/]{40}", text) else escaped(text)


def _similar(key):
    import difflib

    near = difflib.get_close_matches(key, BY_NAME, n=1)
    return f"; did you mean {near[0]}?" if near else "; see bulkvpn.conf(5)"
