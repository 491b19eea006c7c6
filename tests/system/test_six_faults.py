"""Six faults on two machines: each is found with `bulkvpnctl status`, `bulkvpnctl doctor` and the journal alone.

    client ═══ tunnel ═══ server ── site0 192.168.86.1 ── 192.168.86.200, which knows no way back to the tunnel
"""

import dataclasses
import json
import re
from collections.abc import Callable

import pytest

import machines
from pair import EXPIRED, IDENTITY, PROFILE, SERVER, answers

pytestmark = pytest.mark.long

SITE, HOST = "192.168.86.0/24", "192.168.86.200"
"""What lies behind the server: a private network (RFC 1918), as a client takes routes to by default."""
MAKE_SITE = f"""
cp -p /etc/bulkvpn/server.conf /root
ip netns add site
ip link add site0 type veth peer name eth0 netns site
ip address add 192.168.86.1/24 dev site0
ip link set site0 up
ip -n site address add {HOST}/24 dev eth0
ip -n site link set eth0 up
printf '\\nnat = yes\\nroutes = {SITE}\\n' >>/etc/bulkvpn/server.conf
systemctl restart bulkvpnd@server
"""
REMOVE_SITE = """
ip netns delete site
mv /root/server.conf /etc/bulkvpn
systemctl restart bulkvpnd@server
"""
FOUND_SECONDS = 120
"""A connection that has gone silent is given up after 20 s, and the next try after 10 more (defaults)."""
DROPIN = "/run/systemd/system/bulkvpnd@server.service.d"


def on(end, script):
    """A step that runs a script of the shell at one end."""
    return lambda pair: getattr(pair, end).run("sh", "-euc", script)


def told(end, check):
    """The step that does what the doctor says of the problem that one of its checks has found."""

    def step(pair):
        machine = getattr(pair, end)
        rows = json.loads(machine.run("bulkvpnctl", "doctor", "--json", check=False).stdout)
        [command] = [row["mend"] for row in rows if row["check"] == check and row["state"] == "problem"]
        machine.run("sh", "-euc", command)

    return step


def add_again(pair):
    pair.carry(pair.server.run("bulkvpnctl", "pki", "add", IDENTITY, "--remote", SERVER).stdout)
    pair.client.run("systemctl", "restart", "bulkvpnd@client")


def renew(pair):
    pair.renew()
    pair.client.run("systemctl", "restart", "bulkvpnd@client")


@dataclasses.dataclass(frozen=True)
class Fault:
    """make, mend: steps. found: (end, where it is looked for, pattern of what is read there), all of them."""

    name: str
    make: Callable
    found: tuple
    mend: Callable
    clean_up: Callable = lambda pair: None


