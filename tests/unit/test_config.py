"""bulkvpnd.config: every error says where, what and how to mend it, on one line, and never shows a key."""

import contextlib
import ipaddress
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bulkvpnd import config

SECRET = "MHcCAQEEIObhDmVnZXJ0aGVsZXNzdGhpc2lzbm90YXJlYWxrZXlhdGFsbA0K+/9z"
CERTIFICATE = f"-----BEGIN CERTIFICATE-----\n{'QUJD' * 16}\nQUJD\n-----END CERTIFICATE-----\n"
KEY = f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n{SECRET[:40]}\n-----END PRIVATE KEY-----\n"
IDENTITY = "ca = ca.crt\ncertificate = own.crt\nkey = own.key\n"
SERVER = f"mode = server\npool-ipv4 = 10.9.0.0/24\n{IDENTITY}"  # five lines
CLIENT = f"mode = client\nremote = a\n{IDENTITY}"  # five lines


@pytest.fixture
def file(tmp_path):
    """Writes tmp_path/NAME with a mode, and returns its path."""

    def write(text, name="test.conf", mode=0o600):
        path = tmp_path / name
        path.unlink(missing_ok=True)  # its mode may forbid even its owner to write
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        return path

    return write


def load(path, *flags):
    return config.load(["--config", str(path), *flags])[0]


def refused(function, *arguments, on_command_line=False):
    """The message of the ConfigurationError that it must raise."""
    with pytest.raises(config.ConfigurationError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.isprintable(), message
    assert SECRET[:8] not in message and SECRET[-8:] not in message
    assert caught.value.on_command_line is on_command_line
    return message


# What is in a file.


def test_a_client_with_a_full_tunnel(file):
    client = load(file(CLIENT + "redirect-gateway = yes\nkill-switch = yes\nlocal-networks = 192.168.1.0/24\n"))
    assert (client.redirect_gateway, client.kill_switch, client.accept_dns) == (True, True, True)
    assert client.local_networks == (ipaddress.ip_network("192.168.1.0/24"),)
    assert client.accept_routes == (config.PRIVATE,)
    client = load(file(CLIENT + "accept-routes = private\naccept-routes = 203.0.113.0/24\nroutes = 10.1.0.0/16\n"))
    assert client.accept_routes == (config.PRIVATE, (ipaddress.ip_network("203.0.113.0/24"),))
    assert load(file(CLIENT + "accept-routes = none\n")).accept_routes == ((),)


def test_a_server(file):
    path = file("# comment\n; comment\n\n   mode=server  \n" + SERVER.partition("\n")[2] + "mtu = 1400\nworkers = 3\n")
    server = load(path)
    assert (server.name, server.path, server.mode) == ("test", path, "server")
    assert (server.mtu, server.workers, server.offload, server.remote) == (1400, 3, True, ())
    assert server.pool_ipv4 == ipaddress.ip_network("10.9.0.0/24") and server.pool_ipv6 is None
    assert (server.key, server.listen) == ((pathlib.Path("own.key"), None), (("::", 7443),))
    assert (server.frame_size, server.rekey_bytes, server.rekey_interval) == (256 << 10, 64 << 30, 900)


def test_windows_line_ends(file):
    assert load(file(SERVER.replace("\n", "\r\n"))).mode == "server"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mtu", ":1: mtu: not understood; write key = value"),
        ("\n\nmtu 1500", ":3: mtu 1500: not understood; write key = value"),
        ("[server]", ":1: [server]: not understood"),
        ("mtu = x", ":1: mtu = x: should be a whole number of bytes from 1280 to 65521"),
        ("mtu = 1279", ":1: mtu = 1279: should be"),
        ("mtu =", ":1: mtu = : should be"),
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
        ("multipath = 10.2.0.1/16", ":1: multipath = 10.2.0.1/16: should be PREFIX [weight 1 to 256]"),
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


def test_inline_blocks(file):
    bundle = f"{CERTIFICATE}\n{CERTIFICATE}"
    server = load(file(f"{SERVER.partition('ca =')[0]}<ca>\n{bundle}</ca>\n<certificate>\n{CERTIFICATE}</certificate>\n"
                       f"  <key>  \n{KEY}  </key>  \n"))  # fmt: skip
    assert server.ca == (None, bundle)
    assert [config.pem_text(server, name) for name in ("ca", "certificate", "key")] == [bundle, CERTIFICATE, KEY]
    assert SECRET not in repr(server)


def test_repeated_options_keep_their_order(file):
    client = load(file(CLIENT + "remote = [2001:db8::1]:99\nremote = b:1\n"))
    assert client.remote == (("a", 7443), ("2001:db8::1", 99), ("b", 1))


# The command line.


def test_flags_override_the_file(file):
    path = file(SERVER + "mtu = 1400\nlisten = a\nlisten = b\n")
    assert (load(path).mtu, load(path).listen) == (1400, (("a", 7443), ("b", 7443)))
    server = load(path, "--mtu=1300", "--listen", "c:1", "--listen", "d:2", "--log-level", "debug")
    assert (server.mtu, server.listen, server.log_level) == (1300, (("c", 1), ("d", 2)), "debug")


@pytest.mark.parametrize("form", ["-c {}", "-c{}", "-c={}", "--config {}", "--config={}", "-c /nowhere -c {}"])
def test_every_form_of_the_config_flag(file, form):
    assert config.load(form.format(file(SERVER)).split())[0].mode == "server"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--mtu", "12"], "--mtu = 12: should be a whole number of bytes from 1280 to 65521"),
        (["--listen", "a", "--listen", "b:x\n"], r"--listen = b:x\n: should be HOST[:PORT]"),
        (["--remote", "a"], "--remote: is for mode = client, and this is mode = server; take it out"),
        (["--no\nsuch"], r"unrecognized arguments: --no\nsuch; see bulkvpnd --help"),
        (["--log", "debug"], "unrecognized arguments: --log"),
        (["word"], "unrecognized arguments: word"),
        (["--mtu"], "expected one argument; see bulkvpnd --help"),
        (["--key", f"x\n{SECRET}"], "--key: should be"),
        (["--"], "--: there is nothing but options"),
        (["--", "x"], "--: there is nothing but options"),
    ],
)
def test_an_error_blames_the_flag(file, flags, expected):
    path = file(SERVER.replace("key = own.key", f"<key>\n{KEY}</key>") + "mtu = 1400\nlisten = a\n")
    assert expected in refused(load, path, *flags, on_command_line=True)


