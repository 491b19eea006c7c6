"""bulkvpnctl import-openvpn: what a configuration of OpenVPN becomes here, and what is said of the rest."""

import io
import os
import re
import stat

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bulkvpnd import config
from bulkvpnd.admin import openvpn


def carried(text):
    """(settings with one value each, where there is one; [(line, name)] of the notes)."""
    found = openvpn.carry(openvpn.parse(text))
    settings = {name: value[0] if len(value) == 1 else value for name, value in found.settings.items()}
    return settings, [(line, name) for line, name, _ in found.notes]


def why(text):
    return [reason for _, _, reason in openvpn.carry(openvpn.parse(text)).notes]


# What OpenVPN reads


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []), ("  # a comment", []), ("; too", []), ("dev tun", ["dev", "tun"]), ("dev tun # why", ["dev", "tun"]),
        ("push \"route 10.0.0.0 255.0.0.0\"", ["push", "route 10.0.0.0 255.0.0.0"]), ("a 'b \\ c'", ["a", "b \\ c"]),
        ('a "b \\"c\\" d"', ["a", 'b "c" d']), (r"a b\ c", ["a", "b c"]), ("a b#c", ["a", "b#c"]),
        ('a ""', ["a", ""]), ("a b'c'\"d\"", ["a", "bcd"]),
    ],
)  # fmt: skip
def test_words_are_those_of_openvpn(line, words):
    assert openvpn.split(1, line) == words


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('dev tun\npush "x', 2), ("a 'b", 1), ("a \\", 1), ("<ca>\nx", 1), ("dev tun\n\n<key>\n</ca>\n", 3),
        ("a" * 257, 1), ("a " * 17, 1), ("dev tun\n<connection>\nremote 'x\n</connection>", 3), ("push '\"'", 1),
    ],
)  # fmt: skip
def test_what_openvpn_would_not_read_is_refused_by_line(text, line):
    with pytest.raises(openvpn.SyntaxProblem) as error:
        openvpn.carry(openvpn.parse(text))
    assert error.value.line == line


_LINES = st.lists(
    st.one_of(
        st.text(max_size=60),
        st.builds(lambda name, words: " ".join([name, *words]),
                  st.sampled_from(sorted(openvpn.CARRIED) + sorted(openvpn.REASONS) + ["ca", "cert", "key"]
                                  + list(config.BY_NAME)),
                  st.lists(st.one_of(
                      st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\n\r"), max_size=12),
                      st.sampled_from(["10.0.0.0", "255.0.0.0", "fd00::/64", "::", "1194", "tcp", "tun0", "0", "-1",
                                       "DNS", "10.8.0.1", "server", "address", "name", "AES-256-GCM", "def1"]),
                  ), max_size=4)),
        st.sampled_from(["<connection>", "</connection>", "<ca>", "</ca>", "client", "server 10.8.0.0 255.255.255.0"]),
    ),
    max_size=12,
).map("\n".join)


@given(_LINES)
@example("connect-retry")
@example("push \"\"")
@example("<connection>\n<connection>\n</connection>")
def test_whatever_the_text_is_the_result_is_a_configuration_or_a_line_to_blame(text):
    try:
        directives = openvpn.parse(text)
        found = openvpn.carry(directives)
    except openvpn.SyntaxProblem as error:
        assert 1 <= error.line <= len(text.splitlines())
        return
    made = openvpn._text("x\ny", found, {})
    items = config.FileParser().parse(io.StringIO(made))
    assert items.pop("mode") == found.mode
    assert {name: value if isinstance(value, list) else [value] for name, value in items.items()} == found.settings
    for name, values in found.settings.items():
        assert config.BY_NAME[name].role in (None, found.mode) and len(values) <= config.BY_NAME[name].most
        assert config.BY_NAME[name].group != "Hooks", "nobody's programs are started because of a file"
        for value in values:
            config.BY_NAME[name].parse(value)
    assert all(reason.isprintable() and name for _, name, reason in found.notes)


