"""``bulkvpnctl import-openvpn``: a configuration of ours from one of OpenVPN, and why other lines have no place in it.

    text --> parse --> Directive ... --> CARRIED: (option, value) or a note --> the option table --> configuration
                                     '-> REASONS: a note                    '-> notes, one for each line

Only the text and the certificate files that it names are read; nothing that it says is run. Names are those of
openvpn(8).
"""

import contextlib
import dataclasses
import datetime
import ipaddress
import os
import pathlib
import re
import sys

from bulkvpnd import config, pki
from bulkvpnd.admin import files
from bulkvpnd.admin.errors import CommandError

LINE_MAX = 256
"""Characters of a line, as OPTION_LINE_SIZE in OpenVPN's options.h."""
WORDS_MAX = 16
"""Words of a line, as MAX_PARMS in OpenVPN's options.h."""
DEFAULT_PORT = "1194"
"""Where neither ``remote`` nor ``port`` says one, and OpenVPN's registered one with IANA."""
IDENTITY = {"ca": "ca", "cert": "certificate", "key": "key"}
"""Directive: our option."""


@dataclasses.dataclass(frozen=True, slots=True)
class Directive:
    """One line, or one block between <NAME> and </NAME>. line: its number. text: of the block, else None."""

    line: int
    name: str
    words: tuple
    text: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Carried:
    """settings: {option: list of values}. notes: [(line, name, why that line, or a part of it, is not in them)]."""

    mode: str
    settings: dict
    notes: list


class SyntaxProblem(Exception):
    """What OpenVPN would not read either. line: its number."""

    def __init__(self, line, message):
        super().__init__(message)
        self.line = line


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("file", metavar="FILE", type=pathlib.Path,
                        help="a client's or a server's configuration of OpenVPN; - is standard input")
    parser.add_argument("--output", metavar="FILE", type=lambda raw: pathlib.Path(raw).absolute(),
                        help="write to this new file, mode 0600, instead of standard output")


def run(arguments):
    """Returns the exit status."""
    file, output = arguments.file, arguments.output
    text = files.read_any(file)
    try:
        directives = parse(text)
        carried = carry(directives)
    except SyntaxProblem as error:
        raise CommandError(f"{file}:{error.line}: {error}") from None
    blocks, reason = _identity(directives, file.parent, carried.mode)
    notes = carried.notes + (_left(directives, reason) if reason else [])
    text = _text(file, carried, blocks)
    if output:
        files.create(output, text, 0o600)
    else:
        print(text, end="")
    for line, name, why in sorted(notes):
        print(f"{file}:{line}: {name}: {why}", file=sys.stderr)
    return os.EX_OK


# What OpenVPN reads


def parse(text):
    """The directives of a configuration of OpenVPN, [Directive]. Raises SyntaxProblem."""
    found, lines = [], enumerate(text.splitlines(), 1)
    for number, line in lines:
        line = line.strip().removeprefix("\ufeff")
        tag = re.fullmatch(r"<([A-Za-z0-9-]{1,64})>", line)
        if tag:
            found.append(Directive(number, tag[1], (), _block(number, tag[1], lines)))
        elif len(line) > LINE_MAX:
            raise SyntaxProblem(number, f"has more than {LINE_MAX} characters; write a shorter line")
        else:
            words = split(number, line)
            if words:
                found.append(Directive(number, _shown(words[0].removeprefix("--")), tuple(words[1:])))
    return found


def _block(first, name, lines):
    text = []
    for _, line in lines:
        if line.strip() == f"</{name}>":
            return "\n".join(text) + "\n"
        text.append(line)
    raise SyntaxProblem(first, f"<{name}>: never closed; end the block with a line </{name}>")


_WORD = re.compile(r"""\s*(?:[#;].*|((?:[^\s\\"']|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+))""", re.DOTALL)
_PART = re.compile(r"""\\(.)|"((?:[^"\\]|\\.)*)"|'([^']*)'|([^\\"']+)""", re.DOTALL)


