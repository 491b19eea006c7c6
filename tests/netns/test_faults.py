"""Faults that an administrator meets, and `bulkvpnctl doctor`, which says the cause of each."""

import datetime
import json
import os
import re
import shutil
import signal
import sys

import pytest
from harness import ROOT, wait_until

from bulkvpnd import config, pki


def doctor(network, host, name):
    """{check: [(state, text, mend), ...]} and the exit status."""
    done = host.run([sys.executable, "-m", "bulkvpnd.admin", "doctor", "--config", network.directory / f"{name}.conf",
                     "--runtime-directory", network.directory / f"run-{name}", "--json"],
                    check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout, done.stderr
    found = {}
    for row in json.loads(done.stdout):
        found.setdefault(row["check"], []).append((row["state"], row["text"], row["mend"]))
    return found, done.returncode


def problems(network, host, name):
    """{check: its problems as text}."""
    found, status = doctor(network, host, name)
    wrong = {check: [f"{text} | {mend}" for state, text, mend in rows if state == "problem"]
             for check, rows in found.items()}
    assert status == (1 if any(wrong.values()) else 0)
    return {check: "\n".join(rows) for check, rows in wrong.items() if rows}


def test_closed_port_overlapping_route_missing_nat_revoked_client(network):
    if not shutil.which("nft"):
        pytest.skip("needs nft")
    with (network.directory / "server.conf").open("a") as stream:
        stream.write("\nnat = yes\n")
    found = problems(network, network.client, "client")
    assert list(found) == ["server"]
    assert "192.0.2.1:7443: nothing listens there, or a firewall turns it away" in found["server"]

    server = network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    before = [one["connection"] for one in client.wait_connections(4)]
    assert problems(network, network.client, "client") == {}
    assert problems(network, network.server, "server") == {}
    assert [one["connection"] for one in client.connections()] == before, "it disturbs nobody"
    assert network.ping()

    network.client.ip("link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    network.client.ip("address", "add", "10.86.0.200/25", "dev", "lan0")
    network.client.ip("link", "set", "lan1", "up")
    network.client.ip("link", "set", "lan0", "up")
    found = problems(network, network.client, "client")
    assert list(found) == ["routes"]
    assert "10.86.0.0/24 of the tunnel overlaps 10.86.0.128/25, which lan0 has" in found["routes"]
    network.client.ip("link", "delete", "lan0")

    # A table that is gone the daemon writes again by itself; of other rules in the place of its own it knows nothing.
    table = "inet bulkvpnd_server"
    network.server.run(["nft", f"flush chain {table} nat; " + f"add rule {table} nat accept; " * 10])
    network.server.run(["nft", f"flush chain {table} hairpin; " + f"add rule {table} hairpin accept; " * 2])
    found = problems(network, network.server, "server")
    assert list(found) == ["rules", "NAT"]
    assert all("| systemctl restart bulkvpnd@server" in one for one in found.values())
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: server.lines("reloaded: in force: nothing new"), 10, "it is reloaded")
    assert problems(network, network.server, "server") == {}

    network.pki("revoke", "client")
    wait_until(lambda: not server.connections(), 10, "the client is out")
    found = problems(network, network.client, "client")
    assert "the server says that this client's certificate is revoked" in found["server"]
    assert client.stop() == 0 and server.stop() == 0


def test_a_rule_that_drops_what_comes_to_the_port(network):
    if not shutil.which("nft"):
        pytest.skip("needs nft")
    server = network.start_server().wait_ready()
    assert "firewall" not in problems(network, network.server, "server")
    network.server.run(["nft", "add table inet own; add chain inet own way_in { type filter hook input priority 0; }; "
                        "add chain inet own service; add rule inet own way_in ct state established accept; "
                        "add rule inet own way_in tcp dport { 22, 7000-8000 } jump service; "
                        "add rule inet own service counter drop"])
    found = problems(network, network.server, "server")
    assert list(found) == ["firewall"] and "the rule service handle" in found["firewall"]
    client = network.start_client("--handshake-timeout=1")
    wait_until(lambda: client.lines("connection 0 to .* failed"), 20, "nobody gets in")
    # What it proposes mends it.
    network.server.run(found["firewall"].rpartition("| ")[2].split())
    assert "firewall" not in problems(network, network.server, "server")
    assert client.wait_ready().stop() == 0 and server.stop() == 0


@pytest.mark.parametrize(("days", "words"), [(-400, "expired at"), (2, "is not valid before")])
def test_certificate_and_clock_that_do_not_agree(network, days, words):
    """A clock that is two days behind is a certificate of the day after tomorrow."""
    assert "certificate" not in problems(network, network.client, "client")
    begin = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days)
    ca, ca_key = pki.create_authority("authority", begin, 3650)
    certificate, key = pki.issue(ca, ca_key, "client", "client", begin, 30)
    file = network.directory / "client.conf"
    text = file.read_text()
    for name, pem in (("ca", ca), ("certificate", certificate), ("key", key)):
        text = re.sub(rf"<{name}>.*?</{name}>", f"<{name}>\n{pem}</{name}>", text, flags=re.DOTALL)
    file.write_text(text)
    assert config.load(["--config", str(file)])[0].mode == "client"
    found = problems(network, network.client, "client")["certificate"]
    assert words in found and "this machine's clock says" in found


