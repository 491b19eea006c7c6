"""``bulkvpnctl pki``: the certificate authority of a site, in files.

    DIR/                  0755   usually /etc/bulkvpn
      server.conf         0600   the server's configuration, its certificate and key inline
      pki/                0700
        ca.key ca.crt     0600, 0644
        issued/NAME.crt   0644   every certificate that was issued; a name is issued once

A client's key is in the configuration that `add` prints and nowhere else. No file is ever overwritten, and a file with
a key is never readable by others, not even while it is written.
"""

import argparse
import contextlib
import datetime
import ipaddress
import json
import os
import pathlib
import re
import secrets
import sys

from bulkvpnd import config, pki
from bulkvpnd.admin import files

DAYS = 3650
"""How long a certificate is valid: ten years (choice). Nothing renews one by itself, so expiry would be an outage."""


def add_arguments(parser):
    """Adds the subcommands of `COMMANDS` and their arguments to an argparse parser."""
    commands = parser.add_subparsers(dest="pki_command", metavar="COMMAND", required=True)
    for name, (_, summary, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        for flag, settings in (DIRECTORY, *arguments):
            command.add_argument(flag, **settings)


def run(arguments):
    """Runs one subcommand: argparse namespace to exit status, 0, 1, or 77 (EX_NOPERM) where permission is missing."""
    try:
        COMMANDS[arguments.pki_command][0](arguments)
    except (files.CommandError, pki.PKIError, config.ConfigurationError) as error:
        line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(error))
        print(f"bulkvpnctl: {line}", file=sys.stderr)
        return getattr(error, "status", 1)
    return 0


def _init(arguments):
    now = datetime.datetime.now(datetime.timezone.utc)
    base = arguments.directory
    # The random part keeps two sites apart where somebody compares certificates by name.
    ca, ca_key = pki.create_authority(f"bulkvpn-ca-{secrets.token_hex(4)}", now, arguments.days)
    certificate, key = pki.issue(ca, ca_key, arguments.name, "server", now, arguments.days)
    text = _configuration(
        (
            f"Made by bulkvpnctl pki init on {now:%Y-%m-%d}. It holds a private key: keep it away from others.",
            "",
            "Make a configuration for each client, and carry it there:",
            "    bulkvpnctl pki add NAME --remote ADDRESS-OF-THIS-SERVER --output NAME.conf",
            "Start the server, now and at every boot:",
            "    systemctl enable --now bulkvpnd@server",
            "Every option is in bulkvpn.conf(5).",
        ),
        (
            ("mode", "server"),
            ("listen", arguments.listen),
            ("pool-ipv4", arguments.pool_ipv4 or _random_pool_ipv4()),
            ("pool-ipv6", arguments.pool_ipv6 or _random_pool_ipv6()),
        ),
        {"ca": ca, "certificate": certificate, "key": key},
    )
    made = {
        base / "pki" / "ca.key": (ca_key, 0o600),
        base / "pki" / "ca.crt": (ca, 0o644),
        _record(base, arguments.name): (certificate, 0o644),
        base / "server.conf": (text, 0o600),
    }
    for file in made:
        if os.path.lexists(file):
            raise files.CommandError(
                f"{file}: exists already, and nothing is overwritten; move it away first, or choose another --directory"
            )
    with contextlib.ExitStack() as undo:
        for directory in (*reversed(base.parents), base):
            files.make_directory(directory, 0o755, undo)
        for directory in (base / "pki", base / "pki" / "issued"):
            files.make_directory(directory, 0o700, undo)
        for file, (content, mode) in made.items():
            files.create(file, content, mode)
            undo.callback(file.unlink, missing_ok=True)
        undo.pop_all()
    print(f"{base / 'server.conf'}: made; its first lines say what comes next")


def _add(arguments):
    now = datetime.datetime.now(datetime.timezone.utc)
    base = arguments.directory
    ca = files.read(base / "pki" / "ca.crt")
    ca_key = files.read(base / "pki" / "ca.key")
    servers = [issued.name for issued in _issued(base) if issued.role == "server"]
    if len(servers) != 1:
        raise files.CommandError(
            f"{base / 'pki' / 'issued'}: has {len(servers)} server certificates; keep exactly the server's own there"
        )
    remotes = [_with_port(remote, base) for remote in arguments.remote]
    certificate, key = _named(base / "pki", pki.issue, ca, ca_key, arguments.name, "client", now, arguments.days)
    text = _configuration(
        (
            f"Made by bulkvpnctl pki add for {arguments.name} on {now:%Y-%m-%d}. It holds a private key: keep it "
            "away from others.",
            "",
            "On the client: install it as /etc/bulkvpn/client.conf, owner root, mode 0600, then",
            "    systemctl enable --now bulkvpnd@client",
            "Every option is in bulkvpn.conf(5).",
        ),
        (
            ("mode", "client"),
            *(("remote", remote) for remote in remotes),
            ("server-name", servers[0]),
            *([("connections", arguments.connections)] if arguments.connections else []),
        ),
        {"ca": ca, "certificate": certificate, "key": key},
    )
    with contextlib.ExitStack() as undo:
        record = _record(base, arguments.name)
        files.create(record, certificate, 0o644)
        # A configuration that nobody got must not keep its name taken.
        undo.callback(record.unlink, missing_ok=True)
        if arguments.output:
            files.create(arguments.output, text, 0o600)
        else:
            files.write_out(text)
        undo.pop_all()
    if not arguments.output and sys.stdout.isatty():
        print(
            "bulkvpnctl: that was a private key; to have it in a file that others cannot read, "
            "use --output FILE, or: (umask 077; bulkvpnctl pki add ... > client.conf)",
            file=sys.stderr,
        )


