"""The helper for resolvconf: what it takes, and how long its record lives. It runs as a process of its own."""

import fcntl
import json
import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resolvers import Helpers, Machine, until

from bulkvpnd.config import values
from bulkvpnd.host import program, resolvconf
from bulkvpnd.host.resolvconf import HeldRecord, Refused, Request

GOOD = {"instance": "home", "servers": ["10.86.0.1", "fd86::1"], "domains": ["corp.example"]}
TEXT = "nameserver 10.86.0.1\nnameserver fd86::1\nsearch corp.example\n"
RECORD = "tun.bulkvpnd-home"


def message(**fields):
    return json.dumps(GOOD | fields).encode()


# What it takes


def test_a_request():
    request = Request.decode(message())
    assert request == Request("home", ("10.86.0.1", "fd86::1"), ("corp.example",))
    assert Request.decode(request.encode()) == request


LONGEST_DOMAIN = ".".join(["x" * 63] * 3 + ["x" * 61])


def test_the_longest_request():
    longest = Request("x" * 64, (":".join(["1111"] * 8),) * 8, (LONGEST_DOMAIN,) * 8)
    assert len(longest.encode()) <= resolvconf.REQUEST_MAX and Request.decode(longest.encode()) == longest


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "should be JSON"),
        (b"{", "should be JSON"),
        (b"\xff{}", "should be JSON"),
        (b"[" * 4096, "should be JSON"),
        (b"[]", "should be an object with"),
        (b"{}", "should be an object with"),
        (message(more=1), "should be an object with"),
        (message() + b" " * 4096, "should have at most 4096 bytes"),
        *((message(instance=value), "instance: should be 1 to 64 letters")
          for value in ("", "a/b", "a b", "../x", "x\n", "x" * 65, "é", 1, None, ["home"])),
        *((message(servers=value), "should be a list of at most 8 unicast addresses")
          for value in ("10.86.0.1", None, {}, [1], [None], ["10.86.0.1 "], ["10.86.0.1\n"], ["10.86.0.256"],
                        ["127.0.0.1"], ["::1"], ["0.0.0.0"], ["224.0.0.1"], ["ff02::1"], ["fe80::1"], ["fe80::1%eth0"],
                        ["fd86::1%$(x)"], ["169.254.1.1"], ["::ffff:10.86.0.1"], ["example.org"], ["167772161"],
                        ["10.86.0.1"] * 9)),
        *((message(domains=value), "should be a list of at most 8 domain names")
          for value in ("corp.example", None, {}, [1], [""], ["a b"], ["a\n"], ["$(x)"], ["`x`"], ['"x'], ["a_b"],
                        ["a..b"], [".a"], ["a."], ["-a"], ["a-"], ["x" * 64], [LONGEST_DOMAIN + "x"], ["é"],
                        ["a"] * 9)),
    ],
)
def test_it_refuses(data, reason):
    with pytest.raises(Refused, match=reason):
        Request.decode(data)


def accepted(parse, *arguments):
    try:
        parse(*arguments)
    except (ValueError, Refused):
        return False
    return True


ALPHABET = st.text("aZ09.-:_f% $\n", max_size=20)


@given(ALPHABET | st.text(max_size=70))
def test_an_instance_is_called_as_elsewhere(text):
    assert accepted(Request.decode, message(instance=text)) == bool(values.NAME.fullmatch(text))


@given(ALPHABET | st.text("0189.af:", max_size=40) | st.ip_addresses().map(str))
def test_a_name_server_is_what_the_configuration_takes(text):
    assert accepted(Request.decode, message(servers=[text])) == accepted(values.name_server, text)


@given(ALPHABET | st.from_regex(r"([a-z0-9-]{1,64}\.){1,5}[a-z]{1,3}", fullmatch=True))
def test_a_domain_is_what_the_configuration_takes(text):
    assert accepted(Request.decode, message(domains=[text])) == accepted(values.domain, text)


# How long a record lives


@pytest.fixture
def machine(tmp_path, monkeypatch):
    made = Machine(tmp_path, monkeypatch)
    made.install("resolvconf")
    return made


@pytest.fixture
def helpers(machine):
    with Helpers(machine) as made:
        yield made


