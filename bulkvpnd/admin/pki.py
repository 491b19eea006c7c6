"""``bulkvpnctl pki``: the certificate authority of a site, in files.

`register` has the files and what they mean. A client's key is in the configuration that `add` or `renew` prints and
nowhere else. Nothing is overwritten but what `renew`, `revoke` and `crl` are there to replace, and a file with a key is
never readable by others, not even while it is written.
"""

import argparse
import contextlib
import datetime
import io
import ipaddress
import json
import os
import pathlib
import re
import secrets
import shutil
import sys

from bulkvpnd import config, pki
from bulkvpnd.admin import files, oneline, register
from bulkvpnd.admin.errors import CommandError

DAYS = 3650
"""How long a certificate is valid: ten years (choice). Nothing renews one by itself, so expiry would be an outage."""
EXPIRING = 2
"""Exit status of `list` when something expires soon, so that a cron job or a monitor notices."""


def add_arguments(parser):
    """Adds the subcommands of `COMMANDS` and their arguments to an argparse parser."""
    commands = parser.add_subparsers(dest="pki_command", metavar="COMMAND", required=True)
    for name, (_, summary, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        for flag, settings in (DIRECTORY, *arguments):
            command.add_argument(flag, **settings).completer = _COMPLETERS.get((name, flag))


def _issued(parsed_args, **_):
    """The names that have a certificate, for completion in a shell."""
    try:
        return [one.description.name for one in register.records(parsed_args.directory, register.IN_USE)]
    except CommandError:
        return []


_COMPLETERS = {("renew", "name"): _issued, ("revoke", "name"): _issued}


def run(arguments):
    """Runs one subcommand. Returns the exit status."""
    try:
        COMMANDS[arguments.pki_command][0](arguments)
    except pki.PKIError as error:
        raise CommandError(str(error)) from None
    return 0


def _init(arguments):
    now = datetime.datetime.now(datetime.timezone.utc)
    base = arguments.directory
    # The random part keeps two sites apart where somebody compares certificates by name.
    ca, ca_key = pki.create_authority(f"bulkvpn-ca-{secrets.token_hex(4)}", now, arguments.days)
    certificate, key = pki.issue(ca, ca_key, arguments.name, "server", now, arguments.days)
    crl = pki.create_crl(ca, ca_key, {}, int(now.timestamp()), now, arguments.days)
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
            ("crl", register.crl_path(base).name),
        ),
        {"ca": ca, "certificate": certificate, "key": key},
    )
    made = {
        base / "pki" / "ca.key": (ca_key, 0o600),
        register.authority_path(base): (ca, 0o644),
        register.path(base, register.IN_USE, arguments.name): (certificate, 0o644),
        register.crl_path(base): (crl, 0o644),
        base / "server.conf": (text, 0o600),
    }
    for file in made:
        if os.path.lexists(file):
            raise CommandError(
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
    remotes = [_with_port(remote, base) for remote in arguments.remote]
    ca, ca_key = register.authority(base)
    server = _server_name(base)
    _check_free(base, arguments)
    certificate, key = _issue(base, (ca, ca_key), arguments.name, "client", now, arguments.days)
    text = _client_configuration(arguments, now, remotes, server, {"ca": ca, "certificate": certificate, "key": key})
    text = _FORMS[arguments.form](text)
    with contextlib.ExitStack() as undo:
        record = register.path(base, register.IN_USE, arguments.name)
        files.create(record, certificate, 0o644)
        # A configuration that nobody got must not keep its name taken.
        undo.callback(record.unlink, missing_ok=True)
        _hand_over(text, arguments.output, warn=arguments.form == "file")
        undo.pop_all()


def _check_free(base, arguments):
    """Raises CommandError for a name that is in use. Its record must not be moved away: revoke would not find it."""
    for one in register.records(base, register.IN_USE):
        if one.description.name == arguments.name:
            remotes = " ".join(f"--remote {remote}" for remote in arguments.remote if one.description.role == "client")
            again = f"bulkvpnctl pki renew {arguments.name} {remotes}".rstrip()
            raise CommandError(f"{one.path}: exists, so {arguments.name} has a certificate; another file for it: "
                               f"{again}; to lock it out: bulkvpnctl pki revoke {arguments.name}; or choose another "
                               "name")


def _renew(arguments):
    now = datetime.datetime.now(datetime.timezone.utc)
    base = arguments.directory
    authority = register.authority(base)
    if arguments.name == register.named(register.authority_path(base), pki.describe_authority, authority[0])[0]:
        _renew_authority(arguments, authority, now)
        return
    old = next((one for one in register.records(base, register.IN_USE) if one.description.name == arguments.name), None)
    if old is None:
        raise CommandError(f"{arguments.name}: has no certificate in use; make one with: bulkvpnctl pki add")
    is_server = old.description.role == "server"
    if is_server and arguments.remote:
        raise CommandError(f"--remote: is for clients, and {arguments.name} is a server", os.EX_USAGE)
    certificate, key = _issue(base, authority, arguments.name, old.description.role, now, arguments.days)
    blocks = {"ca": authority[0], "certificate": certificate, "key": key}
    file = base / "server.conf"
    in_place = is_server and not arguments.output and _with_blocks(file, {"certificate": certificate, "key": key})
    if arguments.remote:
        remotes = [_with_port(remote, base) for remote in arguments.remote]
        text = _client_configuration(arguments, now, remotes, _server_name(base), blocks)
    else:
        text = in_place or _blocks(blocks).lstrip()
    with contextlib.ExitStack() as undo:
        record = register.path(base, register.IN_USE, arguments.name)
        register.move(base, old, register.REPLACED, undo)
        files.create(record, certificate, 0o644)
        if in_place:
            files.replace(file, text, 0o600)
        else:
            _hand_over(text, arguments.output)
        undo.pop_all()
    if in_place:
        print(f"{file}: has the new certificate and key; systemctl reload bulkvpnd@server makes them count")


def _renew_authority(arguments, authority, now):
    """Another certificate for the same key. What it has signed ends when it was going to, and is renewed by itself."""
    base = arguments.directory
    if arguments.remote or arguments.output:
        raise CommandError(f"--remote, --output: are for clients and servers, and {arguments.name} is the "
                           "authority", os.EX_USAGE)
    file, ca_file = base / "server.conf", register.authority_path(base)
    old = authority[0]
    new = register.named(base / "pki", pki.renew_authority, *authority, now, arguments.days)
    text = files.read(file) if os.path.lexists(file) else ""
    # The certificate itself and not the block that it is in: there may be others beside it.
    in_place = text.count(old.strip()) == 1
    with contextlib.ExitStack() as undo:
        files.replace(ca_file, new, 0o644)
        undo.callback(files.replace, ca_file, old, 0o644)
        if in_place:
            files.replace(file, text.replace(old.strip(), new.strip()), 0o600)
        undo.pop_all()
    print(f"{ca_file}: has the new certificate; clients get it with the next configuration that add or renew makes")
    if in_place:
        print(f"{file}: has it too; systemctl reload bulkvpnd@server puts it in force")
    elif text:
        print(f"{file}: does not have the former one inside; put the new one where its ca is, and reload the server")


def _revoke(arguments):
    now = datetime.datetime.now(datetime.timezone.utc)
    base = arguments.directory
    places = (register.REPLACED,) if arguments.replaced else (register.IN_USE, register.REPLACED)
    found = [one for one in register.records(base, *places) if one.description.name == arguments.name]
    if not found:
        raise CommandError(f"{arguments.name}: has no such certificate; see bulkvpnctl pki list")
    serials = {one.description.serial: now for one in found} | register.revoked(base, now)
    register.write_crl(base, serials, now, arguments.days)
    for record in found:
        with contextlib.ExitStack() as undo:
            register.move(base, record, register.REVOKED, undo)
            undo.pop_all()
    print(f"{arguments.name}: {len(found)} revoked; running servers see it within seconds")
    _warn_of_servers_without_crl(base)


def _crl(arguments):
    now = datetime.datetime.now(datetime.timezone.utc)
    serials = register.revoked(arguments.directory, now)
    register.write_crl(arguments.directory, serials, now, arguments.days)
    print(f"{register.crl_path(arguments.directory)}: made, with {len(serials)} certificates")
    _warn_of_servers_without_crl(arguments.directory)


def _list(arguments):
    now = datetime.datetime.now(datetime.timezone.utc)
    rows = register.rows(arguments.directory, now)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        table = [("NAME", "ROLE", "STATE", "EXPIRES", "SERIAL")]
        table += [(row["name"], row["role"], row["state"], row["expires"][:10], row["serial"]) for row in rows]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)
        print(*lines, sep="\n")
    due = [row for row in rows if row["state"] in ("expiring", "expired")]
    # The authority first: nothing that it signs outlives it.
    due.sort(key=lambda row: row["role"] != "authority")
    for row in due:
        mend = f"make another with: bulkvpnctl pki {'crl' if row['role'] == 'crl' else 'renew ' + row['name']}"
        verb = "expired" if row["state"] == "expired" else "expires"
        print(f"bulkvpnctl: {row['role']} {row['name']} {verb} on {row['expires'][:10]}; {mend}", file=sys.stderr)
    if due:
        raise CommandError("", EXPIRING)


