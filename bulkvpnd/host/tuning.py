"""What the machine is tuned with, as one table; docs/design.md, "Tuning", has the reasons for the values.

    options, situation --> TIPS --> wishes --> ledger (host.sysctl) --> outcomes: found, wanted, set, why not

All of it goes through the ledger, so it is undone when the last instance that wants it stops, and after a crash. What
is set on a socket or on the TUN device goes with that, and is here only to be looked at.
"""

import dataclasses
import logging
import socket
from collections.abc import Callable

from bulkvpnd.host import device, redirect
from bulkvpnd.host.gateway import FORWARDING
from bulkvpnd.host.sysctl import AGREEMENTS, LedgerError, Outcome

log = logging.getLogger(__name__)

USUAL_MTU = 1500
"""Bytes: what a path through the Internet carries (Ethernet's, RFC 894)."""
LINES_MAX = 100
"""Lines of the log at once: one for each key (choice: there are some twenty)."""
STRICT, LOOSE = "1", "2"
"""Values of rp_filter, after RFC 3704 (ip-sysctl.rst)."""
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
"""asm-generic/socket.h"""


@dataclasses.dataclass(frozen=True, slots=True)
class Situation:
    """What is tuned for.

    device: the TUN device, None if there is none yet. outer: names of the devices that lead to the other end. forwards:
    whether this machine forwards what comes out of the tunnel.
    """

    device: str | None = None
    outer: tuple = ()
    forwards: bool = False


def situation(options, name, addresses, ledger):
    """Looks around. Raises nothing.

    options: the configuration. name: of the TUN device, or None. addresses: texts, of the servers that a client may
    connect to; to a server's clients lead the default routes.
    """
    if options.wan_interface is not None:
        outer = (options.wan_interface,)
    else:
        try:
            mark = redirect.choose_mark() if options.redirect_gateway else None
            outer = tuple(device.towards(None if options.mode == "server" else addresses, mark))
        except OSError as error:
            log.info("the interface that leads to the other end is not known: %s", error.strerror or error)
            outer = ()
    forwards = options.mode == "server" and (options.nat or _is_forwarding(ledger))
    return Situation(name, outer, forwards)


def _is_forwarding(ledger):
    for key in FORWARDING.values():
        try:
            if ledger.read(key) != "0":
                return True
        except OSError:
            # A kernel without IPv6.
            continue
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class Tip:
    """One row: which keys get which value.

    option: that says otherwise. keys: of the ledger; {device} and {outer} are filled in, and a key with {outer} is one
    for each. value: (options) -> text, or None for no wish. needed: (key, situation, ledger) -> whether it does
    anything here, and needless: why not.
    """

    option: str
    keys: tuple
    value: Callable
    agreement: str = "exact"
    needed: Callable = lambda key, situation, ledger: True
    needless: str = ""


def _is_strict(key, situation, ledger):
    """The kernel takes the larger of a device's value and that of `all` (ip-sysctl.rst)."""
    values = {ledger.read(one) for one in (key, "net.ipv4.conf.all.rp_filter")}
    return max(values) == STRICT or ledger.is_wanted(key)


def _forwards(key, situation, ledger):
    return situation.forwards