def test_a_path_that_carries_less_than_its_ends(network):
    """A veth takes no packets that are larger than its own MTU and 4 bytes for a VLAN (is_skb_forwardable), and is
    silent about it."""
    network.client.ip("-6", "address", "flush", "dev", "veth0", "scope", "global")
    found, _ = doctor(network, network.client, "client")
    assert found["path MTU"] == [("fine", "192.0.2.1 gets packets of 1500 bytes", None)]
    network.server.ip("link", "set", "veth0", "mtu", "1300")
    found, _ = doctor(network, network.client, "client")
    [(state, text, mend)] = found["path MTU"]
    assert (state, text) == ("problem", "192.0.2.1 gets no packets of 1500 bytes, the MTU of veth0")
    assert mend == "set wan-mtu = 1304"
    network.client.ip("link", "set", "veth0", "mtu", mend.rpartition(" ")[2])
    found, _ = doctor(network, network.client, "client")
    assert found["path MTU"] == [("fine", "192.0.2.1 gets packets of 1304 bytes", None)]


def test_the_certificate_of_another_server(network):
    """By its name, and by its authority: the mend is in the client's file, and not in the server's log."""
    server = network.start_server().wait_ready()
    assert "server" not in problems(network, network.client, "client")
    wait_until(lambda: server.lines("INFO: client from 192.0.2.2:[0-9]* left before it asked"), 10, "a line of it")
    assert server.status()["listener"]["failed"] == 0 and not server.lines("turned away")
    file = network.directory / "client.conf"
    file.write_text(file.read_text().replace("server-name = server", "server-name = other"))
    found = problems(network, network.client, "client")["server"]
    assert "192.0.2.1:7443 has a certificate for server, and server-name is other" in found
    assert f"| in {file}: server-name = server, or correct remote; then: systemctl restart bulkvpnd@client" in found
    elsewhere = network.directory / "elsewhere"
    network.pki("init", directory=elsewhere)
    network.pki("add", "stranger", "--remote", "192.0.2.1", "--output", network.directory / "stranger.conf",
                directory=elsewhere)
    found = problems(network, network.client, "stranger")["server"]
    assert "of an authority that this client does not know" in found and "stranger.conf: take ca, cert" in found
    assert server.stop() == 0


def test_a_client_inside_a_network_behind_it(network):
    """Its route leads the answers into a tunnel that is not there yet: neither end's log can know."""
    file = network.directory / "server.clients.d" / "site.conf"
    file.parent.mkdir()
    file.write_text("[client client]\nnetworks = 198.51.100.0/24\n")
    network.client.ip("address", "add", "198.51.100.7/32", "dev", "lo")
    network.client.ip("route", "add", "192.0.2.1/32", "dev", "veth0", "src", "198.51.100.7")
    network.server.ip("route", "add", "default", "via", "192.0.2.2")
    server = network.start_server().wait_ready()
    assert problems(network, network.server, "server") == {}
    client = network.start_client()
    found = wait_until(lambda: problems(network, network.server, "server"), 20, "the doctor sees it")
    assert list(found) == ["routes"]
    assert "198.51.100.7 begins to connect, and the answer goes into the tunnel" in found["routes"]
    file.write_text("")
    server.process.send_signal(signal.SIGHUP)
    client.wait_ready()
    assert problems(network, network.server, "server") == {}