def split(number, line):
    """The words of a line, by OpenVPN's rules for quotes, backslashes and comments. Raises SyntaxProblem."""
    words, at = [], 0
    while line[at:].strip():
        match = _WORD.match(line, at)
        if not match:
            raise SyntaxProblem(number, "has a quote or backslash without its other half; complete it")
        at = match.end()
        if match[1]:
            words.append("".join(map(_unquoted, _PART.finditer(match[1]))))
    if len(words) > WORDS_MAX:
        raise SyntaxProblem(number, f"has more than {WORDS_MAX} words; write fewer")
    return words


def _unquoted(part):
    escaped, double, single, plain = part.groups()
    return re.sub(r"\\(.)", r"\1", double) if double else escaped or single or plain or ""


def _shown(name):
    """A name that may be printed: a key that was pasted without its block looks like one."""
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name) else "(hidden)"


# What has a place here


class _NoPlace(Exception):
    """Why a line is not carried."""


def carry(directives):
    """What our options can say of it: Carried. Raises SyntaxProblem, for what is in a <connection>."""
    given = {one.name: one for one in directives}
    mode = "server" if "server" in given or _word(given, "mode") == "server" else "client"
    settings, notes = {}, []
    for one in directives:
        if one.name in IDENTITY:
            continue
        try:
            if one.name not in CARRIED:
                raise _NoPlace(REASONS.get(one.name, "has no counterpart"))
            for option, value in CARRIED[one.name](one, given, mode):
                _take(settings, notes, one, option, value, mode)
        except _NoPlace as error:
            notes.append((one.line, one.name, str(error)))
    return Carried(mode, settings, notes)


def _take(settings, notes, directive, option, value, mode):
    """One value into `settings`, checked as that of a file is; what does not pass, into `notes`."""
    row = config.BY_NAME.get(option)
    if row is None:
        notes.append((directive.line, directive.name, value))
        return
    shown = f"{option} = {config.escaped(value)}"
    if row.role not in (None, mode):
        notes.append((directive.line, directive.name, f"is the {row.role}'s to say here: {shown}"))
        return
    try:
        row.parse(value)
    except ValueError as error:
        notes.append((directive.line, directive.name, f"{shown}: should be {error}"))
        return
    values = settings.setdefault(option, [])
    if not row.repeat:
        values.clear()  # the last one counts, as in OpenVPN
    if len(values) == row.most:
        notes.append((directive.line, directive.name, f"{shown}: at most {row.most} are allowed"))
    elif value not in values:
        values.append(value)


def _word(given, name, default=None):
    words = given[name].words if name in given else ()
    return words[0] if words else default


def _argument(directive, at=0):
    if len(directive.words) <= at:
        raise _NoPlace("lacks a word; see openvpn(8)")
    return directive.words[at]


def _as(option):
    """A directive whose one word is the value of `option`."""
    return lambda directive, given, mode: [(option, _argument(directive))]


def _means(*settings):
    """A directive that stands for settings, whatever its words."""
    return lambda directive, given, mode: settings


def _nothing(directive, given, mode):
    """What another directive's function looks at."""
    return ()


def _remote(directive, given, mode):
    host = _argument(directive)
    port = directive.words[1] if len(directive.words) > 1 else _word(given, "rport", _word(given, "port", DEFAULT_PORT))
    protocol = directive.words[2] if len(directive.words) > 2 else _word(given, "proto", "udp")
    shown = config.endpoint_text(host, port)
    if not protocol.startswith("tcp"):
        raise _NoPlace(f"goes over UDP, and this over TCP only; once the server listens there, remote = "
                       f"{config.escaped(shown)}")
    return [("remote", shown)]


def _connection(directive, given, mode):
    if directive.text is None:
        raise _NoPlace("is no block")
    try:
        inner = parse(directive.text)
    except SyntaxProblem as error:
        raise SyntaxProblem(directive.line + error.line, str(error)) from None
    given = {**given, **{one.name: one for one in inner}}
    for one in inner:
        if one.name == "remote":
            yield from _remote(one, given, mode)
        elif one.name not in ("port", "proto", "rport"):
            yield None, f"{one.name} in it has no counterpart"


def _port(directive, given, mode):
    if mode == "client":
        return _nothing(directive, given, mode)
    return [("listen", config.endpoint_text(_word(given, "local", "::"), _argument(directive)))]


def _proto(directive, given, mode):
    if not _argument(directive).startswith("tcp"):
        raise _NoPlace("this goes over TCP only; open the port for TCP")
    return ()


