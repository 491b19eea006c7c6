"""A client that sends everything through the tunnel, with and without the kill switch.

    client ── veth0 192.0.2.2 ═══ 192.0.2.1 veth0 ── server ── veth1 198.51.100.1 ═══ 198.51.100.2 ── web
      └─ bulk0 10.86.0.2 ═══════════ session ═══════════ bulk0 ─┘

The server forwards, so the client reaches the web host outside the tunnel too. Which way a request took shows in the
address that it came from, and in what passes the client's veth0.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
import snapshot
from harness import ROOT, inside, two_hosts, wait_until

from bulkvpnd.admin import namespaces

HERE = pathlib.Path(__file__).parent
WEB = {4: "198.51.100.2", 6: "2001:db8:64::2"}
SERVER = {4: "198.51.100.1", 6: "2001:db8:64::1"}
"""The server as the client knows it: behind a default route, as on the Internet."""
OUTSIDE = {4: "192.0.2.2", 6: "2001:db8::2"}
ETH_P_ALL = 3
"""linux/if_ether.h"""


class Wire:
    """What the client sends by its veth0: the destination addresses of IP packets.

    Left out are the server's own address, neighbour discovery, and the question for the server's name, which the
    daemon has to ask outside.
    """

    def __init__(self, host):
        with inside(host):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
            self._socket.bind(("veth0", ETH_P_ALL))
        self._socket.setblocking(False)

    def sent(self):
        """Since the last time."""
        found = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, protocol, direction, *_) = self._socket.recvfrom(65536)
                if direction != socket.PACKET_OUTGOING or b"\3vpn\4test" in data:
                    continue
                if protocol == 0x0800:
                    found.add(socket.inet_ntop(socket.AF_INET, data[16:20]))
                elif protocol == 0x86DD:
                    found.add(socket.inet_ntop(socket.AF_INET6, data[24:40]))
        neighbours = {one for one in found if one.startswith(("ff02:", "fe80:"))}
        return found - neighbours - set(SERVER.values())

    def close(self):
        self._socket.close()


class Net:
    """The network of this file, with a web host; see above."""

    def __init__(self, network, web, log):
        self.network, self.client, self.server, self.web = network, network.client, network.server, web
        self._log = log

    def get(self, where, seconds=3):
        """Asks the web host from the client. Returns the address that it was asked from, or why there is no answer."""
        url = f"http://[{where}]/" if ":" in where else f"http://{where}/"
        done = self.client.run(["curl", "-s", "-S", "--noproxy", "*", "--max-time", seconds, url], check=False)
        return done.stdout or done.stderr.strip()

    def queries(self):
        """[(asker, name), ...] of all DNS queries so far."""
        return [tuple(line.split()) for line in self._log.read_text().splitlines()]

    def start_client(self, *flags, **options):
        return self.network.start_client("--remote=vpn.test", *flags, **options)


@contextlib.contextmanager
def resolv_conf(host, text):
    """The name servers of a namespace, see ip-netns(8)."""
    directory = pathlib.Path("/etc/netns", host.name)
    directory.mkdir(parents=True)
    (directory / "resolv.conf").write_text(text)
    try:
        yield directory / "resolv.conf"
    finally:
        shutil.rmtree(directory)
        with contextlib.suppress(OSError):
            directory.parent.rmdir()


@pytest.fixture
def net(tmp_path):
    for program in ("curl", "nft", "ethtool"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    with two_hosts(tmp_path) as network, contextlib.ExitStack() as stack:
        web = stack.enter_context(namespaces.Host(namespaces.unique_name("bulkvpn-test-w")))
        stack.enter_context(resolv_conf(network.client, f"nameserver {WEB[4]}\noptions timeout:1 attempts:1\n"))
        namespaces.link(network.server, web, ["198.51.100.1/24", "2001:db8:64::1/64"],
                        ["198.51.100.2/24", "2001:db8:64::2/64"], device="veth1")
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            network.server.run(["sysctl", "-q", "-w", f"{key}=1"])
        for host, ways in ((network.client, ("192.0.2.1", "2001:db8::1")), (web, ("198.51.100.1", "2001:db8:64::1"))):
            for way in ways:
                host.ip("route", "add", "default", "via", way)
        log = tmp_path / "queries"
        log.touch()
        web.start([sys.executable, HERE / "webhost.py", log, f"vpn.test={SERVER[4]}", f"web.test={WEB[4]}",
                   f"web.test={WEB[6]}"])
        wait_until(lambda: web.listening(80), 10, "the web host listens")
        yield Net(network, web, log)


@pytest.fixture
def wire(net):
    made = Wire(net.client)
    yield made
    made.close()


def test_everything_goes_through_the_tunnel(net, wire):
    before = snapshot.take(net.client)
    assert (net.get(WEB[4]), net.get(WEB[6])) == (OUTSIDE[4], OUTSIDE[6])
    assert WEB[4] in wire.sent() and net.queries() == []
    net.network.start_server().wait_ready()
    client = net.start_client("--redirect-gateway=yes").wait_ready()
    client.wait_connections(4)
    known = net.queries()
    assert set(known) == {(OUTSIDE[4], "vpn.test.")}, "the name of the server is asked for outside"
    wire.sent()
    assert (net.get(WEB[4]), net.get(WEB[6])) == ("10.86.0.2", "fd86::2")
    assert net.get("web.test") in ("10.86.0.2", "fd86::2")
    assert {asker for asker, name in net.queries()[len(known) :]} == {"10.86.0.2"}, "names are asked for inside"
    assert wire.sent() == set()
    assert net.network.ping(4) and net.network.ping(6)
    # A connection that is lost comes back outside the tunnel.
    net.client.run(["ss", "-K", "dst", SERVER[4]], check=False)
    client.wait_connections(4)
    assert client.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed
    assert (net.get(WEB[4]), net.get(WEB[6])) == (OUTSIDE[4], OUTSIDE[6])


def test_a_strict_reverse_path_filter_does_not_stop_it(net):
    net.client.run(["sysctl", "-q", "-w", "net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.veth0.rp_filter=1"])
    before = snapshot.take(net.client)
    net.network.start_server().wait_ready()
    client = net.start_client("--redirect-gateway=yes").wait_ready()
    client.wait_connections(4)
    assert net.get(WEB[4]) == "10.86.0.2"
    assert client.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed


def test_a_family_that_the_tunnel_lacks_stays_inside(net, wire):
    text = (net.network.directory / "server.conf").read_text()
    (net.network.directory / "server.conf").write_text(
        "".join(line for line in text.splitlines(True) if not line.startswith("pool-ipv6")))
    net.network.start_server().wait_ready()
    assert net.get(WEB[6]) == OUTSIDE[6]
    client = net.start_client("--redirect-gateway=yes").wait_ready()
    wire.sent()
    assert net.get(WEB[4]) == "10.86.0.2"
    assert "curl: (7)" in net.get(WEB[6]), "an error at once, no time-out"
    assert wire.sent() == set()
    client.stop()
    assert net.get(WEB[6]) == OUTSIDE[6]


def leaks(net, wire):
    """Whether anything leaves when the web host is asked, over IPv4, over IPv6 and by name."""
    wire.sent()
    answers = [net.get(where, 1) for where in (*WEB.values(), "web.test")]
    assert all(answer.startswith("curl:") for answer in answers) or wire.sent(), answers
    return bool(wire.sent()) or not all(answer.startswith("curl:") for answer in answers)


@pytest.mark.parametrize("switch", ["no", "yes"])
def test_before_the_first_connection(net, wire, switch):
    """The server is down."""
    before = snapshot.take(net.client)
    client = net.start_client("--redirect-gateway=yes", f"--kill-switch={switch}")
    wait_until(lambda: client.lines("failed: Connection refused"), 20, "a try that failed")
    assert leaks(net, wire) == (switch == "no")
    # Stopped in the middle of its start.
    assert client.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed
    assert net.get(WEB[4]) == OUTSIDE[4]


def test_nothing_leaves_while_the_server_is_away(net, wire):
    before = snapshot.take(net.client)
    server = net.network.start_server().wait_ready()
    client = net.start_client("--redirect-gateway=yes", "--kill-switch=yes").wait_ready()
    assert net.get(WEB[4]) == "10.86.0.2" and net.get(WEB[6]) == "fd86::2"
    server.stop()
    wait_until(lambda: client.lines("no connection to the server is left"), 30, "the client notices")
    assert not leaks(net, wire)
    # Its own routes out of the way: it is the switch that holds, not the full tunnel alone.
    for family in ("-4", "-6"):
        for priority in (32764, 32765):
            net.client.ip(family, "rule", "del", "priority", priority)
    assert not leaks(net, wire)
    net.network.start_server().wait_ready()
    client.wait_connections(4)
    assert net.network.ping(4)
    assert client.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed
    assert net.get(WEB[4]) == OUTSIDE[4]


@pytest.mark.parametrize("switch", ["no", "yes"])
def test_routes_of_a_hostile_network_lead_nothing_around_the_switch(net, wire, switch):
    """As DHCP hands them out (option 121; CVE-2024-3661). Without the switch they win over the full tunnel."""
    net.network.start_server().wait_ready()
    client = net.start_client("--redirect-gateway=yes", f"--kill-switch={switch}").wait_ready()
    client.wait_connections(4)
    assert (net.get(WEB[4]), net.get(WEB[6])) == ("10.86.0.2", "fd86::2")
    for half in ("0.0.0.0/1", "128.0.0.0/1"):
        net.client.ip("route", "add", half, "via", "192.0.2.1")
    net.client.ip("-6", "route", "add", "2000::/3", "via", "2001:db8::1")
    assert leaks(net, wire) == (switch == "no")
    client.wait_connections(4)
    assert client.stop() == 0


def test_local_networks_stay_within_reach(net):
    assert (net.get(WEB[4]), net.get(WEB[6])) == (OUTSIDE[4], OUTSIDE[6])
    client = net.start_client("--redirect-gateway=yes", "--kill-switch=yes", f"--local-networks={WEB[4]}/32")
    wait_until(lambda: client.lines("failed: "), 20, "a try that failed")
    assert net.get(WEB[4]) == OUTSIDE[4]
    assert net.get(WEB[6], 1).startswith("curl:")
    assert client.stop() == 0


def fail_to_start(net):
    """For an address that is another host's, which is found out only when the switch has been closed."""
    bad = net.start_client("--redirect-gateway=yes", "--kill-switch=yes", f"--metrics={WEB[4]}:9100")
    wait_until(lambda: namespaces.exited(bad.process), 20, "it cannot start")
    assert bad.stop() == 1
    assert bad.lines("kill switch: only the tunnel") and bad.lines("metrics = "), bad.text()


