"""Name servers by resolvectl and by resolvconf: programs in their place write down how they are called."""

import ipaddress
import os
import time

import pytest
from resolvers import Helpers, Machine

from bulkvpnd.host import program

SERVERS = [ipaddress.ip_address("10.86.0.1"), ipaddress.ip_address("fd86::1")]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("domains", "everything", "names", "alone"),
    [
        ([], False, "", "yes"),
        (["corp.example", "a.b"], False, "corp.example a.b", "no"),
        (["corp.example"], True, "corp.example ~.", "yes"),
        ([], True, "~.", "yes"),
    ],
)
def test_resolved(machine, domains, everything, names, alone):
    machine.install("resolvectl")
    machine.install("resolvconf")
    machine.resolved.touch()
    kept = machine.dns()
    assert kept.apply(SERVERS, domains, everything) is None
    assert machine.calls() == [
        "resolvectl dns bulk0 10.86.0.1 fd86::1",
        *([f"resolvectl domain bulk0 {names}"] if names else []),
        f"resolvectl default-route bulk0 {alone}",
    ]
    kept.undo()
    assert machine.calls() == ["resolvectl revert bulk0"]
    kept.undo()
    assert machine.calls() == []


def test_resolved_refuses(machine):
    machine.install("resolvectl", fails={"domain": "Failed to set: Interactive authentication required."})
    machine.resolved.touch()
    kept = machine.dns()
    assert kept.apply(SERVERS, ["corp.example"], False) == \
        "systemd-resolved: Failed to set: Interactive authentication required; is polkitd installed?"
    assert machine.calls()[-1] == "resolvectl revert bulk0", "what was done is taken back"


def test_resolved_does_not_answer(machine, monkeypatch):
    monkeypatch.setattr(program, "TIMEOUT", 0.2)
    machine.install("resolvectl", hangs="dns")
    machine.resolved.touch()
    assert machine.dns().apply(SERVERS, ["corp.example"], False) == \
        "systemd-resolved: no answer within 0.2 s; run: systemctl restart systemd-resolved"
    assert machine.calls() == ["resolvectl dns bulk0 10.86.0.1 fd86::1", "resolvectl revert bulk0"], "it is asked once"


def test_the_end_does_not_wait_long_for_what_does_not_answer(machine, monkeypatch):
    machine.install("resolvectl", hangs="revert")
    machine.resolved.touch()
    kept = machine.dns()
    kept.apply(SERVERS, [], False)
    monkeypatch.setattr(program, "UNDO_TIMEOUT", 0.2)
    began = time.monotonic()
    kept.undo()
    assert time.monotonic() - began < program.TIMEOUT / 2
    assert machine.calls()[-1] == "resolvectl revert bulk0"


def test_neither(machine):
    assert machine.dns().apply(SERVERS, [], False).startswith("neither systemd-resolved nor resolvconf is here")
    assert machine.dns().apply([], [], True) is None, "nothing is wanted"


# resolvconf, by a process that is root and has no helper


def test_resolvconf(machine):
    machine.install("resolvconf")
    machine.install("resolvectl")  # which is there, but its daemon does not run
    kept = machine.dns()
    assert kept.lasts(), "there is nothing that could be lost"
    assert kept.apply(SERVERS, ["corp.example"], True) is None
    assert machine.calls() == ["resolvconf -a tun.bulkvpnd-home -m 0 -x", "nameserver 10.86.0.1", "nameserver fd86::1",
                               "search corp.example"]
    assert kept.apply(SERVERS[:1], [], True) is None
    assert machine.calls() == ["resolvconf -d tun.bulkvpnd-home -f", "removed",
                               "resolvconf -a tun.bulkvpnd-home -m 0 -x", "nameserver 10.86.0.1"]
    assert kept.lasts()
    kept.undo()
    assert machine.calls() == ["resolvconf -d tun.bulkvpnd-home -f", "removed"]
    kept.undo()
    assert machine.calls() == []


def test_what_a_crash_left_with_resolvconf(machine):
    machine.install("resolvconf")
    kept = machine.dns()
    kept.undo()
    assert machine.calls() == [], "nothing was left, and nothing is started"
    for name in ("other", "home"):
        machine.leave(name)
    kept.undo()
    assert machine.calls() == ["resolvconf -d tun.bulkvpnd-home -f", "removed"]
    assert list(machine.names()) == ["tun.bulkvpnd-other"]


def test_resolvconf_refuses(machine):
    machine.install("resolvconf", fails={"-a": "Permission denied\x1b[2J"})
    assert machine.dns().apply(SERVERS, [], False) == r"resolvconf: Permission denied\x1b[2J"
    assert machine.calls()[-2:] == ["resolvconf -d tun.bulkvpnd-home -f", "removed"]


def test_everybody_may_read_what_resolvconf_writes(machine):
    machine.install("resolvconf")
    before = os.umask(0o077)
    try:
        machine.dns().apply(SERVERS, [], False)
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in machine.records.glob("interface/*")] == [0o644]


# resolvconf, by the helper


def test_without_root_and_helper_it_says_what_mends_it(machine):
    machine.install("resolvconf")
    machine.leave("home")
    kept = machine.dns(root=False)
    kept.undo()
    assert kept.apply(SERVERS, [], False) == "resolvconf needs root; run: systemctl start bulkvpnd-resolvconf.socket"
    assert machine.calls() == []


@pytest.mark.parametrize("root", [True, False])
def test_the_helper_is_preferred(machine, root):
    machine.install("resolvconf")
    kept = machine.dns(root)
    with Helpers(machine) as helpers:
        assert kept.apply(SERVERS, ["corp.example"], True) is None
        assert len(helpers.processes) == 1
        assert machine.names() == {
            "tun.bulkvpnd-home": "nameserver 10.86.0.1\nnameserver fd86::1\nsearch corp.example\n"
        }
        assert kept.lasts()
        helpers.processes[0].terminate()
        helpers.processes[0].wait(20)
        assert not kept.lasts()
        assert kept.apply(SERVERS[:1], [], True) is None
        assert kept.lasts()
        kept.undo()
        assert machine.names() == {}, "undo waits for the helper"
