"""bulkvpnctl status: what it makes of instances that answer, of those that do not, and of strange answers."""

import argparse
import json
import os
import socket
import threading

import pytest
import rich.console

from bulkvpnd.admin import status

REPORT = {
    "instance": "server", "version": "1", "mode": "server", "pid": 7, "since": 0, "device": "bulk0",
    "offload": ["csum", "tso"], "addresses": ["10.86.0.1/24"], "listen": ["[::]:7443"],
    "workers": [{"index": 0, "alive": True, "restarts": 1}, {"index": 1, "alive": False, "restarts": 0}],
    "drops": {"no_session": 3, "queue_full": 0},
    "listener": {"handshakes": 2, "admitted": 9, "source_full": 4},
    "sessions": [{
        "identity": "alice", "session": 1, "addresses": ["10.86.0.2"], "cipher": "aes-256-gcm", "offload": [],
        "age": 1, "connections": [
            {"index": 0, "worker": 0, "peer": "[2001:db8::2]:4711", "age": 90061, "rtt_ms": 0.84, "bytes_out": 1536,
             "bytes_in": 3 << 30, "segments_out": 1234567, "segments_in": 1, "frames_out": 2, "frames_in": 3,
             "queued": 0},
            {"index": 1, "worker": 1, "peer": "192.0.2.1:1"},
        ],
    }],
}  # fmt: skip


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


def run(capsys, instance=None, as_json=False):
    code = status.run(argparse.Namespace(instance=instance, json=as_json))
    return (code, *capsys.readouterr())


def line(report=REPORT):
    return json.dumps(report).encode() + b"\n"


def test_no_instance(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "RUNTIME_DIRECTORY", tmp_path)
    code, out, error = run(capsys)
    assert (code, out) == (1, "") and "no instance is running" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "\x1b[2J", "a\n"])
def test_what_is_no_name_is_wrong_usage(capsys, name):
    code, _, error = run(capsys, name)
    assert code == os.EX_USAGE and error[:-1].isprintable()


def test_an_instance_that_does_not_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "RUNTIME_DIRECTORY", tmp_path)
    code, _, error = run(capsys, "office")
    assert code == 1 and "instance office is not running; start it with: systemctl start bulkvpnd@office" in error


def test_an_instance_that_crashed(capsys, tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "status.sock"))
    assert "is not running" in run(capsys, str(tmp_path) + "/")[2]


@pytest.mark.parametrize("answer", [b"", b"garbage\n", b"{\n", b"\xff\xff\n", None, b"[]\n", b"null\n",
                                    b'{"error": "unknown command"}\n', b"[" * 100000],
                         ids=range(9))  # fmt: skip
def test_a_strange_answer_is_one_line(capsys, instance, answer):
    instance(answer)
    code, out, error = run(capsys, "server")
    assert code == 1 and out == "" and error.startswith("bulkvpnctl: instance server does not ")
    assert error.count("\n") == 1 and "Traceback" not in error


def test_json_is_an_array_of_what_the_instances_say(capsys, instance):
    instance(line())
    code, out, error = run(capsys, as_json=True)
    assert (code, json.loads(out), error) == (0, [REPORT], "")


def test_an_instance_that_does_not_answer_hides_no_other(capsys, instance):
    instance(b"", "a")
    instance(line(), "b")
    code, out, error = run(capsys)
    assert code == 1 and "alice" in out and "instance a does not answer" in error


def shown(*reports):
    console = rich.console.Console(width=200, record=True, file=open(os.devnull, "w"), highlight=False)
    status.show(reports, console)
    return console.export_text()


def test_the_table():
    text = shown(REPORT)
    for part in ("server", "process 7", "bulk0 10.86.0.1/24", "csum tso", "1 of 2 alive, 1 restarts", "no_session 3",
                 "alice", "10.86.0.2", "aes-256-gcm", "peer without offload", "[2001:db8::2]:4711", "1d 1h", "0.8 ms",
                 "accept   2 now, admitted 9, source full 4", "1.5 KiB", "3.0 GiB", "1,234,567"):  # fmt: skip
        assert part in text, part
    assert "queue_full" not in text


def test_a_client_without_a_session():
    report = {**REPORT, "mode": "client", "sessions": [], "addresses": [], "offload": [], "drops": {}}
    text = shown({name: value for name, value in report.items() if name != "listener"})
    assert "accept" not in text
    for part in ("no session", "no address yet", "offload  none", "drops    none"):
        assert part in text


def test_nothing_in_a_report_is_markup():
    text = shown({**REPORT, "instance": "[red]x[/red]", "device": "[bold]"})
    assert "[red]x[/red]" in text and "device   [bold]" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m 59s"), (3600, "1h"), (86399, "23h 59m"), (90061, "1d 1h"),
     (86400 * 400, "400d")],
)  # fmt: skip
def test_spans_have_their_two_largest_units(seconds, text):
    assert status._span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (5 << 40, "5.0 TiB"),
     (1 << 60, "1048576.0 TiB")],
)  # fmt: skip
def test_bytes(count, text):
    assert status._bytes(count) == text
