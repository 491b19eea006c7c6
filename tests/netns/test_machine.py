"""What a daemon changes on its machine beyond the device, while it runs and never after: after a stop, a crash, a start
that failed, and one that was stopped half-way."""

import json
import re
import shutil
import signal
import sys

import pytest
import snapshot
from harness import ROOT, Daemon, wait_until

POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
WMEM = "net/ipv4/tcp_wmem"
FORWARDING = "net/ipv4/ip_forward"
MTU = "1400"
GRO = "rx-udp-gro-forwarding: on"
SECOND = ("--listen", "[::]:7444", "--pool-ipv4", "10.87.0.0/24", "--pool-ipv6", "fd87::/64", "--wan-mtu", "1300")


@pytest.fixture
def host(network):
    """The server's host, with a way out and forwarding on, as the administrator may have set them."""
    network.server.ip("route", "add", "default", "via", "192.0.2.2")
    write(network.server, FORWARDING, "1")
    write(network.server, WMEM, "4096 16384 4194304")
    write(network.server, "net/ipv4/conf/default/rp_filter", "1")
    return network.server


def write(host, key, value):
    host.run(["sh", "-c", f"echo '{value}' >/proc/sys/{key}"])


def read(host, key):
    return " ".join(host.run(["cat", f"/proc/sys/{key}"]).stdout.split())


def mtu(host):
    return json.loads(host.ip("-j", "link", "show", "veth0"))[0]["mtu"]


def features(host):
    return host.run(["ethtool", "-k", "veth0"]).stdout


def second(network):
    shutil.copy(network.directory / "server.conf", network.directory / "second.conf")
    return Daemon(network.server, network.directory, "second", SECOND)


def tune(network, *arguments):
    """`bulkvpnctl tune` on the server's host. Returns {setting: row}."""
    result = network.server.run([sys.executable, "-m", "bulkvpnd.admin", "tune", *arguments, "--json"], cwd=ROOT)
    return {row["setting"]: row for row in json.loads(result.stdout)}


def test_it_is_tuned_while_it_runs(network, host):
    before = snapshot.take(host)
    server = network.start_server("--wan-mtu", MTU).wait_ready()
    assert read(host, WMEM) == "4096 16384 16777216"
    assert read(host, "net/ipv4/conf/bulk0/rp_filter") == "2"
    assert mtu(host) == int(MTU)
    assert GRO in features(host)
    assert server.stop() == 0
    assert snapshot.differences(before, snapshot.take(host)) == []


def test_without_tuning_nothing_is_changed(network, host):
    before = snapshot.take(host)
    server = network.start_server("--tuning", "no", "--wan-mtu", MTU).wait_ready()
    after = snapshot.take(host)
    assert [line for line in snapshot.differences(before, after)
            if line.startswith(("sysctl", "link", "feature")) and "bulk0" not in line] == []
    assert server.stop() == 0


def test_two_instances_share_and_the_last_one_restores(network, host):
    before = snapshot.take(host)
    first = network.start_server("--wan-mtu", MTU).wait_ready()
    other = second(network).wait_ready()
    assert mtu(host) == 1300
    assert first.stop() == 0
    assert read(host, WMEM) == "4096 16384 16777216" and mtu(host) == 1300 and GRO in features(host)
    first = network.start_server("--wan-mtu", MTU).wait_ready()
    assert other.stop() == 0
    assert read(host, WMEM) == "4096 16384 16777216" and mtu(host) == int(MTU) and GRO in features(host)
    assert first.stop() == 0
    assert snapshot.differences(before, snapshot.take(host)) == []


def test_in_another_network_namespace_the_same_name_is_another_instance(network, host):
    """They share the directory, and nothing in it."""
    elsewhere = network.directory / "elsewhere"
    elsewhere.mkdir()
    for name in ("server.conf", "crl.pem"):
        shutil.copy(network.directory / name, elsewhere)
    first = network.start_server().wait_ready()
    beside = f"--runtime-directory={network.directory}/run-elsewhere"
    second = Daemon(network.client, elsewhere, "server", [beside]).wait_ready()
    assert second.stop() == 0
    assert read(host, WMEM) == "4096 16384 16777216"
    assert first.stop() == 0


