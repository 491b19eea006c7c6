"""The parts of bulkvpnctl demo that touch nothing; tests/system has the rest."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
import rich.console

from bulkvpnd.admin import demo

RESULT = {
    "direct.tcp_mbps": 16000.0, "tunnel.tcp_mbps": 6400.0, "tunnel.tcp_reverse_mbps": 3200.0, "direct.rtt_ms": 0.05,
    "tunnel.rtt_ms": 0.9, "tunnel.connections": 4, "tunnel.workers": 2, "tunnel.packets_per_frame": 61.5,
    "tunnel.cpu_s_per_gb": 0.75, "tunnel.cipher": "aes-256-gcm", "tunnel.sha256_ok": True,
}  # fmt: skip


def shown(result):
    console = rich.console.Console(file=io.StringIO(), width=120, record=True)
    console.print(demo.table(result, 5))
    return console.export_text()


def test_the_table_shows_ratios_and_units():
    text = shown(RESULT)
    for part in ("16,000", "6,400", "3,200", "0.4", "0.2", "aes-256-gcm", "61.5", "0.75", "equal", "5 s each"):
        assert part in text, part


def test_the_table_says_when_the_file_differs():
    assert "different" in shown({**RESULT, "tunnel.sha256_ok": False})


def test_json_goes_to_a_file_or_to_standard_output(tmp_path, capsys):
    demo._write_json(tmp_path / "out.json", RESULT)
    assert json.loads((tmp_path / "out.json").read_text()) == RESULT
    demo._write_json("-", RESULT)
    assert json.loads(capsys.readouterr().out) == RESULT


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(demo.DemoError, match="out.json: cannot be written: No such file or directory"):
        demo._write_json(tmp_path / "nowhere" / "out.json", RESULT)


def test_cpu_seconds_counts_a_family_and_nobody_else():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        family = demo.cpu_seconds(parent.pid)
        assert len(family) == 2 and parent.pid in family and os.getpid() not in family
        assert all(0 <= seconds < 5 for seconds in family.values())
        assert family.keys() < demo.cpu_seconds(os.getpid()).keys()
        parent.stdin.close()
    assert demo.cpu_seconds(parent.pid) == {}


@pytest.mark.skipif(not pathlib.Path(demo.__file__).parents[2].joinpath("setup.py").exists(),
                    reason="needs the package in its source tree")
def test_the_demo_of_a_source_tree_starts_that_tree(monkeypatch):
    for name in ("WATCHDOG_USEC", "RUNTIME_DIRECTORY", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, "left over")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert demo.set_environment() == [sys.executable, "-m", "bulkvpnd"]
    assert pathlib.Path(os.environ["PYTHONPATH"], "setup.py").exists()
    assert "WATCHDOG_USEC" not in os.environ and "RUNTIME_DIRECTORY" not in os.environ
