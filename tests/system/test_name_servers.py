"""Name servers of a full tunnel by resolvconf, which only root may run, for the unit, which does not run as root."""

import contextlib
import json
import re

import pytest

import machines
from pair import INNER, PROFILE, TOOLS, booted
from test_machines import ours

pytestmark = pytest.mark.long

MANAGERS = ("resolvconf", "openresolv")
"""Packages with a resolvconf(8)."""
HOST, OTHER = "192.0.2.53", "10.86.0.53"
"""Name servers: of the client's machine without the tunnel, and another one of the tunnel."""
UNIT, SOCKET = "bulkvpnd@client", "/run/bulkvpnd-resolvconf/socket"
NAME_SERVER = f"""
import dns.message, dns.rrset, socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("{INNER[4]}", 53))
while True:
    data, peer = server.recvfrom(4096)
    answer = dns.message.make_response(query := dns.message.from_wire(data))
    if query.question[0].to_text() == "www.corp.example. IN A":
        answer.answer.append(dns.rrset.from_text("www.corp.example.", 60, "IN", "A", "{INNER[4]}"))
    server.sendto(answer.to_wire(), peer)
"""
ASK = f"""
import socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect("{SOCKET}")
connection.send(sys.argv[1].encode())
print(connection.recv(4096).decode())
"""

AS_MAIN = ("--inh-caps=+net_admin", "--ambient-caps=+net_admin")
"""How a main process differs from a worker."""


class Client:
    """What is asked of the client's machine."""

    def __init__(self, machine):
        self.machine = machine
        self.run = machine.run

    def name_servers(self):
        """Those of /etc/resolv.conf, in their order."""
        lines = self.run("cat", "/etc/resolv.conf").stdout.splitlines()
        return [line.split()[1] for line in lines if line.startswith("nameserver")]

    def knows(self, name):
        """Whether a program that asks the libc gets an address."""
        return self.run("getent", "ahostsv4", name, check=False).returncode == 0

    def main_process(self):
        return self.run("systemctl", "show", "--property=MainPID", "--value", UNIT).stdout.strip()

    def helpers(self):
        """Units of helpers that run."""
        units = self.run("systemctl", "list-units", "--no-legend", "--plain", "bulkvpnd-resolvconf@*").stdout
        return [line.split()[0] for line in units.splitlines()]

    def wait(self, *servers):
        machines.wait_until(lambda: self.name_servers()[:1] == list(servers)[:1], 60, f"{servers} in resolv.conf")

    def ask(self, user, *flags, servers=("192.0.2.53",), domains=()):
        """What a user hears who asks the helper. flags: for setpriv(1)."""
        request = json.dumps({"instance": "x", "servers": servers, "domains": domains})
        return self.run("setpriv", f"--reuid={user}", f"--regid={self.run('id', '-g', user).stdout.strip()}",
                        "--clear-groups", *flags, "python3", "-c", ASK, request, check=False).stdout


@pytest.fixture(params=MANAGERS)
def manager(request):
    return request.param


@pytest.fixture
def pair(image, package, manager, tmp_path):
    with booted(image, tmp_path / manager, package, tools=(*TOOLS, manager)) as made:
        made.make_tunnel()
        yield made


def write(machine, file, *lines):
    machine.run("sh", "-euc", 'printf "%s\\n" "$@" | cat - "$0" >"$0.new" && chmod 600 "$0.new" && mv "$0.new" "$0"',
                file, *lines)


@contextlib.contextmanager
def dropin(client, text):
    directory = f"/run/systemd/system/{UNIT}.service.d"
    client.run("sh", "-euc", 'mkdir -p "$1" && printf "%s\\n" "$0" >"$1/test.conf" && systemctl daemon-reload', text,
               directory)
    yield
    client.run("sh", "-euc", 'rm -r "$0" && systemctl daemon-reload', directory)