def test_after_a_crash_the_next_start_and_its_stop_give_everything_back(network, host):
    before = snapshot.take(host)
    network.start_server("--wan-mtu", MTU).wait_ready().kill()
    assert mtu(host) == int(MTU) and read(host, WMEM) == "4096 16384 16777216"
    server = network.start_server().wait_ready()
    assert mtu(host) == 1500
    assert server.stop() == 0
    assert snapshot.differences(before, snapshot.take(host)) == []


def test_another_instance_cleans_up_after_one_that_crashed(network, host):
    before = snapshot.take(host)
    crashed = network.start_server("--wan-mtu", MTU).wait_ready()
    crashed.kill()
    other = second(network).wait_ready()
    assert other.stop() == 0
    # The table waits for the instance whose it is: it may hold a kill switch.
    left = snapshot.differences(before, snapshot.take(host))
    assert left and all(line.startswith("nftables") for line in left)


def test_after_a_failed_start_everything_is_as_it_was(network, host):
    before = snapshot.take(host)
    server = network.start_server("--wan-mtu", MTU, "--listen", "198.51.100.1:7443")
    wait_until(lambda: server.process.poll() is not None, 30, "it ends")
    assert server.process.returncode == 1
    assert server.lines(r"tuned: mtu veth0 = 1400, was 1500")
    assert snapshot.differences(before, snapshot.take(host)) == []
    server.close()


def test_after_a_stop_in_the_middle_of_a_start_everything_is_as_it_was(network, host):
    before = snapshot.take(host)

    def start_and_stop():
        """Returns whether the stop came in the middle: tuning had begun, and it was not ready."""
        server = network.start_server("--wan-mtu", MTU)
        wait_until(lambda: server.lines("tuned: "), 30, "it has begun to tune", 0.001)
        server.process.send_signal(signal.SIGSTOP)
        in_the_middle = "READY=1" not in server.notified()
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        wait_until(lambda: server.process.poll() is not None, 30, "it ends")
        assert server.process.returncode == 0
        assert snapshot.differences(before, snapshot.take(host)) == []
        server.close()
        return in_the_middle

    # It takes some ten milliseconds from the one to the other, which a busy machine may let this test miss.
    assert any(start_and_stop() for _ in range(20))


def test_a_key_that_cannot_be_set_is_one_line(network, host):
    """In a network namespace of Linux 6.18 some keys are read-only, even for root, and older ones lack them."""
    with (network.directory / "server.conf").open("a") as file:
        file.write(f"runtime-directory = {network.directory}/run-server\n")
    server = network.start_server().wait_ready()
    shown = tune(network, "show", "--config", str(network.directory / "server.conf"))
    for key in ("net.core.rmem_max", "net.core.netdev_max_backlog"):
        (line,) = server.lines(re.escape(key))
        match = re.search(f"not tuned: {key}: .*not [0-9]+: (Permission denied|No such file or directory)", line)
        assert shown[key]["why_not"] == match[1], "and the same where it is looked for"
    assert server.stop() == 0


@pytest.mark.parametrize("flags", [[], ["--wan-mtu", MTU], ["--nat=yes"]])
def test_an_interface_that_does_not_exist_is_one_line(network, host, flags):
    write(host, FORWARDING, "0")
    server = network.start_server("--wan-interface", "frobnicate0", *flags).wait_ready()
    (line,) = server.lines("frobnicate0")
    assert "WARNING: wan-interface = frobnicate0: No such device, so it is not tuned; correct it" in line
    assert server.stop() == 0


@pytest.mark.parametrize(("found", "warned"), [("1500", 0), ("1400", 1)])
def test_an_unusual_mtu_is_a_warning_and_stays(network, host, found, warned):
    host.ip("link", "set", "veth0", "mtu", found)
    server = network.start_server().wait_ready()
    assert len(server.lines(r"WARNING: veth0.* MTU of 1400.*wan-mtu = 1500")) == warned
    assert mtu(host) == int(found)
    assert server.stop() == 0