TIPS = (
    Tip("socket-memory",
        ("net.core.rmem_max", "net.core.wmem_max", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
        lambda options: str(options.socket_memory), "larger"),
    Tip("option-memory", ("net.core.optmem_max",), lambda options: str(options.option_memory), "larger"),
    Tip("backlog", ("net.core.netdev_max_backlog",), lambda options: str(options.backlog), "larger"),
    # Packets may come back by another instance's device while a member of a group is down.
    Tip("rp-filter", ("net/ipv4/conf/{device}/rp_filter",),
        lambda options: LOOSE if options.rp_filter == "loose" else None, needed=_is_strict,
        needless="it is not strict here"),
    Tip("wan-mtu", ("mtu {outer}",), lambda options: options.wan_mtu and str(options.wan_mtu)),
    Tip("udp-gro-forwarding", ("rx-udp-gro-forwarding {outer}",),
        lambda options: "on" if options.udp_gro_forwarding else None, needed=_forwards,
        needless="nothing is forwarded from there into the tunnel"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """One key that a tip is about here. option: the tip's, or what else asks for it. value: None without a wish."""

    option: str
    key: str
    value: str | None
    agreement: str


def wishes(options, situation, ledger, only_outer=False):
    """What the table wants in a situation.

    options: has what Tip.value reads, such as the configuration. only_outer: leave out what has nothing to do with the
    devices that lead to the other end. Returns [Wish, ...].
    """
    return [wish for wish, needless in _considered(options, situation, ledger, only_outer) if needless is None]


def _considered(options, situation, ledger, only_outer=False):
    """Every tip that is about something here: (Wish, why it does nothing here or None). Arguments as of wishes()."""
    for tip in TIPS:
        value = tip.value(options)
        keys = [key for key in tip.keys if "{outer}" in key] if only_outer else tip.keys
        for key in _filled(keys, situation):
            try:
                needless = None if tip.needed(key, situation, ledger) else tip.needless
            except OSError as error:
                # Without the key there is nothing to be better.
                needless = error.strerror
            yield Wish(tip.option, key, (value or None) if needless is None else None, tip.agreement), needless


def apply(options, situation, ledger, only_outer=False):
    """Tunes the machine until the ledger is restored; raises nothing. Each key that cannot be set is one line of the
    log. Returns [(Wish, Outcome), ...]. See wishes() for the arguments."""
    missing = _warn_of_outer(options, situation, ledger)
    made = []
    for wish in wishes(options, situation, ledger, only_outer):
        if wish.value is None:
            continue
        outcome = ledger.want(wish.key, wish.value, wish.agreement)
        made.append((wish, outcome))
        if outcome.why_not:
            if wish.key.rpartition(" ")[2] not in missing:
                log.info("not tuned: %s", outcome, extra={"burst": LINES_MAX})
        elif outcome.set != outcome.found:
            log.info("tuned: %s, was %s", outcome, outcome.found, extra={"burst": LINES_MAX})
    return made


def examine(options, situation, ledger, refused, others=()):
    """What apply() would do and what is in force, changing nothing. Returns [(Wish, Outcome), ...].

    refused: {key: why not} of what the running instance could not set; nothing else on this machine knows of that.
    others: Wishes for keys that other parts of an instance may want. Tips about the TUN device are shown also
    where there is none yet.
    """
    unwanted = "no instance wants it"
    try:
        entries = ledger.entries()
    except LedgerError as error:
        entries, unwanted = {}, str(error)
    future = dataclasses.replace(situation, device=situation.device or options.device)
    considered = [*_considered(options, future, ledger), *((one, "no option asks for it") for one in others)]
    asked = {wish.key for wish, _ in considered if wish.value is not None}
    # What other instances want, and what turns up only while one runs.
    more = {key: (Wish("", key, *list(entry["wants"].values())[-1]), None)
            for key, entry in entries.items() if key not in asked}
    rows = []
    for wish, needless in [*(row for row in considered if row[0].key not in more), *more.values()]:
        entry = entries.get(wish.key)
        since = unwanted if entry is None else "something else has set it since"
        unasked = None if wish.value else needless or f"{wish.option} does not ask for it"
        rows.append((wish, _examined(wish, entry, ledger, unasked or refused.get(wish.key, since))))
    rows += [*_sockets(options), *_tunnel(options, future)]
    if situation.device is None:
        rows = [(wish, dataclasses.replace(outcome, why_not="there is no TUN device while no instance runs")
                 if outcome.set is None and options.device in wish.key else outcome) for wish, outcome in rows]
    return rows


def _examined(wish, entry, ledger, reason):
    """entry: of the ledger, or None. reason: why it is not as wanted, or not wanted, if that is so."""
    try:
        now = ledger.read(wish.key)
    except OSError as error:
        return Outcome(wish.key, None, wish.value, None, error.strerror)
    is_right = wish.value is not None and AGREEMENTS[wish.agreement](now, wish.value) == now
    return Outcome(wish.key, entry["found"] if entry else now, wish.value, now, None if is_right else reason)


def _filled(keys, situation):
    """Keys with the names of devices; those for which there is none are left out."""
    for key in keys:
        for outer in situation.outer if "{outer}" in key else ("",):
            if situation.device or "{device}" not in key:
                yield key.format(device=situation.device, outer=outer)


def _warn_of_outer(options, situation, ledger):
    """Returns the names of those that are not there, of which all has been said then."""
    missing = set()
    for name in situation.outer:
        try:
            mtu = int(ledger.read(f"mtu {name}"))
        except OSError as error:
            missing.add(name)
            if name == options.wan_interface:
                log.warning("wan-interface = %s: %s, so it is not tuned; correct it, or take it out; see: ip link",
                            name, error.strerror)
            continue
        # What wan-mtu asks for is set a moment later.
        if mtu != USUAL_MTU and options.wan_mtu is None:
            log.warning("%s, which leads to the other end, has an MTU of %d and not %d; if the path %s, set wan-mtu = "
                        "%d", name, mtu, USUAL_MTU,
                        "does not carry that" if mtu > USUAL_MTU else "carries more, as that of PPPoE does not",
                        USUAL_MTU)
    return missing


# What is set on each socket, tried on one that is thrown away


def _sockets(options):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        yield Wish("congestion", "TCP_CONGESTION", options.congestion, "exact"), _congestion(sock, options.congestion)
        for option, name, force in (("sndbuf", socket.SO_SNDBUF, SO_SNDBUFFORCE),
                                    ("rcvbuf", socket.SO_RCVBUF, SO_RCVBUFFORCE)):
            value = getattr(options, option)
            key = f"SO_{option.upper()}"
            yield Wish(option, key, _text(value), "exact"), _buffer(sock, key, value, name, force)


def _congestion(sock, wanted):
    def now():
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode("ascii", "replace")

    found = now()
    if wanted == "system":
        return Outcome("TCP_CONGESTION", found, wanted, found)
    try:
        # With CAP_NET_ADMIN the kernel loads the module for it. auto begins with cubic, which every kernel has.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION,
                        b"bbr" if wanted == "auto" else wanted.encode("ascii"))
    except OSError as error:
        return Outcome("TCP_CONGESTION", found, wanted, found, error.strerror)
    return Outcome("TCP_CONGESTION", found, wanted, wanted if wanted == "auto" else now())


def _buffer(sock, key, wanted, name, force):
    if wanted is None:
        return Outcome(key, "auto", "auto", "auto")
    why_not = None
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, wanted)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, name, wanted)
        why_not = "without CAP_NET_ADMIN the kernel's limit counts"
    now = sock.getsockopt(socket.SOL_SOCKET, name) // 2  # The kernel shows twice what was set, socket(7).
    return Outcome(key, "auto", str(wanted), str(now), why_not if now < wanted else None)


def _text(value):
    return "auto" if value is None else str(value)


# What goes with the TUN device


def _tunnel(options, situation):
    for kind in ("mtu", "txqueuelen"):
        key, wanted = f"{kind} {situation.device}", str(getattr(options, kind))
        try:
            now = device.KINDS[kind].read(situation.device)
        except OSError as error:
            yield Wish(kind, key, wanted, "exact"), Outcome(key, None, wanted, None, error.strerror)
        else:
            # Nobody had it before: the device came with the instance.
            why_not = None if now == wanted else "something else has set it since"
            yield Wish(kind, key, wanted, "exact"), Outcome(key, None, wanted, now, why_not)
