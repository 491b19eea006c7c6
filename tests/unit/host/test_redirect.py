"""Rules and routes in a network namespace of their own, with the kernel that runs the tests."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
BEGIN = """
import ipaddress, json, subprocess
from bulkvpnd.host import redirect, routes

def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

def shown():
    return [json.loads(ip("-j", family, *what) or "[]") for family in ("-4", "-6")
            for what in (["rule"], ["route", "show", "table", "all"])]

def networks(*texts):
    return [*map(ipaddress.ip_network, texts)]

ip("link", "set", "lo", "up")
ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
for device in ("veth0", "veth1"):
    ip("link", "set", device, "addrgenmode", "none")
    ip("link", "set", device, "up")
ip("address", "add", "192.0.2.2/24", "dev", "veth0")
ip("address", "add", "2001:db8::2/64", "dev", "veth0", "nodad")
ip("route", "add", "default", "via", "192.0.2.1")
ip("-6", "route", "add", "default", "via", "2001:db8::1")
ip("route", "add", "10.9.0.0/16", "via", "192.0.2.9")
for device in ("bulk0", "bulk1"):
    ip("tuntap", "add", "dev", device, "mode", "tun")
    ip("link", "set", device, "addrgenmode", "none")
    ip("link", "set", device, "up")
before = shown()

def way(address, mark=0):
    done = subprocess.run(["ip", "-j", "route", "get", address, "mark", str(mark)], capture_output=True, text=True)
    return json.loads(done.stdout)[0]["dev"] if done.returncode == 0 else None

"""


def run(program):
    """In a user namespace, where everybody may do this (user_namespaces(7)). Returns what it printed as JSON lines."""
    if not shutil.which("ip"):
        pytest.skip("needs ip of iproute2")
    unshare = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, see unshare(1)")
    if not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("needs /dev/net/tun")
    done = subprocess.run([*unshare, sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_way_outside_is_looked_for_with_the_mark():
    """What leads to the server is never a tunnel of ours, neither this one nor another's that it may lead through."""
    without, plain, marked, inside = run("""
from bulkvpnd.host import device

def say(mark=None):
    print(json.dumps(device.towards(["203.0.113.1", "2001:db8:9::1"], mark)))

full = redirect.Redirect("bulk0", redirect.choose_mark())
say(7443)
full.apply({4, 6})
say()
say(redirect.choose_mark())
ip("link", "set", "bulk0", "group", "7444")
say()
""")
    assert (without, plain, marked, inside) == (["veth0"], ["bulk0"], ["veth0"], [])


def test_what_is_marked_goes_outside_and_the_rest_into_the_tunnel():
    without, both, marked, near, ipv4, again, gone = run("""
def say():
    print(json.dumps([way("203.0.113.1"), way("2001:db8:9::1")]))

say()
full = redirect.Redirect("bulk0", redirect.choose_mark())
full.apply({4, 6})
say()
print(json.dumps([way("203.0.113.1", redirect.MARK), way("2001:db8:9::1", redirect.MARK)]))
print(json.dumps([way("192.0.2.77"), way("10.9.1.1"), way("2001:db8::77")]))
full.apply({4})
print(json.dumps([way("203.0.113.1"), way("2001:db8:9::1")]))
full.apply({4, 6})
say()
full.undo()
full.undo()
print(json.dumps(shown() == before))
""")
    assert without == ["veth0", "veth0"]
    assert both == ["bulk0", "bulk0"]
    assert marked == ["veth0", "veth0"]
    assert near == ["veth0", "veth0", "veth0"], "what is reached without a default route stays so"
    assert ipv4 == ["bulk0", None], "the version that is not carried goes nowhere"
    assert again == ["bulk0", "bulk0"]
    assert gone is True