@pytest.mark.parametrize("arguments", [[], ["--config"], ["-c"], ["--mtu", "1500"]])
def test_the_config_flag_is_needed(arguments):
    assert "config" in refused(config.load, arguments, on_command_line=True)


def test_environment_variables_do_not_count(file, monkeypatch):
    for option in config.OPTIONS:
        monkeypatch.setenv(option.field.upper(), "nonsense")
    assert load(file(SERVER)).mtu == 1500


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        config.load([flag, "--config", "/no/such/file"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{option.name} " in out for option in config.OPTIONS) or flag == "--version" and "0." in out


# Directories of systemd.


@pytest.mark.parametrize(("kind", "default"), [("runtime", "/run/bulkvpnd/test"), ("state", "/var/lib/bulkvpnd/test")])
def test_directories(file, monkeypatch, kind, default):
    path, field, variable = file(SERVER), f"{kind}_directory", f"{kind.upper()}_DIRECTORY"
    monkeypatch.delenv(variable, raising=False)
    assert getattr(load(path), field) == pathlib.Path(default)
    monkeypatch.setenv(variable, "/given/by/systemd:/second")
    assert getattr(load(path), field) == pathlib.Path("/given/by/systemd")
    assert getattr(load(path, f"--{kind}-directory", "/flag"), field) == pathlib.Path("/flag")


def test_credentials_stand_in_for_files(file, tmp_path, monkeypatch):
    path = file(SERVER)
    file(KEY.replace("M", "N"), "own.key")
    file(CERTIFICATE, "own.crt")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert load(path).mtu == 1500
    file(SERVER + "mtu = 1400\nmtu = 1300", "credentials/test.conf", 0o440)
    # Named after the file that the administrator knows, not after systemd's copy.
    assert refused(load, path).startswith(f"{path}:7: mtu: given twice")
    file(SERVER + "mtu = 1400\n", "credentials/test.conf", 0o440)
    file(KEY, "credentials/own.key", 0o440)
    server = load(path)
    assert server.mtu == 1400
    assert config.pem_text(server, "key") == KEY
    assert config.pem_text(server, "certificate") == CERTIFICATE
    assert load(tmp_path / "not-there" / "test.conf").mtu == 1400


# Files that may hold a key.


def inline(text=KEY):
    return SERVER.replace("key = own.key", f"<key>\n{text}</key>")


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o601, 0o620, 0o777])
def test_a_key_that_others_can_reach(file, mode):
    path = file(inline(), mode=mode)
    message = refused(load, path)
    assert f"has mode {mode:04o}" in message and f"run: chmod 600 {path}" in message
    server = load(file(SERVER, "other.conf"))
    key = file(KEY, "own.key", mode)
    assert f"run: chmod 600 {key}" in refused(config.pem_text, server, "key")


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_key_that_others_cannot_reach(file, mode):
    assert load(file(inline(), mode=mode)).key == (None, KEY)


