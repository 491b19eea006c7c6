"""Timeouts of the tunnel's connections: the table as text, and what is done without one."""

import errno
import os
import re

import pytest

from bulkvpnd.host import conntrack, firewall
from bulkvpnd.host.conntrack import TIMEOUTS, ConntrackTimeouts

KEYS = {name: seconds for states in TIMEOUTS.values() for seconds, name in states.values()}
FOUND = {f"net/netfilter/{name}": "100" for name in KEYS}


def values(tree):
    return {name: int((tree / "net/netfilter" / name).read_text()) for name in KEYS}


def test_a_table_for_the_device_alone(tree, ledger):
    said = []
    change = ConntrackTimeouts("server", ledger, nft=said.append)
    change.apply("bulk0")
    (text,) = said
    assert text.startswith("add table inet bulkvpnd_server/timeouts\ndelete table inet bulkvpnd_server/timeouts\n")
    assert set(re.findall(r"[io]ifname \S+", text)) == {'iifname "bulk0"', 'oifname "bulk0"'}
    assert set(values(tree).values()) == {100}
    change.undo()
    assert said[1].endswith("delete table inet bulkvpnd_server/timeouts\n")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)), firewall.Unavailable("no binding"),
     firewall.FirewallError("refused")],
)  # fmt: skip
def test_without_it_all_connections_of_the_machine(tree, ledger, caplog, error):
    caplog.set_level("INFO")

    def nft(_text):
        raise error

    change = ConntrackTimeouts("server", ledger, nft=nft)
    change.undo()
    change.apply("bulk0")
    # Only what is longer is made shorter.
    assert values(tree) == {name: min(100, seconds) for name, seconds in KEYS.items()}
    assert len(caplog.messages) == 1
    change.undo()
    ledger.restore()
    assert set(values(tree).values()) == {100}


def test_no_instance_has_the_name_of_the_table():
    assert "/" in conntrack.SUFFIX
    assert conntrack.table_name("a") == firewall.table_name("a") + conntrack.SUFFIX
    assert "/" not in firewall.table_name("a/timeouts")
