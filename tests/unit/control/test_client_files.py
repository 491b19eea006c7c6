"""control.clients: the files of NAME.clients.d, and every way in which they can be wrong."""

import ipaddress
import os
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bulkvpnd import config
from bulkvpnd.control import clients

POOLS = {"pool_ipv4": ipaddress.ip_network("10.86.0.0/24"), "pool_ipv6": ipaddress.ip_network("fd86::/64")}


@pytest.fixture
def load(tmp_path):
    """Writes files and reads them: load({name: text}, **changes of the configuration)."""
    directory = tmp_path / "server.clients.d"

    def write_and_load(files, **changes):
        directory.mkdir(exist_ok=True)
        for old in directory.iterdir():
            old.unlink()
        for name, text in files.items():
            (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        fields = {"mode": "server", "name": "server", "path": tmp_path / "server.conf", **POOLS, **changes}
        return clients.load(types.SimpleNamespace(**fields))

    write_and_load.directory = directory
    return write_and_load


def again(load):
    """Reads what is there."""
    path = load.directory.parent / "server.conf"
    return clients.load(types.SimpleNamespace(mode="server", name="server", path=path, **POOLS))


def refused(load, text, **changes):
    with pytest.raises(config.ConfigurationError) as caught:
        load(text if isinstance(text, dict) else {"a.conf": text}, **changes)
    assert not caught.value.on_command_line
    return str(caught.value)


def test_sections_of_all_files_in_order(load):
    found = load({
        "b.conf": "[client warehouse]\nnetworks = 192.168.7.0/24\n\n# x\n  networks=fd00:7::/64\nipv4 = 10.86.0.10\n",
        "a.conf": "; first\n[client  laptop]\r\nipv6 = fd86::a:b\r\n[client plain]\n",
        "c.conf~": "nonsense", "notes": "nonsense", "empty.conf": "",
    })  # fmt: skip
    assert [(one.name, one.addresses, tuple(map(str, one.networks))) for one in found] == [
        ("laptop", {6: ipaddress.ip_address("fd86::a:b")}, ()),
        ("plain", {}, ()),
        ("warehouse", {4: ipaddress.ip_address("10.86.0.10")}, ("192.168.7.0/24", "fd00:7::/64")),
    ]


def test_no_directory_is_no_client(load):
    assert load({}) == ()
    load.directory.rmdir()
    assert again(load) == ()


def test_a_client_has_no_clients(load):
    assert load({"a.conf": "nonsense"}, mode="client") == ()


A, B = "[client a]\n", "[client b]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (A + "ipv4", ":2: ipv4: not understood; write [client NAME], and below it key = value"),
        ("[server a]", ":1: [server a]: not understood"),
        ("[client]", ":1: [client]: not understood"),
        ("[client a b]", ":1: [client a b]: not understood"),
        ("[client a] # x", ":1: [client a] # x: not understood"),
        ("[client a]x = 1", ":1: [client a]x = 1: not understood"),
        ("[client ../a]", ":1: client = ../a: should be a name of 1 to 64 letters, digits"),
        ("ipv4 = 10.86.0.9", ":1: ipv4: stands before the first section; write [client NAME] above it"),
        (A + "ipv5 = 1", ":2: ipv5: unknown; there are: ipv4, ipv6, networks"),
        (A + "\x1b[2J = 1", r":2: \x1b[2J: unknown"),
        (A + "= 1", ":2: : unknown"),
        (A + "ipv4 = fd86::9", ":2: ipv4 = fd86::9: should be an IPv4 address of the pool"),
        (A + "ipv4 = 10.86.0.9/24", ":2: ipv4 = 10.86.0.9/24: should be an IPv4 address"),
        (A + "ipv6 = 10.86.0.9", ":2: ipv6 = 10.86.0.9: should be an IPv6 address"),
        (A + "ipv6 = fd86::9%1", ":2: ipv6 = fd86::9%1: should be an IPv6 address"),
        (A + "ipv4 = \x1b[2J", r":2: ipv4 = \x1b[2J: should be"),
        (A + "ipv4 = 10.86.1.9", ":2: ipv4 = 10.86.1.9: should be an address of pool-ipv4 = 10.86.0.0/24, and "
         "not its first (10.86.0.1 is the server's) or last"),
        (A + "ipv4 = 10.86.0.0", ":2: ipv4 = 10.86.0.0: should be an address of pool-ipv4"),
        (A + "ipv4 = 10.86.0.1", ":2: ipv4 = 10.86.0.1: should be an address of pool-ipv4"),
        (A + "ipv4 = 10.86.0.255", ":2: ipv4 = 10.86.0.255: should be an address of pool-ipv4"),
        (A + "ipv6 = fd86::", ":2: ipv6 = fd86::: should be an address of pool-ipv6 = fd86::/64, and not its "
         "first (fd86::1 is the server's)"),
        (A + "ipv6 = fd86::1", ":2: ipv6 = fd86::1: should be an address of pool-ipv6"),
        (A + "ipv6 = fd87::9", ":2: ipv6 = fd87::9: should be an address of pool-ipv6"),
        (A + "networks = 192.168.7.1/24", ":2: networks = 192.168.7.1/24: should be a network with no host bits"),
        (A + "networks = 192.168.7.0", ":2: networks = 192.168.7.0: should be a network with its length"),
        (A + "networks = 0.0.0.0/0", ":2: networks = 0.0.0.0/0: should be a network"),
        (A + "networks = fe80::/64", ":2: networks = fe80::/64: should be a network"),
        (A + "networks = 192.168.7.0/24, 192.168.8.0/24", ":2: networks = 192.168.7.0/24, 192.168.8.0/24: should"),
        (A + "networks = 10.86.0.128/25", ":2: networks = 10.86.0.128/25: overlaps pool-ipv4 = 10.86.0.0/24; give "),
        (A + "networks = 10.0.0.0/8", ":2: networks = 10.0.0.0/8: overlaps pool-ipv4 = 10.86.0.0/24"),
        (A + "networks = fd86::9/128", ":2: networks = fd86::9/128: overlaps pool-ipv6 = fd86::/64"),
        (A + "[client b]\n[client a]", ":3: [client a]: given twice, first at {file}:1; keep one of them"),
        (A + "ipv4 = 10.86.0.9\nipv4 = 10.86.0.8", ":3: ipv4: given twice, first at {file}:2; keep one of them"),
        (A + "ipv4 = 10.86.0.9\n" + B + "ipv4 = 10.86.0.9", ":4: ipv4 = 10.86.0.9: given twice, first at "
         "{file}:2; keep one of them"),
        (A + "ipv6 = fd86::9\n" + B + "ipv6 = fd86:0::0:9", ":4: ipv6 = fd86::9: given twice"),
        (A + "networks = 192.168.7.0/24\nnetworks = 192.168.7.0/24", ":3: networks = 192.168.7.0/24: overlaps "
         "192.168.7.0/24 of a at {file}:2; a network"),
        (A + "networks = 192.168.7.0/25\n" + B + "networks = 192.168.0.0/16", ":4: networks = 192.168.0.0/16: "
         "overlaps 192.168.7.0/25 of a"),
        (A + "networks = fd00::/16\n" + B + "networks = 192.168.0.0/16\nnetworks = fd00:0:7::/48",
         ":5: networks = fd00:0:7::/48: overlaps fd00::/16 of a at {file}:2"),
    ],
)  # fmt: skip
def test_what_is_wrong_says_where_what_and_how_to_mend_it(load, text, expected):
    message = refused(load, text)
    file = load.directory / "a.conf"
    assert message.startswith(f"{file}{expected.format(file=file)}"), message
    assert message.isprintable()


