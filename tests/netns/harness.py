"""Two hosts in network namespaces, real daemons in them, and waiting for events instead of sleeping.

    client ── veth0 192.0.2.2 ═══ 192.0.2.1 veth0 ── server
      └─ bulk0 ════════ connections of the session ════════ bulk0 ─┘
"""

import contextlib
import ctypes
import json
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from bulkvpnd.admin import namespaces

ROOT = pathlib.Path(__file__).parents[2]
SERVER_ADDRESSES = ["192.0.2.1/30", "2001:db8::1/64"]
CLIENT_ADDRESSES = ["192.0.2.2/30", "2001:db8::2/64"]
INNER = {4: "10.86.0.1", 6: "fd86::1"}
CLONE_NEWNET = 0x40000000
"""linux/sched.h"""


def wait_until(condition, seconds, what, pause=0.05):
    """Polls `condition` every `pause` seconds until it is true; fails the test with `what` after `seconds`.

    Returns what it returned.
    """
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what}")
        select.select([], [], [], pause)


@contextlib.contextmanager
def inside(host):
    """This thread in the network namespace of `host`: a socket that is made meanwhile stays in it for good."""
    setns = ctypes.CDLL(None, use_errno=True).setns  # os.setns is of Python 3.12

    def enter(namespace):
        if setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{host.name}") as other:
        enter(other)
        try:
            yield
        finally:
            enter(own)


class Daemon:
    """A daemon that was started in a namespace, with this process in systemd's place."""

    def __init__(self, host, directory, name, flags=(), environment=(), prefix=()):
        self.directory = directory
        self.name = name
        self.runtime = directory / f"run-{name}"
        self.log_path = directory / f"{name}.log"
        self._notified = ""
        self._notify = str(directory / f"notify-{name}")
        # Read all the time, as systemd does: a daemon waits for room in this socket.
        listening = threading.Event()
        threading.Thread(target=self._listen, args=[listening], daemon=True).start()
        listening.wait()
        self.log = self.log_path.open("ab")
        self._log_start = self.log.tell()
        self.process = host.start(
            [*prefix, sys.executable, "-m", "bulkvpnd", "--config", directory / f"{name}.conf", "--runtime-directory",
             self.runtime, "--state-directory", directory / f"state-{name}", *flags],
            stdout=self.log, stderr=self.log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": self._notify, **dict(environment)},
        )  # fmt: skip

    def _listen(self, listening):
        # Made in this thread, because other tests of the same run may have made sockets gevent's, one loop a thread.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            pathlib.Path(self._notify).unlink(missing_ok=True)
            sock.bind(self._notify)
            listening.set()
            while message := sock.recv(4096):
                self._notified += message.decode() + "\n"

    def notified(self):
        """Everything that was told to systemd so far."""
        return self._notified

    def text(self):
        """What it has logged; another daemon of the same name before it may have written to the file too."""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def lines(self, pattern):
        """The lines of the log in which `pattern` is found."""
        return [line for line in self.text().splitlines() if re.search(pattern, line)]

    def wait_ready(self, seconds=30):
        wait_until(lambda: "READY=1" in self.notified() or namespaces.exited(self.process), seconds,
                   f"{self.name} is ready")
        assert not namespaces.exited(self.process), self.text()
        return self

    def status(self):
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as stream:
            sock.settimeout(10)
            sock.connect(str(self.runtime / "status.sock"))
            sock.sendall(b'{"command": "status"}\n')
            return json.loads(stream.readline())

    def connections(self):
        return [connection for session in self.status()["sessions"] for connection in session["connections"]]

    def wait_connections(self, count, seconds=30):
        def complete():
            connections = self.connections()
            return len(connections) == count and all("age" in one for one in connections) and connections

        return wait_until(complete, seconds, f"{count} connections of {self.name}")

    def stop(self):
        """SIGTERM. Returns the exit status."""
        status = namespaces.end(self.process)
        self.close()
        return status

    def kill(self):
        """SIGKILL of the main process alone, as the OOM killer would."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.close()

    def close(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self._notify)
        self.log.close()


class Network:
    """The hosts and what runs on them."""

    def __init__(self, directory, server, client):
        self.directory = directory
        self.server = server
        self.client = client

    def pki(self, *arguments, directory=None):
        command = [sys.executable, "-m", "bulkvpnd.admin", "pki", *arguments, "--directory",
                   str(directory or self.directory)]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)

    def add_client(self, name, remote="192.0.2.1"):
        self.pki("add", name, "--remote", remote, "--output", str(self.directory / f"{name}.conf"))

    def start_server(self, *flags, **options):
        return Daemon(self.server, self.directory, "server", flags, **options)

    def start_client(self, *flags, name="client", host=None, **options):
        return Daemon(host or self.client, self.directory, name, flags, **options)

    def ping(self, version=4, count=3):
        """Whether the server's inner address answers."""
        result = self.client.run(["ping", "-n", "-c", count, "-i", "0.05", "-W", "1", INNER[version]], check=False)
        match = re.search(r"(\d+) received", result.stdout)
        return bool(match) and int(match[1]) == count


@contextlib.contextmanager
def two_hosts(directory):
    """A Network with a PKI and the configurations server.conf and client.conf in `directory`; nothing runs yet."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not pathlib.Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    with namespaces.pair(SERVER_ADDRESSES, CLIENT_ADDRESSES, ("bulkvpn-test-s", "bulkvpn-test-c")) as (server, client):
        made = Network(directory, server, client)
        made.pki("init", "--pool-ipv4", "10.86.0.0/24", "--pool-ipv6", "fd86::/64")
        made.add_client("client")
        yield made
