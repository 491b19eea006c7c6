"""Fixed addresses of clients and networks behind them: the files of ``/etc/bulkvpn/NAME.clients.d/``.

    [client warehouse]
    ipv4 = 10.86.0.10
    ipv6 = fd86:1:2:3::10
    networks = 192.168.7.0/24
    networks = fd00:7::/64

Every file whose name ends in .conf is read, in the order of names. What is wrong names file, line, key, value and the
mend, as everything about the configuration does; nothing is taken in part.
"""

import dataclasses
import ipaddress
import os
import re

from bulkvpnd import config
from bulkvpnd.config import ConfigurationError

NETWORKS_MAX = 1024
"""Networks behind all clients of a server: every worker gets them in one message (choice)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Client:
    """What is fixed for one identity. addresses: {4 | 6: address}. networks: tuple of ipaddress networks."""

    name: str
    addresses: dict
    networks: tuple


def _address(version):
    def parse(raw):
        try:
            value = ipaddress.ip_address(raw)
        except ValueError:
            value = None
        if value is None or value.version != version or "%" in raw:
            raise ValueError(f"an IPv{version} address of the pool")
        return value

    return parse


def _network(raw):
    if "/" not in raw:
        raise ValueError("a network with its length, for example 192.168.7.0/24")
    return config.pushed_network(raw)


KEYS = {
    # key: (what makes the value of the text, whether it may be repeated)
    "ipv4": (_address(4), False),
    "ipv6": (_address(6), False),
    "networks": (_network, True),
}


def directory_of(configuration):
    """Where the files of an instance are."""
    return configuration.path.parent / f"{configuration.name}.clients.d"


def load(configuration):
    """The Client of every section, in order. Raises ConfigurationError."""
    if configuration.mode != "server":
        return ()
    directory = directory_of(configuration)
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".conf"))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigurationError(f"{directory}: cannot be read: {error.strerror}; the daemon's user must be able to "
                                 "read it and the directories above it") from None
    lines = [line for name in names for line in _lines(directory / name)]
    _check(configuration, lines)
    clients = {}
    for line in lines:
        client = clients.setdefault(line.client, Client(line.client, {}, ()))
        if line.key == "networks":
            clients[line.client] = dataclasses.replace(client, networks=(*client.networks, line.value))
        elif line.key:
            client.addresses[line.value.version] = line.value
    return tuple(clients.values())


# What stands in the files


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    """One setting, or the head of a section if it has no key. where: file and line."""

    where: str
    client: str
    key: str | None = None
    value: object = None

    @property
    def shown(self):
        return f"{self.where}: {self.key} = {self.value}"


def _lines(file):
    """Every line that says something. Raises ConfigurationError."""
    client = None
    for number, text in enumerate(_text(file).split("\n"), 1):
        text, where = text.strip(), f"{file}:{number}"
        if not text or text.startswith(("#", ";")):
            continue
        head = re.fullmatch(r"\[client\s+(\S+)\]", text)
        if head:
            client = _value(where, "client", config.certificate_name, head[1])
            yield _Line(where, client)
            continue
        key, equals, raw = (part.strip() for part in text.partition("="))
        if text.startswith("[") or not equals:
            raise ConfigurationError(f"{where}: {config.escaped(text)}: not understood; write [client NAME], and below "
                                     "it key = value")
        if key not in KEYS:
            raise ConfigurationError(f"{where}: {config.escaped(key)}: unknown; there are: {', '.join(KEYS)}")
        if client is None:
            raise ConfigurationError(f"{where}: {key}: stands before the first section; write [client NAME] above it")
        yield _Line(where, client, key, _value(where, key, KEYS[key][0], raw))


def _value(where, key, parse, raw):
    try:
        return parse(raw)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {key} = {config.escaped(raw)}: should be {error}") from None


def _text(file):
    try:
        with os.fdopen(config.open_regular(file), "rb") as stream:
            return config.bounded_text(stream, file)
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read: {error.strerror}; there is no secret in it, so run: "
                                 f"chmod a+r {file}") from None


# What single lines cannot tell


def _check(configuration, lines):
    pools = {"ipv4": configuration.pool_ipv4, "ipv6": configuration.pool_ipv6}
    first = {}  # what may stand once: the line that has it
    networks = []
    for line in lines:
        if line.key is None:
            _once(first, ("section", line.client), line, f"{line.where}: [client {line.client}]")
        elif line.key == "networks":
            networks.append(line)
            for key, pool in pools.items():
                if pool and pool.version == line.value.version and pool.overlaps(line.value):
                    raise ConfigurationError(f"{line.shown}: overlaps pool-{key} = {pool}; give another network, or "
                                             "another pool")
        else:
            _once(first, (line.client, line.key), line, f"{line.where}: {line.key}")
            _check_address(line, pools[line.key])
            _once(first, line.value, line, line.shown)
    if len(networks) > NETWORKS_MAX:
        raise ConfigurationError(f"{networks[NETWORKS_MAX].shown}: is one too many; at most {NETWORKS_MAX} networks "
                                 "are allowed for all clients")
    _check_apart(networks)


def _once(first, what, line, shown):
    if what in first:
        raise ConfigurationError(f"{shown}: given twice, first at {first[what].where}; keep one of them")
    first[what] = line


def _check_address(line, pool):
    if pool is None:
        raise ConfigurationError(f"{line.shown}: there is no pool-{line.key}; give one, or take this line out")
    last = pool[-1] if pool.version == 4 else None
    if line.value not in pool or line.value in (pool[0], pool[1], last):
        raise ConfigurationError(f"{line.shown}: should be an address of pool-{line.key} = {pool}, and not its first "
                                 f"({pool[1]} is the server's){' or last' if last else ''}")


def _check_apart(lines):
    """Two networks overlap only if one holds the other, so one that overlaps any overlaps its neighbour in order."""
    def place(line):
        return line.value.version, line.value.network_address, line.value.prefixlen

    ordered = sorted(lines, key=place)
    for left, right in zip(ordered, ordered[1:]):
        if left.value.version == right.value.version and left.value.overlaps(right.value):
            earlier, later = sorted((left, right), key=lines.index)
            raise ConfigurationError(f"{later.shown}: overlaps {earlier.value} of {earlier.client} at {earlier.where}; "
                                     "a network belongs to one client")
