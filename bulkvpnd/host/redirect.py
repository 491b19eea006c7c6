"""The full tunnel: everything that is not marked goes to the device, by policy routing as wg-quick(8) has it.

    priority p-1   from all                lookup main suppress_prefixlength 0   all of main but its default route
    priority p     not from all fwmark M   lookup T                              T: default dev bulk0, per family
    32766          from all                lookup main                           marked packets: the outer connections

One mark for all instances, so that the outer connections of one never enter the tunnel of another. Table and
priorities are an instance's own. A family that the tunnel does not carry has an unreachable default route in T: an
error at once instead of a way round the tunnel.

After a crash the routes to the device are gone and the rules are left, which look into a table without a device. By
that any instance knows them and takes them away; so nothing has to be remembered.
"""

import contextlib
import errno
import logging

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bulkvpnd.host.firewall import chain, meta
from bulkvpnd.host.link import NO_IPV6, LinkError
from bulkvpnd.host.netlink import listing, reason
from bulkvpnd.host.routes import FAMILIES, PROTOCOL, RT_TABLE_MAIN, RTN_UNICAST

log = logging.getLogger(__name__)

MARK = 7443
"""The first mark and table that is tried (choice: the default port, as wg-quick(8) does with its own)."""
PLACES = 64
"""Instances with a full tunnel on one machine, at most (choice)."""
RULE_MAIN = 32766
"""Priority of the kernel's own rule for the table main (net/ipv4/fib_rules.c)."""
MANGLE = -150
"""Priority of chains that set marks (nft(8))."""
FIB_RULE_INVERT = 2
"""linux/fib_rules.h"""
LAST = 65535
"""Metric of the unreachable route, so that both can be there while one takes the other's place (choice)."""
_DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}


def choose_mark():
    """The mark of outer connections: the one that other instances have, else the first that no rule asks for."""
    with IPRoute() as netlink:
        rules = _rules(netlink)
    ours = [rule.get_attr("FRA_FWMARK") for rule in rules if _is_ours(rule) and rule.get_attr("FRA_FWMARK")]
    others = {rule.get_attr("FRA_FWMARK") for rule in rules}
    return ours[0] if ours else next(mark for mark in range(MARK, MARK + 2 + len(rules)) if mark not in others)


def restore_mark(mark):
    """A part of the table: answers to outer connections get the mark of the connection that they belong to.

    Else a strict rp_filter would look for the way back to the server without the mark, find the tunnel, and drop them
    (as in wg-quick(8); it asks for net.ipv4.conf.all.src_valid_mark = 1, ip-sysctl of the kernel).
    """
    packet, connection = {"meta": {"key": "mark"}}, {"ct": {"key": "mark"}}
    asks = {"match": {"op": "==", "left": connection, "right": mark}}
    return [
        *chain("full-tunnel-out", "postrouting", MANGLE, [meta("mark", mark), _set(connection, packet)]),
        *chain("full-tunnel-in", "prerouting", MANGLE, [asks, _set(packet, connection)]),
    ]


def _set(key, value):
    return {"mangle": {"key": key, "value": value}}