def test_a_file_without_a_key_may_be_public(file):
    server = load(file(SERVER, mode=0o644))
    file(CERTIFICATE, "ca.crt", 0o644)
    assert config.pem_text(server, "ca") == CERTIFICATE


def test_a_key_of_somebody_else(file):
    path = file(inline())
    try:
        os.chown(path, 1234, 1234)
    except OSError as error:
        pytest.skip(f"needs root, to give a file away: {error}")
    assert f"belongs to user id 1234; run: chown root {path}" in refused(load, path)
    os.chown(file(SERVER), 1234, 1234)
    assert load(path).mode == "server"


def test_a_symlink(file, tmp_path):
    real = file(SERVER, "real.conf")
    link = tmp_path / "link.conf"
    link.symlink_to(real)
    assert refused(load, link).startswith(f"{link}: cannot be read: ")
    file(KEY, "real.key")
    (tmp_path / "own.key").symlink_to("real.key")
    assert f"{tmp_path / 'own.key'}: cannot be read: " in refused(config.pem_text, load(real), "key")


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (("", "not a regular file"), ("pipe", "not a regular file"), ("none", "No such file")):
        assert expected in refused(load, tmp_path / name)
    assert "cannot be read" in refused(load, tmp_path / "new\nline")
    assert "cannot be read" in refused(load, "x" * 5000)


def test_a_file_without_permission(file):
    path = file(SERVER, mode=0)

    @contextlib.contextmanager
    def somebody_else():
        if os.geteuid() != 0:
            yield
            return
        try:
            os.seteuid(1234)
        except OSError as error:
            pytest.skip(f"this namespace has no user 1234: {error}")
        try:
            yield
        finally:
            os.seteuid(0)

    with somebody_else():
        assert refused(load, path).startswith(f"{path}: cannot be read: Permission denied")


def test_the_size_of_a_file_is_limited(file):
    size = config.MAX_FILE_SIZE
    assert load(file(SERVER + "#" * (size - len(SERVER)))).mode == "server"
    assert f"has more than {size} bytes" in refused(load, file(SERVER + "#" * (size + 1 - len(SERVER))))


def test_a_file_that_is_no_text(file):
    assert "is not UTF-8 text" in refused(load, file(b"mode = \xff\xfe"))


def test_a_file_from_elsewhere_may_have_other_line_ends(file):
    for end in ("\r\n", "\r"):
        assert load(file(SERVER.replace("\n", end).encode())).ca == load(file(SERVER)).ca


def test_a_pem_file_without_pem(file):
    server = load(file(SERVER))
    path = file("nothing", "own.crt")
    assert f"certificate = {path}: has no PEM text" in refused(config.pem_text, server, "certificate")


# The table.


