"""Sysctls in a temporary directory."""

import pytest

from bulkvpnd.host.sysctl import Ledger


@pytest.fixture
def tree(request, tmp_path):
    """Like /proc/sys, with what the module of the test has in FOUND: {key below it: value}."""
    root = tmp_path / "proc-sys"
    for key, value in request.module.FOUND.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")
    return root


@pytest.fixture
def ledger(tree, tmp_path):
    made = Ledger(tmp_path / "shared", "server", root=tree)
    yield made
    made.restore()
