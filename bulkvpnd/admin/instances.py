"""``bulkvpnctl init-instances``: several configurations from one, for instances that carry the same networks together.

    server.conf  -->  server1.conf … serverN.conf      ports 7443 … 7442+N, each a part of the pool
                      and server1.clients.d …          networks behind clients, which all of them carry together
    client.conf  -->  client1.conf … clientN.conf      the same ports of the same server

Everything else, certificate and key too, is as in the one they come from. No file is ever overwritten, and each that is
made passes the checks of the daemon's start.
"""

import contextlib
import dataclasses
import ipaddress
import os
import pathlib
import re

from bulkvpnd import config
from bulkvpnd.admin import files, pki
from bulkvpnd.admin.errors import CommandError
from bulkvpnd.control import current

INSTANCES_MAX = 64
"""More instances than this have more workers than any machine has cores (choice)."""
INSTANCES = config.integer(2, INSTANCES_MAX, "instances")
ENDPOINTS = {"server": ("listen", "metrics"), "client": ("remote", "metrics")}
"""The options whose ports go up by one from instance to instance."""
FILES = ("ca", "certificate", "key", "crl")
POOLS = ("pool-ipv4", "pool-ipv6")
UNSHAREABLE = ("runtime-directory", "state-directory")


def add_arguments(parser):
    """Adds the arguments of this command to an argparse parser."""
    parser.add_argument("count", metavar="N", type=lambda raw: int(pki.argument(INSTANCES)(raw)),
                        help=f"how many instances, 2 to {INSTANCES_MAX}")
    parser.add_argument("--from", dest="source", metavar="FILE", type=lambda raw: pathlib.Path(raw).absolute(),
                        help="the configuration to begin with (default: server.conf, else client.conf, in DIR)")
    flag, settings = pki.DIRECTORY
    parser.add_argument(flag, **{**settings, "help": f"where to write (default {config.CONFIGURATION_DIRECTORY})"})
    flag, settings = pki.option("multipath", action="append", default=[],
                                help="a network that the instances carry together; may be repeated")
    parser.add_argument(flag, **settings)


def run(arguments):
    """Returns the exit status."""
    base, count = arguments.directory, arguments.count
    source = arguments.source or next(
        (file for mode in ENDPOINTS if os.path.lexists(file := base / f"{mode}.conf")), base / "server.conf"
    )
    given, _ = config.load(["--config", str(source)])
    wishes = tuple(map(config.BY_NAME["multipath"].parse, arguments.multipath))
    # Of the one that they come from, so that a message names a file that there is.
    given, _, _ = current.check(dataclasses.replace(given, multipath=given.multipath + wishes))
    items, lines = config.read_items(source)
    for name in UNSHAREABLE:
        if name in items:
            raise CommandError(f"{source}:{lines[name][0]}: {name}: each instance needs its own; take it out")
    added = _to_share(given)
    together = {"multipath": [*items.get("multipath", ()), *arguments.multipath, *added]}
    made = {}
    for number, changes in enumerate(_changes(given, items, source, count), 1):
        name = f"{given.mode}{number}"
        made[base / f"{name}.conf"] = _text(
            f"Made by bulkvpnctl init-instances from {source}: instance {number} of {count}.",
            {**items, **_moved(items, source.parent, base), **changes, **together},
        )
    fixed = _clients(source, [f"{given.mode}{number}" for number in range(1, count + 1)], base, made)
    for file in (*made, *dict.fromkeys(file.parent for file in fixed)):
        if os.path.lexists(file):
            raise CommandError(f"{file}: exists already, and nothing is overwritten; move it away first")
    with contextlib.ExitStack() as undo:
        for file, text in made.items():
            files.create(file, text, 0o600)
            undo.callback(file.unlink, missing_ok=True)
        for file, text in fixed.items():
            files.make_directory(file.parent, 0o755, undo)
            files.create(file, text, 0o644)
            undo.callback(file.unlink, missing_ok=True)
        for file in made:
            # What does not start is not left behind.
            _check(file)
        undo.pop_all()
    mode = given.mode
    for file in made:
        print(f"{file}: made")
    for network in added:
        print(f"{network}: is behind a client, so all of them carry it together; where this machine itself sends to "
              f"it, add to multipath = {network} in each: source ADDRESS, its own in its network")
    print(f"Start them, in place of bulkvpnd@{source.stem}, with:\n"
          f"    systemctl disable --now bulkvpnd@{source.stem}\n"
          f"    systemctl enable --now {' '.join(f'bulkvpnd@{mode}{number}' for number in range(1, count + 1))}")
    return os.EX_OK


