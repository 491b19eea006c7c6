"""Two booted machines with the package, a cable between them, and the tunnel that the manual tells two people to make.

    client ── cable 192.0.2.2 ═══ 192.0.2.1 cable ── server
      └─ bulk0 ═══════ connections of the session ═══════ bulk0 ─┘

The site is older than two years and the client's certificate older than one, so that there is one that has expired.
"""

import contextlib
import json

import machines
from bulkvpnd.admin import namespaces

SERVER, CLIENT = "192.0.2.1", "192.0.2.2"
"""TEST-NET-1 of RFC 5737."""
INNER = {4: "10.86.0.1", 6: "fd86::1"}
"""The server's first address of each pool."""
TOOLS = ("faketime", "iputils-ping", "nftables")
"""Packages with which the tests look at the machines and do something to them."""
IDENTITY = "laptop"
PROFILE, EXPIRED = "/etc/bulkvpn/client.conf", "/root/expired.conf"
"""Files on the client: its configuration, and the one with its former certificate."""


class Pair:
    """server, client: machines.Machine, up and with the package installed."""

    def __init__(self, server, client):
        self.server = server
        self.client = client

    def lay_cable(self):
        """Again when one of them was started again: it ended with the network of that one."""
        namespaces.execute(["ip", "link", "add", "cable", "netns", str(self.server.init), "type", "veth",
                            "peer", "name", "cable", "netns", str(self.client.init)])
        for machine, address in ((self.server, SERVER), (self.client, CLIENT)):
            machine.run("ip", "address", "add", f"{address}/30", "dev", "cable")
            machine.run("ip", "link", "set", "cable", "up")

    def make_tunnel(self):
        """What the manual says. The client's unit comes first and does not care; nothing passes before the server's.

        Another client had the first address of the pool: a lease that is lost shows.
        """
        self.server.run("faketime", "-f", "-800d", "bulkvpnctl", "pki", "init", "--pool-ipv4", "10.86.0.0/24",
                        "--pool-ipv6", "fd86::/64")
        phone = self.server.run("bulkvpnctl", "pki", "add", "phone", "--remote", SERVER).stdout
        self.carry(phone, "/etc/bulkvpn/phone.conf")
        self.server.run("systemctl", "enable", "--now", "bulkvpnd@server")
        self.client.run("systemctl", "start", "bulkvpnd@phone")
        self.client.run("systemctl", "stop", "bulkvpnd@phone")
        self.client.run("rm", "/etc/bulkvpn/phone.conf")
        self.server.run("systemctl", "stop", "bulkvpnd@server")

        former = self.server.run("faketime", "-f", "-400d", "bulkvpnctl", "pki", "add", IDENTITY, "--days", "365",
                                 "--remote", SERVER).stdout
        self.carry(former, EXPIRED)
        self.renew()
        self.client.run("systemctl", "enable", "--now", "--no-block", "bulkvpnd@client")
        assert not self.through(4) and not self.through(6)
        self.server.run("systemctl", "start", "bulkvpnd@server")
        self.wait_through()
        # Not of the start before: the phone went while it still made connections.
        start = self.server.run("systemctl", "show", "--property=InvocationID", "--value", "bulkvpnd@server").stdout
        warnings = self.server.journal(f"_SYSTEMD_INVOCATION_ID={start.strip()}", "--priority=warning", "--quiet")
        assert warnings == [], warnings

    def renew(self):
        """The client gets another certificate of its name, which counts from its next start on."""
        self.carry(self.server.run("bulkvpnctl", "pki", "renew", IDENTITY, "--remote", SERVER).stdout)

    def carry(self, profile, file=PROFILE):
        """Writes a configuration that the server's machine made to a file of the client's."""
        self.client.run("sh", "-euc", 'umask 077 && printf %s "$0" >"$1"', profile, file)

    def through(self, version):
        """Whether the server's address inside the tunnel answers the client. version: of IP, 4 or 6."""
        return answers(self.client, INNER[version])

    def wait_through(self, seconds=60):
        machines.wait_until(lambda: self.through(4) and self.through(6), seconds, "traffic passes")

    def addresses(self):
        """The client's own inside the tunnel."""
        [report] = json.loads(self.client.run("bulkvpnctl", "status", "client", "--json").stdout)
        return report["addresses"]


def answers(machine, address):
    """Whether `address` answers a ping of `machine`."""
    return machine.run("ping", "-c", "1", "-W", "1", address, check=False).returncode == 0


@contextlib.contextmanager
def booted(image, directory, *packages, tools=TOOLS):
    """A Pair with a cable. directory: its name, too, is the pair's own. packages: conftest.Package; the first is
    installed, and the others can be. tools: packages of Debian, which are installed too."""
    with contextlib.ExitStack() as stack:
        ends = []
        for role in ("server", "client"):
            root = stack.enter_context(machines.Root(image, directory / role))
            for package in packages:
                package.copy_into(root, *tools)
            ends.append(stack.enter_context(root.boot(f"bulkvpn-{image.release}-{directory.name}-{role}")))
            packages[0].install(ends[-1], *tools)
        pair = Pair(*ends)
        pair.lay_cable()
        yield pair
