"""admin.ruleset: what rules of nftables do with a new connection, as libnftables-json(5) has them."""

import pytest

from bulkvpnd.admin.ruleset import DROPS, DROPS_SOME, PASSES, PASSES_SOME, UNKNOWN, Fate, fates

PORT = {"payload": {"protocol": "tcp", "field": "dport"}}
ACCEPT, DROP, REJECT, RETURN = ({name: None} for name in ("accept", "drop", "reject", "return"))
COUNTER, LOG = {"counter": {"packets": 0, "bytes": 0}}, {"log": {"prefix": "x"}}
EXTENSION = {"xt": None}
TO = "inet filter input"


def match(left, right, op="=="):
    return {"match": {"op": op, "left": left, "right": right}}


def port(right, op="=="):
    return match(PORT, right, op)


def state(*names):
    return match({"ct": {"key": "state"}}, list(names), "in")


def jump(target, kind="jump"):
    return {kind: {"target": target}}


def vmap(key, *pairs):
    return {"vmap": {"key": key, "data": {"set": [list(one) for one in pairs]}}}


def source(network="192.0.2.0"):
    return match({"payload": {"protocol": "ip", "field": "saddr"}}, network)


def device(name):
    return match({"meta": {"key": "iifname"}}, name)


def protocol(name):
    return match({"meta": {"key": "l4proto"}}, name)


def fate(policy, *rules, **others):
    """The Fate of port 7443. rules: of the base chain, each its statements; handles count from 1. others: chains."""
    objects = [{"metainfo": {}}, {"table": {"family": "inet", "name": "filter"}},
               {"chain": {"family": "inet", "table": "filter", "name": "input", "hook": "input", "policy": policy}}]
    number = 0
    for chain, content in {"input": rules, **others}.items():
        for expression in content:
            number += 1
            objects.append({"rule": {"family": "inet", "table": "filter", "chain": chain, "handle": number,
                                     "expr": list(expression)}})
    (found,) = fates(objects, 7443)
    return found


PASSING = {
    "nothing": (),
    "another port is dropped": ([port(22), DROP],),
    "a list of other ports": ([port({"set": [22, {"range": [1, 7442]}]}), DROP],),
    "all but this port": ([port(7443, "!="), DROP],),
    "another protocol": ([protocol("udp"), DROP],
                         [match({"payload": {"protocol": "udp", "field": "dport"}}, 7443), DROP]),
    "what is no new connection": ([state("invalid"), DROP], [vmap({"ct": {"key": "state"}}, ("invalid", DROP))]),
    "loopback": ([device("lo"), DROP],),
    "a source": ([source(), DROP],),
    "only counted": ([port(7443), COUNTER, LOG],),
    "an extension that is not about it": ([EXTENSION, DROP],),
}


@pytest.mark.parametrize("rules", PASSING.values(), ids=PASSING)
def test_what_passes(rules):
    assert fate("accept", *rules, unused=[[port(7443), DROP]]) == Fate(TO, PASSES)


DROPPED = {
    # rules, handle of the one that drops
    "the port": ([[port(7443), DROP]], 1),
    "the port, rejected": ([[port(22), ACCEPT], [port(7443), COUNTER, LOG, REJECT]], 2),
    "a list with it": ([[port({"set": [22, {"range": [7000, 8000]}]}), DROP]], 1),
    "a list whose elements have a timeout": ([[port({"set": [{"elem": {"val": 7443, "timeout": 9}}]}), DROP]], 1),
    "all but another": ([[port(22, "!="), DROP]], 1),
    "the port of any protocol": ([[match({"payload": {"protocol": "th", "field": "dport"}}, 7443), DROP]], 1),
    "new connections": ([[state("established", "related"), ACCEPT], [state("new"), DROP]], 2),
    "all of TCP": ([[protocol("tcp"), DROP]], 1),
    "everything that is left": ([[port(22), ACCEPT], [device("lo"), ACCEPT], [REJECT]], 3),
    "by iptables": ([[protocol("tcp"), port(7443), {"xt": {"type": "target", "name": "REJECT"}}]], 1),
    "by iptables with --syn": ([[match({"&": [{"payload": {"protocol": "tcp", "field": "flags"}},
                                              ["fin", "syn", "rst", "ack"]]}, "syn"), port(7443), DROP]], 1),
    "by a map": ([[vmap(PORT, (22, ACCEPT), (7443, DROP))]], 1),
    "by a map of states": ([[vmap({"ct": {"key": "state"}}, ("established", ACCEPT), ("new", DROP))]], 1),
}


