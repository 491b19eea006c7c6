"""control.server: what a client gets that may come in, and what its worker gets."""

import ipaddress

import pytest
from doubles import establish
from logins import FIXED, admit, live

from bulkvpnd.control import server as server_module


def test_a_worker_gets_the_socket_the_keys_and_what_came_behind(site, server):
    admitted = admit(site, server, index=2)
    message = admitted.message
    assert bytes.fromhex(message["secret_in"]) == admitted.secrets["c2s"]
    assert bytes.fromhex(message["secret_out"]) == admitted.secrets["s2c"]
    assert message["secret_in"] != message["secret_out"]
    admitted.sock.sendall(b"frames")
    assert server.workers.sockets[admitted.number].recv(100) == b"frames"
    assert (admitted.welcome.index, admitted.welcome.connections, admitted.welcome.cipher) == (2, 4, "aes-256-gcm")
    assert [str(admitted.welcome.ipv4), admitted.welcome.ipv6] == ["10.86.0.2/24", None]
    # Until its first authentic frame nobody is told of the session.
    assert not server.workers.told("session")
    establish(server, admitted.number)
    assert [message["workers"] for message in server.workers.told("session")] == [[0], [0]]


def test_the_smaller_wish_counts(site, start):
    server = start(connections=3, frame_size="256K")
    welcome = admit(site, server, connections=2, frame_size=1 << 19).welcome
    assert (welcome.connections, welcome.frame_size) == (2, 1 << 18)
    welcome = admit(site, server, "bob", connections=64, frame_size=1 << 17).welcome
    assert (welcome.connections, welcome.frame_size) == (3, 1 << 17)


@pytest.mark.parametrize(("wish", "agreed"), [((1 << 20, 60), (1 << 20, 60)), ((1 << 36, 86400), (1 << 30, 900))])
def test_keys_are_used_no_longer_than_either_end_wants(site, start, wish, agreed):
    server = start(rekey_bytes="1G")
    admitted = admit(site, server, rekey_bytes=wish[0], rekey_interval=wish[1])
    settings = admitted.message["settings"]
    assert (admitted.welcome.rekey_bytes, admitted.welcome.rekey_interval) == agreed
    assert (settings["rekey_bytes"], settings["rekey_interval"]) == agreed


def test_what_is_pushed_besides_the_addresses(site, start):
    server = start(routes=["192.168.7.0/24", "fd00:7::/64"], dns=["10.86.0.1"], dns_search=["example.org", "test"])
    welcome = admit(site, server).welcome
    assert [str(network) for network in welcome.routes] == ["192.168.7.0/24", "fd00:7::/64"]
    assert [str(address) for address in welcome.dns] == ["10.86.0.1"]
    assert welcome.dns_search == ("example.org", "test")


def test_nothing_is_pushed_unasked(site, server):
    welcome = admit(site, server).welcome
    assert (welcome.routes, welcome.dns, welcome.dns_search) == ((), (), ())


def test_a_client_with_an_address_and_a_network_of_its_own(site, start):
    server = start(clients=FIXED, routes=["192.168.0.0/16", "192.168.7.0/24", "192.168.7.128/25", "fd07::/64"])
    alice, bob, carol = (live(site, server, name) for name in ("alice", "bob", "carol"))
    assert [str(one.welcome.ipv4) for one in (alice, bob, carol)] == ["10.86.0.77/24", "10.86.0.2/24", "10.86.0.3/24"]
    # Workers learn of the networks with every connection and every session.
    networks = [["192.168.7.0/24"], ["fd07::/64", "192.168.8.0/24"], []]
    for kind in ("attach", "session"):
        told = {message["session"]: message["networks"] for message in server.workers.told(kind)}
        assert list(told.values()) == networks
    assert [one["networks"] for one in server.status({})["sessions"]] == networks
    # A client is not told to look in the tunnel for what is behind itself.
    pushed = [[str(route) for route in one.welcome.routes] for one in (alice, bob, carol)]
    assert pushed == [
        ["192.168.0.0/16", "fd07::/64"],
        ["192.168.0.0/16", "192.168.7.0/24", "192.168.7.128/25"],
        ["192.168.0.0/16", "192.168.7.0/24", "192.168.7.128/25", "fd07::/64"],
    ]


