"""nftables: one table of our own for each instance, ``inet bulkvpnd_NAME``, and nothing of anybody else's.

    part "gateway"   --.
    part "timeouts"  --+--> the whole table, in one transaction --> kernel
    part ...         --'

A part is what one purpose needs: a list of objects as `chain` makes them, in libnftables' JSON (libnftables-json(5)),
without family and table. Whenever a part comes, changes or goes, the table is written anew, in one transaction: no
packet ever meets half of it, and when the kernel refuses, what was there before stays.

Through libnftables and not nft(8): no other program, no quoting, and under the unit's sandbox nothing but a netlink
socket. It is not pyroute2's nftables, because the versions in Debian 12 and 13 have no masquerade.
"""

import collections
import errno
import hashlib
import logging
import os
import pathlib
import re

log = logging.getLogger(__name__)

FAMILY = "inet"
PREFIX = "bulkvpnd_"
CAP_NET_ADMIN = 1 << 12
"""linux/capability.h; the bit in /proc/PID/status."""
DROP = ({"counter": None}, {"drop": None})
"""What a rule that drops ends with; the counter is for the administrator, in ``nft list ruleset``."""


class FirewallError(Exception):
    """There is no libnftables, or the kernel refused; the message names the table. exit_status: of the daemon."""

    def __init__(self, message, exit_status=1):
        super().__init__(message)
        self.exit_status = exit_status


class Unavailable(FirewallError):
    """libnftables, or its Python binding, is not installed."""


# What parts are made of