@pytest.mark.parametrize(("rules", "handle"), DROPPED.values(), ids=DROPPED)
def test_what_a_rule_drops(rules, handle):
    assert fate("accept", *rules) == Fate(TO, DROPS, f"input handle {handle}")


def test_chains_that_are_jumped_to():
    assert fate("accept", [jump("a")], a=[[jump("b", "goto")], [port(7443), ACCEPT]], b=[[port(7443), DROP]]) == Fate(
        TO, DROPS, "b handle 4")
    assert fate("drop", [jump("a")], a=[[port(22), DROP], [port(7443), ACCEPT]]) == Fate(TO, PASSES, "a handle 3")
    # What is behind a return or a goto is never come to.
    assert fate("accept", [jump("a")], a=[[RETURN], [DROP]]) == Fate(TO, PASSES)
    assert fate("accept", [jump("a")], a=[[jump("b", "goto")], [DROP]], b=[[port(22), DROP]]) == Fate(TO, PASSES)
    # The way there is about the port, and not for all.
    assert fate("drop", [port(7443), jump("a")], a=[[source(), ACCEPT]]) == Fate(TO, PASSES_SOME, "a handle 2")
    assert fate("accept", [source(), jump("a")], a=[[port(7443), DROP]]) == Fate(TO, DROPS_SOME, "a handle 2")
    assert fate("accept", [vmap({"meta": {"key": "iifname"}}, ("eth0", jump("a")))], a=[[port(7443), DROP]]) == Fate(
        TO, DROPS_SOME, "a handle 2")
    # The kernel would not take such a ring.
    assert fate("accept", [jump("a")], a=[[jump("a")]]) == Fate(TO, PASSES)


@pytest.mark.parametrize("some", [source(), {"limit": {"rate": 1}}, device("eth0"), EXTENSION, port("@known"),
                                  match({"&": [1, 2]}, 3)])
def test_a_rule_that_is_not_for_all(some):
    verdicts = {"drop": (ACCEPT, PASSES_SOME), "accept": (DROP, DROPS_SOME)}
    for policy, (verdict, does) in verdicts.items():
        assert fate(policy, [port({"set": [22, 7443]}), some, verdict]) == Fate(TO, does, "input handle 1")


def test_the_first_rule_that_is_for_all_decides():
    assert fate("accept", [port(7443), ACCEPT], [port(7443), DROP]) == Fate(TO, PASSES, "input handle 1")
    assert fate("accept", [port(7443), DROP], [port(7443), ACCEPT]) == Fate(TO, DROPS, "input handle 1")


def test_policy():
    assert fate("drop", [port(22), ACCEPT], [source(), ACCEPT]) == Fate(TO, DROPS)
    assert fate("drop", [port(7443), ACCEPT]) == Fate(TO, PASSES, "input handle 1")


@pytest.mark.parametrize(("policy", "rules", "does"), [
    ("drop", [[EXTENSION, ACCEPT]], UNKNOWN), ("accept", [[EXTENSION, DROP]], PASSES),
    ("accept", [[port(7443), EXTENSION]], UNKNOWN),
    ("accept", [[EXTENSION, ACCEPT], [port(7443), DROP]], DROPS), ("accept", [[EXTENSION, ACCEPT], [DROP]], UNKNOWN),
    ("drop", [[{"xt": {"type": "target", "name": "LOG"}}]], DROPS),
    ("drop", [[EXTENSION, ACCEPT], [port(7443), source(), ACCEPT]], PASSES_SOME),
])  # fmt: skip
def test_what_is_not_understood(policy, rules, does):
    assert fate(policy, *rules).does == does


def test_which_chains_count():
    def base(family, table, hook, policy="drop"):
        return {"chain": {"family": family, "table": table, "name": "x", "hook": hook, "policy": policy}}

    objects = [base("inet", "bulkvpnd_server", "input", "accept"), base("bridge", "a", "input"),
               base("ip", "b", "forward"), base("ip", "c", "input"), base("ip6", "d", "prerouting"),
               {"chain": {"family": "ip", "table": "c", "name": "y"}}]
    assert [one.chain for one in fates(objects, 1)] == ["ip6 d x", "ip c x"]