# What becomes of it


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("remote a.example 443 tcp", {"remote": "a.example:443"}),
        ("remote a.example\nproto tcp-client", {"remote": "a.example:1194"}),
        ("port 80\nproto tcp\nremote 2001:db8::1", {"remote": "[2001:db8::1]:80"}),
        ("proto tcp\nremote a\nremote b\nremote a", {"remote": ["a:1194", "b:1194"]}),
        ("<connection>\nproto tcp\nremote a 443\n</connection>", {"remote": "a:443"}),
        ("dev tun", {}), ("dev office0", {"device": "office0"}), ("--dev office0", {"device": "office0"}),
        ("redirect-gateway def1 ipv6", {"redirect-gateway": "yes"}),
        ("route 10.1.0.0 255.255.0.0", {"routes": "10.1.0.0/16"}), ("route 192.0.2.7", {"routes": "192.0.2.7/32"}),
        ("route 10.1.0.0 255.255.0.0 vpn_gateway 5", {"routes": "10.1.0.0/16"}),
        ("route-ipv6 2001:db8:7::/48", {"routes": "2001:db8:7::/48"}),
        ("dhcp-option DNS 10.8.0.1\ndhcp-option DOMAIN example.org", {"dns": "10.8.0.1", "dns-search": "example.org"}),
        ("dns server 0 address 10.8.0.1 fd00::1\ndns search-domains a.example",
         {"dns": ["10.8.0.1", "fd00::1"], "dns-search": "a.example"}),
        ("verb 0", {"log-level": "error"}), ("verb 3", {"log-level": "info"}), ("verb 6", {"log-level": "debug"}),
        ("verb 0\nverb 3", {"log-level": "info"}),
        ("cipher AES-256-GCM", {"cipher": "aes-256-gcm"}),
        ("data-ciphers CHACHA20-POLY1305", {"cipher": "chacha20-poly1305"}),
        ("data-ciphers AES-256-GCM:AES-128-GCM:CHACHA20-POLY1305", {"cipher": "auto"}),
        ("tun-mtu 1400\ntxqueuelen 500", {"mtu": "1400", "txqueuelen": "500"}),
        ("connect-retry 5 60\nhand-window 30", {"retry-max": "60", "handshake-timeout": "30"}),
        ("reneg-sec 600\nreneg-bytes 67108864", {"rekey-interval": "600", "rekey-bytes": "67108864"}),
        ("verify-x509-name vpn.example.org name", {"server-name": "vpn.example.org"}),
        ("route-nopull", {"accept-routes": "none", "accept-dns": "no"}),
        ("server 10.8.0.0 255.255.255.0\nport 443\nproto tcp",
         {"pool-ipv4": "10.8.0.0/24", "listen": "[::]:443"}),
        ("server 10.8.0.0 255.255.255.0\nlocal 192.0.2.1\nlport 443",
         {"pool-ipv4": "10.8.0.0/24", "listen": "192.0.2.1:443"}),
        ("mode server\nserver-ipv6 fd00:1::/64\nclient-to-client\nduplicate-cn\nkeepalive 10 60\nsndbuf 0\n"
         "rcvbuf 393216",
         {"pool-ipv6": "fd00:1::/64", "client-to-client": "yes", "second-login": "parallel", "keepalive": "10",
          "keepalive-timeout": "60", "sndbuf": "auto", "rcvbuf": "393216"}),
        ("mode server\npush \"route 10.1.0.0 255.255.0.0\"\npush 'dhcp-option DNS 10.8.0.1'",
         {"routes": "10.1.0.0/16", "dns": "10.8.0.1"}),
    ],
)  # fmt: skip
def test_a_line_is_carried(text, settings):
    assert carried(text) == (settings, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("remote a.example 443", "over UDP"), ("remote a.example 443 udp6", "over UDP"), ("proto udp", "TCP only"),
        ("remote", "lacks a word"), ("dev tap0", "Ethernet"), ("dev a-name-that-is-too-long", "at most 15"),
        ("redirect-gateway !ipv4", "or neither"), ("redirect-gateway def1 block-local", "flag block-local"),
        ("route 10.1.0.0 255.255.0.0 net_gateway", "elsewhere"), ("route gateway.example", "in numbers"),
        ("route 10.1.0.0 255.255.0.1", "in numbers"), ("route 0.0.0.0 0.0.0.0", "/8 or smaller"),
        ("dhcp-option WINS 10.8.0.1", "only DNS"), ("dhcp-option DNS x", "IP address"), ("cipher BF-CBC", "ciphers"),
        ("sndbuf 65536", "is the server's to say here: sndbuf = 65536"), ("reneg-sec 0", "always replaced"),
        ("keepalive 10 60", "is the server's"), ("tun-mtu 70000", "from 1280"),
        ("mode server\nredirect-gateway", "each client has"),
        ("mode server\npush \"comp-lzo\"", "nothing that a server"),
        ("verify-x509-name \"C=US, CN=x\" subject", "server-name"), ("comp-lzo", "no compression"),
        ("auth-user-pass", "no passwords"), ("up /bin/true", "not carried over"), ("frobnicate", "no counterpart"),
        ("on-up /bin/true", "no counterpart"),
        ("<tls-auth>\nsecret\n</tls-auth>", "neither a shared key"),
        ("<connection>\nproto udp\nremote a\n</connection>", "over UDP"),
        ("<connection>\nproto tcp\nremote a\nsocks-proxy x\n</connection>", "socks-proxy in it"),
    ],
)  # fmt: skip
def test_a_line_that_is_not_carried_has_a_reason(text, reason):
    reasons = why(text)
    assert 1 <= len(reasons) <= 2 and any(reason in one for one in reasons)


def test_more_than_an_option_takes_is_left_out():
    lines = [f"dhcp-option DNS 10.8.0.{number}" for number in range(1, 11)]
    settings, notes = carried("\n".join(lines))
    assert len(settings["dns"]) == 8 and notes == [(9, "dhcp-option"), (10, "dhcp-option")]