def chain(name, hook, priority, *rules, kind="filter"):
    """The objects of a base chain and its rules. What meets none of them passes.

    name: one that no other part has. hook: prerouting, input, forward, output or postrouting. priority: number, as in
    nft(8). rules: each a list of statements. kind: filter, nat or route.
    """
    base = {"name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}
    return [{"chain": base}, *({"rule": {"chain": name, "expr": list(rule)}} for rule in rules)]


def meta(key, value, negated=False):
    """Matches what the kernel knows of a packet. key: iifname, oifname, mark, …"""
    return _match({"meta": {"key": key}}, value, negated)


def address(field, network, negated=False):
    """Matches an address of a packet, of its own IP version only. field: saddr or daddr. network: or address."""
    protocol = {4: "ip", 6: "ip6"}[network.version]
    left = {"payload": {"protocol": protocol, "field": field}}
    if network.max_prefixlen == getattr(network, "prefixlen", network.max_prefixlen):
        return _match(left, str(getattr(network, "network_address", network)), negated)
    return _match(left, {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}, negated)


def source_type(kind, negated=False):
    """Matches what the routes say of the source address. kind: local, unicast, …"""
    return _match({"fib": {"flags": ["saddr"], "result": "type"}}, kind, negated)


def source_port(number):
    """Matches TCP with this source port, over both IP versions."""
    return _match({"payload": {"protocol": "tcp", "field": "sport"}}, number)


def conntrack(key, flag):
    """Matches a flag of what the kernel tracks a packet's connection by, nft(8). key: state or status."""
    return {"match": {"op": "in", "left": {"ct": {"key": key}}, "right": flag}}


def _match(left, right, negated=False):
    return {"match": {"op": "!=" if negated else "==", "left": left, "right": right}}


# The table


def table_name(instance):
    """As nft(8) can print it and read it again, whatever the instance is called."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", instance):
        instance = hashlib.sha256(instance.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return PREFIX + instance


class Firewall:
    """The table of one instance. nft: runs commands; see `run`."""

    def __init__(self, instance, nft=None):
        self._nft = nft or run
        self._table = {"family": FAMILY, "name": table_name(instance)}
        self._parts = {}
        self._held = set()

    @property
    def table(self):
        """Its name, as an administrator finds it in ``nft list tables``."""
        return self._table["name"]

    def apply(self, part, objects):
        """Makes `objects` the part of that name, in place of what it was. Raises FirewallError; then nothing changed.

        Empty objects take the part away, and the last part takes the table with it.
        """
        parts = {**self._parts, part: list(objects)}
        parts = {name: content for name, content in parts.items() if content}
        if parts:
            self._write(parts)
        elif self._parts:
            self._delete()
        self._parts = parts

    def mend(self):
        """Writes the table again if something of it is gone. Returns whether it was. Raises FirewallError.

        What is there besides does not matter, and what was changed in its place is not seen.
        """
        wanted = _counted(one for content in self._parts.values() for one in content)
        if not (wanted and wanted - _counted(self._listed())):
            return False
        self.rewrite()
        return True

    def rewrite(self):
        """Writes the table again, whatever is there. Raises FirewallError."""
        if self._parts:
            self._write(self._parts)

    def exists(self):
        """Whether the table is there: of this run, or of one that crashed. Raises FirewallError."""
        return bool(self._listed())

    def _listed(self):
        try:
            return self._nft([{"list": {"table": self._table}}])
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._explain(error, "listed") from None

    def hold(self, *parts):
        """Of what is there, undo() leaves `parts` and no others: what must not open when the daemon fails."""
        self._held = set(parts)

    def clean(self):
        """Removes what a crashed run of this instance left, if nothing was written since; never raises.

        The first part that is written replaces that anyway, and without a moment in which there is no table: a kill
        switch holds from one run to the next.
        """
        if not self._parts:
            self.undo()

    def undo(self):
        """Removes the table, also one that a crashed run of this instance left, but for what is held. Never raises."""
        held = {name: content for name, content in self._parts.items() if name in self._held}
        self._parts = {}
        try:
            if held:
                self._write(held)
            else:
                self._delete()
        except FirewallError as error:
            # Without a binding there never was a table; with one it may be there still.
            log.log(logging.DEBUG if isinstance(error, Unavailable) else logging.WARNING, "%s", error)

    def _write(self, parts):
        inside = {"family": FAMILY, "table": self.table}
        commands = [
            # Adding first makes deleting succeed whether it was there or not.
            {"add": {"table": self._table}},
            {"delete": {"table": self._table}},
            {"add": {"table": self._table}},
        ]
        for content in parts.values():
            for one in content:
                commands += [{"add": {kind: {**inside, **fields}}} for kind, fields in one.items()]
        try:
            self._nft(commands)
        except OSError as error:
            raise self._explain(error, "written") from None

    def _delete(self):
        try:
            self._nft([{"delete": {"table": self._table}}])
        except FileNotFoundError:
            # It is not there, which is what was wanted.
            return
        except OSError as error:
            raise self._explain(error, "removed") from None

    def _explain(self, error, done):
        hint = "; it needs root or CAP_NET_ADMIN" if error.errno == errno.EPERM else ""
        return FirewallError(f"nftables table {FAMILY} {self.table} cannot be {done}: {error.strerror}{hint}",
                             os.EX_NOPERM if error.errno == errno.EPERM else 1)


def _counted(objects):
    """How many of each kind there are in each chain. objects: of libnftables-json(5)."""
    return collections.Counter(
        (kind, fields.get("chain", fields.get("name"))) for one in objects for kind, fields in one.items()
    )


# What is there besides ours


def forward_drops(nft=None):
    """Base chains of others that drop what is forwarded unless a rule lets it pass: [table and chain, text].

    Chains of iptables are among them where it is the iptables of nftables, as in Debian since 10. Raises FirewallError.
    """
    try:
        found = (nft or run)([{"list": {"chains": None}}])
    except OSError as error:
        raise FirewallError(f"nftables: chains cannot be listed: {error.strerror}") from None
    return [f"{one['family']} {one['table']}, chain {one['name']}"
            for one in base_chains(found, "forward") if one.get("policy") == "drop"]


def base_chains(objects, hook):
    """The base chains of others at a hook, in IPv4 and IPv6. objects, and these: of libnftables-json(5).

    None of ours has the policy to drop: one that has is an administrator's, whatever its table is called.
    """
    chains = [one["chain"] for one in objects if "chain" in one]
    return [one for one in chains if one.get("hook") == hook and one["family"] in ("ip", "ip6", "inet")
            and not (one["table"].startswith(PREFIX) and one.get("policy") != "drop")]


# libnftables


def check():
    """Raises Unavailable if tables cannot be written on this machine at all. Touches nothing."""
    _library()


def _library():
    try:
        # Here, so that a machine without it runs all that needs no firewall.
        import nftables

        return nftables.Nftables()
    except (ImportError, OSError) as error:
        raise Unavailable(f"nftables: its Python binding cannot be used ({error}); run: apt install python3-nftables",
                          os.EX_UNAVAILABLE) from None


def _permitted(library):
    """The library, which says it on standard error before it fails (1.0.6). Raises PermissionError."""
    capabilities = re.search(r"(?m)^CapEff:\s*([0-9a-f]+)$", pathlib.Path("/proc/self/status").read_text())
    if not int(capabilities[1], 16) & CAP_NET_ADMIN:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    return library


def run(commands):
    """Runs commands of libnftables-json(5) in one transaction.

    Returns the objects that they list. Raises OSError with the kernel's reason, FirewallError without libnftables.
    """
    status, output, error = _permitted(_library()).json_cmd({"nftables": commands})
    if status:
        raise _as_os_error(error)
    return output["nftables"] if output else []


def run_text(text):
    """Runs text of nft(8) in one transaction, for what libnftables' JSON cannot say. Raises like `run`."""
    status, _, error = _permitted(_library()).cmd(text)
    if status:
        raise _as_os_error(error)


def _as_os_error(text):
    """libnftables has only text, and its last words are those of strerror(3)."""
    # Behind them it may propose a table whose name is similar, another instance's for one.
    line = text.strip().splitlines()[0].partition("; did you mean")[0] if text.strip() else "unknown error"
    for number in errno.errorcode:
        if line.endswith(os.strerror(number)):
            return OSError(number, os.strerror(number))
    return OSError(errno.EINVAL, line)
