"""control.status: the status socket, asked well and badly."""

import contextlib
import gc
import json
import os
import stat
import subprocess
import sys
import time

import gevent
import gevent.subprocess
import pytest
from doubles import until
from gevent import socket
from gevent.event import Event

from bulkvpnd.admin import status as admin
from bulkvpnd.control import status as status_module
from bulkvpnd.control.status import (
    PLACES_EACH, PLACES_MAX, PRIVILEGED_MAX, REQUEST_MAX, Claim, CommandError, StatusSocket,
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    reports = StatusSocket(tmp_path / "run", lambda: {"instance": "server"})
    reports.start()
    yield tmp_path / "run" / "status.sock"
    reports.stop()
    assert not (tmp_path / "run" / "status.sock").exists()


def ask(path, request, end=True):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(request)
        if end:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(65536):
            answer += part
        return answer


def test_one_line_in_one_line_out(path):
    assert ask(path, b'{"command": "status"}\n', end=False) == b'{"instance": "server"}\n'


@pytest.mark.parametrize(
    "request_line",
    [
        b"", b"\n", b"garbage\n", b"\xff\xfe\n", b"[]\n", b"null\n", b"1\n", b"{}\n", b'{"command": 1}\n',
        b'{"command": null}\n', b'{"command": ["status"]}\n', b'{"command": {}}\n', b'{"command": "reboot"}\n',
        b"[" * 4000 + b"\n", b"x" * 3 * PRIVILEGED_MAX,
    ],
    ids=range(15),
)  # fmt: skip
def test_anything_else_is_answered_with_what_there_is(path, request_line, capfd):
    try:
        answer = ask(path, request_line)
    except (ConnectionResetError, BrokenPipeError):
        # It ends with bytes unread, when the request is longer than any may be.
        assert len(request_line) > PRIVILEGED_MAX
    else:
        assert json.loads(answer) == {"error": UNKNOWN % "status"}
    assert "Traceback" not in capfd.readouterr().err
    assert ask(path, b'{"command": "status"}\n') == b'{"instance": "server"}\n'


NOBODY = 65534
ASKER = """
import contextlib, os, socket, sys
os.setresuid(*[int(sys.argv[1])] * 3)
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect("status.sock")
    with contextlib.suppress(BrokenPipeError):
        sock.sendall(sys.stdin.buffer.read() + b"\\n")
    with contextlib.suppress(ConnectionResetError):
        sys.stdout.buffer.write(sock.makefile("rb").readline())
"""


def ask_as(user, request):
    """Asks the socket in the current directory."""
    process = gevent.subprocess.run([sys.executable, "-c", ASKER, str(user)], input=request, capture_output=True,
                                    timeout=10)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout) if process.stdout else None


STATUS, DRAIN = b'{"command": "status"}', b'{"command": "drain"}'
UNKNOWN = "not a command of this instance, which has: %s; name an instance that has it"
REFUSED = {"error": "drain: only root may order that; run it as root", "status": 77}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")


@pytest.fixture
def drained(tmp_path, monkeypatch):
    """The requests to drain that a socket took, which everybody may open, in the current directory."""
    done = []
    reports = StatusSocket(tmp_path, lambda: {"instance": "server"}, {"drain": lambda one: done.append(one) or {}})
    reports.start()
    (tmp_path / "status.sock").chmod(0o666)
    tmp_path.chmod(0o711)  # of those above it nobody asks who is in it already
    monkeypatch.chdir(tmp_path)
    yield done
    reports.stop()


@needs_root
def test_who_is_not_root_may_only_look(drained, tmp_path):
    assert ask_as(NOBODY, STATUS) == {"instance": "server"}
    assert ask_as(NOBODY, DRAIN) == REFUSED
    too_long = b'{"command": "status", "x": "' + b"x" * REQUEST_MAX + b'"}'
    assert ask_as(NOBODY, too_long) in (None, {"error": UNKNOWN % "status, drain"})
    assert drained == []
    assert ask(tmp_path / "status.sock", DRAIN[:-1] + b', "text": "' + b"x" * 3 * REQUEST_MAX + b'"}\n') == b"{}\n"
    assert len(drained) == 1


@needs_root
def test_the_daemon_s_own_user_may_only_look(drained):
    """Its workers have it too."""
    os.seteuid(NOBODY)
    try:
        assert ask_as(NOBODY, STATUS) == {"instance": "server"}
        assert ask_as(NOBODY, DRAIN) == REFUSED and drained == []
        assert ask_as(0, DRAIN) == {} and len(drained) == 1
    finally:
        os.seteuid(0)


def connected(path, count, held):
    """Connections that say nothing. held: ExitStack."""
    for _ in range(count):
        sock = held.enter_context(socket.socket(socket.AF_UNIX))
        sock.connect(str(path))
        yield sock


FULL = {"error": "too many requests at once; try again when the others are answered"}


