"""Fixtures over harness.py."""

import pytest
from harness import Network, two_hosts


@pytest.fixture
def network(tmp_path):
    with two_hosts(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared_network(tmp_path_factory):
    """One for all the cases of a file, where none of them needs a fresh one."""
    with two_hosts(tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows the end of every daemon's log."""
    report = (yield).get_result()
    if report.failed:
        networks = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Network)]
        for log in sorted(log for one in networks for log in one.directory.glob("*.log")):
            report.sections.append((log.name, log.read_text(errors="replace")[-4000:]))