# What the subcommands write and read.


def _configuration(comment, settings, blocks):
    """Text of a configuration file: comment lines, (key, value) pairs and {key: PEM}."""
    lines = [f"# {line}".rstrip() for line in comment] + [""]
    lines += [f"{key} = {value}" for key, value in settings]
    return "\n".join(lines) + "\n" + _blocks(blocks)


def _blocks(blocks):
    """{key: PEM} as they stand in a configuration."""
    return "".join(f"\n<{key}>\n{pem.strip()}\n</{key}>\n" for key, pem in blocks.items())


def _with_blocks(file, blocks):
    """The text of a configuration with other PEM in its blocks; None if it is not there or does not have them."""
    if not os.path.lexists(file):
        return None
    text = files.read(file)
    for key, pem in blocks.items():
        text, count = re.subn(rf"^<{key}>$.*?^</{key}>$", _blocks({key: pem}).strip(), text, flags=re.DOTALL | re.M)
        if count != 1:
            return None
    return text


def _client_configuration(arguments, now, remotes, server, blocks):
    return _configuration(
        (
            f"Made by bulkvpnctl pki for {arguments.name} on {now:%Y-%m-%d}. It holds a private key: keep it "
            "away from others.",
            "",
            "On the client: install it as /etc/bulkvpn/client.conf, owner root, mode 0600, then",
            "    systemctl enable --now bulkvpnd@client",
            "Both is what this does: bulkvpnctl import FILE --start",
            "Every option is in bulkvpn.conf(5).",
        ),
        (
            ("mode", "client"),
            *(("remote", remote) for remote in remotes),
            ("server-name", server),
            *([("connections", arguments.connections)] if arguments.connections else []),
        ),
        blocks,
    )


