"""bulkvpnd.config.configuration: file, command line and systemd's environment become one configuration."""

import ipaddress
import os
import pathlib
import subprocess
import sys

import pytest
from examples import CLIENT, KEY, SECRET, SERVER, load, refused

from bulkvpnd import config


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


def test_repeated_options_keep_their_order(file):
    client = load(file(CLIENT + "remote = [2001:db8::1]:99\nremote = b:1\n"))
    assert client.remote == (("a", 7443), ("2001:db8::1", 99), ("b", 1))


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


@pytest.mark.parametrize(("kind", "default"), [("runtime", "/run/bulkvpnd/test"), ("state", "/var/lib/bulkvpnd/test")])
def test_directories(file, monkeypatch, kind, default):
    path, field, variable = file(SERVER), f"{kind}_directory", f"{kind.upper()}_DIRECTORY"
    monkeypatch.delenv(variable, raising=False)
    assert getattr(load(path), field) == pathlib.Path(default)
    monkeypatch.setenv(variable, "/given/by/systemd:/second")
    assert getattr(load(path), field) == pathlib.Path("/given/by/systemd")
    assert getattr(load(path, f"--{kind}-directory", "/flag"), field) == pathlib.Path("/flag")


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
