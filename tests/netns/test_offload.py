"""An end without offload: both ends say so once, and everything works, at the old speed."""

import json

import pytest
from harness import INNER, wait_until

SLOW = "packets go one by one, at a fraction of the speed"
SAYS = {
    # which end has none: (flag, reason in its log) of the server and of the client
    "server": (("--offload=no", "offload = no"), ("--offload=yes", "the server takes no super-packets")),
    "client": (("--offload=yes", "client takes no super-packets"), ("--offload=no", "offload = no")),
    "both": (("--offload=no", "offload = no"), ("--offload=no", "offload = no")),
}


@pytest.fixture(scope="module", params=SAYS)
def tunnel(request, shared_network):
    server, client = SAYS[request.param]
    server = shared_network.start_server(server[0]).wait_ready()
    client = shared_network.start_client(client[0]).wait_ready()
    client.wait_connections(4)
    yield request.param, shared_network, server, client
    assert client.stop() == 0 and server.stop() == 0


def test_each_end_says_so_once(tunnel):
    without, _, *daemons = tunnel
    for daemon, (_, reason) in zip(daemons, SAYS[without]):
        wait_until(lambda: daemon.lines(SLOW), 5, f"{daemon.name} says so")
        (line,) = daemon.lines(SLOW)
        assert f"{reason}: {SLOW}" in line


@pytest.mark.parametrize("version", INNER)
def test_it_works_both_ways(tunnel, version):
    _, network, server, client = tunnel
    before = [one["peer"] for one in client.connections()]
    listening = network.server.start(["iperf3", "--server", "--one-off", "--bind", INNER[version]])
    wait_until(lambda: network.server.listening(5201), 10, "iperf3 listens")
    report = network.client.run(["iperf3", "--json", "-c", INNER[version], "-t", "1", "--bidir"])
    listening.wait(10)
    end = json.loads(report.stdout)["end"]
    assert end["sum_received"]["bytes"] > 0 and end["sum_received_bidir_reverse"]["bytes"] > 0
    assert [one["peer"] for one in client.connections()] == before, "a connection was re-made"
    for daemon in (server, client):
        for one in daemon.connections():
            assert one["packets_out"] == one["segments_out"], "a super-packet went out"
