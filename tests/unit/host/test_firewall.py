"""The table of an instance: written whole, kept when the kernel refuses, gone at the end."""

import copy
import errno
import ipaddress
import logging
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nftdouble import Nft

from bulkvpnd.host import firewall
from bulkvpnd.host.firewall import DROP, Firewall, FirewallError, Unavailable, address, chain, meta

HAIRPIN = chain("hairpin", "forward", 0, [meta("iifname", "bulk0"), meta("oifname", "bulk0"), *firewall.DROP])
PORT = chain("port", "input", 0, [meta("iifname", "bulk0", negated=True), *firewall.DROP])


@pytest.fixture
def nft():
    return Nft()


@pytest.fixture
def table(nft):
    return Firewall("server", nft)


def test_parts_come_change_and_go_and_the_table_goes_with_the_last(nft, table):
    assert nft.tables == {}
    table.apply("a", HAIRPIN)
    table.apply("b", PORT)
    assert nft.chains("bulkvpnd_server") == ["hairpin", "port"]
    table.apply("a", chain("other", "forward", 0))
    assert nft.chains("bulkvpnd_server") == ["other", "port"]
    table.apply("a", [])
    assert nft.chains("bulkvpnd_server") == ["port"]
    table.apply("b", [])
    assert nft.tables == {}
    table.apply("b", [])
    assert nft.tables == {}


def test_every_change_is_one_transaction(nft, table):
    for count, (part, objects) in enumerate([("a", HAIRPIN), ("b", PORT), ("a", [])], 1):
        table.apply(part, objects)
        assert nft.transactions == count


def test_everything_is_in_the_table_of_the_instance(nft, table):
    table.apply("a", HAIRPIN + PORT)
    (content,) = nft.tables.values()
    assert len(content) == 4
    for one in content:
        (fields,) = one.values()
        assert (fields["family"], fields["table"]) == ("inet", "bulkvpnd_server") == ("inet", table.table)


def test_nobody_else_s_table_is_touched(nft, table):
    other = Firewall("other", nft)
    other.apply("a", PORT)
    before = nft.tables[("inet", "bulkvpnd_other")]
    table.apply("a", HAIRPIN)
    table.undo()
    assert nft.tables == {("inet", "bulkvpnd_other"): before}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOENT, errno.EOPNOTSUPP])
def test_what_the_kernel_refuses_changes_nothing(nft, table, number):
    table.apply("a", HAIRPIN)
    before, nft.refuses = nft.tables, number
    with pytest.raises(FirewallError) as caught:
        table.apply("b", PORT)
    assert "nftables table inet bulkvpnd_server cannot be written: " + os.strerror(number) in str(caught.value)
    assert caught.value.exit_status == (os.EX_NOPERM if number == errno.EPERM else 1)
    assert nft.tables == before
    nft.refuses = None
    # The part that failed is not among those that are written next.
    table.apply("c", chain("last", "forward", 0))
    assert nft.chains("bulkvpnd_server") == ["hairpin", "last"]


def test_what_a_crash_left_is_replaced_by_the_first_part(nft):
    Firewall("server", nft).apply("old", PORT)
    table = Firewall("server", nft)
    done = nft.transactions
    table.apply("new", HAIRPIN)
    assert nft.chains("bulkvpnd_server") == ["hairpin"] and nft.transactions == done + 1
    table.clean()
    assert nft.chains("bulkvpnd_server") == ["hairpin"]


def test_what_a_crash_left_goes_if_nothing_is_wanted_now(nft, table):
    Firewall("server", nft).apply("old", PORT)
    table.clean()
    assert nft.tables == {}


def lose_table(nft):
    nft.tables.clear()


def lose_rule(nft):
    content = nft.tables[("inet", "bulkvpnd_server")]
    content.remove(next(one for one in content if one.get("rule", {}).get("chain") == "hairpin"))


def lose_chain(nft):
    content = nft.tables[("inet", "bulkvpnd_server")]
    content[:] = [one for one in content for fields in one.values()
                  if "port" not in (fields.get("name"), fields.get("chain"))]


@pytest.mark.parametrize("lose", [lose_table, lose_rule, lose_chain])
def test_what_somebody_took_out_comes_back(nft, table, lose):
    table.apply("a", HAIRPIN)
    table.apply("b", PORT)
    whole, done = copy.deepcopy(nft.tables), nft.transactions
    assert not table.mend() and nft.tables == whole
    lose(nft)
    assert table.mend() and nft.tables == whole
    assert not table.mend()
    # What is there besides is somebody's, and nothing is missing.
    nft.tables[("inet", "bulkvpnd_server")].append({"rule": {"chain": "port", "expr": []}})
    assert not table.mend()
    assert nft.transactions == done + 4 + 1 - (lose is lose_table)


