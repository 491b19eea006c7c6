"""The installed package on a booted machine: the package's own tests, and its removal."""

import pytest

pytestmark = pytest.mark.long

TEST_TIMEOUT = 900
"""Seconds for one of the package's own tests (choice)."""


def own_tests(text):
    """{test: packages it needs besides this one} of debian/tests/control."""
    stanzas = [dict(line.split(": ", 1) for line in stanza.splitlines()) for stanza in text.strip().split("\n\n")]
    return {stanza["Tests"]: set(stanza["Depends"].split(", ")) - {"@"} for stanza in stanzas}


def ours(machine):
    """Files and units with the project's name. What is in /etc/bulkvpn is the administrator's."""
    others = " -o ".join(f"-path {path}" for path in ("/etc/bulkvpn", "/proc", "/root", "/var/cache/apt")).split()
    files = machine.run("find", "/", "/run", "-xdev", "(", *others, ")", "-prune", "-o", "-name", "*bulkvpn*", "-print")
    units = machine.run("systemctl", "list-units", "--all", "--no-legend", "--plain", "bulkvpn*")
    return files.stdout.split() + units.stdout.splitlines()


def test_package(root, clone, package):
    """Installed, tested by its own tests and purged: nothing runs after the one, and nothing is left of the other."""
    tests = own_tests((clone / "debian" / "tests" / "control").read_text())
    needed = sorted(set().union(*tests.values()))
    package.copy_into(root, *needed)
    root.copy_in(clone, "/root/source")
    with root.boot(f"bulkvpn-{root.image.release}") as machine:
        package.install(machine, *needed)
        units = machine.run("systemctl", "list-units", "--no-legend").stdout
        assert "bulkvpnd@" not in units and "bulkvpnd-resolvconf" not in units
        assert machine.run("find", "/etc/systemd", "-name", "bulkvpnd@*").stdout == ""
        for test in tests:
            machine.run("mkdir", f"/tmp/{test}")
            machine.run("env", "--chdir=source", f"AUTOPKGTEST_TMP=/tmp/{test}", f"debian/tests/{test}",
                        timeout=TEST_TIMEOUT)
        # The last of them left a wrong configuration behind.
        machine.run("sed", "-i", "/^mtu = 1$/d", "/etc/bulkvpn/server.conf")
        machine.run("systemctl", "enable", "--now", "bulkvpnd@server")
        assert ours(machine)
        machine.run("apt-get", "purge", "-y", "bulkvpnd")
        assert ours(machine) == []
        # Keys are not thrown away with a package.
        machine.run("test", "-e", "/etc/bulkvpn/server.conf")