def test_a_kill_leaves_the_switch_closed_until_the_next_start(net, wire):
    before = snapshot.take(net.client)
    net.network.start_server().wait_ready()
    client = net.start_client("--redirect-gateway=yes", "--kill-switch=yes").wait_ready()
    client.kill()
    wait_until(lambda: "bulk0" not in net.client.ip("-br", "link"), 20, "its workers are gone")
    assert not leaks(net, wire)
    # A start that fails finds it closed, and leaves it so.
    fail_to_start(net)
    assert not leaks(net, wire)
    client = net.start_client("--redirect-gateway=yes", "--kill-switch=yes").wait_ready()
    assert net.get(WEB[4]) == "10.86.0.2"
    assert client.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed


EARLY_STOP = """
import os, signal, sys

class Finder:
    def find_spec(name, *rest):
        if name == "bulkvpnd.control.main" and "--config" in sys.argv:
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder)
"""
"""A sitecustomize that stops the daemon while it imports, before its event loop has signal handlers."""


def test_a_stop_before_the_start_is_done_opens_the_switch_of_a_crashed_run(net, wire):
    before = snapshot.take(net.client)
    net.network.start_server().wait_ready()
    flags = ("--redirect-gateway=yes", "--kill-switch=yes")
    net.start_client(*flags).wait_ready().kill()
    wait_until(lambda: "bulk0" not in net.client.ip("-br", "link"), 20, "its workers are gone")
    assert not leaks(net, wire)
    (net.network.directory / "sitecustomize.py").write_text(EARLY_STOP)
    client = net.start_client(*flags, environment={"PYTHONPATH": f"{net.network.directory}:{HERE.parents[1]}"})
    wait_until(lambda: namespaces.exited(client.process), 20, "it ends by itself")
    assert client.stop() == 0
    assert net.get(WEB[4]) == OUTSIDE[4]
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed


