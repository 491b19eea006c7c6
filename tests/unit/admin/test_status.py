"""bulkvpnctl status: what it makes of instances that answer, of those that do not, and of strange answers."""

import argparse
import json
import os
import socket
import threading

import pytest
from reports import REPORT

from bulkvpnd.admin import status


@pytest.fixture
def instance(tmp_path, monkeypatch):
    """Starts an instance that answers one request with bytes; it has a name below the runtime directory."""
    monkeypatch.setattr(status, "RUNTIME_DIRECTORY", tmp_path)
    monkeypatch.setattr(status, "TIMEOUT", 0.3)
    threads = []

    def start(answer, name="server"):
        (tmp_path / name).mkdir()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / name / "status.sock"))
        listener.listen()
        listener.settimeout(5)

        def serve():
            with listener:
                sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                if answer is None:
                    sock.recv(1)  # until the other end has had enough
                else:
                    sock.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(10)


def line(report=REPORT):
    return json.dumps(report).encode() + b"\n"


def test_no_instance(ctl, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "RUNTIME_DIRECTORY", tmp_path)
    code, out, error = ctl("status")
    assert (code, out) == (1, "") and "no instance is running" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "\x1b[2J", "a\n"])
def test_what_is_no_name_is_wrong_usage(ctl, name):
    code, _, error = ctl("status", name)
    assert code == os.EX_USAGE and error[:-1].isprintable()


def test_an_instance_that_does_not_run(ctl, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "RUNTIME_DIRECTORY", tmp_path)
    code, _, error = ctl("status", "office")
    assert code == 1 and "instance office is not running; start it with: systemctl start bulkvpnd@office" in error


def test_an_instance_that_crashed(ctl, tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "status.sock"))
    assert "is not running" in ctl("status", f"{tmp_path}/")[2]


@pytest.mark.parametrize("answer", [b"", b"garbage\n", b"{\n", b"\xff\xff\n", None, b"[]\n", b"null\n",
                                    b'{"error": "unknown command"}\n', b"[" * 100000],
                         ids=range(9))  # fmt: skip
def test_a_strange_answer_is_one_line(ctl, instance, answer):
    instance(answer)
    code, out, error = ctl("status", "server")
    assert code == 1 and out == "" and error.startswith("bulkvpnctl: instance server does not ")
    assert error.count("\n") == 1 and "Traceback" not in error


def test_json_is_an_array_of_what_the_instances_say(ctl, instance):
    instance(line())
    code, out, error = ctl("status", "--json")
    assert (code, json.loads(out), error) == (0, [REPORT], "")


def test_an_instance_that_does_not_answer_hides_no_other(ctl, instance):
    instance(b"", "a")
    instance(line(), "b")
    code, out, error = ctl("status")
    assert code == 1 and "alice" in out and "instance a does not answer" in error


def test_watching_goes_on_until_it_is_interrupted(ctl, tmp_path, monkeypatch):
    """Each look asks again: an instance that ended is said, and ends the watching only if none is left."""
    asked = []

    def ask_all(instance):
        asked.append(instance)
        if len(asked) == 1:
            return [REPORT], []
        if len(asked) == 2:
            return [REPORT], [status.StatusError("instance [b] does not answer")]
        raise status.StatusError("no instance is running")

    monkeypatch.setattr(status, "ask_all", ask_all)
    code, out, error = ctl("status", "--watch", "0.1")
    assert code == 1 and asked == [None] * 3 and "no instance is running" in error
    assert "alice" in out and "instance [b] does not answer" in out


@pytest.mark.parametrize("raw", ["0", "-1", "x", "nan", "1e9", ""])
def test_a_period_that_is_none(raw, capsys):
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    assert parser.parse_args(["--watch"]).watch == 2 and parser.parse_args(["--watch", "0.5"]).watch == 0.5
    with pytest.raises(SystemExit):
        parser.parse_args(["--watch", raw])
    assert "a number of seconds from 0.1 to 3600" in capsys.readouterr().err
