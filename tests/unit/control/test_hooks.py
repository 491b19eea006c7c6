"""control.hooks: real programs, and what they may and may not do."""

import os
import types

import gevent
import pytest
from doubles import until

from bulkvpnd.config import ConfigurationError
from bulkvpnd.control import hooks as hooks_module
from bulkvpnd.control.hooks import OPTIONS, RUNNING_MAX, Hooks, check


def configured(path, **programs):
    fields = {name.replace("-", "_"): None for name in OPTIONS.values()} | programs
    return types.SimpleNamespace(name="server", mode="server", path=path, **fields)


@pytest.fixture
def program(tmp_path):
    """Makes a program of lines of sh."""
    def make(text, name="hook", mode=0o755):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(mode)
        return path

    return make


def test_a_program_gets_an_argument_and_just_these_variables(program, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "of the daemon")
    hook = program(f'/usr/bin/env -0 >{tmp_path}/env.new; echo "$#:$1" >{tmp_path}/argv; pwd >{tmp_path}/cwd\n'
                   f'mv {tmp_path}/env.new {tmp_path}/env')
    made = Hooks(configured(tmp_path, on_client_connect=hook), "bulk0")
    made.tell("up")
    gevent.sleep(0)
    assert not (tmp_path / "env").exists(), "it is for another event"
    made.tell("client-connect", identity="$(touch x); alice", addresses="10.86.0.2", peer="192.0.2.1:1")
    until((tmp_path / "env").exists, "it ran", 10)
    found = dict(one.split("=", 1) for one in (tmp_path / "env").read_text().split("\0") if one)
    for name in ("PWD", "SHLVL", "_", "OLDPWD"):
        found.pop(name, None)  # the shell's own
    assert found == {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "BULKVPN_EVENT": "client-connect",
        "BULKVPN_INSTANCE": "server", "BULKVPN_MODE": "server", "BULKVPN_DEVICE": "bulk0",
        "BULKVPN_IDENTITY": "$(touch x); alice", "BULKVPN_ADDRESSES": "10.86.0.2", "BULKVPN_PEER": "192.0.2.1:1",
    }
    assert (tmp_path / "argv").read_text() == "1:client-connect\n"
    assert (tmp_path / "cwd").read_text() == "/\n"
    made.stop()


def test_output_is_logged_escaped_and_bounded(program, tmp_path, journal):
    hook = program("printf 'one\\n\\033[2Jtwo\\n'; head -c 1000000 /dev/zero | tr '\\0' x; yes | head -1000; exit 3")
    made = Hooks(configured(tmp_path, on_up=hook), "bulk0")
    made.tell("up")
    until(lambda: any("ended with status 3" in one for one in journal.messages), "its end", 10)
    assert journal.messages[:2] == [f"{hook} up: one", f"{hook} up: \\x1b[2Jtwo"]
    assert len(journal.messages) == 52 and "more lines" in journal.messages[-2]
    assert all(len(one) < 300 + len(str(hook)) + 10 for one in journal.messages)


def test_a_program_ends_when_its_time_is_up_with_what_it_started(program, tmp_path, caplog):
    hook = program(f"sleep 1000 & echo $! >{tmp_path}/pid; sleep 1000")
    made = Hooks(configured(tmp_path, on_up=hook), "bulk0", time_max=0.3)
    made.tell("up")
    until(lambda: any("ended after" in one for one in caplog.messages), "its end", 10)
    pid = (tmp_path / "pid").read_text().strip()

    def is_gone():
        try:
            with open(f"/proc/{pid}/stat") as stream:
                return ") Z " in stream.read()
        except (FileNotFoundError, ProcessLookupError):  # before, or while it is read
            return True

    until(is_gone, "the program that it started is gone", 10)
    made.stop()


@pytest.fixture
def held(program, tmp_path):
    """Hooks whose programs take note of what they are started for, and end when `go` is called. lines(): what ended."""
    log, gate = tmp_path / "log", tmp_path / "go"
    hook = program(f"while ! [ -e {gate} ]; do sleep 0.02; done; echo $1 $BULKVPN_IDENTITY $BULKVPN_PEER >>{log}")
    made = Hooks(configured(tmp_path, on_client_connect=hook, on_client_disconnect=hook), "bulk0")

    def lines():
        gate.touch()
        until(lambda: not made._running, "all are done", 15)
        return log.read_text().splitlines()

    yield made, lines
    made.stop()


