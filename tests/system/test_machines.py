"""The installed package on booted machines: the package's own tests, its removal, and two machines with a cable."""

import contextlib

import pytest

import machines
from bulkvpnd.admin import namespaces

pytestmark = pytest.mark.long

TEST_TIMEOUT = 900
"""Seconds for one of the package's own tests (choice)."""
SERVER, CLIENT = "192.0.2.1", "192.0.2.2"
"""TEST-NET-1 of RFC 5737."""
INNER = {4: "10.86.0.1", 6: "fd86::1"}
"""The server's first address of each pool."""


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


@pytest.fixture
def with_package(package):
    """Lets a root have the package in /root, and its dependencies, so that apt can install it without a network."""

    def download(root, *others):
        root.copy_in(package.file, "/root/bulkvpnd.deb")
        root.install("/root/bulkvpnd.deb", *others, download_only=True)

    return download


def install(machine, *others):
    machine.run("apt-get", "install", "-y", "--no-install-recommends", "/root/bulkvpnd.deb", *others)


def test_package(root, clone, with_package):
    """Installed, tested by its own tests and purged: nothing runs after the one, and nothing is left of the other."""
    tests = own_tests((clone / "debian" / "tests" / "control").read_text())
    needed = sorted(set().union(*tests.values()))
    with_package(root, *needed)
    root.copy_in(clone, "/root/source")
    with root.boot(f"bulkvpn-{root.image.release}") as machine:
        install(machine, *needed)
        assert "bulkvpnd@" not in machine.run("systemctl", "list-units", "--no-legend").stdout
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


def connect(server, client):
    """A cable between two machines, which has to be laid again when one of them was started again."""
    namespaces.execute(["ip", "link", "add", "cable", "netns", str(server.init), "type", "veth",
                        "peer", "name", "cable", "netns", str(client.init)])
    for machine, address in ((server, SERVER), (client, CLIENT)):
        machine.run("ip", "address", "add", f"{address}/30", "dev", "cable")
        machine.run("ip", "link", "set", "cable", "up")


def through(client, version):
    """Whether the server's address inside the tunnel answers the client."""
    return client.run("ping", f"-{version}", "-c", "1", "-W", "1", INNER[version], check=False).returncode == 0


def test_two_machines(image, tmp_path, with_package):
    """What the manual tells two administrators to do, and a restart of the server's machine under it."""
    with contextlib.ExitStack() as stack:
        booted = []
        for role in ("server", "client"):
            root = stack.enter_context(machines.Root(image, tmp_path / role))
            with_package(root, "iputils-ping")
            booted.append(stack.enter_context(root.boot(f"bulkvpn-{image.release}-{role}")))
            install(booted[-1], "iputils-ping")
        server, client = booted
        connect(server, client)

        server.run("bulkvpnctl", "pki", "init", "--pool-ipv4", "10.86.0.0/24", "--pool-ipv6", "fd86::/64")
        profile = server.run("bulkvpnctl", "pki", "add", "laptop", "--remote", SERVER).stdout
        client.run("sh", "-euc", 'umask 077 && printf %s "$0" >/etc/bulkvpn/client.conf', profile)
        assert not through(client, 4) and not through(client, 6)

        # The server gets its unit enabled and started, and the client does not care that it comes first.
        client.run("systemctl", "enable", "--now", "--no-block", "bulkvpnd@client")
        server.run("systemctl", "enable", "--now", "bulkvpnd@server")
        machines.wait_until(lambda: through(client, 4) and through(client, 6), 30, "traffic passes")
        assert server.journal("--unit=bulkvpnd@server", "--priority=warning", "--quiet") == []

        server.stop()
        assert not through(client, 4)
        server.start()
        connect(server, client)
        machines.wait_until(lambda: through(client, 4) and through(client, 6), 60, "traffic passes after the restart")

        server.run("systemctl", "stop", "bulkvpnd@server")
        assert not through(client, 4)
        assert server.run("ip", "-o", "link", "show", "type", "tun").stdout == ""