class Redirect:
    """The full tunnel through one device. mark: of the outer connections, from choose_mark()."""

    def __init__(self, device, mark):
        self._device = device
        self._mark = mark
        self._place = None

    def apply(self, versions):
        """Sends everything into the device. versions: {4, 6}, what the tunnel carries. Raises LinkError.

        Once more with other versions changes what is carried.
        """
        with IPRoute() as netlink:
            links = netlink.link_lookup(ifname=self._device)
            if not links:
                raise LinkError(f"redirect-gateway: {self._device}: the device is gone")
            if self._place is None:
                self._place = self._claim(netlink, links[0], versions)
            for version in FAMILIES:
                self._set_default(netlink, version, links[0] if version in versions else None)
            for version, family in FAMILIES.items():
                # In this order, so that no rule for main is ever left without the one that leads into the tunnel.
                for rule in reversed(self._rules_of_ours()):
                    self._do(version, netlink.rule, "add", family=family, **rule)

    def _claim(self, netlink, index, versions):
        """The first place whose priorities and table are free. The default route in the table is the claim."""
        rules = _rules(netlink)
        busy = {rule.get_attr("FRA_PRIORITY") for rule in rules}
        busy |= {-rule.get_attr("FRA_TABLE", 0) for rule in rules}
        for place in range(PLACES):
            if busy & {*_priorities(place), -_table(place)} or _routes(netlink, _table(place)):
                continue
            version = min(versions)
            try:
                netlink.route("add", family=FAMILIES[version], dst=_DEFAULT[version], oif=index, table=_table(place),
                              proto=PROTOCOL)
                return place
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise LinkError(f"redirect-gateway: default route: {reason(error)}") from None
        raise LinkError(f"redirect-gateway: every routing table from {_table(0)} to {_table(PLACES - 1)} is taken; "
                        "see: ip rule")

    def _set_default(self, netlink, version, index):
        """index: None for unreachable. The new route comes before the old one goes."""
        what = {"family": FAMILIES[version], "dst": _DEFAULT[version], "table": _table(self._place), "proto": PROTOCOL}
        way = {"oif": index} if index else {"type": "unreachable", "priority": LAST}
        self._do(version, netlink.route, "add", **what, **way)
        for message in _routes(netlink, _table(self._place), FAMILIES[version]):
            if (message["type"] == RTN_UNICAST) != bool(index):
                _delete(netlink, message)

    def _rules_of_ours(self):
        before, own = _priorities(self._place)
        return (
            {"priority": before, "table": RT_TABLE_MAIN, "FRA_SUPPRESS_PREFIXLEN": 0, "protocol": PROTOCOL},
            {"priority": own, "table": _table(self._place), "fwmark": self._mark, "flags": FIB_RULE_INVERT,
             "protocol": PROTOCOL},
        )

    @staticmethod
    def _do(version, function, *arguments, **options):
        try:
            function(*arguments, **options)
        except NetlinkError as error:
            if version == 6 and error.code in NO_IPV6:
                # There is nothing that could leak.
                log.debug("redirect-gateway: no IPv6: %s", reason(error))
            elif error.code != errno.EEXIST:
                raise LinkError(f"redirect-gateway: IPv{version}: {reason(error)}") from None

    def undo(self):
        """Removes rules and routes of this instance and of those that crashed."""
        try:
            with IPRoute() as netlink:
                for table in {*self._own_table(), *_abandoned(netlink)}:
                    _remove(netlink, table)
        except (NetlinkError, OSError) as error:
            log.warning("redirect-gateway: rules cannot be removed: %s", reason(error))
        self._place = None

    def _own_table(self):
        return () if self._place is None else (_table(self._place),)


def _priorities(place):
    """Of the two rules, in their order."""
    return RULE_MAIN - 2 - 2 * place, RULE_MAIN - 1 - 2 * place


def _table(place):
    return MARK + place


def _rules(netlink):
    rules = []
    for family in FAMILIES.values():
        with contextlib.suppress(NetlinkError):  # a kernel without the family
            rules += [rule for rule in listing(netlink.get_rules, family=family) if rule["family"] == family]
    return rules


def _routes(netlink, table, *families):
    return [
        message
        for family in families or FAMILIES.values()
        for message in listing(netlink.get_routes, family=family, table=table)
        # A kernel without a family gives those of the others.
        if message["family"] == family and message.get_attr("RTA_TABLE") == table
    ]


def _is_ours(rule):
    return rule.get_attr("FRA_PROTOCOL") == PROTOCOL


def _abandoned(netlink):
    """The tables that rules of ours look into and from which no way leads to a device."""
    tables = {rule.get_attr("FRA_TABLE") for rule in _rules(netlink) if _is_ours(rule) and rule["flags"]}
    return [
        table
        for table in tables
        if table and not any(message["type"] == RTN_UNICAST for message in _routes(netlink, table))
    ]


def _remove(netlink, table):
    """The rules that look into `table`, those for main before them, and what is in it."""
    ours = [rule for rule in _rules(netlink) if _is_ours(rule)]
    own = {(rule["family"], rule.get_attr("FRA_PRIORITY")) for rule in ours if rule.get_attr("FRA_TABLE") == table}
    before = {(family, priority - 1) for family, priority in own}
    for rule in sorted(ours, key=lambda rule: rule.get_attr("FRA_PRIORITY", 0)):
        at = rule["family"], rule.get_attr("FRA_PRIORITY")
        if at in own or at in before and rule.get_attr("FRA_TABLE") == RT_TABLE_MAIN:
            _attempt(netlink.rule, "del", family=rule["family"], priority=at[1], table=rule.get_attr("FRA_TABLE"),
                     protocol=PROTOCOL)
    for message in _routes(netlink, table):
        if message["proto"] == PROTOCOL:
            _delete(netlink, message)


def _delete(netlink, message):
    """A default route. With its metric: IPv6 does not ask for the type."""
    metric = message.get_attr("RTA_PRIORITY")
    _attempt(netlink.route, "del", family=message["family"], dst=_DEFAULT[6 if message["family"] == FAMILIES[6] else 4],
             table=message.get_attr("RTA_TABLE"), type=message["type"], proto=PROTOCOL,
             **({"priority": metric} if metric else {}))


def _attempt(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except NetlinkError as error:
        # It went with its device in this moment, or another instance was quicker.
        log.debug("redirect-gateway: %s", reason(error))