def test_so_many_at_a_time_and_one_for_each_client(held):
    made, lines = held
    for identity in "ab":
        made.tell("client-connect", identity=identity)
        made.tell("client-disconnect", identity=identity)
    for number in range(10):
        made.tell("client-connect", identity=f"n{number}")
    assert len(made._running) == RUNNING_MAX
    done = lines()
    for identity in "ab":
        assert [one for one in done if one.endswith(f" {identity}")] == [
            f"client-connect {identity}", f"client-disconnect {identity}"]
    assert sum(" n" in one for one in done) == 10


def test_one_that_comes_and_goes_holds_up_no_other(held):
    """What is over before its turn is not told of, so it takes no room; each beginning that is told has its end."""
    made, lines = held
    for number in range(150):
        made.tell("client-connect", identity="mallory", addresses="10.86.0.9", peer=str(number))
        made.tell("client-disconnect", identity="mallory", addresses="10.86.0.9")
    made.tell("client-connect", identity="mallory", addresses="10.86.0.9", peer="last")
    assert sum(map(len, made._waiting.values())) <= 2
    made.tell("client-connect", identity="eve", addresses="10.86.0.2", peer="x")
    made.tell("client-disconnect", identity="eve", addresses="10.86.0.2")
    done = lines()
    assert [one for one in done if "mallory" in one] == [
        "client-connect mallory 0", "client-disconnect mallory", "client-connect mallory last"]
    assert [one for one in done if "eve" in one] == ["client-connect eve x", "client-disconnect eve"]


def test_sessions_of_one_identity_are_told_apart(held):
    made, lines = held
    made.tell("client-connect", identity="a", addresses="10.86.0.2", peer="first")
    made.tell("client-connect", identity="a", addresses="10.86.0.3", peer="second")
    made.tell("client-disconnect", identity="a", addresses="10.86.0.2")
    assert lines() == ["client-connect a first", "client-connect a second", "client-disconnect a"]


def test_an_end_alone_is_told_of_what_began(held, program, tmp_path):
    """Nothing waits without bound where only one of the two has a program."""
    made, lines = held
    made.reconfigure(configured(tmp_path, on_client_disconnect=made._configuration.on_client_disconnect))
    for _ in range(100):
        made.tell("client-connect", identity="a")
        made.tell("client-disconnect", identity="a")
        gevent.sleep(0)
    assert sum(map(len, made._waiting.values())) <= 2
    assert set(lines()) == {"client-disconnect a"}


def test_a_stop_waits_but_not_for_ever(program, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hooks_module, "STOP_TIME", 0.3)
    quick, slow = program(f"sleep 0.1; touch {tmp_path}/done", "quick"), program("sleep 1000", "slow")
    made = Hooks(configured(tmp_path, on_up=slow, on_down=quick), "bulk0")
    made.tell("down")
    made.stop()
    assert (tmp_path / "done").exists() and not caplog.messages
    made.tell("up")
    made.stop()
    assert any("not waited for" in one for one in caplog.messages) and not made._running


def test_programs_that_cannot_be_used_are_named_before(program, tmp_path):
    path = tmp_path / "server.conf"
    check(configured(path))
    check(configured(path, on_up=program("")))
    with pytest.raises(ConfigurationError, match="server.conf: on-up = /no/such: No such file"):
        check(configured(path, on_up="/no/such"))
    with pytest.raises(ConfigurationError, match="on-up = .*: cannot be executed; run: chmod"):
        check(configured(path, on_up=program("", mode=0o644)))
    with pytest.raises(ConfigurationError, match="cannot be executed"):
        check(configured(path, on_up=tmp_path))
    with pytest.raises(ConfigurationError, match="on-down = .*: others can change it; run: chown root"):
        check(configured(path, on_down=program("", mode=0o777)))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_a_program_of_another_user_is_refused(program, tmp_path):
    hook = program("")
    os.chown(hook, 65534, 65534)
    with pytest.raises(ConfigurationError, match="others can change it"):
        check(configured(tmp_path, on_up=hook))


def test_a_program_that_went_is_one_line(tmp_path, caplog):
    made = Hooks(configured(tmp_path, on_up="/no/such"), "bulk0")
    made.tell("up")
    until(lambda: any("cannot be started" in one for one in caplog.messages), "a line", 5)
    assert not made._running