def test_across_files(load):
    message = refused(load, {"b.conf": "[client a]\n", "a.conf": "[client a]\n"})
    assert message == (f"{load.directory}/b.conf:1: [client a]: given twice, first at {load.directory}/a.conf:1; "
                       "keep one of them")


@pytest.mark.parametrize("key, value", [("ipv4", "10.86.0.9"), ("ipv6", "fd86::9")])
def test_an_address_without_its_pool(load, key, value):
    message = refused(load, f"[client a]\n{key} = {value}", **{f"pool_{key}": None})
    assert message.endswith(f":2: {key} = {value}: there is no pool-{key}; give one, or take this line out")


def test_a_network_may_be_of_a_version_that_has_no_pool(load):
    assert load({"a.conf": "[client a]\nnetworks = fd86::/64"}, pool_ipv6=None)[0].networks


def test_how_many_networks_there_may_be(load):
    lines = [f"networks = 172.16.{at // 256}.{at % 256}/32" for at in range(clients.NETWORKS_MAX + 1)]
    assert len(load({"a.conf": "[client a]\n" + "\n".join(lines[:-1])})[0].networks) == clients.NETWORKS_MAX
    message = refused(load, "[client a]\n" + "\n".join(lines))
    assert f":{clients.NETWORKS_MAX + 2}: networks = 172.16.4.0/32: is one too many; at most 1024" in message


