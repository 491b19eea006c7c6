"""The TUN device's offload: what the probe says of a kernel that cannot, and of one that can."""

import ipaddress
import os
import pathlib
import struct
import subprocess
import sys

import pytest

from bulkvpnd.host.tun import Tun, probe_packet
from bulkvpnd.protocol import packet

ROOT = pathlib.Path(__file__).parents[3]
PROBES = """
import resource
from pyroute2 import IPRoute
from bulkvpnd.host import link
from bulkvpnd.host.tun import Tun, TunError

tun = Tun.open("probed", 2)
# A device that is down takes the flags and refuses the write, as some kernels do with their device up.
print(tun.enable_offload(), tun.offloads)
link.bring_up(tun.name, 1500, 9000, 7443)
print(tun.enable_offload(), tun.offloads)
tun.disable_offload()
print(tun.offloads, tun.is_up())
try:
    Tun.open("probed", 1)
except TunError as error:
    print(error)
most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, most[1]))
print(tun.is_up())
resource.setrlimit(resource.RLIMIT_NOFILE, most)
with IPRoute() as route:
    route.link("del", ifname="probed")
print(tun.is_up())
tun.close()
"""


def test_descriptor_without_offload():
    """A kernel that has no segmentation offload refuses the request, as a pipe does."""
    reading, writing = os.pipe()
    tun = Tun("bulk0", [writing])
    try:
        assert tun.enable_offload() == "the kernel's TUN has no segmentation offload"
        assert tun.offloads == ()
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
    finally:
        tun.close()
        os.close(reading)
    assert tun.descriptors == []


def test_probe_of_a_real_device():
    """In a user namespace, where everybody may make a device (user_namespaces(7))."""
    unshare = ["unshare", "--map-root-user", "--net", "--mount"]
    # A sysfs of its own shows the devices of its own.
    program = ["sh", "-c", 'mount -t sysfs none /sys && exec "$@"', "sh", sys.executable, "-c", PROBES]
    if subprocess.run([*unshare, "mount", "-t", "sysfs", "none", "/sys"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, see unshare(1)")
    if not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("needs /dev/net/tun")
    done = subprocess.run([*unshare, *program], capture_output=True, text=True, timeout=30,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    down, up, off, taken, without_descriptors, gone = done.stdout.splitlines()
    assert down == "the kernel refuses to take a super-packet: Input/output error ()"
    assert up in ("None ('csum', 'tso', 'uso')", "None ('csum', 'tso')")
    assert off == "() True"
    assert taken.startswith("the TUN device probed exists already")
    assert (without_descriptors, gone) == ("True", "False")


def test_no_device_without_the_privilege():
    """Whoever runs this as root gives it up first."""
    program = "from bulkvpnd.host.tun import Tun, TunError\ntry: Tun.open('bulk0', 1)\nexcept TunError as error: " \
              "print(error.exit_status, error)"  # fmt: skip
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"] if os.geteuid() == 0 else []
    done = subprocess.run([*powerless, sys.executable, "-c", program], capture_output=True, text=True, timeout=30,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout.startswith(f"{os.EX_NOPERM} cannot make the TUN device bulk0") or "is missing" in done.stdout


def test_probe_is_a_super_packet_that_goes_nowhere():
    probe = probe_packet()
    payload = memoryview(struct.pack(">I", len(probe)) + probe).toreadonly()
    found = packet.inspect(payload, 0, len(payload), frozenset(packet.OFFLOADS), None, {})
    assert found == ([(4, len(payload))], 2, len(payload)), "a kernel must take it apart"
    ip = probe[packet.VNET_SIZE :]
    assert ipaddress.IPv4Address(ip[12:16]) == ipaddress.IPv4Address("255.255.255.255")
    assert ipaddress.IPv4Address(ip[16:20]).is_unspecified