def test_one_user_has_so_many_places_and_the_rest_is_refused_at_once(path):
    with contextlib.ExitStack() as held:
        first, *_ = list(connected(path, PLACES_EACH, held))
        for sock in connected(path, 200, held):
            assert json.loads(sock.makefile().readline()) == FULL
        first.sendall(b'{"command": "status"}\n')
        assert json.loads(first.makefile().readline()) == {"instance": "server"}
        until(lambda: ask(path, b'{"command": "status"}\n') == b'{"instance": "server"}\n', "its place is free")


CROWD = """
import os, socket, sys
for user in range(1, int(sys.argv[1])):
    os.seteuid(user)
    for _ in range(int(sys.argv[2])):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("status.sock")
        os.dup(sock.detach())
    os.seteuid(0)
print(flush=True), input()
"""


@needs_root
def test_a_crowd_does_not_keep_out_root(drained, tmp_path):
    """Many users with many connections each, that say nothing: root's are answered, and before the others end."""
    users, each = PLACES_MAX + 1, PLACES_MAX
    with gevent.subprocess.Popen([sys.executable, "-c", CROWD, str(users), str(each)], stdin=gevent.subprocess.PIPE,
                                 stdout=gevent.subprocess.PIPE) as crowd:
        try:
            assert crowd.stdout.readline() == b"\n"
            assert ask_as(NOBODY, STATUS) == FULL
            for _ in range(PLACES_EACH):
                assert ask(tmp_path / "status.sock", STATUS + b"\n") == b'{"instance": "server"}\n'
        finally:
            crowd.communicate(b"\n")
    until(lambda: ask_as(NOBODY, STATUS) == {"instance": "server"}, "there is room again")


def test_what_goes_wrong_with_a_command_is_one_answer(tmp_path, capfd):
    def refuse(request):
        raise CommandError(f"no {request['what']}", 78)

    reports = StatusSocket(tmp_path, lambda: {"instance": "server"}, {"refuse": refuse}, os.geteuid())
    reports.start()
    path = tmp_path / "status.sock"
    assert json.loads(ask(path, b'{"command": "refuse", "what": "way"}\n')) == {"error": "no way", "status": 78}
    answer = json.loads(ask(path, b'{"command": "refuse"}\n'))
    assert answer == {"error": "refuse: internal error; the log of the instance says more"}
    assert ask(path, b'{"command": "status"}\n') == b'{"instance": "server"}\n'
    reports.stop()


def test_a_command_is_not_done_by_halves_when_the_asker_loses_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(status_module, "TIME_MAX", 0.1)
    begun, go, done = Event(), Event(), Event()

    def slow(request):
        begun.set()
        go.wait()
        done.set()
        return {}

    reports = StatusSocket(tmp_path, dict, {"slow": slow}, os.geteuid())
    reports.start()
    assert ask(tmp_path / "status.sock", b'{"command": "slow"}\n') == b""
    assert begun.is_set() and not done.is_set()
    go.set()
    assert done.wait(5)
    reports.stop()


def test_a_slow_request_ends_and_holds_nobody(path, monkeypatch):
    monkeypatch.setattr(status_module, "TIME_MAX", 0.2)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b'{"comm')
        begun = time.monotonic()
        assert ask(path, b'{"command": "status"}\n')
        assert time.monotonic() - begun < 0.1
        assert sock.recv(1) == b""
        assert 0.1 < time.monotonic() - begun < 1


def test_a_reader_that_reads_nothing_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(status_module, "TIME_MAX", 0.2)
    gc.collect()  # the garbage of earlier tests may have sockets
    before = len(os.listdir("/proc/self/fd"))
    reports = StatusSocket(tmp_path, lambda: {"x": "x" * (1 << 22)})
    reports.start()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "status.sock"))
        sock.sendall(b'{"command": "status"}\n')
        until(lambda: len(os.listdir("/proc/self/fd")) == before + 3)
        until(lambda: len(os.listdir("/proc/self/fd")) == before + 2)
    reports.stop()


def test_only_owner_and_group_may_ask(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750


def test_what_a_crash_left_behind_is_in_nobody_s_way(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "status.sock"))
    reports = StatusSocket(tmp_path, lambda: {})
    reports.start()
    assert ask(tmp_path / "status.sock", b'{"command": "status"}\n') == b"{}\n"
    reports.stop()
    reports.stop()


def test_a_directory_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        StatusSocket(tmp_path / "file" / "run", lambda: {}).start()


def test_the_administrator_s_tool_and_the_socket_understand_each_other(path):
    # In another greenlet: the tool's sockets are this loop's too.
    assert gevent.spawn(admin.ask, path).get(timeout=5) == {"instance": "server"}


def test_a_runtime_directory_is_one_process_s(tmp_path):
    directory = tmp_path / "run" / "server"
    with Claim(directory):
        with pytest.raises(OSError, match=f"^{directory}: another instance runs with this runtime directory"):
            Claim(directory).__enter__()
        with Claim(tmp_path / "run" / "other"):
            pass
        # What it starts does not inherit the claim.
        program = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert subprocess.run([sys.executable, "-c", program, directory], capture_output=True).returncode == 1
        child = subprocess.Popen([sys.executable, "-c", "print(flush=True), input()"], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, close_fds=False)
        child.stdout.readline()
    with Claim(directory):
        pass
    child.communicate(b"\n")
