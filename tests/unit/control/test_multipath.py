"""control.multipath: when an instance is a member, and what it says of that. The kernel is a double."""

import ipaddress
import logging
import pathlib
import types

import gevent
import pytest
from doubles import Ledger, until

from bulkvpnd.config import ConfigurationError
from bulkvpnd.config import Multipath as Wish
from bulkvpnd.control.clients import Client
from bulkvpnd.control.multipath import Multipath, check_configuration, literal_addresses
from bulkvpnd.control.transport import address_of, shown
from bulkvpnd.host.multipath import HASH_POLICY, MultipathError

SITE4, SITE6 = ipaddress.ip_network("10.2.0.0/16"), ipaddress.ip_network("fd02::/48")


class Role:
    """carried: the prefixes that get through now."""

    def __init__(self):
        self.carried = set()
        self.on_change = None

    def carries(self, prefix):
        return prefix in self.carried

    def outer_addresses(self):
        return {"192.0.2.1"}


class Kernel:
    """Makes memberships. present: {prefix: {device: weight}}."""

    def __init__(self):
        self.present = {}
        self.failure = None
        self.said = []

    def membership(self, device, prefix, weight, source, directory):
        kernel = self

        def check(peers=()):
            kernel.said.append(("check", prefix, tuple(peers)))
            if kernel.failure:
                raise MultipathError(kernel.failure)

        def apply(peers=()):
            if kernel.failure:
                raise MultipathError(kernel.failure)
            if device not in kernel.present.setdefault(prefix, {}):
                kernel.said.append(("join", prefix, tuple(peers)))
            kernel.present[prefix][device] = weight

        def undo():
            return kernel.present.get(prefix, {}).pop(device, None) is not None

        return types.SimpleNamespace(device=device, prefix=prefix, weight=weight, source=source, check=check,
                                     apply=apply, undo=undo, members=lambda: dict(kernel.present.get(prefix, {})))


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def make(kernel):
    def make(*wishes):
        wishes = wishes or (Wish(SITE4, 2, None),)
        return Multipath(wishes, "bulk0", None, Role(), Ledger(), membership=kernel.membership)

    return make


def test_a_member_while_the_tunnel_carries_the_prefix(make, kernel, caplog):
    caplog.set_level(logging.INFO)
    with make() as multipath:
        role = multipath._role
        gevent.sleep(0.02)
        assert not kernel.present
        role.carried = {SITE4}
        role.on_change()
        until(lambda: kernel.present == {SITE4: {"bulk0": 2}}, seconds=0.5)
        assert ("join", SITE4, ("192.0.2.1",)) in kernel.said
        role.carried = set()
        role.on_change()
        until(lambda: kernel.present == {SITE4: {}}, seconds=0.5)
        role.carried = {SITE4}
        role.on_change()
        until(lambda: kernel.present == {SITE4: {"bulk0": 2}}, seconds=0.5)
    assert kernel.present == {SITE4: {}}
    role.on_change()
    gevent.sleep(0.02)
    assert kernel.present == {SITE4: {}}, "nothing joins after the end"
    assert caplog.text.count("bulk0 carries 10.2.0.0/16") == 2
    assert caplog.text.count("bulk0 no longer carries 10.2.0.0/16") == 1


def test_what_somebody_removed_comes_back(make, kernel):
    with make() as multipath:
        multipath._role.carried = {SITE4}
        multipath._role.on_change()
        until(lambda: kernel.present == {SITE4: {"bulk0": 2}})
        del kernel.present[SITE4]
        until(lambda: kernel.present == {SITE4: {"bulk0": 2}})


def test_prefixes_are_members_each_for_itself(make, kernel):
    with make(Wish(SITE4, 1, None), Wish(SITE6, 3, None)) as multipath:
        multipath._role.carried = {SITE6}
        multipath._role.on_change()
        until(lambda: kernel.present.get(SITE6) == {"bulk0": 3})
        assert not kernel.present.get(SITE4)
        assert multipath._ledger.wanted == [(HASH_POLICY[4], "1"), (HASH_POLICY[6], "1")]


