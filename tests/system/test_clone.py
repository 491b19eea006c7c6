"""The two commands of the README on a fresh Debian that has nothing but a clone of the source."""

import json
import subprocess

import pytest

from bulkvpnd.admin.demo import KEYS

pytestmark = pytest.mark.long

DEMO_TIMEOUT, TESTS_TIMEOUT = 300, 1800
"""Seconds, the installation of what they need included (choices)."""


@pytest.fixture
def fresh(root, clone):
    root.copy_in(clone, "/root/bulkvpnd")
    return root


def test_demo(fresh):
    assert fresh.run("sh", "-c", "command -v bulkvpnctl", check=False).returncode != 0
    report = fresh.run("/root/bulkvpnd/demo", "--seconds", "2", "--json", "/root/result.json", timeout=DEMO_TIMEOUT)
    print(report.stdout)
    result = json.loads((fresh.path / "root" / "result.json").read_text())
    assert tuple(result) == KEYS
    assert None not in result.values()
    # What was measured is the package, which stays and works alone from now on.
    fresh.run("bulkvpnctl", "--version")
    status = ["git", "-C", fresh.path / "root" / "bulkvpnd", "status", "--porcelain", "--ignored"]
    assert subprocess.run(status, capture_output=True, text=True, check=True).stdout == "", "the checkout is as it was"


def test_tests(fresh):
    """Everything that the tests need is installed by their own command; none of them is left out for want of it."""
    report = fresh.run("/root/bulkvpnd/tests/run", timeout=TESTS_TIMEOUT).stdout
    print(report)
    assert "needs" not in "".join(line for line in report.splitlines() if line.startswith("SKIPPED"))