def _device(directive, given, mode):
    name = _argument(directive)
    if name.startswith("tap"):
        raise _NoPlace("only IP packets are carried, no Ethernet frames: TAP devices and bridges have no counterpart")
    return [] if name in ("tun", "null") else [("device", name)]


def _redirect_gateway(directive, given, mode):
    if mode == "server":
        raise _NoPlace("a server cannot push it here: each client has redirect-gateway = yes, or not")
    if "!ipv4" in directive.words:
        raise _NoPlace("IPv4 and IPv6 both go through the tunnel, or neither; give networks as routes")
    yield "redirect-gateway", "yes"
    for word in directive.words:
        if word not in ("def1", "ipv6", "autolocal"):
            yield None, f"the flag {config.escaped(word)} has no counterpart"


def _route(directive, given, mode):
    network, mask = _argument(directive), directive.words[1] if len(directive.words) > 1 else "default"
    return [("routes", _network(network, "255.255.255.255" if mask == "default" else mask, directive.words[2:]))]


def _route_ipv6(directive, given, mode):
    network, _, length = _argument(directive).partition("/")
    return [("routes", _network(network, length or "128", directive.words[1:]))]


def _network(network, mask, rest):
    if rest and rest[0] not in ("default", "vpn_gateway"):
        raise _NoPlace("leads elsewhere than into the tunnel; set that route outside, such as by ip route")
    try:
        return str(ipaddress.ip_network(f"{network}/{mask}", strict=False))
    except ValueError:
        raise _NoPlace("is not a network in numbers") from None


def _pool(directive, given, mode):
    try:
        return [("pool-ipv4", str(ipaddress.IPv4Network("/".join(directive.words[:2]))))]
    except ValueError:
        raise _NoPlace("is not a network in numbers") from None


_DHCP = {"DNS": "dns", "DNS6": "dns", "DOMAIN": "dns-search", "DOMAIN-SEARCH": "dns-search",
         "ADAPTER_DOMAIN_SUFFIX": "dns-search"}  # fmt: skip


def _dhcp_option(directive, given, mode):
    kind = _argument(directive)
    if kind not in _DHCP:
        raise _NoPlace("only DNS and DOMAIN have a counterpart")
    return [(_DHCP[kind], _argument(directive, 1))]


def _dns(directive, given, mode):
    words = directive.words
    if words[:1] == ("search-domains",):
        return [("dns-search", word) for word in words[1:]]
    if words[:1] == ("server",) and words[2:3] in (("address",), ("resolve-domains",)):
        return [("dns" if words[2] == "address" else "dns-search", word) for word in words[3:]]
    raise _NoPlace("only addresses and domains have a counterpart")


def _buffer(directive, given, mode):
    size = _argument(directive)
    return [(directive.name, "auto" if size == "0" else size)]  # 0 is the system's default


def _verb(directive, given, mode):
    """openvpn(8): 0 is fatal errors only, 1 to 4 normal use, from 5 on every packet."""
    level = _argument(directive)
    return [("log-level", {"0": "error"}.get(level, "info" if level in "1234" else "debug"))]


def _cipher(directive, given, mode):
    names = {one.lower() for one in _argument(directive).split(":")}
    ours = sorted(names & {"aes-256-gcm", "chacha20-poly1305"})
    if not ours:
        raise _NoPlace("the ciphers here are aes-256-gcm and chacha20-poly1305, and both ends choose the faster one")
    return [("cipher", ours[0])] if len(ours) == 1 and len(names) == 1 else [("cipher", "auto")]


def _keepalive(directive, given, mode):
    return [("keepalive", _argument(directive)), ("keepalive-timeout", _argument(directive, 1))]


def _connect_retry(directive, given, mode):
    return [("retry-max", _argument(directive, int(len(directive.words) > 1)))]


def _renegotiation(option):
    def carried(directive, given, mode):
        if _argument(directive) in ("0", "-1"):
            raise _NoPlace(f"keys are always replaced, see {option}")
        return [(option, directive.words[0])]

    return carried


def _server_name(directive, given, mode):
    if directive.words[1:2] not in (("name",), ()):
        raise _NoPlace("a server is known by the one name in its certificate: server-name")
    return [("server-name", _argument(directive))]


