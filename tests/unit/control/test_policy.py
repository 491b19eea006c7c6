"""Which pushed routes a client takes, and how routes are led around the server."""

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bulkvpnd import config
from bulkvpnd.control import policy

network, address = ipaddress.ip_network, ipaddress.ip_address
EVERYTHING = (network("0.0.0.0/0"), network("::/0"))


@st.composite
def networks(draw):
    version = draw(st.sampled_from((4, 6)))
    bits = {4: 32, 6: 128}[version]
    # Few beginnings, so that some overlap; and everything, which a default route is, often enough.
    value = draw(st.integers(0, 3)) << bits - 2 | draw(st.just(0) | st.integers(0, (1 << bits - 2) - 1))
    length = draw(st.just(0) | st.integers(0, bits))
    cls = {4: ipaddress.IPv4Network, 6: ipaddress.IPv6Network}[version]
    return cls((value, length), strict=False)


@st.composite
def networks_and_addresses(draw):
    some = draw(st.lists(networks(), max_size=6))
    inside = [one[draw(st.integers(0, one.num_addresses - 1))] for one in some]
    return some, draw(st.lists(st.sampled_from(inside), max_size=4)) if inside else []


@pytest.mark.parametrize(
    ("pushed", "allowed", "servers", "connected", "why"),
    [
        ("10.1.0.0/16", config.PRIVATE, [], [], None),
        ("fd00:1::/64", config.PRIVATE, [], [], None),
        ("10.1.0.0/16", config.PRIVATE, ["192.0.2.1"], ["192.0.2.0/24", "fd00::/8"], None),
        ("203.0.113.0/24", config.PRIVATE, [], [], "not in accept-routes"),
        ("2001:db8::/32", config.PRIVATE, [], [], "not in accept-routes"),
        ("10.0.0.0/8", (network("10.1.0.0/16"),), [], [], "not in accept-routes"),
        ("10.1.0.0/16", (), [], [], "not in accept-routes"),
        ("0.0.0.0/0", EVERYTHING, [], [], "a default route is only taken"),
        ("::/0", EVERYTHING, [], [], "a default route is only taken"),
        ("10.1.0.0/16", config.PRIVATE, ["10.1.2.3"], [], "it covers the server's address 10.1.2.3"),
        ("fd00::/16", config.PRIVATE, ["10.1.2.3", "fd00::7"], [], "it covers the server's address fd00::7"),
        # The network of the place where the client is: it, more than it, a part of it.
        ("192.168.1.0/24", config.PRIVATE, [], ["192.168.1.0/24"], "overlaps 192.168.1.0/24, which"),
        ("192.168.0.0/16", config.PRIVATE, [], ["192.168.1.0/24"], "overlaps 192.168.1.0/24, which"),
        ("192.168.1.128/25", config.PRIVATE, [], ["192.168.1.0/24"], "overlaps 192.168.1.0/24, which"),
    ],
)
def test_a_pushed_route(pushed, allowed, servers, connected, why):
    taken, refused = policy.accept_routes([network(pushed)], allowed, [*map(address, servers)],
                                          [*map(network, connected)])
    assert taken == ([] if why else [network(pushed)])
    assert (why in refused[network(pushed)]) if why else refused == {}


@given(networks_and_addresses(), st.lists(networks(), max_size=3), st.lists(networks(), max_size=3))
@example(([network("0.0.0.0/0")], []), list(EVERYTHING), [])
def test_what_is_taken_is_allowed_and_spares_what_it_must(pushed_and_servers, allowed, connected):
    pushed, servers = pushed_and_servers
    taken, refused = policy.accept_routes(pushed, allowed, servers, connected)
    assert set(taken) | set(refused) == set(pushed) and not set(taken) & set(refused)
    for one in taken:
        assert one.prefixlen > 0
        assert any(one.version == other.version and one.subnet_of(other) for other in allowed)
        assert not any(server in one for server in servers)
        assert not any(one.version == other.version and one.overlaps(other) for other in connected)


@given(networks_and_addresses())
def test_around_leaves_out_the_addresses_and_nothing_else(given_):
    some, servers = given_
    left = policy.around(some, servers)
    assert not any(server in one for one in left for server in servers)
    for version in (4, 6):
        whole = ipaddress.collapse_addresses(one for one in some if one.version == version)
        alone = {network(server) for server in servers if server.version == version}
        rest = ipaddress.collapse_addresses(one for one in left if one.version == version)
        missing = {server for server in alone if any(server.subnet_of(one) for one in some if one.version == version)}
        assert sum(one.num_addresses for one in whole) - len(missing) == sum(one.num_addresses for one in rest)


def test_around_takes_no_more_routes_than_bits():
    assert len(policy.around([network("198.51.100.0/24")], [address("198.51.100.7")])) == 8
    assert policy.around([network("198.51.100.0/24")], [address("203.0.113.1"), address("::1")]) == [
        network("198.51.100.0/24")
    ]