def test_name_servers(pair, manager):
    client = Client(pair.client)
    client.run("systemctl", "stop", UNIT)
    # As a DHCP client has it.
    client.run("sh", "-euc", 'echo "nameserver $0" | resolvconf -a cable.dhclient', HOST)
    before = client.name_servers()
    assert before[0] == HOST and INNER[4] not in before
    assert client.run("test", "-e", SOCKET, check=False).returncode, "no instance runs, and nothing listens"

    write(pair.server, "/etc/bulkvpn/server.conf", f"dns = {INNER[4]}", "dns-search = corp.example")
    pair.server.run("systemctl", "restart", "bulkvpnd@server")
    pair.server.run("systemd-run", "--quiet", "--unit=names", "python3", "-c", NAME_SERVER)
    write(pair.client, PROFILE, "redirect-gateway = yes")
    assert not client.knows("www")

    # It comes up.
    client.run("systemctl", "start", UNIT)
    client.wait(INNER[4])
    if manager == "openresolv":
        assert client.name_servers() == [INNER[4]]
    machines.wait_until(lambda: client.knows("www"), 30, "a name of the search domain is known")
    assert client.knows("www.corp.example") and not client.knows("www.example.org")
    assert client.run("systemctl", "show", "--property=User", "--value", UNIT).stdout.strip() == "bulkvpnd"
    assert len(client.helpers()) == 1
    # What it finds wrong is that the server has no NAT.
    doctor = client.run("bulkvpnctl", "doctor", check=False).stdout
    assert re.search(f"fine +DNS +{re.escape(INNER[4])} answers", doctor), doctor

    # Who may speak to the helper, and what it makes of nonsense.
    assert "Permission denied" in client.ask("nobody", *AS_MAIN)
    assert "should come from a process with CAP_NET_ADMIN" in client.ask("bulkvpnd")
    assert "domain names of letters" in client.ask("bulkvpnd", *AS_MAIN, domains=["$(touch /root/x)"])
    assert client.ask("bulkvpnd", *AS_MAIN) == "null\n", "it asks as the daemon does"
    assert client.name_servers()[0] == INNER[4] or manager == "openresolv"
    machines.wait_until(lambda: len(client.helpers()) == 1, 10, "that helper has ended")
    assert client.name_servers()[0] == INNER[4]

    # A stop takes it back.
    client.run("systemctl", "stop", UNIT)
    assert client.name_servers() == before and not client.knows("www")
    machines.wait_until(lambda: not client.helpers(), 10, "the helper has ended")
    assert client.run("test", "-e", SOCKET, check=False).returncode, "nothing listens any more"

    # So does the end of the main process, whatever ends it; another start sets it again.
    with dropin(client, "[Service]\nRestart=no"):
        client.run("systemctl", "start", UNIT)
        client.wait(INNER[4])
        client.run("kill", "-KILL", client.main_process())
        client.wait(*before)
        assert client.name_servers() == before
    client.run("systemctl", "start", UNIT)
    client.wait(INNER[4])
    process = client.main_process()
    client.run("kill", "-KILL", process)
    machines.wait_until(lambda: client.main_process() not in (process, "0"), 60, "it is started again")
    machines.wait_until(lambda: client.knows("www"), 60, "names are known again")
    assert client.name_servers()[0] == INNER[4]

    # A helper that is ended, and one that is killed.
    client.run("systemctl", "stop", *client.helpers())
    assert client.name_servers() == before
    client.run("systemctl", "reload", UNIT)
    client.wait(INNER[4])
    client.run("systemctl", "kill", "--signal=KILL", *client.helpers())
    machines.wait_until(lambda: not client.helpers(), 10, "the helper is gone")
    assert client.name_servers()[0] == INNER[4]
    client.run("systemctl", "stop", UNIT)
    assert client.name_servers() == before

    # A session with another name server.
    client.run("systemctl", "start", UNIT)
    client.wait(INNER[4])
    pair.server.run("sed", "-i", f"s/^dns = .*/dns = {OTHER}/", "/etc/bulkvpn/server.conf")
    pair.server.run("systemctl", "restart", "bulkvpnd@server")
    client.wait(OTHER)
    assert INNER[4] not in client.name_servers()

    # A machine that shuts down; openresolv keeps its file.
    client.run("systemctl", "disable", UNIT)
    pair.client.reboot()
    assert OTHER not in client.name_servers()
    pair.lay_cable()
    client.run("systemctl", "start", UNIT)
    client.wait(OTHER)
    assert client.run("journalctl", "--identifier=bulkvpnd-resolvconf", "--quiet", "--output=cat").stdout == ""

    client.run("apt-get", "purge", "-y", "bulkvpnd")
    assert OTHER not in client.name_servers()
    assert ours(pair.client) == []
