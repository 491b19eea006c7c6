"""What `bulkvpnctl tune` prints and how it ends; tests/netns has what it does."""

import argparse
import json

import pytest

from bulkvpnd.admin import tune

KEYS = {"setting", "found", "wanted", "set", "option", "why_not"}


def run(*arguments):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return tune.run(parser.parse_args(arguments))


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A shared directory that nobody has made yet, and not the machine's."""
    monkeypatch.setattr(tune.sysctl, "SHARED_DIRECTORY", tmp_path / "none")
    monkeypatch.setattr(tune.status, "RUNTIME_DIRECTORY", tmp_path / "run")
    return tmp_path


@pytest.fixture
def client_file(tmp_path):
    file = tmp_path / "client.conf"
    pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    file.write_text("mode = client\nremote = 127.0.0.1\nsocket-memory = 64M\nrp-filter = system\n"
                    f"runtime-directory = {tmp_path}/run/client\n"
                    + "".join(f"<{name}>\n{pem}</{name}>\n" for name in ("ca", "certificate", "key")))
    file.chmod(0o600)
    return file


def test_show_as_json_has_every_key(nowhere, capsys):
    assert run("show", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row.keys() == KEYS for row in rows)
    settings = {row["setting"]: row for row in rows}
    assert settings["net.ipv4.tcp_rmem"]["wanted"] == "16777216"
    assert settings["conntrack timeouts"]["option"] == "conntrack-timeouts"


def test_show_as_a_table(nowhere, capsys):
    assert run("show") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [word for word in ("setting", "found", "wanted", "set", "option", "why not") if word not in lines[1]] == []
    assert any("net.ipv4.tcp_rmem" in line and "socket-memory" in line for line in lines)


def test_the_configuration_counts(client_file, capsys):
    assert run("show", "--config", str(client_file), "--json") == 0
    settings = {row["setting"]: row for row in json.loads(capsys.readouterr().out)}
    assert settings["net.ipv4.tcp_rmem"]["wanted"] == str(64 << 20)
    assert "conntrack timeouts" not in settings


@pytest.mark.parametrize("action", ["show", "apply", "revert"])
def test_a_wrong_configuration_is_one_line(client_file, capsys, action):
    client_file.write_text(client_file.read_text() + "socket-memory = 1\n")
    assert run(action, "--config", str(client_file)) == 78
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert f"{client_file}:" in printed.err


def test_nothing_to_revert(nowhere, capsys):
    assert run("revert", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert list(nowhere.iterdir()) == []