def test_a_kill_without_the_switch_leaves_nothing_after_the_next_run(net):
    before = snapshot.take(net.client)
    net.network.start_server().wait_ready()
    net.start_client("--redirect-gateway=yes").wait_ready().kill()
    wait_until(lambda: "bulk0" not in net.client.ip("-br", "link"), 20, "its workers are gone")
    assert "proto 86" in net.client.ip("rule")
    assert net.get(WEB[4]) == OUTSIDE[4]
    # Without the option now: what is left is removed all the same.
    client = net.start_client().wait_ready()
    assert "proto 86" not in net.client.ip("rule") + net.client.ip("-6", "rule")
    assert client.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed


def test_a_failed_start_leaves_the_host_as_it_was(net):
    before = snapshot.take(net.client)
    fail_to_start(net)
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed
    assert net.get(WEB[4]) == OUTSIDE[4]


def test_two_full_tunnels_do_not_lead_into_each_other(net):
    before = snapshot.take(net.client)
    net.network.add_client("second")
    net.network.start_server().wait_ready()
    first = net.start_client("--redirect-gateway=yes").wait_ready()
    second = net.network.start_client("--redirect-gateway=yes", "--remote=vpn.test", name="second").wait_ready()
    first.wait_connections(4)
    second.wait_connections(4)
    assert net.get(WEB[4]) in ("10.86.0.2", "10.86.0.3")
    assert first.stop() == 0
    assert net.get(WEB[4]) == "10.86.0.3"
    assert second.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed


