"""bulkvpnd.config.values: what each kind of value takes and refuses."""

import ipaddress
import pathlib

import pytest

from bulkvpnd.config import values


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (values.endpoint,
         {"a": ("a", 7443), "*:1": ("*", 1), "[::]": ("::", 7443), "[fe80::1%eth0]:65535": ("fe80::1%eth0", 65535)},
         ["", ":1", "a:", "a:65536", "a:0", "[a]", "[::1", "::1", "a b", "a\n", "[1.2.3.4]", "ä", "a:١"]),
        (values.duration(1, 100000), {"1": 1, "5s": 5, "2 m": 120, "1h": 3600, "1d": 86400},
         ["0", "-1", "2d", "1.5", "1ms", "m", "١"]),
        (values.size(1, 1 << 30), {"1": 1, "2K": 2048, "1M": 1 << 20, "1G": 1 << 30}, ["0", "2G", "1k", "1KB", "K"]),
        (values.early_drop, {"64:30:256": (64, 30, 256), "7": (7, 100, 7), "1:1:1": (1, 1, 1), "9:100:10000":
                             (9, 100, 10000)},
         ["", "0", "10001", "5:30:4", "0:30:4", "5:0:6", "5:101:6", "5:30:10001", "5:30", "5::6", "5:30:6:7", "-1",
          "5 :30:6", "5:30:6\n", "١"]),
        (values.boolean, {"yes": True, "no": False}, ["", "YES", "1"]),
        (values.or_auto(values.integer(1, 9)), {"auto": None, "9": 9}, ["Auto", "10", "9\n", " 9", "+9", "9" * 99]),
        (values.device_name, {"bulk%d": "bulk%d", "a" * 15: "a" * 15, "a" * 13 + "%d": "a" * 13 + "%d"},
         ["", ".", "..", "a/b", "a b", "%d", "a%d%d", "a%s", "a" * 16, "a" * 14 + "%d"]),
        (values.certificate_name, {"A.b_c-9": "A.b_c-9"}, ["", "a b", "a\n", "a" * 65]),
        (values.path, {"/a": pathlib.Path("/a")}, ["", "a", "/a\0"]),
        (values.multipath,
         {"10.2.0.0/16": values.Multipath(ipaddress.ip_network("10.2.0.0/16"), 1, None),
          "fd02::/48  weight 255": values.Multipath(ipaddress.ip_network("fd02::/48"), 255, None),
          "10.2.0.0/16 weight 3 source 10.1.0.1":
              values.Multipath(ipaddress.ip_network("10.2.0.0/16"), 3, ipaddress.ip_address("10.1.0.1"))},
         ["", "10.2.0.0", "10.2.0.0/33", "10.2.0.0/16 3", "10.2.0.0/16 weight", "10.2.0.0/16 weight 256",
          "10.2.0.0/16 weight -1", "10.2.0.0/16 weight ١", "10.2.0.0/16 source fd02::1", "10.2.0.0/16 source x",
          "10.2.0.0/16 source 10.1.0.1 weight 1", "224.0.0.0/4", "127.0.0.0/8", "fe80::/64", "10.2.0.0/16\n"]),
        (values.network(4, 30), {"10.0.0.0/8": ipaddress.ip_network("10.0.0.0/8")},
         ["10.0.0.0/31", "10.0.0.0", "0.0.0.0/0", "224.0.0.0/8", "127.0.0.0/8", "10.0.0.1/8", "fd00::/64"]),
        (values.network(6, 126), {"fd00::/8": ipaddress.ip_network("fd00::/8")}, ["fd00::/127", "::/0", "ff00::/8"]),
    ],
)  # fmt: skip
def test_kinds_of_values(parse, good, bad):
    assert {raw: parse(raw) for raw in good} == good
    for raw in bad:
        with pytest.raises(ValueError, match="."):
            parse(raw)


@pytest.mark.parametrize(
    ("raw", "value"),
    [("127.0.0.1:9743", ("127.0.0.1", 9743)), ("[::1]:1", ("::1", 1)), ("0.0.0.0:65535", ("0.0.0.0", 65535))],
)
def test_a_socket_address(raw, value):
    assert values.socket_address(raw) == value


@pytest.mark.parametrize(
    "raw", ["", ":1", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "::1:9743", "[::1]", "localhost:1", "1.2.3:4",
            "[x]:1", "127.0.0.1:9743x", "[fe80::1%eth0]:1"]
)  # fmt: skip
def test_what_is_no_socket_address(raw):
    with pytest.raises(ValueError, match="for example 127.0.0.1:9743"):
        values.socket_address(raw)