def test_the_first_of_parallel_sessions_has_what_is_fixed(site, start):
    server = start(clients=FIXED, second_login="parallel")
    first, second = live(site, server), live(site, server)
    assert [str(one.welcome.ipv4.ip) for one in (first, second)] == ["10.86.0.77", "10.86.0.2"]
    assert [message["networks"] for message in server.workers.told("attach")] == [["192.168.7.0/24"], []]


def test_where_no_client_may_send(start):
    server = start(pool_ipv6="fd86::/64", clients=FIXED)
    server.worker_ready(1)
    assert server.workers.sent == [(1, {
        "type": "isolate",
        "networks": ["10.86.0.0/24", "fd86::/64", "192.168.7.0/24", "fd07::/64", "192.168.8.0/24"],
        "exempt": ["10.86.0.1", "fd86::1"],
    })]
    server = start(client_to_client="yes", clients=FIXED)
    server.worker_ready(1)
    assert not server.workers.sent


def test_the_device_gets_the_first_addresses(start):
    server = start(pool_ipv6="fd86::/64")
    assert server.link.calls == [("addresses", "bulk0", ["10.86.0.1/24", "fd86::1/64"])]


def test_the_device_of_a_crashed_run_may_take_a_moment_to_go(start, monkeypatch):
    server = start()
    applied = []
    monkeypatch.setattr(server_module.gateway, "apply", lambda *arguments: applied.append(arguments[2]))
    server.link.taken, server.link.led = 3, 2
    server.prepare()
    assert applied == ["bulk0"]
    monkeypatch.setattr(server_module, "CRASH_SECONDS", 0.1)
    for what in ("taken", "led"):
        setattr(server.link, what, 10**6)
        with pytest.raises(server.link.LinkError):
            server.prepare()
        setattr(server.link, what, 0)
    assert applied == ["bulk0"]


def test_without_ipv6_clients_get_ipv4_alone(site, start, monkeypatch, caplog):
    monkeypatch.setattr(server_module.gateway, "apply", lambda *arguments: None)
    server = start(pool_ipv6="fd86::/64")
    server.prepare()
    assert admit(site, server).welcome.ipv6 and not caplog.messages
    server = start(pool_ipv6="fd86::/64")
    server.link.ipv6 = False
    server.prepare()
    (line,) = caplog.messages
    assert line.startswith("pool-ipv6 = fd86::/64: this machine has no IPv6, so clients get IPv4 alone; take it out")
    assert [str(one) for one in server._pool.server_interfaces] == ["10.86.0.1/24"]


def test_a_pool_of_ipv6_alone_needs_it(start):
    server = start(pool_ipv4=None, pool_ipv6="fd86::/64")
    server.link.ipv6 = False
    with pytest.raises(server.link.LinkError, match="fd86::/64: this machine has no IPv6; give a pool-ipv4"):
        server.prepare()


def test_parts_of_a_pool_that_others_have_are_one_line(start, monkeypatch, caplog):
    monkeypatch.setattr(server_module.gateway, "apply", lambda *arguments: None)
    server = start(pool_ipv6="fd86::/64")
    server.prepare()
    assert "not all of it leads" not in caplog.text
    server.link.parts = [(ipaddress.ip_network(f"10.86.0.{16 * number}/28"), f"eth{number}") for number in range(1, 6)]
    server.prepare()
    (line,) = [line for line in caplog.messages if "not all of it leads" in line]
    assert line.startswith("pool-ipv4 = 10.86.0.0/24: ") and "eth1 has 10.86.0.16/28" in line and "and 2 more" in line


def test_join_goes_to_the_next_worker_with_keys_of_its_own(site, server):
    first = live(site, server)
    second = live(site, server, joins=first.welcome, index=1)
    assert second.welcome.session == first.welcome.session and second.welcome.ipv4 == first.welcome.ipv4
    assert {first.message["secret_in"], first.message["secret_out"]}.isdisjoint(
        {second.message["secret_in"], second.message["secret_out"]}
    )
    attached = [(index, message["session"]) for index, message in server.workers.sent if message["type"] == "attach"]
    assert attached == [(0, 1), (1, 1)]
    assert server.workers.told("session")[-1]["workers"] == [0, 1]


def test_a_worker_is_told_that_a_connection_replaces_another(site, server):
    first = live(site, server)
    assert not first.message["replaces"]
    assert live(site, server, joins=first.welcome, replaces=True).message["replaces"]