def test_other_rules_in_the_place_of_ours_go_when_it_is_written_again(nft, table):
    table.rewrite()
    assert nft.tables == {}
    table.apply("a", HAIRPIN)
    whole = copy.deepcopy(nft.tables)
    nft.tables[("inet", "bulkvpnd_server")][-1]["rule"]["expr"] = [{"accept": None}]
    assert not table.mend() and nft.tables != whole
    table.rewrite()
    assert nft.tables == whole


def test_nothing_is_put_back_that_is_not_there_by_its_own_will(nft, table):
    assert not table.mend() and nft.transactions == 0
    table.apply("a", HAIRPIN)
    table.apply("b", PORT)
    table.apply("b", [])
    lose_table(nft)
    assert table.mend() and nft.chains("bulkvpnd_server") == ["hairpin"]
    table.hold("a")
    table.undo()
    lose_table(nft)
    assert not table.mend() and nft.tables == {}


def test_what_cannot_be_put_back_is_an_error(nft, table):
    table.apply("a", HAIRPIN)
    nft.refuses = errno.EPERM
    with pytest.raises(FirewallError, match="bulkvpnd_server cannot be listed: Operation not permitted; it needs root"):
        table.mend()


def test_undo_says_what_it_cannot_do_and_raises_nothing(nft, table, caplog):
    table.undo()
    table.apply("a", HAIRPIN)
    nft.refuses = errno.EPERM
    table.undo()
    nft.refuses = None
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "nftables table inet bulkvpnd_server cannot be removed: Operation not permitted; it needs root or CAP_NET_ADMIN"
    ]
    table.undo()
    assert nft.tables == {}


def test_without_the_binding(monkeypatch, caplog):
    """Undo is silent, for there was nothing to change anything with; whatever needs it says what to install."""
    monkeypatch.setitem(sys.modules, "nftables", None)
    table = Firewall("server")
    table.undo()
    table.clean()
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    for call in (firewall.check, firewall.forward_drops, lambda: table.apply("a", HAIRPIN)):
        with pytest.raises(Unavailable, match="; run: apt install python3-nftables$") as caught:
            call()
        assert caught.value.exit_status == os.EX_UNAVAILABLE


def test_who_drops_what_is_forwarded(nft):
    assert firewall.forward_drops(nft) == []
    Firewall("server", nft).apply("a", chain("own", "forward", 0, DROP))
    for family, name, fields in (
        ("ip", "filter", {"name": "FORWARD", "hook": "forward", "policy": "drop"}),
        ("inet", "bulkvpnd_admin", {"name": "mine", "hook": "forward", "policy": "drop"}),
        ("inet", "fw", {"name": "in", "hook": "input", "policy": "drop"}),
        ("inet", "fw", {"name": "pass", "hook": "forward", "policy": "accept"}),
        ("inet", "fw", {"name": "ours"}),
        ("bridge", "b", {"name": "FORWARD", "hook": "forward", "policy": "drop"}),
    ):
        nft.tables.setdefault((family, name), []).append({"chain": {"family": family, "table": name, **fields}})
    assert firewall.forward_drops(nft) == ["ip filter, chain FORWARD", "inet bulkvpnd_admin, chain mine"]


def test_addresses():
    left = {"payload": {"protocol": "ip", "field": "saddr"}}
    network = address("saddr", ipaddress.ip_network("10.0.0.0/24"))
    assert network == {"match": {"op": "==", "left": left, "right": {"prefix": {"addr": "10.0.0.0", "len": 24}}}}
    for one in (ipaddress.ip_address("10.0.0.1"), ipaddress.ip_network("10.0.0.1/32")):
        assert address("saddr", one, negated=True) == {"match": {"op": "!=", "left": left, "right": "10.0.0.1"}}
    assert address("daddr", ipaddress.ip_address("fd00::1"))["match"]["left"]["payload"]["protocol"] == "ip6"


@given(st.lists(st.text(max_size=300), min_size=2, max_size=2, unique=True))
def test_every_instance_has_a_name_that_nft_can_read(instances):
    names = [firewall.table_name(instance) for instance in instances]
    assert names[0] != names[1]
    for name in names:
        assert name.startswith("bulkvpnd_") and len(name) < 128
        assert all(one.isascii() and (one.isalnum() or one in "._-") for one in name)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("internal:0:0-0: Error: Could not process rule: No such file or directory\n\n", errno.ENOENT),
        ("internal:0:0-0: Error: Could not process rule: Operation not permitted\ninternal: more\n", errno.EPERM),
        ("internal:0:0-0: Error: No such file or directory; did you mean table ‘bulkvpnd_b’ in family inet?",
         errno.ENOENT),
        ("internal:0:0-0: Error: Unknown statement object 'bogus'.", errno.EINVAL),
        ("", errno.EINVAL),
    ],
)
def test_the_words_of_libnftables(text, number):
    assert firewall._as_os_error(text).errno == number
