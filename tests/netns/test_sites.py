"""Four instances at each of two sites carry one prefix of the other site together, and lose some of them under load.

    site A: 10.1.0.1, fd01::1                                          site B: 10.2.0.1, fd02::1
    server1 ═══ 4 connections ═══ client1
    server2 ═══ 4 connections ═══ client2        A leads to 10.2.0.0/16 and fd02::/48 by server1 … server4,
    server3 ═══ 4 connections ═══ client3        B to 10.1.0.0/16 and fd01::/48 by client1 … client4
    server4 ═══ 4 connections ═══ client4
"""

import itertools
import json
import subprocess
import sys
import time

import pytest
import snapshot
from harness import ROOT, Daemon, two_hosts, wait_until

COUNT = 4
STREAMS = 32
"""Enough that no instance is without one by chance: (3/4)^32 is 1 in 10,000, for each."""
SITES = {
    # IP version: (networks, addresses), of site A and of site B
    4: (("10.1.0.0/16", "10.2.0.0/16"), ("10.1.0.1", "10.2.0.1")),
    6: (("fd01::/48", "fd02::/48"), ("fd01::1", "fd02::1")),
}
CLIENTS = "[client client]\n" + "".join(f"networks = {networks[1]}\n" for networks, _ in SITES.values())
FLAGS = ("--workers=1", "--log-level=info")
RATE = "2M"
"""Bits a second of each stream while instances come and go: far below what stops the machine, so that each stream has
something to send in every interval."""
INTERVAL = 0.5
MOVED = 1.0
"""Seconds within which traffic has to move."""
STILL_MAX = 2.0
"""Seconds that a stream may stand still for a move: MOVED, and the timeout of its TCP that doubled meanwhile."""


def behind_clients(network, text):
    directory = network.directory / "server.clients.d"
    directory.mkdir()
    (directory / "site-b.conf").write_text(text)


