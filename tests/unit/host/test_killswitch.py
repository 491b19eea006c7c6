"""The kill switch as a part of the table: what it ends with, and when it outlives the rest.

Whether it lets pass what it should is for the tests with real hosts.
"""

import ipaddress
import json

import pytest
from nftdouble import Nft

from bulkvpnd.host import killswitch, redirect
from bulkvpnd.host.firewall import DROP, Firewall, FirewallError

LOCAL = [ipaddress.ip_network("192.168.1.0/24"), ipaddress.ip_network("fd00::1/128")]
OBJECTS = killswitch.objects(7443, LOCAL)


@pytest.mark.parametrize("hook", ["output", "forward"])
def test_what_no_rule_lets_pass_is_dropped(hook):
    [chain] = [one["chain"]["name"] for one in OBJECTS if "chain" in one and one["chain"]["hook"] == hook]
    *passing, last = [one["rule"]["expr"] for one in OBJECTS if "rule" in one and one["rule"]["chain"] == chain]
    assert tuple(last) == DROP
    for rule in passing:
        assert rule[-1] == {"accept": None} and len(rule) > 1, "a rule without a condition would let everything pass"
    named = json.dumps(passing)
    assert "192.168.1.0" in named and "fd00::1" in named and "oifgroup" in named
    assert ("7443" in named) == (hook == "output")


def chains(nft):
    return set(nft.chains("bulkvpnd_home") or ())


def test_it_is_held_and_the_rest_goes():
    nft = Nft()
    table = Firewall("home", nft)
    assert not table.exists()
    table.apply("full-tunnel", redirect.restore_mark(7443))
    table.apply(killswitch.PART, OBJECTS)
    assert table.exists() and len(chains(nft)) == 4
    table.hold(killswitch.PART)
    table.undo()
    assert chains(nft) == {"kill-switch-output", "kill-switch-forward"}
    # The next run takes it over and is stopped as it should be.
    table = Firewall("home", nft)
    assert table.exists()
    table.apply(killswitch.PART, OBJECTS)
    table.clean()
    assert table.exists()
    table.hold(killswitch.PART)
    table.hold()
    table.undo()
    assert nft.tables == {}


def test_what_is_held_and_not_there_keeps_nothing():
    nft = Nft()
    table = Firewall("home", nft)
    table.apply("full-tunnel", redirect.restore_mark(7443))
    table.hold(killswitch.PART)
    table.undo()
    assert nft.tables == {}


def test_a_table_that_cannot_be_looked_for():
    nft = Nft()
    nft.refuses = 1
    with pytest.raises(FirewallError, match="cannot be listed"):
        Firewall("home", nft).exists()