def _server_name(base):
    """The name of the one server. Raises CommandError."""
    servers = [one.description.name for one in register.records(base, register.IN_USE)
               if one.description.role == "server"]
    if len(servers) != 1:
        raise CommandError(
            f"{base / 'pki' / register.IN_USE}: has {len(servers)} server certificates; keep exactly the server's own "
            "there"
        )
    return servers[0]


def _issue(base, authority, name, role, now, days):
    return register.named(base / "pki", pki.issue, *authority, name, role, now, days)


def _line(text):
    return oneline.encode(config.FileParser().parse(io.StringIO(text))) + "\n"


def _qr_code(text):
    """The line as a QR code in block characters. Raises CommandError where the terminal is too small for it."""
    import segno

    code = segno.make(_line(text).strip(), error="l", boost_error=False, micro=False, mode="alphanumeric")
    columns, lines = code.symbol_size(border=_QUIET)[0], code.symbol_size(border=_QUIET)[1] // 2 + 2
    have = shutil.get_terminal_size()
    if sys.stdout.isatty() and (have.columns < columns or have.lines < lines):
        raise CommandError(f"--qr: needs a terminal of {columns} columns and {lines} lines, and this one has "
                           f"{have.columns} and {have.lines}; enlarge it, or use --line")
    out = io.StringIO()
    code.terminal(out, border=_QUIET, compact=True)
    return out.getvalue()


_QUIET = 2
"""Modules of margin. ISO/IEC 18004 wants 4, and readers are content with 2, which saves columns (choice)."""
_FORMS = {"file": lambda text: text, "line": _line, "qr": _qr_code}


def _hand_over(text, output, warn=True):
    """What holds a private key, to a new file or standard output."""
    if output:
        files.create(output, text, 0o600)
        return
    # At once: where nobody gets the key, what was made for it is taken back.
    print(text, end="", flush=True)
    if warn and sys.stdout.isatty():
        print(
            "bulkvpnctl: that was a private key; to have it in a file that others cannot read, "
            "use --output FILE, or: (umask 077; bulkvpnctl pki add ... > client.conf)",
            file=sys.stderr,
        )


def _warn_of_servers_without_crl(base):
    """server.conf may be older than its list, or not know of it."""
    file = base / "server.conf"
    if not os.path.lexists(file):
        return
    try:
        configuration, _ = config.load(["--config", str(file)])
    except config.ConfigurationError as error:
        print(f"bulkvpnctl: {error}", file=sys.stderr)
        return
    if not configuration.crl:
        print(f"bulkvpnctl: {file}: has no crl, so nobody is refused yet; add the line crl = "
              f"{register.crl_path(base).name} and restart the server", file=sys.stderr)


