"""What rules of nftables that others made do with a new TCP connection to a port of this machine.

    libnftables-json(5) --> base chains at HOOKS --> their rules in order, and of chains that they jump to --> Fate

A new connection meets a rule for certain, never, or perhaps: where a condition is about something else than the port.
Rules of iptables are among them if it is that of nftables, as in Debian since 10; its extensions are not understood.
"""

import dataclasses

from bulkvpnd.host import firewall

HOOKS = ("prerouting", "input")
"""What a packet for this machine passes."""
JUMPS_MAX = 16
"""How deep chains jump into each other at most (NFT_JUMP_STACK_SIZE of net/netfilter/nf_tables.h)."""
DROPPING = ("drop", "reject")
VERDICTS = ("accept", *DROPPING)
PORT = [{"payload": {"protocol": protocol, "field": "dport"}} for protocol in ("tcp", "th")]
PROTOCOL = [{"meta": {"key": "l4proto"}}, {"payload": {"protocol": "ip", "field": "protocol"}},
            {"payload": {"protocol": "ip6", "field": "nexthdr"}}]
STATE = {"ct": {"key": "state"}}
FLAGS = {"payload": {"protocol": "tcp", "field": "flags"}}
DEVICE = [{"meta": {"key": key}} for key in ("iif", "iifname")]
OTHERS = ("udp", "udplite", "icmp", "icmpv6", "igmp", "sctp", "dccp")
"""Protocols whose fields no segment of TCP has."""
PASSES, DROPS, PASSES_SOME, DROPS_SOME, UNKNOWN = "passes", "drops", "passes some", "drops some", "unknown"
"""What a chain does with new connections to a port: lets all of them pass, or none; drops them in the end, but a rule
about the port lets some pass before, or the other way round; a rule that is not understood may decide."""


@dataclasses.dataclass(frozen=True)
class Fate:
    """What one base chain does with new connections to a port.

    chain: family, table and name, as nft(8) takes them. does: PASSES, ... rule: that does so, as chain and handle; None
    if the chain's policy does, or if it is unknown.
    """

    chain: str
    does: str
    rule: str | None = None


def fates(objects, port):
    """A Fate for each base chain of others on the way in. objects: of libnftables-json(5)."""
    rules = {}
    for rule in (one["rule"] for one in objects if "rule" in one):
        rules.setdefault((rule["family"], rule["table"], rule["chain"]), []).append(rule)
    return [_fate(rules, chain, port) for hook in HOOKS for chain in firewall.base_chains(objects, hook)]


@dataclasses.dataclass(frozen=True)
class _Step:
    """A verdict that connections meet. verdict: of VERDICTS, None if it is not understood. is_sure: all of them meet
    it. names_port: it is about this port."""

    verdict: str | None
    is_sure: bool = True
    names_port: bool = False
    rule: str | None = None


def _fate(rules, chain, port):
    key = (chain["family"], chain["table"], chain["name"])
    before = []
    for step in (*_steps(rules, key, port), _Step(chain.get("policy", "accept"))):
        if step.is_sure and step.verdict:
            break
        before.append(step)
    drops = step.verdict in DROPPING
    other = [one.rule for one in before if one.names_port and one.verdict and (one.verdict in DROPPING) != drops]
    if other:
        does, rule = PASSES_SOME if drops else DROPS_SOME, other[0]
    elif any(not one.verdict and (one.names_port or (drops and not step.names_port)) for one in before):
        does, rule = UNKNOWN, None
    else:
        does, rule = DROPS if drops else PASSES, step.rule
    return Fate(" ".join(key), does, rule)


def _steps(rules, key, port, is_sure=True, names_port=False, jumps=JUMPS_MAX):
    """The verdicts in the chain `key`, in their order. is_sure, names_port: of how it is come to."""
    for rule in rules.get(key, ()):
        met, named = _meets(rule["expr"], port)
        if met is False:
            continue
        where = f"{key[2]} handle {rule['handle']}"
        for kind, value, chosen, by_port in _statements(rule["expr"], port):
            sure, about = bool(is_sure and met and chosen), names_port or named or by_port
            if kind in VERDICTS or kind == "xt":
                yield _Step(kind if kind in VERDICTS else None, sure, about, where)
            elif kind in ("jump", "goto") and jumps:
                yield from _steps(rules, (*key[:2], value["target"]), port, sure, about, jumps - 1)
            if sure and kind in ("goto", "return"):
                return


def _meets(expression, port):
    """(whether a new connection meets the conditions of a rule, None for perhaps; whether they name its port)."""
    met, named = True, False
    for part in expression:
        ((kind, value),) = part.items()
        if kind == "match":
            one = _matches(value["left"], value["right"], port)
            one = one if one is None else one != (value.get("op") == "!=")
            named = named or value["left"] in PORT
        elif kind == "limit" or (kind == "xt" and not _is_target(value)):
            one = None
        else:
            continue
        if one is False:
            return False, False
        met = met and one
    return met, named


def _matches(left, right, port):
    """Whether what a condition is about has one of the values; None for perhaps."""
    if left in PORT:
        return _contains(right, port)
    if left in PROTOCOL:
        return _contains(right, "tcp")
    if left == STATE:
        return _contains(right, "new")
    if left in DEVICE and right == "lo":
        return False
    if isinstance(left, dict) and left.get("&", [None])[0] == FLAGS and right == "syn":
        return True  # --syn of iptables
    return False if isinstance(left, dict) and left.get("payload", {}).get("protocol") in OTHERS else None


def _contains(values, value):
    """values: of libnftables-json(5). None where they are not known: what is in a named set is not looked at."""
    if isinstance(values, str) and values.startswith("@"):
        return None
    if isinstance(values, dict) and "range" in values:
        low, high = values["range"]
        return low <= value <= high
    if isinstance(values, dict) and "elem" in values:
        return _contains(values["elem"]["val"], value)
    if isinstance(values, dict):
        values = values.get("set", [])
    if isinstance(values, list):
        found = [_contains(one, value) for one in values]
        return True if True in found else None if None in found else False
    return values == value


def _statements(expression, port):
    """Of a rule, and of what its maps of verdicts have: [(kind, value, whether it is chosen, whether by the port)]."""
    for part in expression:
        ((kind, value),) = part.items()
        if kind == "vmap":
            found = value["data"].get("set", ()) if isinstance(value["data"], dict) else ()
            for key, verdict in found:
                chosen = _matches(value["key"], key, port)
                if chosen is not False:
                    yield *next(iter(verdict.items())), chosen, value["key"] in PORT
        elif kind == "xt" and _is_target(value):
            # Of the others none decides: LOG, MARK.
            if value["name"] == "REJECT":
                yield "reject", None, True, False
        else:
            yield kind, value, True, False


def _is_target(extension):
    """Newer libnftables say what an extension of iptables is."""
    return bool(extension) and extension.get("type") == "target"
