"""The TUN device once it is up, in a user namespace, where everybody may make one (user_namespaces(7))."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PROGRAM = """
import json
from pyroute2 import IPRoute
from bulkvpnd.host import link
from bulkvpnd.host.tun import Tun

tun = Tun.open("bulk0", 2)
link.bring_up(tun.name, 1400, 9000, 7443)
with IPRoute() as route:
    (index,) = route.link_lookup(ifname=tun.name)
    (device,) = route.get_links(index)
    print(json.dumps({
        "state": device["state"],
        **{name: device.get_attr("IFLA_" + name.upper()) for name in ("mtu", "txqlen", "qdisc", "group")},
        "addresses": [one.get_attr("IFA_ADDRESS") for one in route.get_addr(index=index)],
        "queues of the kernel": len([one for one in route.get_qdiscs(index) if one.get_attr("TCA_KIND") != "noqueue"]),
    }))
"""


SWITCHED_OFF = """
import pathlib
from bulkvpnd.host import link
from bulkvpnd.host.tun import Tun

def switch(name, value):
    pathlib.Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text(value)

tuns = []
def has(mtu=1500):
    tuns.append(Tun.open("bulk%d", 1))
    link.bring_up(tuns[-1].name, mtu, 100, 0)
    return link.has_ipv6(tuns[-1].name)

found = [has()]
switch("all", "1")
found += [link.has_ipv6(tuns[0].name), has()]
switch("all", "0")
switch("default", "1")
found += [link.has_ipv6(tuns[0].name), has()]
switch("default", "0")
# A device without any IPv6, as all are where the kernel has none (RFC 8200 section 5).
found += [has(), has(1279)]
print(found)
"""


def test_a_device_that_is_up():
    assert json.loads(output(PROGRAM)) == {"state": "up", "mtu": 1400, "txqlen": 9000, "qdisc": "noqueue",
                                           "group": 7443, "addresses": [], "queues of the kernel": 0}


def test_whether_a_device_can_have_ipv6():
    assert output(SWITCHED_OFF).strip() == "[True, False, False, True, False, True, False]"


def output(program):
    """What a program prints in a network namespace of its own."""
    unshare = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, see unshare(1)")
    if not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("needs /dev/net/tun")
    done = subprocess.run([*unshare, sys.executable, "-c", program], capture_output=True, text=True, timeout=30,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