_PUSHED = ("route", "route-ipv6", "redirect-gateway", "dhcp-option", "dns", "tun-mtu", "sndbuf", "rcvbuf")


def _push(directive, given, mode):
    words = split(directive.line, _argument(directive))
    if not words or words[0] not in _PUSHED:
        raise _NoPlace("this is nothing that a server pushes here")
    return CARRIED[words[0]](Directive(directive.line, words[0], tuple(words[1:])), given, mode)


CARRIED = {
    # directive: function(Directive, {name: Directive}, mode) -> [(option, value), or (None, note)]; raises _NoPlace
    "client": _nothing,
    "client-to-client": _means(("client-to-client", "yes")),
    "cipher": _cipher,
    "connect-retry": _connect_retry,
    "connection": _connection,
    "data-ciphers": _cipher,
    "dev": _device,
    "dhcp-option": _dhcp_option,
    "dns": _dns,
    "duplicate-cn": _means(("second-login", "parallel")),
    "hand-window": _as("handshake-timeout"),
    "keepalive": _keepalive,
    "local": _nothing,
    "lport": _port,
    "mode": _nothing,
    "port": _port,
    "proto": _proto,
    "push": _push,
    "rcvbuf": _buffer,
    "redirect-gateway": _redirect_gateway,
    "remote": _remote,
    "reneg-bytes": _renegotiation("rekey-bytes"),
    "reneg-sec": _renegotiation("rekey-interval"),
    "route": _route,
    "route-ipv6": _route_ipv6,
    "route-nopull": _means(("accept-routes", "none"), ("accept-dns", "no")),
    "rport": _nothing,
    "server": _pool,
    "server-ipv6": _as("pool-ipv6"),
    "sndbuf": _buffer,
    "tun-mtu": _as("mtu"),
    "txqueuelen": _as("txqueuelen"),
    "verb": _verb,
    "verify-x509-name": _server_name,
}

_REASONS = {
    # why: directives
    "is always so here": (
        "auth-nocache", "dev-type", "float", "nobind", "persist-key", "persist-tun", "pull", "remote-cert-tls",
        "resolv-retry", "tcp-nodelay", "tls-client", "tls-server", "topology", "ns-cert-type", "remote-cert-eku",
        "explicit-exit-notify", "ifconfig-pool-persist",
    ),
    "systemd does this: see the unit bulkvpnd@.service": (
        "cd", "chroot", "daemon", "group", "log", "log-append", "mlock", "nice", "syslog", "user", "writepid",
    ),
    "both ends prove who they are by certificates, and there are no passwords": (
        "askpass", "auth-user-pass", "auth-user-pass-verify", "auth-retry", "auth-token", "auth-gen-token",
        "username-as-common-name", "verify-client-cert", "client-cert-not-required", "static-challenge",
    ),
    "the handshake is TLS 1.3, and needs neither a shared key nor parameters": (
        "dh", "ecdh-curve", "key-direction", "secret", "tls-auth", "tls-cipher", "tls-ciphersuites", "tls-crypt",
        "tls-crypt-v2", "tls-groups", "tls-timeout", "tls-version-max", "tls-version-min", "tran-window",
    ),
    "the ciphers authenticate what they encrypt": (
        "auth", "no-replay", "replay-window", "data-ciphers-fallback", "ncp-ciphers", "ncp-disable", "keysize",
    ),
    "there is no compression, since it lets an observer guess what is inside": (
        "allow-compression", "comp-lzo", "comp-noadapt", "compress",
    ),
    "programs are not carried over; those that are wanted are given as hooks, on-up for one, see bulkvpn.conf(5)": (
        "client-connect", "client-disconnect", "down", "route-up", "up",
    ),
    "no plugins, management interface or further scripts; see Hooks in bulkvpn.conf(5)": (
        "down-pre", "ipchange", "learn-address", "management", "plugin", "route-noexec", "route-pre-down",
        "script-security", "setenv", "setenv-safe", "tls-verify", "up-delay", "up-restart",
    ),
    "the outer connection is a stream of bytes, so its MTU needs no care": (
        "fragment", "link-mtu", "mssfix", "mtu-disc", "mtu-test", "tun-mtu-extra", "tun-max-mtu", "fast-io",
    ),
    "there are no proxies": ("http-proxy", "http-proxy-option", "http-proxy-retry", "socks-proxy"),
    "only IP packets are carried, no Ethernet frames": ("server-bridge",),
    "addresses come from the pool; fixed ones, and networks behind a client, go into NAME.clients.d": (
        "client-config-dir", "ifconfig", "ifconfig-ipv6", "ifconfig-ipv6-push", "ifconfig-pool", "ifconfig-push",
        "iroute", "iroute-ipv6",
    ),
    "the option crl takes a list of bulkvpnctl pki crl": ("crl-verify",),
    "keepalive and keepalive-timeout of the server say this": (
        "inactive", "ping", "ping-exit", "ping-restart", "ping-timer-rem",
    ),
    "bulkvpnctl status shows it": ("status", "status-version"),
    "is on Windows only": ("block-outside-dns", "ip-win32", "register-dns", "route-method", "tap-sleep"),
    "a full tunnel with kill-switch = yes has this": ("block-ipv6",),
    "remotes are tried in their order": ("remote-random", "remote-random-hostname"),
    "a server pushes routes, name servers and numbers only, and accept-routes and accept-dns say what is taken": (
        "pull-filter", "redirect-private",
    ),
}
REASONS = {name: why for why, names in _REASONS.items() for name in names}


