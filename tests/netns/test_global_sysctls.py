"""The sysctls that Linux has once for the machine, in no network namespace of one's own: they are set where this runs.

Written by a user with the one capability that the unit gives, and by a little: a page more than there is. Every test
ends with what it found.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest
from harness import ROOT

from bulkvpnd.host.sysctl import PROC_SYS

KEYS = ("net.core.rmem_max", "net.core.wmem_max", "net.core.netdev_max_backlog")
USER = "65534"
"""nobody (Debian policy 9.2.2)."""
UNPRIVILEGED = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs")
WITH_CAPABILITY = (*UNPRIVILEGED, "--bounding-set=-all,+net_admin", "--inh-caps=-all,+net_admin",
                   "--ambient-caps=-all,+net_admin")
"""As the unit does: User=, NoNewPrivileges=, CapabilityBoundingSet=, AmbientCapabilities=."""
PAGE = 4096

# Wants its arguments KEY=VALUE, says what became of it, and gives it back when its standard input ends.
INSTANCE = """
import pathlib, sys
from bulkvpnd.host.sysctl import Ledger
ledger = Ledger(pathlib.Path(sys.argv[1]), sys.argv[2])
ledger.recover()
for wish in sys.argv[3:]:
    print(ledger.want(*wish.split("="), agreement="larger"), flush=True)
print("done", flush=True)
sys.stdin.read()
ledger.restore()
"""


def path(key):
    return PROC_SYS / key.replace(".", "/")


def values():
    return {key: path(key).read_text().strip() for key in KEYS}


@pytest.fixture
def found():
    """{key: value} as found, and as it is put back in every case."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    before = {}
    for key in KEYS:
        try:
            before[key] = path(key).read_text().strip()
            path(key).write_text(before[key])
        except OSError as error:
            pytest.skip(f"{key}: {error.strerror}: not the machine's first network namespace")
    try:
        yield before
    finally:
        for key, value in before.items():
            path(key).write_text(value)


@pytest.fixture
def start():
    """Starts an instance as a user with rights of `rights`. Returns (Popen, the lines that it said)."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bulkvpn-test-"))
    os.chown(directory, int(USER), int(USER))
    # The user may not look into the checkout, but into this.
    shutil.copytree(ROOT / "bulkvpnd", directory / "bulkvpnd", ignore=shutil.ignore_patterns("__pycache__"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)

        def started(name, wishes, rights=WITH_CAPABILITY):
            process = subprocess.Popen(
                [*rights, sys.executable, "-B", "-c", INSTANCE, directory / "shared", name,
                 *(f"{key}={value}" for key, value in wishes.items())],
                cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(end, process)
            return process, list(iter(lambda: process.stdout.readline().strip(), "done"))

        yield started


def end(process):
    process.stdin.close()
    process.stdout.close()
    process.wait(10)


def larger(found):
    return {key: str(int(value) + PAGE) for key, value in found.items()}


def test_set_and_given_back(found, start):
    wanted = larger(found)
    process, said = start("one", wanted)
    assert said == [f"{key} = {value}" for key, value in wanted.items()]
    assert values() == wanted
    end(process)
    assert values() == found


def test_what_is_large_enough_is_not_written(found, start):
    process, said = start("one", {key: str(int(value) - 1) for key, value in found.items()})
    assert said == [f"{key} = {value}" for key, value in found.items()]
    assert values() == found
    end(process)
    assert values() == found


def test_the_last_instance_gives_it_back(found, start):
    first, _ = start("one", larger(found))
    second, _ = start("two", larger(larger(found)))
    assert values() == larger(larger(found))
    end(second)
    assert values() == larger(found)
    end(first)
    assert values() == found


def test_after_a_crash_the_next_start_gives_it_back(found, start):
    process, _ = start("one", larger(found))
    process.kill()
    process.wait(10)
    assert values() == larger(found)
    end(start("two", {})[0])
    assert values() == found


def test_without_the_capability(found, start):
    process, said = start("one", larger(found), UNPRIVILEGED)
    assert len(said) == len(KEYS) and all(line.endswith("Permission denied") for line in said), said
    assert values() == found
    end(process)
