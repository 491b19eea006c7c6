"""A file of a configuration: every error says where, what and how to mend it, on one line, and never shows a key."""

import re

import pytest
from examples import CERTIFICATE, CLIENT, KEY, SECRET, SERVER, TEXT, load, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bulkvpnd import config


def test_a_file_from_elsewhere_may_have_other_line_ends(file):
    for end in ("\r\n", "\r"):
        assert load(file(SERVER.replace("\n", end).encode())).ca == load(file(SERVER)).ca


def test_inline_blocks(file):
    bundle = f"{CERTIFICATE}\n{CERTIFICATE}"
    server = load(file(f"{SERVER.partition('ca =')[0]}<ca>\n{bundle}</ca>\n<certificate>\n{CERTIFICATE}</certificate>\n"
                       f"  <key>  \n{KEY}  </key>  \n"))  # fmt: skip
    assert server.ca == (None, bundle)
    assert [config.pem_text(server, name) for name in ("ca", "certificate", "key")] == [bundle, CERTIFICATE, KEY]
    assert SECRET not in repr(server)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mtu", ":1: mtu: not understood; write key = value"),
        ("\n\nmtu 1500", ":3: mtu 1500: not understood; write key = value"),
        ("[server]", ":1: [server]: not understood"),
        ("mtu = x", ":1: mtu = x: should be a whole number of bytes from 1280 to 65521"),
        ("mtu = 1279", ":1: mtu = 1279: should be"),
        ("mtu =", ":1: mtu = : should be"),
        ("mtu = --", ":1: mtu = --: should be"),
        ("routes = 10.0.0.0/8\nroutes = --", ":2: routes = --: should be"),
        ("mtu = 1500 # comment", ":1: mtu = 1500 # comment: should be"),
        ("mtu = 1500 \x1b[2J", r":1: mtu = 1500 \x1b[2J: should be"),
        ("mtu = 15\u202e00", r":1: mtu = 15\u202e00: should be"),
        ("mtu = " + "9" * 1000, ":1: mtu = " + "9" * 61 + "...: should be"),
        ("mtuu = 1500", ":1: mtuu: unknown option; did you mean mtu?"),
        ("Mode = server", ":1: Mode: unknown option; did you mean mode?"),
        ("whatever\x07 = 1500", r":1: whatever\x07: unknown option; see bulkvpn.conf(5)"),
        ("config = /etc/passwd", ":1: config: unknown option"),
        ("check = yes", ":1: check: unknown option"),
        ("= 3", ":1: : unknown option"),
        ("mtu = 1500\n\nmtu = 1500", ":3: mtu: given twice, first on line 1; keep one of them"),
        ("max-handshakes = 9:8", ":1: max-handshakes = 9:8: should be START:RATE:FULL, connections, percent"),
        ("mode = both", ":1: mode = both: should be one of: server, client"),
        ("offload = true", ":1: offload = true: should be yes or no"),
        ("workers = many", ":1: workers = many: should be auto, or a whole number of processes from 1 to 64"),
        ("frame-size = 1T", ":1: frame-size = 1T: should be a number of bytes from 131072 to 1048576; K, M or G"),
        ("rekey-interval = 2w", ":1: rekey-interval = 2w: should be a number of seconds"),
        ("pool-ipv4 = 10.9.0.1/24", ":1: pool-ipv4 = 10.9.0.1/24: should be an IPv4 network with no host bits set"),
        ("pool-ipv6 = 10.9.0.0/24", ":1: pool-ipv6 = 10.9.0.0/24: should be an IPv6 network"),
        ("routes = 10.9.0.1/24", ":1: routes = 10.9.0.1/24: should be a network with no host bits set, /8 or smaller"),
        ("routes = 10.9.0.0", ":1: routes = 10.9.0.0: should be a network"),
        ("routes = 10.9.0.0/24\nroutes = ::/0", ":2: routes = ::/0: should be a network"),
        ("routes = 10.9.0.0/24\n" * 257, ":257: routes: given 257 times; at most 256 are allowed"),
        ("accept-routes = all", ":1: accept-routes = all: should be private, none, or a network with no host bits set"),
        ("accept-routes = none\naccept-routes = 10.0.0.1/8", ":2: accept-routes = 10.0.0.1/8: should be private, none"),
        ("local-networks = 192.168.1.1", ":1: local-networks = 192.168.1.1: should be a network with no host bits"),
        ("local-networks = ff02::/16", ":1: local-networks = ff02::/16: should be a network"),
        (CLIENT + "kill-switch = yes", ": kill-switch = yes: without a full tunnel it would"),
        (SERVER + "redirect-gateway = yes", ":6: redirect-gateway: is for mode = client, and this is mode = server"),
        ("dns = ::1", ":1: dns = ::1: should be the IP address of a name server"),
        ("dns = localhost", ":1: dns = localhost: should be the IP address of a name server"),
        ("dns = 10.9.0.1\n" * 9, ":9: dns: given 9 times; at most 8 are allowed"),
        ("dns-search = a_b", ":1: dns-search = a_b: should be a domain name of letters, digits, hyphens and dots"),
        ("device = a/b", ":1: device = a/b: should be an interface name"),
        ("runtime-directory = run", ":1: runtime-directory = run: should be an absolute path"),
        ("listen = a\nlisten = 2001:db8::1", ":2: listen = 2001:db8::1: should be HOST[:PORT], with an IPv6 address"),
        ("remote = a:0", ":1: remote = a:0: should be HOST[:PORT]"),
        ("ca = a\0b", ":1: ca = a\\x00b: should be the path of a PEM file"),
        ("<mtu>\n1500\n</mtu>", ":1: mtu = 1500\\n: should be"),
        ("<ca>\nx", ":1: <ca>: never closed; end the block with a line </ca>"),
        ("<cha>\nx\n</cha>", ":1: cha: unknown option; did you mean ca?"),
        ("<ca>\nx\ny\n</ca>", ":1: ca = x\\ny\\n: should be the path of a PEM file, or PEM text"),
        ("<ca>\n-----BEGIN X-----\n!\n-----END X-----\n</ca>", ": should be PEM text, from -----BEGIN to -----END"),
        (f"ca = x\n<ca>\n{CERTIFICATE}</ca>", ":2: ca: given twice, first on line 1"),
        ("mtu = 1500", ": mode: missing; write mode = server or mode = client"),
        (CLIENT.replace("remote = a\n", ""), ": remote: missing; mode = client needs it"),
        (CLIENT.replace("key = own.key\n", ""), ": key: missing; mode = client needs it"),
        (SERVER.replace("ca = ca.crt\n", ""), ": ca: missing; mode = server needs it"),
        (SERVER.replace("pool-ipv4 = 10.9.0.0/24\n", ""), ": pool-ipv4: missing; give pool-ipv4, pool-ipv6 or both"),
        (SERVER + "remote = a", ":6: remote: is for mode = client, and this is mode = server; take it out"),
        (CLIENT + "grace = 5", ":6: grace: is for mode = server, and this is mode = client; take it out"),
        ("multipath = 10.2.0.1/16", ":1: multipath = 10.2.0.1/16: should be PREFIX [weight 1 to 255]"),
        ("multipath = 10.2.0.0/16 weight 0", ":1: multipath = 10.2.0.0/16 weight 0: should be PREFIX"),
        (CLIENT + "multipath = 10.2.0.0/16\nmultipath = 10.2.0.0/16 weight 2", ":7: multipath = 10.2.0.0/16: given tw"),
        (SERVER + "multipath = 10.9.0.0/24", ":6: multipath = 10.9.0.0/24: is inside pool-ipv4 = 10.9.0.0/24, which"),
        (SERVER + "multipath = 10.2.0.0/16\n" * 65, ":70: multipath: given 65 times; at most 64 are allowed"),
        (SERVER + "keepalive = 20", ": keepalive-timeout = 20: should be longer than keepalive = 20"),
    ],
)
def test_an_error_says_where_what_and_how_to_mend_it(file, text, expected):
    path = file(text)
    message = refused(load, path)
    assert message.startswith(str(path)) and expected in message, message


