"""bulkvpnctl reload, disconnect and drain: what is asked of an instance, and what is made of its answer."""

import json
import os
import socket
import threading

import pytest

from bulkvpnd import config
from bulkvpnd.admin import drain, status

CONFIGURATION = ("mode = client\nremote = 192.0.2.1\n"
                 + "".join(f"{name} = /nowhere/{name}.pem\n" for name in ("ca", "certificate", "key")))


@pytest.fixture
def instance(tmp_path, monkeypatch):
    """Starts an instance that gives each answer to one request; what it was asked comes back as a list."""
    monkeypatch.setattr(status, "RUNTIME_DIRECTORY", tmp_path)
    monkeypatch.setattr(drain, "PERIOD", 0.0)
    threads = []

    def start(*answers, name="server"):
        (tmp_path / name).mkdir()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / name / "status.sock"))
        listener.listen()
        listener.settimeout(5)
        asked = []

        def serve():
            with listener:
                for answer in answers:
                    sock, _ = listener.accept()
                    with sock, sock.makefile("rb") as stream:
                        asked.append(json.loads(stream.readline()))
                        sock.sendall(json.dumps(answer).encode() + b"\n")

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return asked

    yield start
    for thread in threads:
        thread.join(10)


def test_reload_brings_the_text_and_says_what_became_of_it(instance, tmp_path, ctl, monkeypatch):
    file = tmp_path / "server.conf"
    file.write_text(CONFIGURATION + "# ü\n")
    # The environment of ExecReload may name the copy, which is old.
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "server.conf").write_text("old")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    asked = instance({"live": {"grace": config.NOW, "keepalive": config.CONNECTIONS}, "restart": ["mtu"]})
    code, out, err = ctl("reload", "server", "--config", file)
    assert (code, err) == (0, "") and asked == [{"command": "reload", "text": CONFIGURATION + "# ü\n"}]
    assert out == ("server: grace: in force\nserver: keepalive: in force for connections made from then on\n"
                   "server: mtu: needs a restart: systemctl restart bulkvpnd@server\n")


def test_reload_of_nothing_new(instance, tmp_path, ctl):
    (tmp_path / "server.conf").write_text(CONFIGURATION)
    instance({"live": {}, "restart": []})
    assert ctl("reload", "server", "--config", tmp_path / "server.conf") == (
        0, "server: nothing has changed\n", "")


def test_reload_asks_nobody_when_the_file_is_wrong(instance, tmp_path, ctl):
    file = tmp_path / "server.conf"
    file.write_text(CONFIGURATION + "mtu = 1\n")
    code, out, err = ctl("reload", "server", "--config", file)
    assert (code, out) == (os.EX_CONFIG, "") and err.startswith(f"bulkvpnctl: {file}:6: mtu = 1: should be")


def test_reload_that_is_refused_fails(instance, tmp_path, ctl):
    (tmp_path / "server.conf").write_text(CONFIGURATION)
    instance({"error": "no"})
    assert ctl("reload", "server", "--config", tmp_path / "server.conf") == (1, "", "bulkvpnctl: server: no\n")


def test_disconnect(instance, ctl):
    asked = instance({"ended": 2}, {"error": "no session of bob"})
    assert ctl("disconnect", "alice") == (0, "server: alice: 2 sessions ended\n", "")
    assert ctl("disconnect", "bob", "server") == (1, "", "bulkvpnctl: server: no session of bob\n")
    assert asked == [{"command": "disconnect", "identity": "alice"}, {"command": "disconnect", "identity": "bob"}]


def test_drain_waits_until_nobody_is_left(instance, ctl):
    answers = [{"draining": True, "sessions": count} for count in (2, 2, 1, 0)]
    asked = instance(*answers, {"draining": False, "sessions": 0})
    code, out, err = ctl("drain", "--wait")
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"server: accepts no new sessions; {left} left" for left in ("2 are", "1 is", "0 are")]
    assert ctl("drain", "--off")[1] == "server: accepts new sessions; 0 are there\n"
    assert [one["off"] for one in asked] == [False] * 4 + [True]


def test_one_of_several_has_to_be_named(instance, ctl):
    instance(name="one")
    instance(name="two")
    code, _, err = ctl("drain")
    assert code == os.EX_USAGE and err == "bulkvpnctl: several instances run here: one, two; name one of them\n"
