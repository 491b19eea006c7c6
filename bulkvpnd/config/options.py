"""The one table of options.

Every option is a key of ``/etc/bulkvpn/NAME.conf`` and a flag of bulkvpnd(8). The parser, ``--help``, the commented
example files in ``etc/bulkvpn/`` and the check of the man page all come from `OPTIONS`.
"""

import dataclasses
from collections.abc import Callable

from bulkvpnd.config.values import (
    any_network, boolean, certificate_name, choice, device_name, domain, duration, early_drop, endpoint, integer,
    interface_name, multipath, name_server, network, or_auto, path, pem, pushed_network, route_policy, size,
    socket_address,
)  # fmt: skip

RESTART = "restart"
NOW, CONNECTIONS, SESSIONS = "at once", "connections made from then on", "sessions begun from then on"
RELOADS = (RESTART, NOW, CONNECTIONS, SESSIONS)
"""When a change of an option takes effect, as messages and the manual say it."""
PUSHED = {"server": SESSIONS, "client": NOW}
"""What a server tells its clients when their session begins, and a client does by itself."""
FRAME_SIZE_MIN = 128 * 1024
"""Bytes; a frame must hold one super-packet (64 KiB) and leave room to fill the rest from the next batch."""
FRAME_SIZE_MAX = 1024 * 1024


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


def help_text(option):
    """The option's help with its role and default, as ``--help`` and the example files show it."""
    notes = [f"{option.role} only"] if option.role else []
    if option.default is not None:
        notes.append(f"default {option.default}")
    return option.help + (f" ({'; '.join(notes)})" if notes else "")


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