NARROW = KEY.replace("END", "ND").replace(SECRET, "\n".join(re.findall(".{1,20}", SECRET)))[: -len(SECRET)]
"""A key in lines too short to be taken for one, without its end."""


@pytest.mark.parametrize(
    "text",
    [
        f"key = {KEY}",
        f"key {KEY}",
        KEY,
        KEY.replace("-----BEGIN PRIVATE KEY-----", "#"),
        f"# <key>\n# -----BEGIN\n{SECRET}==\n",
        f"<key>\n{SECRET}\n</key>",
        f"<key>\n{KEY}",
        f"<key>\n{KEY.replace('END', 'ND')}</key>",
        f"<key>\n{NARROW}\n</key>",
        f"<ca>\n{NARROW}\n</ca>",
        f"<kye>\n{KEY}</kye>",
        f"<ca>\n{SECRET}\n</ca>",
        f"<ca>\n{KEY.replace('END', 'ND')}</ca>",
        f"key = {SECRET}\n{SERVER}",
        SERVER.replace("key = own.key", f"<key>\n{KEY}</key>\nkey = {SECRET}"),
    ],
    ids=lambda text: text[:16],
)
def test_no_error_shows_a_key(file, text):
    refused(load, file(text))


LINES = st.lists(
    st.text(max_size=40)
    | st.builds("{} = {}".format, st.sampled_from([*config.BY_NAME, "nope"]), TEXT)
    | st.sampled_from((SERVER + CLIENT + KEY).splitlines() + ["<ca>", "</ca>", "<key>", "</key>"]),
    max_size=12,
)


@given(LINES)
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_a_configuration_or_a_one_line_error(file, lines):
    path = file("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        load(path)
    except config.ConfigurationError as error:
        assert str(error).isprintable() and str(error).startswith(str(path)) and len(str(error)) < 600
        assert SECRET[:8] not in str(error)
        assert not error.on_command_line