def test_no_directive_has_two_places():
    assert not set(openvpn.CARRIED) & set(openvpn.REASONS)
    assert len(openvpn.REASONS) == sum(map(len, openvpn._REASONS.values()))


def test_no_program_is_carried():
    programs = ("up", "down", "client-connect", "client-disconnect", "route-up", "plugin", "on-up", "on-down")
    for mode in ("client", "mode server\nserver 10.8.0.0 255.255.255.0"):
        settings, notes = carried(mode + "".join(f"\n{name} /usr/bin/true" for name in programs))
        assert [name for _, name in notes if name in programs] == list(programs)
        assert not any(config.BY_NAME[name].group == "Hooks" for name in settings)


# The command


def test_the_whole_file_is_accounted_for(tmp_path, ctl):
    lines = ["client", "dev tun", "proto tcp", "remote vpn.example.org 443", "nobind", "comp-lzo",
             "A" * 60, "cipher AES-256-GCM", "\x1b[31mred"]
    file = tmp_path / "office.ovpn"
    file.write_text("\n".join(lines))
    status, out, error = ctl("import-openvpn", file)
    assert status == 0 and "mode = client\nremote = vpn.example.org:443\ncipher = aes-256-gcm\n" in out
    assert [int(re.match(r".*?:(\d+): ", line)[1]) for line in error.splitlines()] == [5, 6, 7, 9]
    assert "AAAA" not in error and "\x1b" not in error and "bulkvpnctl pki add NAME" in out


def test_certificates_are_taken_only_if_the_daemon_would(tmp_path, ctl):
    site = tmp_path / "site"
    assert ctl("pki", "init", "--directory", site)[0] == 0
    profile = ctl("pki", "add", "laptop", "--remote", "x", "--directory", site)[1]
    blocks = {name: re.search(rf"<{name}>\n(.*?)</{name}>", profile, re.DOTALL)[1]
              for name in ("ca", "certificate", "key")}
    (tmp_path / "ca.crt").write_text(blocks["ca"])
    text = "client\nproto tcp\nremote x 443\nca ca.crt\n" \
           f"<cert>\nCertificate:\n    Version: 3\n{blocks['certificate']}</cert>\n<key>\n{blocks['key']}</key>\n"
    file = tmp_path / "office.ovpn"
    file.write_text(text)
    status, _, error = ctl("import-openvpn", file, "--output", tmp_path / "office.conf")
    made = tmp_path / "office.conf"
    assert (status, error) == (0, "") and stat.S_IMODE(made.stat().st_mode) == 0o600
    assert ctl("import", made, "--directory", tmp_path / "etc")[0] == 0

    assert ctl("import-openvpn", file, "--output", made)[0] == 1, "nothing is overwritten"
    (tmp_path / "ca.crt").unlink()
    status, out, error = ctl("import-openvpn", file)
    assert status == 0 and "-----BEGIN" not in out and "PRIVATE" not in error
    assert "ca.crt: cannot be read" in error and "or take those of: bulkvpnctl pki add\n" in error
    assert error.count("not taken, since") == 1 and error.count(": not taken, for the reason at line 4\n") == 2
    other = ctl("pki", "add", "other", "--remote", "x", "--directory", site)[1]
    (tmp_path / "ca.crt").write_text(blocks["ca"])
    file.write_text(text.partition("<key>")[0] + "<key>" + other.partition("<key>")[2])
    status, out, error = ctl("import-openvpn", file)
    assert status == 0 and "-----BEGIN" not in out and "key: does not belong to the certificate" in error
    (tmp_path / "ca.crt").unlink()
    file.write_text(text)
    os.mkfifo(tmp_path / "ca.crt")
    assert "is not a regular file" in ctl("import-openvpn", file)[2]
    file.write_text(text.partition("<key>")[0])
    assert "-----BEGIN" not in ctl("import-openvpn", file)[1]


def test_a_server_is_sent_to_what_makes_servers(tmp_path, ctl):
    file = tmp_path / "server.ovpn"
    for text in ("ca ca.crt\n", "ca ca.crt\ncert c.crt\nkey k\n", "<ca>\n</ca>\n<cert>\n</cert>\n<key>\n</key>\n"):
        file.write_text("server 10.8.0.0 255.255.255.0\n" + text)
        error = ctl("import-openvpn", file)[2]
        assert "take those of: bulkvpnctl pki init\n" in error and "pki add" not in error


def test_what_cannot_be_read_is_one_line(tmp_path, ctl):
    file = tmp_path / "office.ovpn"
    for content, said in ((b'dev "tun', "office.ovpn:1: has a quote"), (b"\xff", "UTF-8"),
                          (b"#" * (config.MAX_FILE_SIZE + 1), "more than")):
        file.write_bytes(content)
        status, out, error = ctl("import-openvpn", file)
        assert status in (1, os.EX_CONFIG) and out == "" and said in error and error.count("\n") == 1
