"""admin.top: the history behind its bars, and the command."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from reports import REPORT, changed

from bulkvpnd.admin import status, top


def test_a_history_has_the_last_rates_of_those_who_are_there():
    history = top.History(3)
    for rate in range(5):
        history.add([changed(session__rate_in=rate)])
    assert list(history.rates["server", "alice", "in"]) == [2, 3, 4]
    assert list(history.rates["server", "alice", "out"]) == [1_500_000] * 3
    history.add([changed(sessions=[])])
    assert history.rates == {}


def test_once(ctl, monkeypatch):
    monkeypatch.setattr(status, "ask_all", lambda instance: ([REPORT], []))
    code, out, _ = ctl("top", "--once")
    assert code == 0 and "● server  well" in out and "alice" in out


def test_nobody_to_ask(ctl, monkeypatch):
    answers = [([REPORT], [status.StatusError("instance b does not answer")])]

    def ask_all(instance):
        if not answers:
            raise status.StatusError("no instance is running", 69)
        return answers.pop()

    monkeypatch.setattr(status, "ask_all", ask_all)
    monkeypatch.setattr(top, "PERIOD", 0.01)
    code, out, error = ctl("top")
    assert code == 69 and "instance b does not answer" in out and "no instance is running" in error


def test_one_that_does_not_answer_is_the_status_of_one_look(ctl, monkeypatch):
    monkeypatch.setattr(status, "ask_all", lambda instance: ([REPORT], [status.StatusError("b is silent", 1)]))
    code, out, error = ctl("top", "--once")
    assert code == 1 and "alice" in out and "b is silent" in error


@pytest.mark.parametrize("command", [["top"], ["status", "--watch", "0.1"]], ids=" ".join)
def test_what_is_no_terminal_gets_each_look_at_once(command):
    """A reader in a pipe sees the first look while the command goes on."""
    script = ("from bulkvpnd import cli; from bulkvpnd.admin import status; from reports import REPORT\n"
              "status.ask_all = lambda instance: ([REPORT], [])\n"
              f"raise SystemExit(cli.bulkvpnctl({command!r}))\n")
    here = pathlib.Path(__file__)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": f"{here.parents[3]}:{here.parent}"}) as process:
        try:
            seen = 0
            while seen < 2:
                line = process.stdout.readline()
                assert line, process.stderr.read()
                seen += "● server" in line
            assert process.poll() is None
        finally:
            process.terminate()
    assert process.returncode == 128 + signal.SIGTERM


def test_a_terminal_is_given_back(monkeypatch):
    """After SIGTERM it shows its former screen and its cursor again."""
    script = ("from bulkvpnd import cli; from bulkvpnd.admin import status; from reports import REPORT\n"
              "status.ask_all = lambda instance: ([REPORT], [])\n"
              "raise SystemExit(cli.bulkvpnctl(['top']))\n")
    here = pathlib.Path(__file__)
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        with subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stdin=theirs,
                              env={**os.environ, "TERM": "xterm",
                                   "PYTHONPATH": f"{here.parents[3]}:{here.parent}"}) as process:
            os.close(theirs)
            shown = b""
            while b"alice" not in shown:
                shown += terminal.read(65536)
            process.terminate()
            # EIO is how the other end of a terminal says that the last process has closed it.
            with contextlib.suppress(OSError):
                while more := terminal.read(65536):
                    shown += more
    assert shown.index(b"\x1b[?1049h") < shown.index(b"\x1b[?1049l")
    assert shown.rindex(b"\x1b[?25l") < shown.rindex(b"\x1b[?25h")
    assert process.returncode == 128 + signal.SIGTERM
