"""Kinds of value: each turns the raw string into the value, or raises ValueError with what would be right.

Those that take arguments return such a function.
"""

import dataclasses
import ipaddress
import pathlib
import re

DEFAULT_PORT = 7443
"""Choice: above 1023, so that the service needs no CAP_NET_BIND_SERVICE, and free in Debian's /etc/services."""
MULTIPATH_WEIGHT_MAX = 255
"""What every kernel with next-hop objects takes: weight - 1 is a byte, and kernels before 6.12, such as Debian 12's,
refuse 255 there (nh_check_attr_group() in net/ipv4/nexthop.c; "net: nexthop: Increase weight to u16" of 6.12 has
two)."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What an identity may be called: printable in any log and safe as a file name."""
PRIVATE = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))
"""RFC 1918, RFC 4193: a server that may push routes to these takes nothing of the Internet."""


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


def size(low, high):
    """Bytes; K, M and G are powers of 1024."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return _scaled(units, low, high, f"a number of bytes from {low} to {high}; K, M or G may follow")


def duration(low, high):
    """Seconds; s, m, h and d may follow."""
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
    return _scaled(units, low, high, f"a number of seconds from {low} to {high}; s, m, h or d may follow")


def _scaled(units, low, high, expected):
    pattern = re.compile(r"([0-9]{1,18})\s*(" + "|".join(filter(None, units)) + ")?")

    def parse(raw):
        match = pattern.fullmatch(raw)
        value = int(match[1]) * units[match[2] or ""] if match else -1
        if not low <= value <= high:
            raise ValueError(expected)
        return value

    return parse


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


def endpoint_text(host, port):
    """What endpoint() reads as (host, port)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
    expected = (f"PREFIX [weight 1 to {MULTIPATH_WEIGHT_MAX}] [source ADDRESS], with no host bits set in PREFIX, "
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