def test_a_client_finds_the_interface_by_the_route_to_its_server(network, host):
    client = network.client
    client.ip("link", "add", "other0", "type", "veth", "peer", "name", "other1")
    client.ip("address", "add", "198.51.100.1/24", "dev", "other0")
    client.ip("link", "set", "other0", "up")
    client.ip("link", "set", "other1", "up")
    client.ip("route", "add", "default", "via", "198.51.100.2")
    before = snapshot.take(client)
    server = network.start_server().wait_ready()
    daemon = network.start_client("--wan-mtu", MTU).wait_ready()
    assert mtu(client) == int(MTU)
    assert json.loads(client.ip("-j", "link", "show", "other0"))[0]["mtu"] == 1500
    assert daemon.stop() == 0
    assert snapshot.differences(before, snapshot.take(client)) == []
    assert server.stop() == 0


# By hand


def test_by_hand_and_back(network, host):
    before = snapshot.take(host)
    shown = tune(network, "show")
    assert shown["net.ipv4.tcp_wmem"]["why_not"] == "no instance wants it"
    assert snapshot.differences(before, snapshot.take(host)) == []
    config = ("--config", str(network.directory / "server.conf"))
    with (network.directory / "server.conf").open("a") as file:
        file.write(f"wan-mtu = {MTU}\nruntime-directory = {network.directory}/run-server\n")
    tune(network, "apply", *config)
    assert mtu(host) == int(MTU) and GRO in features(host)
    shown = tune(network, "show", *config)
    assert shown["net.ipv4.tcp_wmem"]["found"] == "4096 16384 4194304"
    assert shown["net.ipv4.tcp_wmem"]["set"] == "4096 16384 16777216"
    assert shown["net.ipv4.tcp_wmem"]["why_not"] is None
    # An instance that comes and goes leaves what was set by hand.
    assert network.start_server().wait_ready().stop() == 0
    assert mtu(host) == int(MTU)
    tune(network, "revert", *config)
    assert snapshot.differences(before, snapshot.take(host)) == []


def test_show_without_root_says_so_in_its_row(network, host):
    with (network.directory / "server.conf").open("a") as file:
        file.write("nat = yes\n")
    result = host.run([*POWERLESS, sys.executable, "-m", "bulkvpnd.admin", "tune", "show", "--json", "--config",
                       network.directory / "server.conf"], cwd=ROOT)
    (row,) = [one for one in json.loads(result.stdout) if one["setting"] == "conntrack timeouts"]
    assert (row["set"], row["why_not"]) == (None, "Operation not permitted; run it as root to see")
    assert result.stderr == ""


def test_show_knows_the_timeouts_of_its_own_instance(network, host):
    """And not those of another, nor that it forwards."""
    first = network.start_server("--nat=yes").wait_ready()
    for name, shown in (("server", ("short", None)), ("other", ("system", "no instance wants it"))):
        text = (network.directory / "server.conf").read_text()
        file = network.directory / f"{name}.conf"
        file.write_text(f"nat = yes\nruntime-directory = {network.directory}/run-{name}\n{text}")
        file.chmod(0o600)
        row = tune(network, "show", "--config", str(file))["conntrack timeouts"]
        assert (row["set"], row["why_not"]) == shown
        file.write_text(text)
    assert first.stop() == 0


def test_show_knows_the_device_of_a_running_instance(network, host):
    with (network.directory / "server.conf").open("a") as file:
        file.write(f"runtime-directory = {network.directory}/run-server\n")
    config = ("--config", str(network.directory / "server.conf"))
    assert "txqueuelen bulk0" not in tune(network, "show", *config)
    server = network.start_server().wait_ready()
    shown = tune(network, "show", *config)
    assert shown["txqueuelen bulk0"] == {"setting": "txqueuelen bulk0", "found": None, "wanted": "9000",
                                         "set": "9000", "option": "txqueuelen", "why_not": None}
    assert shown["net/ipv4/conf/bulk0/rp_filter"]["set"] == "2"
    assert server.stop() == 0
