"""What `bulkvpnctl tune` prints and how it ends; tests/netns has what it does."""

import json

import pytest

from bulkvpnd.admin import tune

KEYS = {"setting", "found", "wanted", "set", "option", "why_not"}


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


def test_show_as_json_has_every_key(nowhere, ctl):
    code, out, _ = ctl("tune", "show", "--json")
    assert code == 0
    rows = json.loads(out)
    assert all(row.keys() == KEYS for row in rows)
    settings = {row["setting"]: row for row in rows}
    assert settings["net.ipv4.tcp_rmem"]["wanted"] == "16777216"
    assert settings["conntrack timeouts"]["option"] == "conntrack-timeouts"


def test_show_as_a_table(nowhere, ctl):
    code, out, _ = ctl("tune", "show")
    assert code == 0
    lines = out.splitlines()
    assert [word for word in ("setting", "found", "wanted", "set", "option", "why not") if word not in lines[1]] == []
    assert any("net.ipv4.tcp_rmem" in line and "socket-memory" in line for line in lines)


def test_the_configuration_counts(client_file, ctl):
    code, out, _ = ctl("tune", "show", "--config", client_file, "--json")
    assert code == 0
    settings = {row["setting"]: row for row in json.loads(out)}
    assert settings["net.ipv4.tcp_rmem"]["wanted"] == str(64 << 20)
    assert "conntrack timeouts" not in settings


@pytest.mark.parametrize("action", ["show", "apply", "revert"])
def test_a_wrong_configuration_is_one_line(client_file, ctl, action):
    client_file.write_text(client_file.read_text() + "socket-memory = 1\n")
    code, out, error = ctl("tune", action, "--config", client_file)
    assert (code, out) == (78, "") and len(error.splitlines()) == 1 and f"{client_file}:" in error


def test_nothing_to_revert(nowhere, ctl):
    code, out, _ = ctl("tune", "revert", "--json")
    assert (code, json.loads(out)) == (0, [])
    assert list(nowhere.iterdir()) == []