def test_two_kill_switches_do_not_shut_each_other_in(net, wire):
    """As two instances of one client have them: what one tunnel carries leaves this machine in that tunnel only."""
    before = snapshot.take(net.client)
    net.network.add_client("second")
    server = net.network.start_server().wait_ready()
    flags = ("--redirect-gateway=yes", "--kill-switch=yes")
    first = net.start_client(*flags).wait_ready()
    second = net.network.start_client(*flags, "--remote=vpn.test", name="second").wait_ready()
    first.wait_connections(4)
    second.wait_connections(4)
    wire.sent()
    assert net.get(WEB[4]) in ("10.86.0.2", "10.86.0.3") and net.get(WEB[6]) in ("fd86::2", "fd86::3")
    for device in ("bulk0", "bulk1"):
        net.client.run(["ping", "-n", "-c", "1", "-W", "2", "-I", device, "10.86.0.1"])
    assert wire.sent() == set()
    # Either one alone is as closed as both.
    assert first.stop() == 0
    assert net.get(WEB[4]) == "10.86.0.3"
    server.stop()
    wait_until(lambda: second.lines("no connection to the server is left"), 30, "the client notices")
    assert not leaks(net, wire)
    assert second.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed


def test_a_second_full_tunnel_knows_which_interface_leads_outside(net):
    """Not the first one's tunnel, whose MTU is its own affair."""
    net.network.add_client("second")
    net.network.start_server().wait_ready()
    first = net.start_client("--redirect-gateway=yes").wait_ready()

    def mtu(device):
        return json.loads(net.client.ip("-j", "link", "show", device))[0]["mtu"]

    assert (mtu("veth0"), mtu("bulk0")) == (1500, 1500)
    second = net.network.start_client("--redirect-gateway=yes", "--remote=vpn.test", "--wan-mtu=1400", name="second")
    second.wait_ready()
    assert (mtu("veth0"), mtu("bulk0")) == (1400, 1500)
    assert second.stop() == 0
    assert (mtu("veth0"), mtu("bulk0")) == (1500, 1500)
    assert first.stop() == 0


FLUSHES = ("flush ruleset", "flush table inet bulkvpnd_client", "delete table inet bulkvpnd_client",
           "delete rule inet bulkvpnd_client kill-switch-output handle {drop}")


def switch(host, table="bulkvpnd_client"):
    """The rules of the kill switch as they are there."""
    found = json.loads(host.run(["nft", "-j", "list", "ruleset"]).stdout)["nftables"]
    rules = [one["rule"] for one in found if one.get("rule", {}).get("table") == table]
    return [rule for rule in rules if rule["chain"].startswith("kill-switch")]