@pytest.mark.parametrize("option", config.OPTIONS, ids=lambda option: option.name)
def test_every_default_is_a_value_and_every_help_says_it(option):
    if option.default is not None:
        option.parse(option.default)
        assert option.default in config.help_text(option)
    assert option.help and option.metavar and option.role in (None, "server", "client")


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (config.endpoint,
         {"a": ("a", 7443), "*:1": ("*", 1), "[::]": ("::", 7443), "[fe80::1%eth0]:65535": ("fe80::1%eth0", 65535)},
         ["", ":1", "a:", "a:65536", "a:0", "[a]", "[::1", "::1", "a b", "a\n", "[1.2.3.4]", "ä", "a:١"]),
        (config.duration(1, 100000), {"1": 1, "5s": 5, "2 m": 120, "1h": 3600, "1d": 86400},
         ["0", "-1", "2d", "1.5", "1ms", "m", "١"]),
        (config.size(1, 1 << 30), {"1": 1, "2K": 2048, "1M": 1 << 20, "1G": 1 << 30}, ["0", "2G", "1k", "1KB", "K"]),
        (config.early_drop, {"64:30:256": (64, 30, 256), "7": (7, 100, 7), "1:1:1": (1, 1, 1), "9:100:10000":
                             (9, 100, 10000)},
         ["", "0", "10001", "5:30:4", "0:30:4", "5:0:6", "5:101:6", "5:30:10001", "5:30", "5::6", "5:30:6:7", "-1",
          "5 :30:6", "5:30:6\n", "١"]),
        (config.boolean, {"yes": True, "no": False}, ["", "YES", "1"]),
        (config.or_auto(config.integer(1, 9)), {"auto": None, "9": 9}, ["Auto", "10", "9\n", " 9", "+9", "9" * 99]),
        (config.device_name, {"bulk%d": "bulk%d", "a" * 15: "a" * 15, "a" * 13 + "%d": "a" * 13 + "%d"},
         ["", ".", "..", "a/b", "a b", "%d", "a%d%d", "a%s", "a" * 16, "a" * 14 + "%d"]),
        (config.certificate_name, {"A.b_c-9": "A.b_c-9"}, ["", "a b", "a\n", "a" * 65]),
        (config.path, {"/a": pathlib.Path("/a")}, ["", "a", "/a\0"]),
        (config.multipath,
         {"10.2.0.0/16": config.Multipath(ipaddress.ip_network("10.2.0.0/16"), 1, None),
          "fd02::/48  weight 256": config.Multipath(ipaddress.ip_network("fd02::/48"), 256, None),
          "10.2.0.0/16 weight 3 source 10.1.0.1":
              config.Multipath(ipaddress.ip_network("10.2.0.0/16"), 3, ipaddress.ip_address("10.1.0.1"))},
         ["", "10.2.0.0", "10.2.0.0/33", "10.2.0.0/16 3", "10.2.0.0/16 weight", "10.2.0.0/16 weight 257",
          "10.2.0.0/16 weight -1", "10.2.0.0/16 weight ١", "10.2.0.0/16 source fd02::1", "10.2.0.0/16 source x",
          "10.2.0.0/16 source 10.1.0.1 weight 1", "224.0.0.0/4", "127.0.0.0/8", "fe80::/64", "10.2.0.0/16\n"]),
        (config.network(4, 30), {"10.0.0.0/8": ipaddress.ip_network("10.0.0.0/8")},
         ["10.0.0.0/31", "10.0.0.0", "0.0.0.0/0", "224.0.0.0/8", "127.0.0.0/8", "10.0.0.1/8", "fd00::/64"]),
        (config.network(6, 126), {"fd00::/8": ipaddress.ip_network("fd00::/8")}, ["fd00::/127", "::/0", "ff00::/8"]),
    ],
)  # fmt: skip
def test_kinds_of_values(parse, good, bad):
    assert {raw: parse(raw) for raw in good} == good
    for raw in bad:
        with pytest.raises(ValueError, match="."):
            parse(raw)


TEXT = st.text(max_size=80) | st.text("0123456789.:/[]%-ag \n", max_size=30)


@given(st.sampled_from(config.OPTIONS), TEXT)
@settings(deadline=None, max_examples=1000)
def test_any_text_is_a_value_or_a_value_error(option, raw):
    with contextlib.suppress(ValueError):
        option.parse(raw)


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


# The daemon.


@pytest.mark.parametrize(
    ("text", "flags", "status", "expected"),
    [
        ("mode = server\n\x1b[2J\n", [], os.EX_CONFIG, r"test.conf:2: \x1b[2J: not understood"),
        (SERVER, ["--mtu", "1"], os.EX_USAGE, "--mtu = 1: should be"),
        (SERVER, ["--nonsense\n"], os.EX_USAGE, r"unrecognized arguments: --nonsense\n"),
    ],
)
def test_the_daemon_ends_with_one_line_and_the_right_status(file, text, flags, status, expected):
    command = [sys.executable, "-m", "bulkvpnd", "--config", file(text), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (status, ""), result.stderr
    assert result.stderr.startswith("bulkvpnd: ") and expected in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("raw", "value"),
    [("127.0.0.1:9743", ("127.0.0.1", 9743)), ("[::1]:1", ("::1", 1)), ("0.0.0.0:65535", ("0.0.0.0", 65535))],
)
def test_a_socket_address(raw, value):
    assert config.socket_address(raw) == value


@pytest.mark.parametrize(
    "raw", ["", ":1", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "::1:9743", "[::1]", "localhost:1", "1.2.3:4",
            "[x]:1", "127.0.0.1:9743x", "[fe80::1%eth0]:1"]
)  # fmt: skip
def test_what_is_no_socket_address(raw):
    with pytest.raises(ValueError, match="for example 127.0.0.1:9743"):
        config.socket_address(raw)
