"""Name servers by resolvectl and by resolvconf: programs in their place write down how they are called."""

import ipaddress
import os
import time

import pytest

from bulkvpnd.host import dns
from bulkvpnd.host.dns import Dns

SERVERS = [ipaddress.ip_address("10.86.0.1"), ipaddress.ip_address("fd86::1")]


class Machine:
    """resolved: whether systemd-resolved runs. fails: {first argument: what the program says on standard error}.

    hangs: the first argument with which it never ends.
    """

    def __init__(self, directory, monkeypatch):
        self._directory = directory
        self._log = directory / "calls"
        self.resolved, self.records = directory / "stub-resolv.conf", directory / "resolvconf"
        (directory / "bin").mkdir()
        monkeypatch.setenv("PATH", f"{directory / 'bin'}:/usr/bin:/bin")

    def install(self, program, fails=(), hangs="none"):
        file = self._directory / "bin" / program
        cases = "".join(f'{first}) echo "{said}" >&2; exit 1;;\n' for first, said in dict(fails).items())
        file.write_text(f'#!/bin/sh\necho "{program} $*" >>{self._log}\ncase "$1" in\n{cases}'
                        f'-a) cat >>{self._log};;\n{hangs}) exec tail -f /dev/null;;\nesac\n')
        file.chmod(0o755)

    def calls(self):
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        return lines

    def dns(self):
        return Dns("bulk0", "home", self.resolved, self.records)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    # Nothing of the real machine is asked: a resolvectl there would be found behind ours.
    made = Machine(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for program in ("sh", "cat", "tail"):
        os.symlink(f"/usr/bin/{program}", tmp_path / "bin" / program)
    return made


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
    monkeypatch.setattr(dns, "TIMEOUT", 0.2)
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
    monkeypatch.setattr(dns, "UNDO_TIMEOUT", 0.2)
    began = time.monotonic()
    kept.undo()
    assert time.monotonic() - began < dns.TIMEOUT / 2
    assert machine.calls()[-1] == "resolvectl revert bulk0"


def test_resolvconf(machine):
    machine.install("resolvconf")
    machine.install("resolvectl")  # which is there, but its daemon does not run
    kept = machine.dns()
    assert kept.apply(SERVERS, ["corp.example"], True) is None
    assert machine.calls() == ["resolvconf -a tun.bulkvpnd-home -m 0 -x", "nameserver 10.86.0.1", "nameserver fd86::1",
                               "search corp.example"]
    assert kept.apply(SERVERS[:1], [], True) is None
    assert machine.calls() == ["resolvconf -d tun.bulkvpnd-home -f", "resolvconf -a tun.bulkvpnd-home -m 0 -x",
                               "nameserver 10.86.0.1"]
    kept.undo()
    assert machine.calls() == ["resolvconf -d tun.bulkvpnd-home -f"]


def test_what_a_crash_left_with_resolvconf(machine):
    machine.install("resolvconf")
    kept = machine.dns()
    kept.undo()
    assert machine.calls() == [], "nothing was left, and nothing is started"
    for name in ("tun.bulkvpnd-other", "tun.bulkvpnd-home"):
        (machine.records / "interface").mkdir(parents=True, exist_ok=True)
        (machine.records / "interface" / name).touch()
    kept.undo()
    assert machine.calls() == ["resolvconf -d tun.bulkvpnd-home -f"]


def test_resolvconf_refuses(machine):
    machine.install("resolvconf", fails={"-a": "Permission denied\x1b[2J"})
    assert machine.dns().apply(SERVERS, [], False) == r"resolvconf: Permission denied\x1b[2J; it needs root"


def test_neither(machine):
    assert machine.dns().apply(SERVERS, [], False).startswith("neither systemd-resolved nor resolvconf is here")
    assert machine.dns().apply([], [], True) is None, "nothing is wanted"