def test_nothing_is_touched_without_the_option(kernel):
    multipath = Multipath((), "bulk0", None, role := Role(), ledger := Ledger(), membership=kernel.membership)
    multipath.check(["192.0.2.1"])
    with multipath:
        assert not ledger.wanted and role.on_change is None
    assert multipath.status() == [] and not kernel.said


def test_a_hash_policy_that_cannot_be_set_is_said(make, caplog):
    multipath = make()
    multipath._ledger.why_not = "Read-only file system"
    with multipath:
        assert "multipath: flows between the same two hosts stay on one instance: net.ipv4." in caplog.text


def test_a_failure_is_said_once_and_tried_again(make, kernel, caplog):
    with make() as multipath:
        kernel.failure = "multipath = 10.2.0.0/16: no"
        multipath._role.carried = {SITE4}
        for _ in range(5):
            multipath._role.on_change()
            gevent.sleep(0.01)
        assert caplog.text.count("multipath = 10.2.0.0/16: no") == 1
        assert multipath.status()[0]["why_not"] == "multipath = 10.2.0.0/16: no"
        kernel.failure = None
        multipath._role.on_change()
        until(lambda: kernel.present == {SITE4: {"bulk0": 2}})


def test_check_names_what_is_wrong_before_anything_starts(make, kernel):
    multipath = make()
    multipath.check(["192.0.2.1"])
    assert kernel.said == [("check", SITE4, ("192.0.2.1",))]
    kernel.failure = "no"
    with pytest.raises(MultipathError, match="no"):
        multipath.check()


def test_status(make, kernel):
    wish = Wish(SITE4, 2, ipaddress.ip_address("10.1.0.1"))
    with make(wish) as multipath:
        gevent.sleep(0.02)
        kernel.present[SITE4] = {"bulk7": 1}
        shown = {"prefix": "10.2.0.0/16", "device": "bulk0", "weight": 2, "source": "10.1.0.1"}
        assert multipath.status() == [{**shown, "up": False, "why_not": "the tunnel is down", "members": {"bulk7": 1}}]
        multipath._role.carried = {SITE4}
        multipath._role.on_change()
        until(lambda: "bulk0" in kernel.present[SITE4])
        assert multipath.status() == [
            {**shown, "up": True, "why_not": None, "members": {"bulk7": 1, "bulk0": 2}}
        ]


def test_a_server_needs_a_client_with_the_network():
    def server(*networks, mode="server"):
        return types.SimpleNamespace(
            mode=mode, path=pathlib.Path("/etc/bulkvpn/server1.conf"), name="server1",
            multipath=(Wish(SITE4, 1, None),), clients=(Client("far", {}, networks),),
        )  # fmt: skip

    check_configuration(server(SITE6, SITE4))
    check_configuration(server(mode="client"))
    # A larger one would have a route of its own, of every instance, and all but the first would fail.
    for networks in ((), (SITE6,), (SITE4.supernet(),)):
        with pytest.raises(ConfigurationError) as caught:
            check_configuration(server(*networks))
        assert str(caught.value) == (
            "/etc/bulkvpn/server1.conf: multipath = 10.2.0.0/16: is behind no client; write networks = 10.2.0.0/16 "
            "below a [client NAME] in /etc/bulkvpn/server1.clients.d/NAME.conf"
        )


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "fe80::1"])
def test_the_address_of_a_peer(address):
    assert address_of(shown((address, 7443))) == address
    assert address_of(shown((f"{address}%eth0" if ":" in address else f"::ffff:{address}", 7443))) == address


def test_addresses_that_are_known_before_a_name_is_looked_up():
    endpoints = [("vpn.example.org", 1), ("192.0.2.1", 2), ("fe80::1%eth0", 3), ("*", 4)]
    assert literal_addresses(endpoints) == ["192.0.2.1", "fe80::1"]
