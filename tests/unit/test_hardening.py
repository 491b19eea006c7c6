"""hardening: in processes of their own, because it cannot be taken back."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PR_GET_DUMPABLE = 3
"""linux/prctl.h."""


def said(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.split(), result.stderr


def test_memory_is_hidden_afterwards_and_not_before():
    output, error = said(
        "import ctypes, resource\n"
        "from bulkvpnd.hardening import hide_memory\n"
        f"dumpable = lambda: ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))\n"
        "print(dumpable(), hide_memory(), dumpable(), *resource.getrlimit(resource.RLIMIT_CORE))"
    )
    assert (output, error) == (["1", "True", "0", "0", "0"], "")


def test_where_prctl_cannot_be_reached_it_says_so_and_the_limit_holds():
    output, error = said(
        "import resource, sys\n"
        "from bulkvpnd.hardening import hide_memory\n"
        "sys.modules['ctypes'] = None\n"
        "print(hide_memory(), *resource.getrlimit(resource.RLIMIT_CORE))"
    )
    assert (output, error) == (["False", "0", "0"], "")


def test_it_still_opens_what_it_has_by_its_own_descriptors():
    """As the key does on its way into TLS: see control.tls.make_context."""
    output, error = said(
        "import ctypes, os\n"
        "from bulkvpnd.hardening import hide_memory\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "hidden = hide_memory()\n"
        "descriptor = os.memfd_create('certificate')\n"
        "os.write(descriptor, b'PEM')\n"
        "print(hidden, open(f'/proc/self/fd/{descriptor}').read())"
    )
    assert (output, error) == (["True", "PEM"], "")


REACHING = """
import itertools, json, os, pathlib, socket, subprocess, sys, threading, traceback
from bulkvpnd.hardening import confine
directory = pathlib.Path(sys.argv[1])
for number in range(3):
    (directory / f"old{number}").mkdir()
made, gone = itertools.count(), itertools.count()
secret = directory / "server.conf"
secret.write_text("key")
descriptor = os.open(directory / "log", os.O_WRONLY | os.O_CREAT)

sockets = [socket.socket(socket.AF_UNIX) for _ in range(3)]

def refused(act):
    try:
        act()
    except OSError as error:
        return error.strerror
    return None

WAYS = {
    "read": secret.read_text,
    "write": lambda: secret.write_text("other"),
    "list": lambda: os.listdir(directory),
    "make": lambda: (directory / f"new{next(made)}").mkdir(),
    "remove": lambda: (directory / f"old{next(gone)}").rmdir(),
    "change": lambda: secret.chmod(0o600),
    "give": lambda: os.chown(secret, -1, -1),
    "cut": lambda: os.truncate(secret, 3),
    "run": lambda: subprocess.run(["/bin/true"]),
    "process": lambda: pathlib.Path("/proc/1/status").read_text(),
    "socket": lambda: socket.socket().close(),
    "connect": lambda: sockets.pop().connect(sys.argv[2]),
    "signal": lambda: os.kill(os.getppid(), 0),
}

def all_refused():
    return {name: refused(way) for name, way in WAYS.items()}

if "without" in sys.argv:
    sys.modules[sys.argv[-1]] = None
said = {"before": all_refused(), "missing": confine(), "after": all_refused()}
thread = threading.Thread(target=lambda: said.update(thread=all_refused()))
thread.start()
thread.join()
import wave  # a module that nobody has needed yet
try:
    raise ValueError
except ValueError:
    said["traceback"] = traceback.format_exc()
said["written"] = os.write(descriptor, b"more")
print(json.dumps(said))
"""
FILES = dict.fromkeys(("read", "write", "list", "make", "remove", "run", "process"), "Permission denied")
CALLS = dict.fromkeys(("change", "give", "cut", "socket", "connect", "signal"), "Operation not permitted")
"""What Landlock refuses, and what seccomp does."""


@pytest.fixture
def reached(tmp_path_factory):
    """reached(*arguments): what a process can do before and after it has been confined."""

    def reach(*arguments):
        directory = tmp_path_factory.mktemp("reached")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "status.sock"))
            listener.listen()
            done = subprocess.run([sys.executable, "-c", REACHING, directory, directory / "status.sock", *arguments],
                                  cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        if said["missing"] and not arguments:
            pytest.skip(f"needs a kernel with it: {said['missing']}")
        return said

    return reach


def test_a_confined_process_reaches_nothing_by_itself(reached):
    said = reached()
    assert set(said["before"].values()) == {None} and said["missing"] == []
    assert said["after"] == said["thread"] == FILES | CALLS


def test_a_confined_process_works_on(reached):
    """With what it has open, and with all of Python."""
    said = reached()
    assert said["written"] == 4 and "File" in said["traceback"]


@pytest.mark.parametrize(("module", "name", "lost"), [("ctypes", "Landlock", FILES), ("seccomp", "seccomp", CALLS)])
def test_what_is_missing_is_named_and_the_other_half_holds(reached, module, name, lost):
    reached()
    said = reached("without", module)
    (line,) = said["missing"]
    assert line.startswith(f"{name}: ") and module in line
    # A file is not cut for the one reason where it is for the other.
    after = {way: reason for way, reason in said["after"].items() if way != "cut"}
    assert after == {way: None if way in lost else reason for way, reason in (FILES | CALLS).items() if way != "cut"}


ATTEMPTS = """
import os, sys
import gevent
from bulkvpnd.dataplane import worker

def attempt():
    for way in (lambda: open(sys.argv[2]), lambda: os.kill(os.getppid(), 0)):
        try:
            way()
            print("done", flush=True)
        except OSError as error:
            print(error.strerror, flush=True)

gevent.spawn(attempt)
worker.main()
"""


def test_a_worker_is_confined_before_it_serves(tmp_path, reached):
    """The greenlet runs when the worker waits for its first message."""
    reached()
    secret = tmp_path / "server.conf"
    secret.touch()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with subprocess.Popen([sys.executable, "-c", ATTEMPTS, str(theirs.fileno()), secret], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, pass_fds=[theirs.fileno()]) as process, ours:
        theirs.close()
        assert [process.stdout.readline() for _ in range(2)] == ["Permission denied\n", "Operation not permitted\n"]
        ours.close()
        assert process.wait(timeout=20) == 0