def test_files_that_cannot_be_used(load):
    assert "a.conf: is not UTF-8 text" in refused(load, b"\xff\xfe")
    size = config.MAX_FILE_SIZE
    assert load({"a.conf": "#" * size}) == ()
    assert f"a.conf: has more than {size} bytes" in refused(load, "#" * (size + 1))
    load({})
    os.mkfifo(load.directory / "p.conf")
    with pytest.raises(config.ConfigurationError, match="p.conf: is not a regular file"):
        again(load)
    (load.directory / "p.conf").unlink()
    (load.directory / "gone.conf").symlink_to("nowhere")
    with pytest.raises(config.ConfigurationError, match="gone.conf: cannot be read: No such file or directory; "):
        again(load)


def test_what_stands_in_place_of_the_directory(load, tmp_path):
    (tmp_path / "server.clients.d").write_text("")
    with pytest.raises(config.ConfigurationError, match="server.clients.d: cannot be read: Not a directory; "):
        again(load)


# Anything at all.

NETWORK = st.builds(
    lambda bits, length: str(ipaddress.ip_network(((192 << 24) | (bits << 16), length), strict=False)),
    st.integers(0, 15), st.integers(8, 24),
)  # fmt: skip


@given(st.lists(NETWORK, max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_networks_are_taken_exactly_when_none_overlaps_another(load, networks):
    values = list(map(ipaddress.ip_network, networks))
    overlap = any(a.overlaps(b) for at, a in enumerate(values) for b in values[:at])
    text = "".join(f"[client c{at}]\nnetworks = {network}\n" for at, network in enumerate(networks))
    try:
        assert len(load({"a.conf": text})) == len(networks)
        assert not overlap
    except config.ConfigurationError as error:
        assert overlap and "overlaps" in str(error)


LINE = (
    st.text(max_size=40)
    | st.builds("{} = {}".format, st.sampled_from([*clients.KEYS, "nope"]), st.text("0123456789abcdf.:/ ", max_size=20))
    | st.sampled_from(["[client a]", "[client b]", "ipv4 = 10.86.0.9", "ipv6 = fd86::9", "networks = 192.168.7.0/24"])
)


@given(st.lists(LINE, max_size=10))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_taken_or_a_one_line_error(load, lines):
    try:
        found = load({"a.conf": "\n".join(lines)})
    except config.ConfigurationError as error:
        assert str(error).isprintable() and str(error).startswith(str(load.directory)) and len(str(error)) < 600
        return
    for client in found:
        assert config.NAME.fullmatch(client.name)
        assert all(address in POOLS[f"pool_ipv{version}"] for version, address in client.addresses.items())