def test_a_switch_that_something_else_removes_is_closed_again_at_once(net, wire):
    """As Debian's /etc/nftables.conf does it, which begins with flush ruleset; and nothing is left after a stop."""
    before = snapshot.take(net.client)
    server = net.network.start_server().wait_ready()
    client = net.start_client("--redirect-gateway=yes", "--kill-switch=yes").wait_ready()
    server.stop()
    wait_until(lambda: client.lines("no connection to the server is left"), 30, "the client notices")
    whole = len(switch(net.client))
    # It is the switch that holds, not the full tunnel.
    for half in ("0.0.0.0/1", "128.0.0.0/1"):
        net.client.ip("route", "add", half, "via", "192.0.2.1")
    assert not leaks(net, wire)
    for count, command in enumerate(FLUSHES, 1):
        drop = [rule["handle"] for rule in switch(net.client) if rule["chain"] == "kill-switch-output"][-1]
        net.client.run(["nft", command.format(drop=drop)])
        wait_until(lambda: len(switch(net.client)) == whole, 10, f"closed again after {command}")
        assert not leaks(net, wire)
        lines = client.lines("nftables table inet bulkvpnd_client: something else removed it, or a part of it")
        assert len(lines) == count, client.text()
    for half in ("0.0.0.0/1", "128.0.0.0/1"):
        net.client.ip("route", "del", half, "via", "192.0.2.1")
    assert client.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed


def test_a_device_that_was_down_has_everything_again(net, wire):
    before = snapshot.take(net.client)
    net.network.start_server("--routes=10.77.0.0/16").wait_ready()
    client = net.start_client("--redirect-gateway=yes").wait_ready()
    client.wait_connections(4)
    addresses = snapshot.take(net.client)
    assert (net.get(WEB[4]), net.get(WEB[6])) == ("10.86.0.2", "fd86::2")
    # Too short for who looks once in a while, and for long.
    for count, commands in enumerate((["link set bulk0 down", "link set bulk0 up"], ["link set bulk0 down"]), 1):
        for command in commands:
            net.client.ip(*command.split())
        wait_until(lambda: len(client.lines("device bulk0 is down: something else .* ip link set bulk0 up")) == count,
                   10, "it is said")
        if len(commands) == 1:
            assert net.get(WEB[4]) == OUTSIDE[4], "there is no full tunnel without a device"
            net.client.ip("link", "set", "bulk0", "up")
        wait_until(lambda: len(client.lines("device bulk0 is up again, with its addresses and routes")) == count,
                   10, "it is put back")
        wire.sent()
        assert (net.get(WEB[4]), net.get(WEB[6])) == ("10.86.0.2", "fd86::2")
        assert wire.sent() == set()
        assert not (changed := "\n".join(snapshot.differences(addresses, snapshot.take(net.client)))), changed
    assert not client.lines("ERROR|Traceback")
    assert client.stop() == 0
    assert not (changed := "\n".join(snapshot.differences(before, snapshot.take(net.client)))), changed


def test_the_switch_lets_neighbours_find_each_other(net):
    """Over IPv6 nothing is reached before a neighbour has answered."""
    net.client.ip("-6", "neigh", "flush", "dev", "veth0")
    net.network.start_server().wait_ready()
    client = net.network.start_client("--redirect-gateway=yes", "--kill-switch=yes", f"--remote=[{SERVER[6]}]")
    client.wait_ready()
    client.wait_connections(4)
    assert net.get(WEB[6]) == "fd86::2"
    assert client.stop() == 0