def _check(file):
    try:
        current.check(config.load(["--config", str(file)])[0])
    except config.ConfigurationError as error:
        raise CommandError(f"nothing was made, since an instance would not start: {error}") from None


def _to_share(given):
    """The networks behind clients that no multipath names. Only one instance could have a route of its own to each."""
    shared = {wish.prefix for wish in given.multipath}
    return [str(network) for client in given.clients for network in client.networks if network not in shared]


def _clients(source, names, base, made):
    """The files of NAME.clients.d for each instance, {path: text}.

    Each server has a part of the pool, so a fixed address is one server's; for the others its line is a comment.
    """
    found = sorted((source.parent / f"{source.stem}.clients.d").glob("*.conf"))
    fixed = {}
    for name in names:
        text = made[base / f"{name}.conf"]
        pools = [ipaddress.ip_network(pool) for pool in re.findall(r"^pool-ipv[46] = (.+)$", text, re.MULTILINE)]
        for file in found:
            lines = files.read(file).splitlines()
            fixed[base / f"{name}.clients.d" / file.name] = "".join(_for_pools(line, pools) + "\n" for line in lines)
    return fixed


def _for_pools(line, pools):
    key, _, value = (part.strip() for part in line.partition("="))
    if key in ("ipv4", "ipv6"):
        with contextlib.suppress(ValueError):
            if not any(ipaddress.ip_address(value) in pool for pool in pools):
                return f"# not of this instance's pool: {line.strip()}"
    return line


def _changes(given, items, source, count):
    """For each instance what is its own: [{option: value or list of values}]."""
    endpoints = {option: found for option in ENDPOINTS[given.mode] if (found := _endpoints(given, option))}
    # A remote is another machine's. Of this one's ports none may be two instances', whatever addresses they are at.
    taken = [{(option == "remote" and host, port + number) for option, found in endpoints.items()
              for host, port in found} for number in range(count)]
    union = set().union(*taken)
    if max(port for _, port in union) > 65535 or len(union) < sum(map(len, taken)):
        raise CommandError(f"{source}: {', '.join(endpoints)}: {count} instances need {count} ports from each of these "
                           "on, and no two may meet; choose other ports")
    stem = items["device"].replace("%d", "").rstrip("0123456789") if "device" in items else given.mode
    pools = {name: _parts(source, name, getattr(given, config.BY_NAME[name].field), count) for name in POOLS}
    return [
        {
            **{option: [config.endpoint_text(host, port + number) for host, port in found]
               for option, found in endpoints.items()},
            "device": f"{stem[:13]}{number + 1}",
            **{name: str(parts[number]) for name, parts in pools.items() if parts},
        }
        for number in range(count)
    ]


def _endpoints(given, option):
    """[(host, port), ...]"""
    value = getattr(given, option)
    return value if config.BY_NAME[option].repeat else [value] if value else []


def _parts(source, name, pool, count):
    """`count` equal parts of a pool, as few as powers of two allow."""
    if pool is None:
        return None
    longer = (count - 1).bit_length()
    try:
        parts = [config.BY_NAME[name].parse(str(part)) for part in _subnets(pool, longer, count)]
    except ValueError:
        raise CommandError(f"{source}: {name} = {pool}: is too small to be shared by {count} instances; "
                           "choose a larger one") from None
    return parts


def _subnets(pool, longer, count):
    subnets = pool.subnets(prefixlen_diff=longer)
    return [next(subnets) for _ in range(count)]


def _moved(items, there, here):
    """Paths of FILES count from the directory of the configuration, so elsewhere they have to be whole."""
    if there == here:
        return {}
    return {name: str(there / value) for name in FILES if "-----BEGIN" not in (value := items.get(name, "-----BEGIN"))}


def _text(comment, items):
    """Text of a configuration file from what config.read_items() gave."""
    lines, blocks = [f"# {comment}", "# It may hold a private key: keep it away from others.", ""], []
    for name, value in items.items():
        for one in value if isinstance(value, list) else [value]:
            if "\n" in one:
                blocks += ["", f"<{name}>", one.strip("\n"), f"</{name}>"]
            else:
                lines.append(f"{name} = {one}")
    return "\n".join([*lines, *blocks]) + "\n"
