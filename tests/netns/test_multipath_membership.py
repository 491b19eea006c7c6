"""Memberships in a next-hop group, without daemons: the kernel is real, and a device of a TUN stands for an instance.

    bulk1  bulk2  bulk3     one network namespace; each device exists as long as somebody holds its descriptor
"""

import contextlib
import ipaddress
import json
import threading

import pytest
from harness import inside

from bulkvpnd.admin import namespaces
from bulkvpnd.config import values
from bulkvpnd.host import link
from bulkvpnd.host.multipath import PROTOCOL, Membership, MultipathError
from bulkvpnd.host.nexthop import Netlink
from bulkvpnd.host.tun import Tun

PREFIXES = {4: ipaddress.ip_network("10.2.0.0/16"), 6: ipaddress.ip_network("fd02::/48")}
ROUNDS = 300

both_versions = pytest.mark.parametrize("version", [4, 6])
with_and_without_objects = pytest.mark.parametrize("objects", [True, False], ids=["group", "route"])


@pytest.fixture
def host():
    with namespaces.Host(namespaces.unique_name("bulkvpn-test-mp")) as host, inside(host):
        yield host


@pytest.fixture
def device(host):
    """Makes a device that is up and has a carrier. Returns the Tun."""
    with contextlib.ExitStack() as stack:

        def make(name):
            tun = Tun.open(name, 1)
            stack.callback(tun.close)
            link.bring_up(tun.name, 1500, 100, 7443)
            return tun

        yield make


@pytest.fixture
def join(device, tmp_path):
    """Makes a device and its membership, not yet applied. Returns (Tun, Membership)."""

    def make(name, version, weight=1, **options):
        tun = device(name)
        return tun, Membership(name, PREFIXES[version], weight, directory=tmp_path / "shared", **options)

    return make


def routes(host, version):
    return json.loads(host.ip(f"-{version}", "-j", "route", "show", PREFIXES[version]))


def nexthops(host):
    return json.loads(host.ip("-j", "nexthop"))


@both_versions
@with_and_without_objects
def test_members_come_and_go(host, join, version, objects):
    members = [join(f"bulk{number}", version, number, objects=objects)[1] for number in (1, 2, 3)]
    assert not routes(host, version) and not members[0].members()
    for count, member in enumerate(members, 1):
        assert member.apply()
        assert not member.apply(), "a second time changes nothing"
        assert members[0].members() == {f"bulk{number}": number for number in range(1, count + 1)}
    assert len(routes(host, version)) == 1
    assert bool(nexthops(host)) == objects
    assert members[1].undo()
    assert not members[1].undo()
    assert members[0].members() == {"bulk1": 1, "bulk3": 3}
    assert members[1].apply()
    assert members[0].members() == {"bulk1": 1, "bulk2": 2, "bulk3": 3}
    for member in members:
        assert member.undo()
    assert not routes(host, version) and not nexthops(host)


@both_versions
@with_and_without_objects
def test_the_kernel_takes_the_largest_weight(host, join, version, objects):
    weights = {"bulk1": 1, "bulk2": values.MULTIPATH_WEIGHT_MAX}
    members = [join(name, version, weight, objects=objects)[1] for name, weight in weights.items()]
    assert [member.apply() for member in members] == [True, True] and members[0].members() == weights


@both_versions
def test_the_kernel_takes_out_what_crashed(host, join, version):
    (first, one), (second, two) = join("bulk1", version), join("bulk2", version)
    one.apply(), two.apply()
    first.close()
    assert two.members() == {"bulk2": 1}
    second.close()
    assert not routes(host, version) and not nexthops(host)


def test_without_objects_the_others_make_the_route_again(host, join):
    """A device that goes takes an IPv4 route with several hops with it (fib_sync_down_dev of net/ipv4)."""
    (first, one), (_, two) = (join(name, 4, objects=False) for name in ("bulk1", "bulk2"))
    one.apply(), two.apply()
    first.close()
    assert two.members() == {}
    assert two.apply()
    assert two.members() == {"bulk2": 1}


def test_only_the_flows_of_the_one_that_leaves_move(host, join):
    """The kernel is asked for the way of 256 flows before and after."""
    members = [join(f"bulk{number}", 4)[1] for number in (1, 2, 3, 4)]
    for member in members:
        member.apply()
    assert {one["type"] for one in nexthops(host) if "group" in one} == {"resilient"}
    host.run(["sysctl", "-qw", "net.ipv4.fib_multipath_hash_policy=1"])

    def ways():
        lookups = "\n".join(f"route get 10.2.0.9 ipproto tcp sport {port} dport 80" for port in range(1024, 1280))
        answers = host.run(["ip", "-o", "-batch", "-"], stdin=None, input=lookups).stdout.splitlines()
        return [answer.split(" dev ")[1].split()[0] for answer in answers]

    before = ways()
    assert set(before) == {"bulk1", "bulk2", "bulk3", "bulk4"}
    assert ways() == before
    members[2].undo()
    after = ways()
    assert set(after) == {"bulk1", "bulk2", "bulk4"}
    assert [new for old, new in zip(before, after) if old != "bulk3"] == [old for old in before if old != "bulk3"]