def test_instances_and_others_do_not_clash():
    marks, ways, one_left, foreign, gone = run(f"""
ip("rule", "add", "fwmark", "{0x1D13}", "lookup", "100", "priority", "32765")
ip("route", "add", "default", "dev", "veth0", "table", "7444")
before = shown()
first = redirect.Redirect("bulk0", redirect.choose_mark())
first.undo()
first.apply({{4, 6}})
second = redirect.Redirect("bulk1", redirect.choose_mark())
second.undo()
second.apply({{4, 6}})
print(json.dumps([first._mark, second._mark]))
mark = second._mark
print(json.dumps([way("203.0.113.1") in ("bulk0", "bulk1"), way("203.0.113.1", mark), way("2001:db8:9::1", mark)]))
first.undo()
print(json.dumps(way("203.0.113.1")))
print(ip("-j", "rule", "show", "priority", "32765").strip())
second.undo()
print(json.dumps(shown() == before))
""")
    assert marks == [7444, 7444], "one mark, and not the one that somebody else asks for"
    assert ways == [True, "veth0", "veth0"]
    assert one_left == "bulk1"
    assert foreign[0]["table"] == "100"
    assert gone is True


def test_what_a_crash_left_goes_with_any_next_start():
    left, gone, alive = run("""
crashed = redirect.Redirect("bulk0", redirect.choose_mark())
crashed.apply({6})
ip("link", "delete", "bulk0")
print(json.dumps([rule["protocol"] for rule in json.loads(ip("-j", "rule")) if "protocol" in rule]))
other = redirect.Redirect("bulk1", redirect.choose_mark())
other.undo()
print(json.dumps([family for family in ("-4", "-6") if "86" in ip(family, "rule") + ip(family, "route", "show", "table",
                                                                                        "all")]))
other.apply({4})
redirect.Redirect("bulk0", redirect.MARK).undo()
print(json.dumps(way("203.0.113.1")))
""")
    assert left == ["86", "86"]
    assert gone == []
    assert alive == "bulk1", "what another instance has is no leftover"


def test_routes_of_single_networks():
    refused, ways, fewer, connected, present, gone = run("""
ways = routes.Routes("bulk0")
refused = ways.apply(networks("10.1.0.0/16", "10.9.0.0/16", "192.0.2.0/24", "fd00:1::/64", "2001:db8::/64"))
print(json.dumps({str(one): why for one, why in refused.items()}))
print(json.dumps([way("10.1.2.3"), way("10.9.1.1"), way("fd00:1::9"), way("192.0.2.7")]))
ways.apply(networks("10.2.0.0/16", "fd00:1::/64"))
print(json.dumps([way("10.1.2.3"), way("10.2.2.3"), way("fd00:1::9")]))
print(json.dumps(sorted(map(str, routes.connected("bulk0")))))
ip("route", "add", "10.3.0.0/16", "via", "192.0.2.9", "proto", str(routes.PROTOCOL))
ip("-6", "route", "add", "fe80::/64", "dev", "veth0")
print(json.dumps(sorted((str(network), name) for network, name in routes.present())))
ip("route", "delete", "10.3.0.0/16")
ip("-6", "route", "delete", "fe80::/64", "dev", "veth0")
ways.undo()
ways.undo()
same = shown() == before
ip("link", "delete", "bulk0")
ways.undo()
print(json.dumps(same))
""")
    taken = "there is a route already, by veth0"
    assert refused == {"10.9.0.0/16": taken, "192.0.2.0/24": taken, "2001:db8::/64": taken}
    assert ways == ["bulk0", "veth0", "bulk0", "veth0"]
    assert fewer == ["veth0", "bulk0", "bulk0"]
    assert connected == ["192.0.2.0/24", "2001:db8::/64"]
    assert present == [["10.2.0.0/16", "bulk0"], ["10.9.0.0/16", "veth0"], ["192.0.2.0/24", "veth0"],
                       ["2001:db8::/64", "veth0"], ["fd00:1::/64", "bulk0"]]
    assert gone is True
