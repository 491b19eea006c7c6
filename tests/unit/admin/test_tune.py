"""What `bulkvpnctl tune` prints and how it ends; tests/netns has what it does."""

import json
import re

import pytest

from bulkvpnd.admin import tune
from bulkvpnd.host.sysctl import Ledger
from bulkvpnd.protocol import aead

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


@pytest.fixture
def rows(nowhere, pki_ctl, ctl):
    """Shows what is wanted for a server with lines of one's own. Returns {setting: row}."""
    pki_ctl("init", "--pool-ipv4", "10.86.0.0/24", directory=nowhere)
    file = nowhere / "server.conf"
    text = file.read_text()

    def shown(lines="", certificate=None):
        ours = text if certificate is None else re.sub("(?s)<certificate>.*</certificate>",
                                                       f"<certificate>\n{certificate}</certificate>", text)
        file.write_text(f"{lines}\nruntime-directory = {nowhere}/run\n{ours}")
        code, out, error = ctl("tune", "show", "--config", file, "--json")
        assert (code, error) == (0, "")
        return {row["setting"]: row for row in json.loads(out)}

    return shown


def test_what_is_wanted_is_shown_before_it_runs(rows, nowhere):
    forwarding, spread = "net.ipv4.ip_forward", "net.ipv6.fib_multipath_hash_policy"
    found = rows()
    for key in (forwarding, "net.ipv6.conf.all.forwarding", "net.ipv4.fib_multipath_hash_policy", spread):
        assert (found[key]["wanted"], found[key]["why_not"]) == (None, "no option asks for it")
    assert found["conntrack timeouts"]["why_not"] == "only with nat = yes"
    (nowhere / "server.clients.d").mkdir()
    (nowhere / "server.clients.d" / "a.conf").write_text("[client a]\nnetworks = fd02::/48\n")
    found = rows("nat = yes\nmultipath = fd02::/48")
    assert [found[forwarding][name] for name in ("wanted", "option")] == ["1", "nat, networks"]
    assert [found[spread][name] for name in ("wanted", "option")] == ["1", "multipath"]
    assert found["net.ipv4.fib_multipath_hash_policy"]["wanted"] is None


def test_timeouts_of_all_connections_are_said_to_be_that(rows, nowhere):
    assert rows("nat = yes")["conntrack timeouts"]["why_not"] == "no instance wants it"
    tree = nowhere / "proc-sys"
    (tree / "net/netfilter").mkdir(parents=True)
    (tree / "net/netfilter/nf_conntrack_udp_timeout").write_text("30\n")
    with Ledger(nowhere / ".shared", "server", root=tree) as ledger:
        ledger.want("net.netfilter.nf_conntrack_udp_timeout", "15", "smaller")
        row = rows("nat = yes")["conntrack timeouts"]
    assert row["set"] == "short" and row["why_not"].startswith("for all connections")


@pytest.mark.parametrize("cipher", ["auto", *aead.CIPHERS])
def test_the_cipher_is_shown(rows, cipher):
    row = rows(f"cipher = {cipher}")["cipher"]
    assert row["wanted"] == cipher and row["set"] in (aead.CIPHERS if cipher == "auto" else [cipher])


def test_the_kind_of_key_is_shown(rows):
    assert rows()["key"] == {"setting": "key", "found": None, "wanted": "elliptic curve", "set": "EC secp256r1",
                             "option": "certificate", "why_not": None}
    row = rows(certificate="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")["key"]
    assert row["set"] is None and "is not a certificate" in row["why_not"]


@pytest.mark.parametrize("action", ["show", "apply", "revert"])
def test_a_wrong_configuration_is_one_line(client_file, ctl, action):
    client_file.write_text(client_file.read_text() + "socket-memory = 1\n")
    code, out, error = ctl("tune", action, "--config", client_file)
    assert (code, out) == (78, "") and len(error.splitlines()) == 1 and f"{client_file}:" in error


def test_a_damaged_ledger_is_named(nowhere, client_file, ctl):
    client_file.write_text(client_file.read_text().replace("64M", "1G"))  # more than any machine has
    (nowhere / "net").mkdir()
    (nowhere / "net" / "key").write_text("0\n")
    Ledger(nowhere / "run" / ".shared", "(by hand)", by_hand=True, root=nowhere).want("net.key", "1")
    (file,) = (nowhere / "run" / ".shared").glob("sysctl-*.json")
    file.write_text("[")
    reason = f"{file}: not what this program writes; remove the file"
    code, out, _ = ctl("tune", "show", "--config", client_file, "--json")
    assert code == 0 and reason in [row["why_not"] for row in json.loads(out)]
    code, _, error = ctl("tune", "revert", "--config", client_file)
    assert code == 1 and reason in error


def test_nothing_to_revert(nowhere, ctl):
    code, out, _ = ctl("tune", "revert", "--json")
    assert (code, json.loads(out)) == (0, [])
    assert ctl("tune", "revert") == (0, "nothing is set by hand, so nothing was changed\n", "")
    assert list(nowhere.iterdir()) == []
