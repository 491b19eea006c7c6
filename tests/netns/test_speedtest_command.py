"""`bulkvpnctl speedtest` between two hosts, as short as it can be; what it measures is no test of speed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from harness import ROOT, wait_until

from bulkvpnd.admin import namespaces

COMMAND = [sys.executable, "-m", "bulkvpnd.admin", "speedtest"]
OPTIONS = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}}


def test_through_the_tunnel_and_beside_it(network):
    if not shutil.which("iperf3"):
        pytest.skip("needs iperf3")
    server = network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    command = [*COMMAND, client.runtime, "--seconds", "1", "--json"]

    done = network.client.run(command, check=False, **OPTIONS)
    assert done.returncode == 1 and "bulkvpnctl speedtest --serve" in done.stderr

    other = network.server.start([*COMMAND, server.runtime, "--serve", "--beside", "192.0.2.1"],
                                 stdout=subprocess.DEVNULL, **OPTIONS)
    # On 10.86.0.1, fd86::1 and 192.0.2.1.
    listening = ["ss", "-Hltn", "sport = :7444"]
    wait_until(lambda: network.server.run(listening).stdout.count("\n") == 3, 10, "it listens")
    result = json.loads(network.client.run(command, **OPTIONS).stdout)
    for way in ("tunnel", "beside"):
        assert all(result[way][direction]["bits"] > 0 for direction in ("out", "in"))
        assert result[way]["rtt_idle_ms"] > 0
    assert set(result["bottleneck"]) == {"out", "in"}
    namespaces.end(other)
    wait_until(lambda: not network.server.run(listening).stdout, 5, "it leaves nothing behind")
    assert client.stop() == 0 and server.stop() == 0


def test_a_server_that_is_away_for_a_moment(network):
    """As --serve is between two tests. Even where one measurement takes longer than the other end may be away."""
    if not shutil.which("iperf3"):
        pytest.skip("needs iperf3")
    server = network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    measuring = network.client.start([*COMMAND, client.runtime, "--seconds", "3", "--json"], stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True, **OPTIONS)
    wait_until(lambda: refusals(network.server), 20, "it was refused")
    network.server.start(["iperf3", "--server", "--port", "7444"], stdout=subprocess.DEVNULL)
    out, error = measuring.communicate(timeout=60)
    assert measuring.returncode == 0, error
    result = json.loads(out)
    assert all(result[way][direction]["bits"] > 0 for way in ("tunnel", "beside") for direction in ("out", "in"))
    assert client.stop() == 0 and server.stop() == 0


def refusals(host):
    """How often a host has said that nothing listens on a port: Tcp OutRsts of proc(5)."""
    lines = host.run(["grep", "^Tcp:", "/proc/net/snmp"]).stdout.splitlines()
    names, values = (line.split() for line in lines)
    return int(values[names.index("OutRsts")])
