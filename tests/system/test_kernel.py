"""The package under the kernel of its Debian, which has what no container has: sysctls, and Landlock."""

import os
import re
import shutil

import pytest

pytestmark = pytest.mark.long

TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "mke2fs": "e2fsprogs"}
"""Command: Debian package."""
KERNEL = "linux-image-cloud-amd64"
ONCE = {"net.core.rmem_max", "net.core.wmem_max", "net.core.optmem_max", "net.core.netdev_max_backlog"}
"""What tuning writes and a machine has once, in its first network namespace."""
TUNING = """cd source
AUTOPKGTEST_TMP=/tmp debian/tests/tuning
journalctl --output=cat --unit=bulkvpnd@tuned
"""
"""A shell's, in /root: the package's own test, and then what its server said."""


@pytest.fixture(scope="session", autouse=True)
def tools():
    if os.uname().machine != "x86_64":
        pytest.skip(f"needs x86_64 for {KERNEL}")
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            pytest.skip(f"needs {tool} of the package {package}")


def test_tuned_and_confined(root, clone, package):
    """The package's own test, which takes in what it finds: here nothing may be missing."""
    root.copy_in(package.file, "/root/bulkvpnd.deb")
    root.copy_in(clone, "/root/source")
    root.install(KERNEL, "/root/bulkvpnd.deb", "iproute2", "procps", "python3-nftables")
    report = root.run_with_kernel("sh", "-ec", TUNING)
    print(report)
    [once] = re.findall("^# of the machine's own:(.*)$", report, re.MULTILINE)
    assert {setting.partition("=")[0] for setting in once.split()} == ONCE
    assert "ready: device" in report and "not confined" not in report, "the unit's filter lets the workers do it"