def held(machine, instance="home"):
    return HeldRecord(instance, machine.records, machine.socket)


def connect(machine, data=None):
    """A connection to the helper, as a daemon's that may do anything."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(20)
    connection.connect(str(machine.socket))
    if data is not None:
        connection.send(data)
    return connection


def answer(connection):
    return json.loads(connection.recv(4096))


def test_a_record_is_there_until_it_is_removed(machine, helpers):
    record = held(machine)
    assert not record.is_there()
    record.remove()
    assert machine.calls() == [], "there was nothing to remove"
    assert record.set(GOOD["servers"], GOOD["domains"]) is None
    assert machine.names() == {RECORD: TEXT}
    record.remove()
    assert machine.names() == {}
    record.remove()
    assert machine.calls().count(f"resolvconf -d {RECORD} -f") == 1
    helpers.processes[0].wait(20)
    assert helpers.processes[0].returncode == 0


def test_a_record_goes_with_the_daemon(machine, helpers):
    with connect(machine, message()) as connection:
        assert answer(connection) is None
        assert machine.names() == {RECORD: TEXT}
    until(lambda: machine.names() == {}, "the record is removed")


def test_a_second_message_ends_it(machine, helpers):
    with connect(machine, message()) as connection:
        assert answer(connection) is None
        connection.send(message())
        assert connection.recv(1) == b""
    assert machine.names() == {}


def test_a_record_goes_when_the_helper_is_to_stop(machine, helpers):
    record = held(machine)
    record.set(GOOD["servers"], [])
    helpers.processes[0].terminate()
    assert helpers.processes[0].wait(20) == 0
    assert machine.names() == {} and not record.is_there()
    record.remove()


def test_what_a_killed_helper_left_is_removed(machine, helpers):
    record = held(machine)
    record.set(GOOD["servers"], [])
    helpers.processes[0].kill()
    helpers.processes[0].wait(20)
    assert record.is_there()
    record.remove()
    assert machine.names() == {}


def test_what_was_left_by_an_earlier_run_is_removed(machine, helpers):
    machine.leave("home")
    machine.leave("other")
    held(machine).remove()
    assert list(machine.names()) == ["tun.bulkvpnd-other"]


def test_instances_have_records_of_their_own(machine, helpers):
    records = [held(machine, name) for name in ("home", "work")]
    for record in records:
        assert record.set(["10.86.0.1"], []) is None
    records[0].remove()
    assert list(machine.names()) == ["tun.bulkvpnd-work"]
    records[1].remove()


def is_waited_for(file):
    """Whether a process waits for the lock of a file, /proc/locks of proc(5)."""
    inode = f":{file.stat().st_ino} " if file.exists() else "nothing"
    with open("/proc/locks") as lines:
        return any("->" in line and inode in line for line in lines)


def test_a_helper_waits_for_the_one_before(machine, helpers):
    """A daemon that is killed and started again: the first helper may be slow, and must not remove the second's."""
    gate = machine.directory / "gate"
    os.mkfifo(gate)
    machine.install("resolvconf", first=f"read go <{gate}")
    with connect(machine, message()) as connection:
        assert answer(connection) is None
    until(lambda: f"resolvconf -d {RECORD} -f" in machine.log.read_text(), "the first is at it")
    with connect(machine, message(servers=["10.86.0.2"])) as connection:
        until(lambda: is_waited_for(machine.directory / "home.lock") or RECORD not in machine.names()
              or "10.86.0.2" in machine.names()[RECORD], "the second has begun")
        gate.write_text("go\n")
        assert answer(connection) is None
        called = [line.split()[1] for line in machine.calls() if line.startswith("resolvconf")]
        assert called == ["-a", "-d", "-a"]
        assert "10.86.0.2" in machine.names()[RECORD]
        gate_again = threading.Thread(target=gate.write_text, args=["go\n"])
        gate_again.start()
    gate_again.join()
    until(lambda: machine.names() == {}, "the record is removed")