# Certificates

MADE_BY = {"client": "bulkvpnctl pki add", "server": "bulkvpnctl pki init"}
"""mode: what makes ca, certificate and key of one's own."""


def _left(directives, reason):
    """Notes on ca, cert and key: why they are not taken, once."""
    left = [one for one in directives if one.name in IDENTITY]
    return [(one.line, one.name, reason if one is left[0] else f"not taken, for the reason at line {left[0].line}")
            for one in left]


def _identity(directives, directory, mode):
    """({option: PEM}, None), or ({}, why not). Those of one's own PKI fit if the daemon would take them."""
    given = {one.name: one for one in directives if one.name in IDENTITY}
    if set(given) != set(IDENTITY):
        return {}, f"a certificate goes with an authority and a key; take those of: {MADE_BY[mode]}"
    try:
        blocks = {IDENTITY[name]: _pem(one, directory) for name, one in given.items()}
        pki.check_own(blocks["ca"], blocks["certificate"], blocks["key"], mode,
                      datetime.datetime.now(datetime.timezone.utc))
        for name, text in blocks.items():
            config.BY_NAME[name].parse(text)
    except (CommandError, config.ConfigurationError, pki.PKIError) as error:
        return {}, f"not taken, since {error}; or take those of: {MADE_BY[mode]}"
    except ValueError:
        return {}, f"not taken, since there is more than PEM in it; or take those of: {MADE_BY[mode]}"
    return blocks, None


def _pem(directive, directory):
    """Only the PEM: easy-rsa writes the certificate in words above it."""
    text = directive.text
    if text is None:
        if not directive.words or directive.words[0] == "[inline]":
            raise CommandError(f"{directive.name} names no file")
        with contextlib.suppress(ValueError):
            text = config.read_secret_file(directory / directive.words[0])
    text = (text or "").replace("\r", "")
    found = re.findall(r"-----BEGIN ([A-Z0-9 ]+)-----\n(.*?)-----END \1-----", text, re.DOTALL)
    return "".join(f"-----BEGIN {label}-----\n{body}-----END {label}-----\n" for label, body in found)


def _text(file, carried, blocks):
    name = "".join(one if one.isprintable() else "?" for one in str(file))
    lines = [f"# Made by bulkvpnctl import-openvpn from {name}. Every option is in bulkvpn.conf(5)."]
    if not blocks:
        where = {"client": f"on the server, {MADE_BY['client']} NAME --remote HOST prints them",
                 "server": f"{MADE_BY['server']} makes them"}[carried.mode]
        lines += [f"# ca, certificate and key are missing: {where}."]
    if carried.mode == "client" and "remote" not in carried.settings:
        lines += ["# remote is missing: write remote = HOST:PORT, the server's TCP port."]
    lines += ["", f"mode = {carried.mode}"]
    lines += [f"{one.name} = {value}" for one in config.OPTIONS for value in carried.settings.get(one.name, ())]
    lines += [f"\n<{name}>\n{text.strip()}\n</{name}>" for name, text in blocks.items()]
    return "\n".join(lines) + "\n"