def test_two_prefixes_of_one_instance(host, join, tmp_path):
    _, one = join("bulk1", 4)
    other = Membership("bulk1", ipaddress.ip_network("10.3.0.0/16"), 2, directory=tmp_path / "shared")
    assert one.apply() and other.apply()
    assert one.undo()
    assert one.members() == {} and other.members() == {"bulk1": 2}
    assert other.undo() and not nexthops(host)


def test_a_route_that_was_removed_is_made_again(host, join):
    members = [join(f"bulk{number}", 4)[1] for number in (1, 2)]
    for member in members:
        member.apply()
    host.ip("route", "del", PREFIXES[4])
    assert members[0].members() == {}
    assert members[1].apply()
    assert members[0].members() == {"bulk1": 1, "bulk2": 1}
    assert not members[0].apply()
    assert len([one for one in nexthops(host) if "group" in one]) == 1


def test_a_group_that_was_removed_is_made_again(host, join):
    _, one = join("bulk1", 4)
    one.apply()
    for found in nexthops(host):
        host.ip("nexthop", "del", "id", found["id"])
        break
    assert one.members() == {}
    assert one.apply() and one.members() == {"bulk1": 1}
    assert one.undo() and not nexthops(host)


@both_versions
def test_a_route_of_somebody_else(host, join, version):
    _, one = join("bulk1", version)
    one.check()
    host.ip(f"-{version}", "route", "add", PREFIXES[version], "dev", "lo")
    with pytest.raises(MultipathError, match="is there already; remove it, or carry another prefix; see: ip"):
        one.check()
    with pytest.raises(MultipathError, match="is there already; remove it, or carry another prefix; see: ip"):
        one.apply()
    assert not nexthops(host), "half a membership is none"
    assert [route["dev"] for route in routes(host, version)] == ["lo"]
    assert not one.undo()
    assert [route["dev"] for route in routes(host, version)] == ["lo"]


def test_a_guard_with_a_higher_metric_stays(host, join):
    """It says what happens to packets while no instance is up."""
    _, one = join("bulk1", 4)
    host.ip("route", "add", "unreachable", PREFIXES[4], "metric", 4096)
    one.check()
    assert one.apply() and one.members() == {"bulk1": 1}
    assert one.undo()
    assert [route["metric"] for route in routes(host, 4)] == [4096]


@both_versions
def test_the_far_end_of_the_tunnel_itself(host, join, version):
    _, one = join("bulk1", version)
    inner, other = {4: ("10.2.0.1", "10.3.0.1"), 6: ("fd02::1", "fd03::1")}[version]
    one.check([other])
    with pytest.raises(MultipathError, match=f"holds {inner}"):
        one.check([inner])
    with pytest.raises(MultipathError, match=f"holds {inner}"):
        one.apply([inner])
    assert not routes(host, version)
    host.ip(f"-{version}", "route", "add", inner, "dev", "lo")
    one.check([inner])
    assert one.apply([inner])


def test_an_address_of_its_own(host, join):
    host.ip("address", "add", "10.1.0.1/32", "dev", "lo")
    _, one = join("bulk1", 4, source=ipaddress.ip_address("10.1.0.1"))
    one.apply()
    assert " src 10.1.0.1 " in host.ip("route", "get", "10.2.0.9")


def test_an_address_of_nobody(host, join):
    _, one = join("bulk1", 4, source=ipaddress.ip_address("10.1.0.1"))
    with pytest.raises(MultipathError, match=r"multipath = 10\.2\.0\.0/16: "):
        one.apply()
    assert not nexthops(host)


def test_a_device_that_is_gone(host, join):
    tun, one = join("bulk1", 4)
    tun.close()
    with pytest.raises(MultipathError, match="multipath = "):
        one.apply()
    assert not one.undo()


@with_and_without_objects
def test_the_last_one_leaves_while_another_joins(host, join, objects):
    """Group and route go between two looks at them."""
    leaving, joining = (join(name, 4, objects=objects)[1] for name in ("bulk1", "bulk2"))

    def come_and_go():
        with inside(host):
            for _ in range(ROUNDS):
                leaving.apply()
                leaving.undo()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    for _ in range(ROUNDS):
        joining.apply()
        assert "bulk2" in joining.members()
        joining.undo()
    thread.join()


@with_and_without_objects
def test_all_at_once(host, join, objects):
    """Without the lock, members would overwrite each other's group."""
    members = [join(f"bulk{number}", 4, objects=objects)[1] for number in range(16)]

    def come_and_go(member):
        with inside(host):
            for _ in range(20):
                member.apply()
                member.undo()
            member.apply()

    threads = [threading.Thread(target=come_and_go, args=[member]) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(members[0].members()) == {f"bulk{number}" for number in range(16)}
    if objects:
        assert len([one for one in nexthops(host) if "group" in one]) == 1


def test_errors_carry_the_kernels_reason(host):
    with Netlink() as netlink:
        with pytest.raises(OSError, match="Invalid device index"):
            netlink.add_hop(7, PROTOCOL, 2, 9999)
        with pytest.raises(FileNotFoundError):
            netlink.delete(7)
        with pytest.raises(ProcessLookupError):
            netlink.delete_route(PREFIXES[4], PROTOCOL)