def test_a_helper_does_nothing_without_the_lock_of_its_instance(machine, helpers):
    file = machine.directory / "home.lock"
    with open(file, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = connect(machine, message())
        until(lambda: is_waited_for(file) or machine.names().get(RECORD), "it has begun")
        assert is_waited_for(file) and RECORD not in machine.names()
    with connection:
        assert answer(connection) is None and RECORD in machine.names()


def test_a_helper_does_not_wait_for_a_request_for_ever(machine, monkeypatch):
    monkeypatch.setattr(resolvconf, "REQUEST_TIMEOUT", 0.1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        helper = threading.Thread(target=resolvconf.serve, args=(theirs, machine.directory, machine.records, 0))
        helper.start()
        helper.join(10)
        is_waiting = helper.is_alive()
        ours.shutdown(socket.SHUT_RDWR)
        helper.join()
    assert not is_waiting and machine.calls() == []


def test_a_failure_is_told_and_leaves_nothing(machine, helpers):
    machine.install("resolvconf", fails={"-a": "cannot write"})
    record = held(machine)
    assert record.set(GOOD["servers"], []) == "cannot write"
    until(lambda: "removed" in machine.log.read_text(), "what may be half done is removed")


def test_a_record_that_cannot_be_removed_is_in_the_log(machine, helpers):
    machine.install("resolvconf", fails={"-d": "cannot remove"})
    record = held(machine)
    record.set(GOOD["servers"], [])
    record.remove()
    assert helpers.processes[0].communicate(timeout=20)[1] == "the record of home is not removed: cannot remove\n"


def test_a_hook_that_fails_is_in_the_log_and_the_record_counts(machine, helpers):
    machine.install("resolvconf", last='echo "no name server" >&2; exit 1')
    record = held(machine)
    assert record.set(GOOD["servers"], []) is None
    assert record.is_there()
    record.remove()
    assert machine.names() == {}
    assert helpers.processes[0].communicate(timeout=20)[1] == f"resolvconf, for {RECORD}: no name server\n" * 2


def test_a_request_that_is_none_is_refused_and_nothing_is_run(machine, helpers):
    for data in (b"{", message(domains=["$(id)"]), b"x" * 5000):
        with connect(machine, data) as connection:
            assert answer(connection).startswith("request: ")
            assert connection.recv(1) == b"", "it is over"
    with connect(machine):
        pass  # nothing is sent
    for process in helpers.processes:
        assert process.wait(20) == 0
    assert machine.calls() == []
    assert held(machine, "a b").set(["10.86.0.1"], []) == "request: " \
        "instance: should be 1 to 64 letters, digits, dots, underscores and hyphens"


def test_who_has_not_the_capability_is_refused(machine):
    # No process has the bit of a capability that the kernel does not know.
    with Helpers(machine, 1 << 62):
        assert held(machine).set(["10.86.0.1"], []) == "request: should come from a process with CAP_NET_ADMIN"
    assert machine.calls() == []


# What the daemon makes of a helper that does not work


def test_without_a_socket(machine):
    record = held(machine)
    assert record.set(["10.86.0.1"], []) == f"{machine.socket}: No such file or directory"
    machine.leave("home")
    record.remove()


@pytest.fixture
def listener(machine):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
        made.bind(str(machine.socket))
        made.listen()
        yield made


def test_a_helper_that_does_not_answer(machine, listener, monkeypatch):
    monkeypatch.setattr(resolvconf, "ANSWER_TIMEOUT", 0.1)
    assert held(machine).set(["10.86.0.1"], []) == "no answer within 0.1 s"


def test_a_helper_that_ends(machine, listener):
    def end():
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.close()

    thread = threading.Thread(target=end)
    thread.start()
    assert "journalctl -t bulkvpnd-resolvconf" in held(machine).set(["10.86.0.1"], [])
    thread.join()


def test_the_end_does_not_wait_long_for_the_helper(machine, listener, monkeypatch):
    monkeypatch.setattr(program, "UNDO_TIMEOUT", 0.1)
    accepted = []

    def hold():
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.send(b"null")
        accepted.append(connection)

    thread = threading.Thread(target=hold)
    thread.start()
    record = held(machine)
    assert record.set(["10.86.0.1"], []) is None
    thread.join()
    machine.leave("home")
    record.remove()
    with accepted.pop() as connection:
        assert connection.recv(1) == b"", "it is told"