@pytest.mark.parametrize("switch", ["no", "yes"])
def test_what_is_forwarded_for_others(net, wire, switch):
    """A guest behind the client, such as a container, gets no further than the client itself."""
    with namespaces.Host(namespaces.unique_name("bulkvpn-test-g")) as guest:
        namespaces.link(net.client, guest, ["10.44.0.1/24"], ["10.44.0.2/24"], device="veth2")
        guest.ip("route", "add", "default", "via", "10.44.0.1")
        net.client.run(["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
        client = net.start_client("--redirect-gateway=yes", f"--kill-switch={switch}")
        wait_until(lambda: client.lines("failed: Connection refused"), 20, "a try that failed")
        wire.sent()
        guest.run(["ping", "-n", "-c", "1", "-W", "1", WEB[4]], check=False)
        assert (WEB[4] in wire.sent()) == (switch == "no")
        assert client.stop() == 0


def test_a_failure_after_it_was_up_leaves_the_switch_closed(net, wire):
    before = snapshot.take(net.client)
    net.network.start_server().wait_ready()
    client = net.start_client("--redirect-gateway=yes", "--kill-switch=yes").wait_ready()
    net.client.ip("link", "delete", "bulk0")
    wait_until(lambda: namespaces.exited(client.process), 20, "it ends")
    assert client.stop() == 1
    assert not leaks(net, wire)
    assert net.start_client("--redirect-gateway=yes", "--kill-switch=yes").wait_ready().stop() == 0
    changed = "\n".join(snapshot.differences(before, snapshot.take(net.client)))
    assert not changed, changed


@pytest.mark.parametrize("switch", ["no", "yes"])
def test_what_is_measured_beside_the_tunnel_goes_outside(net, switch):
    """It counts only where nothing of it comes out of the tunnel, which the server does not let in here."""
    if not shutil.which("iperf3"):
        pytest.skip("needs iperf3")
    server = net.network.start_server().wait_ready()
    client = net.start_client("--redirect-gateway=yes", f"--kill-switch={switch}").wait_ready()
    client.wait_connections(4)
    net.server.run(["nft", "table inet test { chain input { type filter hook input priority 0; "
                           f"iifname bulk0 ip daddr {SERVER[4]} drop; }}; }}"])
    net.server.start(["iperf3", "--server", "--port", "7444"], stdout=subprocess.DEVNULL)
    wait_until(lambda: net.server.listening(7444), 10, "it listens")
    made = net.client.run(["ping", "-n", "-c", "1", "-W", "1", SERVER[4]], check=False)
    assert made.returncode != 0, "unbound it goes into the tunnel"
    done = net.client.run([sys.executable, "-m", "bulkvpnd.admin", "speedtest", client.runtime, "--seconds", "1",
                           "--json"], timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    result = json.loads(done.stdout)
    assert result["tunnel"]["out"]["bits"] > 0
    if switch == "no":
        assert result["beside"]["out"]["bits"] > 0 and result["beside"]["rtt_idle_ms"] > 0
    else:
        assert "out" not in result["beside"] and "with kill-switch" in result["beside"]["why_not"], result
    assert client.stop() == 0 and server.stop() == 0


def checked(net):
    """{check: [(state, text), ...]} of the client's doctor."""
    done = net.client.run([sys.executable, "-m", "bulkvpnd.admin", "doctor", "--config",
                           net.network.directory / "client.conf", "--runtime-directory",
                           net.network.directory / "run-client", "--json"],
                          check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    found = {}
    for row in json.loads(done.stdout):
        found.setdefault(row["check"], []).append((row["state"], row["text"]))
    return found


def test_the_doctor_finds_a_server_that_leads_nowhere(net):
    """The web host knows no way back to the pool, so only NAT makes one; it is the server's router and name server."""
    client_file = net.network.directory / "client.conf"
    client_file.write_text(client_file.read_text().replace("remote = 192.0.2.1:7443",
                                                           f"redirect-gateway = yes\nremote = {SERVER[4]}"))
    for family, network, way in (("-4", "192.0.2.0/30", "198.51.100.1"), ("-6", "2001:db8::/64", "2001:db8:64::1")):
        net.web.ip(family, "route", "delete", "default")
        net.web.ip(family, "route", "add", network, "via", way)
    net.server.ip("route", "add", "default", "via", WEB[4])
    net.web.run(["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
    server = net.network.start_server().wait_ready()
    assert checked(net)["beyond"] == [("not checked", "there is no connection")]
    client = net.network.start_client().wait_ready()
    client.wait_connections(4)
    lost = [("problem", f"IPv{version}: nothing beyond the server answers") for version in (4, 6)]
    found = checked(net)
    assert found["beyond"][0] == lost[0] and found["beyond"][1][1] == lost[1][1]
    # What has nothing to do with the tunnel is looked at beside it.
    assert found["path MTU"] == [("fine", f"{SERVER[4]} gets packets of 1500 bytes")]

    with resolv_conf_of(net, ""):
        assert checked(net)["beyond"][0] == ("note", lost[0][1]), "a router may be silent"
        net.server.run(["sysctl", "-q", "-w", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"])
        assert checked(net)["beyond"][0] == lost[0], "the server does not forward"
    assert server.stop() == 0
    server = net.network.start_server("--nat=yes").wait_ready()
    client.wait_connections(4)
    assert checked(net)["beyond"][0] == ("fine", f"IPv4: {WEB[4]} answers, beyond the server")
    with resolv_conf_of(net, ""):
        assert checked(net)["beyond"] == [("fine", f"IPv4: {WEB[4]} answers, beyond the server"), ("note", lost[1][1])]
    assert client.stop() == 0 and server.stop() == 0


@contextlib.contextmanager
def resolv_conf_of(net, text):
    """Other name servers of the client for a while."""
    file = pathlib.Path("/etc/netns", net.client.name, "resolv.conf")
    before = file.read_text()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(before)