def _list(arguments):
    rows = [
        {"name": one.name, "role": one.role, "serial": f"{one.serial:x}", "expires": one.expires.isoformat()}
        for one in _issued(arguments.directory)
    ]
    if arguments.json:
        files.write_out(json.dumps(rows, indent=2) + "\n")
        return
    table = [("NAME", "ROLE", "EXPIRES", "SERIAL")]
    table += [(row["name"], row["role"], row["expires"][:10], row["serial"]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)
    files.write_out("".join(line + "\n" for line in lines))


# What the subcommands write and read.


def _configuration(comment, settings, blocks):
    """Text of a configuration file: comment lines, (key, value) pairs and {key: PEM}."""
    lines = [f"# {line}".rstrip() for line in comment] + [""]
    lines += [f"{key} = {value}" for key, value in settings]
    lines += [f"\n<{key}>\n{pem.strip()}\n</{key}>" for key, pem in blocks.items()]
    return "\n".join(lines) + "\n"


def _random_pool_ipv4():
    """A /24 of 10.64.0.0/10: 16384 of them, in the part of RFC 1918 space that routers seldom hand out (choice)."""
    return ipaddress.IPv4Network(((10 << 24) + (64 << 16) + (secrets.randbelow(1 << 14) << 8), 24))


def _random_pool_ipv6():
    """Subnet 1 of a unique local prefix: fd00::/8 and 40 random bits, RFC 4193 section 3.1."""
    return ipaddress.IPv6Network(((0xFD << 120) + (secrets.randbits(40) << 80) + (1 << 64), 64))


def _record(base, name):
    return base / "pki" / "issued" / f"{name}.crt"


def _issued(base):
    """[pki.Description] of every certificate on record, by name."""
    directory = base / "pki" / "issued"
    with files.about(directory, "cannot be read"):
        records = sorted(directory / name for name in os.listdir(directory) if name.endswith(".crt"))
    return [_named(record, pki.describe, files.read(record)) for record in records]


def _named(path, function, *arguments):
    """Calls a function of `pki`, and has its error name the file or directory that the arguments are from."""
    try:
        return function(*arguments)
    except pki.PKIError as error:
        raise files.CommandError(f"{path}: {error}") from None


def _with_port(remote, base):
    """HOST[:PORT] as HOST:PORT; without a port it is the one of DIR/server.conf, if there is that file."""
    if re.search(r":[0-9]+\Z", remote):
        return remote
    file = base / "server.conf"
    port = config.DEFAULT_PORT
    if os.path.lexists(file):
        try:
            port = config.load(["--config", str(file)])[0].listen[0][1]
        except config.ConfigurationError as error:
            raise files.CommandError(f"{error}; or say the port with --remote {remote}:PORT") from None
    return f"{remote}:{port}"


def _argument(parse):
    """A `config` parse function as argparse wants it, so that its message reaches the administrator."""

    def checked(raw):
        try:
            parse(raw)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"should be {error}") from None
        return raw

    return checked


def _option(name, **settings):
    """An argument that becomes the value of a configuration option and is checked as that."""
    option = config.BY_NAME[name]
    return (f"--{name}", {"metavar": option.metavar, "type": _argument(option.parse), "help": option.help, **settings})


DIRECTORY = (
    "--directory",
    {"metavar": "DIR", "type": lambda raw: pathlib.Path(raw).absolute(), "default": config.CONFIGURATION_DIRECTORY,
     "help": f"where the configuration and pki/ are (default {config.CONFIGURATION_DIRECTORY})"},
)  # fmt: skip
_DAYS = (
    "--days",
    {"metavar": "N", "type": lambda raw: int(_argument(config.integer(1, 36500, "days"))(raw)), "default": DAYS,
     "help": f"how long the certificates are valid (default {DAYS})"},
)  # fmt: skip

COMMANDS = {
    # name: (function, help, arguments)
    "init": (_init, "make the certificate authority and the server's configuration", (
        ("--name", {"metavar": "NAME", "type": _argument(config.certificate_name), "default": "server",
                    "help": "name in the server's certificate (default server)"}),
        _DAYS,
        _option("pool-ipv4", help="IPv4 addresses inside the tunnel (default: a random /24 of 10.64.0.0/10)"),
        _option("pool-ipv6", help="IPv6 addresses inside the tunnel (default: a random unique local /64)"),
        _option("listen", default=config.BY_NAME["listen"].default,
                help=f"address and port of the server (default {config.BY_NAME['listen'].default})"),
    )),
    "add": (_add, "make a client's certificate and print its configuration", (
        ("name", {"metavar": "NAME", "type": _argument(config.certificate_name), "help": "name of the client"}),
        _option("remote", required=True, action="append",
                help="the server as the client reaches it; may be repeated"),
        _DAYS,
        _option("connections", help=f"parallel TCP connections (default {config.BY_NAME['connections'].default})"),
        ("--output", {"metavar": "FILE", "type": lambda raw: pathlib.Path(raw).absolute(),
                      "help": "write to this new file, mode 0600, instead of standard output"}),
    )),
    "list": (_list, "show the certificates that were issued", (
        ("--json", {"action": "store_true", "help": "as JSON"}),
    )),
}  # fmt: skip