def _random_pool_ipv4():
    """A /24 of 10.64.0.0/10: 16384 of them, in the part of RFC 1918 space that routers seldom hand out (choice)."""
    return ipaddress.IPv4Network(((10 << 24) + (64 << 16) + (secrets.randbelow(1 << 14) << 8), 24))


def _random_pool_ipv6():
    """Subnet 1 of a unique local prefix: fd00::/8 and 40 random bits, RFC 4193 section 3.1."""
    return ipaddress.IPv6Network(((0xFD << 120) + (secrets.randbits(40) << 80) + (1 << 64), 64))


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
            raise CommandError(f"{error}; or say the port with --remote {remote}:PORT") from None
    return f"{remote}:{port}"


def argument(parse):
    """A `config` parse function as argparse wants it, so that its message reaches the administrator."""

    def checked(raw):
        try:
            parse(raw)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"should be {error}") from None
        return raw

    return checked


def option(name, **settings):
    """An argument that becomes the value of a configuration option and is checked as that."""
    row = config.BY_NAME[name]
    return (f"--{name}", {"metavar": row.metavar, "type": argument(row.parse), "help": row.help, **settings})


DIRECTORY = (
    "--directory",
    {"metavar": "DIR", "type": lambda raw: pathlib.Path(raw).absolute(), "default": config.CONFIGURATION_DIRECTORY,
     "help": f"where the configuration and pki/ are (default {config.CONFIGURATION_DIRECTORY})"},
)  # fmt: skip
_DAYS = (
    "--days",
    {"metavar": "N", "type": lambda raw: int(argument(config.integer(1, 36500, "days"))(raw)), "default": DAYS,
     "help": f"how long the certificates are valid (default {DAYS})"},
)  # fmt: skip
_NAME = (
    "name",
    {"metavar": "NAME", "type": argument(config.certificate_name), "help": "name of the client or server"},
)  # fmt: skip
_CRL_DAYS = (_DAYS[0], {**_DAYS[1], "help": f"how long the revocation list is valid (default {DAYS})"})
_OUTPUT = (
    "--output",
    {"metavar": "FILE", "type": lambda raw: pathlib.Path(raw).absolute(),
     "help": "write to this new file, mode 0600, instead of standard output"},
)  # fmt: skip

COMMANDS = {
    # name: (function, help, arguments)
    "init": (_init, "make the certificate authority and the server's configuration", (
        ("--name", {"metavar": "NAME", "type": argument(config.certificate_name), "default": "server",
                    "help": "name in the server's certificate (default server)"}),
        _DAYS,
        option("pool-ipv4", help="IPv4 addresses inside the tunnel (default: a random /24 of 10.64.0.0/10)"),
        option("pool-ipv6", help="IPv6 addresses inside the tunnel (default: a random unique local /64)"),
        option("listen", default=config.BY_NAME["listen"].default,
               help=f"address and port of the server (default {config.BY_NAME['listen'].default})"),
    )),
    "add": (_add, "make a client's certificate and print its configuration", (
        ("name", {"metavar": "NAME", "type": argument(config.certificate_name), "help": "name of the client"}),
        option("remote", required=True, action="append",
               help="the server as the client reaches it; may be repeated"),
        _DAYS,
        option("connections", help=f"parallel TCP connections (default {config.BY_NAME['connections'].default})"),
        _OUTPUT,
        ("--line", {"action": "store_const", "dest": "form", "const": "line", "default": "file",
                    "help": "as one line, which bulkvpnctl import takes too"}),
        ("--qr", {"action": "store_const", "dest": "form", "const": "qr", "default": "file",
                  "help": "as a QR code of that line, in block characters"}),
    )),
    "renew": (_renew, "make another certificate for a name that has one, or for the authority", (
        ("name", {"metavar": "NAME", "help": "name of the client, the server or, as list shows it, the authority"}),
        option("remote", action="append",
               help="for a client: print a whole configuration, as add does; may be repeated"),
        _DAYS,
        option("connections", help="with --remote, as add"),
        _OUTPUT,
    )),
    "revoke": (_revoke, "end the validity of a name's certificates", (
        _NAME,
        ("--replaced", {"action": "store_true", "help": "only those that were renewed, not the one in use"}),
        _CRL_DAYS,
    )),
    "crl": (_crl, "make the revocation list anew, before it expires", (_CRL_DAYS,)),
    "list": (_list, "show the certificates that were issued", (
        ("--json", {"action": "store_true", "help": "as JSON"}),
    )),
}  # fmt: skip