class Sites:
    """Both sites with their configurations; each role has its instances by number."""

    def __init__(self, network):
        self.network = network
        self.hosts = {"server": network.server, "client": network.client}
        self.before = None
        self.running = {}  # (role, number): Daemon
        behind_clients(network, CLIENTS)
        for at, (role, host) in enumerate(self.hosts.items()):
            wishes = []
            for networks, addresses in SITES.values():
                wishes += ["--multipath", f"{networks[1 - at]} source {addresses[at]}"]
                host.ip("address", "add", addresses[at], "dev", "lo", *(["nodad"] if ":" in addresses[at] else []))
            subprocess.run(
                [sys.executable, "-m", "bulkvpnd.admin", "init-instances", str(COUNT), "--directory",
                 network.directory, "--from", network.directory / f"{role}.conf", *wishes],
                check=True, cwd=ROOT, capture_output=True,
            )  # fmt: skip
        self.before = self.snapshot()

    def snapshot(self):
        return {role: snapshot.take(host) for role, host in self.hosts.items()}

    def changed(self):
        return [line for role, now in self.snapshot().items() for line in snapshot.differences(self.before[role], now)]

    def start(self, role, number):
        flags = [*FLAGS, *(["--retry-max=1"] if role == "client" else [])]
        daemon = Daemon(self.hosts[role], self.network.directory, f"{role}{number}", flags)
        self.running[role, number] = daemon
        return daemon

    def start_all(self):
        for role in self.hosts:
            started = [self.start(role, number) for number in range(1, COUNT + 1)]
            for daemon in started:
                daemon.wait_ready(60)
        self.wait_members(range(1, COUNT + 1), 20)

    def stop_all(self):
        for daemon in reversed(list(self.running.values())):
            daemon.process.terminate()
        assert [daemon.stop() for daemon in self.running.values()] == [0] * len(self.running)

    def members(self, role, version):
        """The numbers of the instances that carry the far site's prefix, as the kernel has it."""
        prefix = SITES[version][0][role == "server"]
        routes = json.loads(self.hosts[role].ip(f"-{version}", "-j", "route", "show", prefix))
        hops = [hop for route in routes for hop in route.get("nexthops", [route])]
        return sorted(int(hop["dev"].removeprefix(role)) for hop in hops)

    def wait_members(self, numbers, seconds):
        """Waits until both ends have just these members. Returns the seconds that it took."""
        begun = time.monotonic()
        for role in self.hosts:
            for version in SITES:
                wait_until(lambda: self.members(role, version) == list(numbers), seconds,
                           f"{role} IPv{version} has {list(numbers)}")
        return time.monotonic() - begun

    def sent(self, role):
        """{device: bytes that went into the tunnel}"""
        shown = json.loads(self.hosts[role].ip("-j", "-s", "link"))
        return {one["ifname"]: one["stats64"]["tx"]["bytes"] for one in shown if one["ifname"].startswith(role)}

    def begin_load(self, version, seconds, *flags):
        """Streams from B to A, unless a flag is --reverse. Returns the Popen of iperf3, whose output is JSON."""
        host = self.network.server
        host.start(["iperf3", "--server", "--one-off", "--bind", SITES[version][1][0]], stdout=subprocess.DEVNULL)
        wait_until(lambda: host.listening(5201), 10, "iperf3 listens")
        return self.network.client.start(
            ["iperf3", "--json", "--client", SITES[version][1][0], "--time", str(seconds), "--parallel", str(STREAMS),
             "--interval", str(INTERVAL), *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish_load(self, load):
        """Returns, for each stream, the bytes of each interval. A connection that broke is an error of iperf3."""
        output, _ = load.communicate(timeout=60)
        report = json.loads(output)
        assert load.returncode == 0 and "error" not in report, report.get("error")
        return [list(stream) for stream in zip(*(
            [stream["bytes"] for stream in interval["streams"]] for interval in report["intervals"]
        ))]  # fmt: skip

    def all_used(self, version):
        """Whether new flows use every instance, both ways."""
        before = {role: self.sent(role) for role in self.hosts}
        self.finish_load(self.begin_load(version, 2))
        used = {role: {device: count - before[role].get(device, 0) for device, count in self.sent(role).items()}
                for role in self.hosts}
        # B sends the data; what A sends is little more than acknowledgements.
        return min(used["client"].values()) > 100_000 and min(used["server"].values()) > 5_000, used


def still(stream):
    """The longest time in seconds that a stream, the bytes of each interval, stood still."""
    return INTERVAL * max(len(list(run)) if not is_moving else 0 for is_moving, run in itertools.groupby(stream, bool))


@pytest.fixture
def sites(tmp_path):
    with two_hosts(tmp_path) as network:
        yield Sites(network)


def test_what_is_made_starts(network):
    """All of them, whatever the one that they come from has that only one instance can have."""
    behind_clients(network, CLIENTS)
    with (network.directory / "server.conf").open("a") as file:
        file.write("metrics = 127.0.0.1:9743\n")
    before = snapshot.take(network.server)
    subprocess.run([sys.executable, "-m", "bulkvpnd.admin", "init-instances", "2", "--directory", network.directory],
                   check=True, cwd=ROOT, capture_output=True)
    servers = [Daemon(network.server, network.directory, f"server{number}", FLAGS) for number in (1, 2)]
    for server in servers:
        server.wait_ready()
    assert [server.stop() for server in servers] == [0, 0]
    assert snapshot.differences(before, snapshot.take(network.server)) == []


def test_four_instances_carry_one_prefix_and_survive_the_loss_of_two(sites):
    network = sites.network
    for _, addresses in SITES.values():
        assert network.client.run(["ping", "-c1", "-W1", addresses[0]], check=False).returncode != 0
    sites.start_all()
    for version, (_, addresses) in SITES.items():
        assert network.client.run(["ping", "-c3", "-i0.1", addresses[0]]).returncode == 0
        assert network.server.run(["ping", "-c3", "-i0.1", addresses[1]]).returncode == 0
        used, counts = sites.all_used(version)
        assert used, counts

    for version in SITES:
        # At the receiver, because the sender's buffers would hide it when nothing arrives.
        load = sites.begin_load(version, 20, "--bitrate", RATE, "--length", "8K", "--reverse")
        before = sites.sent("server")
        wait_until(lambda: all(count > before[device] + 500_000 for device, count in sites.sent("server").items()), 10,
                   "all carry something")
        sites.running["client", 2].kill()
        assert sites.wait_members([1, 3, 4], MOVED) < MOVED
        sites.running["server", 3].process.terminate()
        assert sites.wait_members([1, 4], MOVED + 1) < MOVED + 1
        assert sites.running["server", 3].stop() == 0
        sites.start("client", 2).wait_ready()
        sites.start("server", 3).wait_ready()
        sites.wait_members(range(1, COUNT + 1), 20)
        assert max(map(still, sites.finish_load(load))) <= STILL_MAX
        used, counts = sites.all_used(version)
        assert used, counts

    sites.stop_all()
    assert sites.changed() == []


def test_nothing_is_left_by_a_crash_of_all_nor_by_the_next_run(sites):
    sites.start_all()
    assert sites.changed() != []
    for daemon in sites.running.values():
        daemon.kill()
    for role in sites.hosts:
        for version in SITES:
            wait_until(lambda: sites.members(role, version) == [], 10, "the kernel has taken all out")
    sites.running.clear()
    sites.start_all()
    sites.stop_all()
    assert sites.changed() == []


def test_a_route_of_somebody_else_ends_the_start_and_stays(sites):
    prefix = SITES[4][0][0]
    sites.network.client.ip("route", "add", prefix, "dev", "lo")
    sites.before = sites.snapshot()
    daemon = sites.start("client", 1)
    assert daemon.process.wait(20) == 1
    (line,) = daemon.lines("multipath = 10.1.0.0/16: .*is there already")
    assert "ERROR" in line
    assert sites.changed() == []
    daemon.close()


def test_the_first_and_the_last(sites):
    """The route is there as long as one instance is; what it leads to is up to the others."""
    for role in sites.hosts:
        sites.start(role, 2).wait_ready()
    sites.wait_members([2], 10)
    for role in sites.hosts:
        sites.start(role, 4).wait_ready()
    sites.wait_members([2, 4], 10)
    # A client whose server is gone takes no part, and neither does a server whose client is gone.
    sites.running["server", 2].process.terminate()
    sites.wait_members([4], 10)
    assert sites.running["client", 2].process.poll() is None
    assert sites.network.client.run(["ping", "-c3", "-i0.1", SITES[4][1][0]]).returncode == 0
    sites.running["client", 4].process.terminate()
    sites.wait_members([], 10)
    assert sites.network.client.run(["ping", "-c1", "-W1", SITES[4][1][0]], check=False).returncode != 0
    sites.stop_all()
    assert sites.changed() == []
