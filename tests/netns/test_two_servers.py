"""Two servers for one client: a session has one of them, and when that is gone the next begins another.

    client ── veth0 192.0.2.2 ═══ 192.0.2.1 veth0 ── server     port 7443: one    port 8443: other
"""

from harness import Daemon, wait_until

SETTINGS = """device = bulk1
pool-ipv4 = 10.86.1.0/24
listen = 0.0.0.0:8443
"""


def servers_of(client):
    return {one["peer"] for one in client.connections()}


def server_connection(server):
    return server.wait_connections(4)[0]


def test_a_client_fails_over_with_all_of_its_connections(network):
    text = (network.directory / "server.conf").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("pool-", "listen", "device"))]
    other_file = network.directory / "other.conf"
    other_file.touch(0o600)
    other_file.write_text(SETTINGS + "\n".join(kept))
    one = network.start_server().wait_ready()
    other = Daemon(network.server, network.directory, "other").wait_ready()
    client = network.start_client("--remote=192.0.2.1:7443", "--remote=192.0.2.1:8443").wait_ready()
    client.wait_connections(4)
    assert servers_of(client) == {"192.0.2.1:7443"} and network.ping()

    # One connection alone comes back to its own server.
    before = {connection["connection"] for connection in client.connections()}
    port = server_connection(one)["peer"].rpartition(":")[2]
    network.server.run(["ss", "-K", f"dport = :{port}"])
    wait_until(lambda: {connection["connection"] for connection in client.wait_connections(4)} - before, 10,
               "another takes its place")
    assert servers_of(client) == {"192.0.2.1:7443"} and not other.status()["sessions"]

    for gone, left, port in ((one, other, 8443), (other, None, 7443)):
        if left is None:
            one = left = network.start_server().wait_ready()
        assert gone.stop() == 0
        wait_until(lambda: servers_of(client) == {f"192.0.2.1:{port}"} and len(client.connections()) == 4, 20,
                   f"all connections go to port {port}")
        (session,) = left.status()["sessions"]
        assert len(session["connections"]) == 4
    assert network.ping()
    assert not client.lines("ERROR|Traceback")
    assert client.stop() == 0 and one.stop() == 0