FAULTS = (
    # The last of them makes another list of revoked certificates, which is too new for a clock that is behind.
    Fault(
        "wrong clock",
        # A container has the clock of all: the server gets one of its own, two days behind.
        on("server", f"""
            mkdir -p {DROPIN}
            library=$(dpkg --listfiles libfaketime | grep libfaketimeMT.so.1)
            printf '[Service]\\nEnvironment=LD_PRELOAD=%s FAKETIME=-2d FAKETIME_DONT_FAKE_MONOTONIC=1\\n' "$library" \\
                >{DROPIN}/clock.conf
            systemctl daemon-reload
            systemctl restart bulkvpnd@server"""),
        (("client", "status", "no connection to the server: .*bad.certificate"),
         # Who fails again and again is turned away for a while, of which the doctor says that status has the reason.
         ("client", "doctor", "does not take this client's certificate; its clock may be wrong"
                              "|what failed before: bulkvpnctl status"),
         ("client", "journal", "connection . to 192.0.2.1:7443 failed: .*bad.certificate"),
         ("server", "journal", "turned away: .*certificate is not yet valid")),
        on("server", f"rm -r {DROPIN}; systemctl daemon-reload; systemctl restart bulkvpnd@server"),
    ),
    Fault(
        "closed port",
        on("server", "nft 'add table inet filter;"
                     " add chain inet filter input { type filter hook input priority 0; policy drop; }'"),
        (("client", "status", "no connection to the server: 192.0.2.1:7443: "),
         ("client", "doctor", "192.0.2.1:7443 cannot be reached: .*let TCP port 7443 through"),
         ("client", "journal", "connection . to 192.0.2.1:7443 failed"),
         ("server", "doctor", "chain inet filter input: its policy, .* drops what comes to port 7443")),
        told("server", "firewall"),
        on("server", "nft delete table inet filter"),
    ),
    Fault(
        "expired certificate",
        on("client", f"cp {EXPIRED} {PROFILE}; systemctl restart bulkvpnd@client || true"),
        (("client", "status", "no instance is running; bulkvpnctl doctor says why"),
         ("client", "doctor", "certificate: expired at .*bulkvpnctl pki renew"),
         ("client", "journal", "certificate: expired at .*issue a new one, or set the clock")),
        renew,
    ),
    Fault(
        "overlapping route",
        on("client", """
            ip link add lan0 type veth peer name lan1
            ip address add 192.168.86.129/25 dev lan0
            ip link set lan1 up
            ip link set lan0 up"""),
        (("client", "doctor", "192.168.86.0/24 of the tunnel overlaps 192.168.86.128/25, which lan0 has"),),
        on("client", "ip link delete lan0"),
    ),
    Fault(
        "missing NAT",
        # A table that is gone the daemon writes again by itself; other rules in its place it does not see.
        on("server", "nft 'flush chain inet bulkvpnd_server nat; "
                     + "add rule inet bulkvpnd_server nat accept; " * 10 + "'"),
        (("server", "doctor", "no table inet bulkvpnd_server translates.*systemctl restart bulkvpnd@server"),),
        told("server", "NAT"),
    ),
    Fault(
        "revoked client",
        on("server", f"bulkvpnctl pki revoke {IDENTITY}"),
        (("client", "status", "no connection to the server: .*certificate.revoked"),
         ("client", "doctor", "the server says that this client's certificate is revoked"),
         ("client", "journal", "connection . to 192.0.2.1:7443 failed: .*certificate.revoked"),
         ("server", "journal", "turned away: .*certificate revoked")),
        add_again,
    ),
)
LOOKS = {
    # where it is looked for: command, {since} the journal's cursor before the fault
    "status": "bulkvpnctl status",
    "doctor": "bulkvpnctl doctor",
    "journal": "journalctl --output=cat --after-cursor='{since}' --unit='bulkvpnd@*'",
}


@pytest.fixture(scope="module")
def site(pair):
    """The pair, with a network behind the server that the client reaches by NAT."""
    pair.server.run("sh", "-euc", MAKE_SITE)
    wait_all_is_well(pair)
    yield pair
    pair.server.run("sh", "-euc", REMOVE_SITE)
    pair.wait_through()


def works(pair):
    return answers(pair.client, HOST)


def wait_all_is_well(pair):
    machines.wait_until(lambda: works(pair), 60, f"{HOST} answers through the tunnel")
    for machine in (pair.server, pair.client):
        wait_said(machine, LOOKS["doctor"], "no problems$")


def wait_said(machine, command, pattern):
    def said():
        # Lines as wide as a terminal are broken.
        return " ".join(machine.run("sh", "-c", command, check=False).stdout.split())

    try:
        machines.wait_until(lambda: re.search(pattern, said(), re.IGNORECASE), FOUND_SECONDS, f"{command}: {pattern}")
    except AssertionError as error:
        raise AssertionError(f"{error}; it says: {said()}") from None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(site, fault):
    since = {end: getattr(site, end).journal("--lines=0", "--show-cursor")[-1].removeprefix("-- cursor: ")
             for end in ("server", "client")}
    fault.make(site)
    machines.wait_until(lambda: not works(site), 30, "nothing passes any more")
    for end, look, pattern in fault.found:
        wait_said(getattr(site, end), LOOKS[look].format(since=since[end]), pattern)
    fault.mend(site)
    machines.wait_until(lambda: works(site), 120, f"{HOST} answers again")
    fault.clean_up(site)
    wait_all_is_well(site)
