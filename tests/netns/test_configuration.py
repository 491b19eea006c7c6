"""What the daemon says and does when it cannot start: which status, which line, and what it has touched by then."""

import contextlib
import os
import pathlib
import socket
import sys

import pytest
import snapshot
from harness import ROOT, Daemon, inside

OWN = ["--listen=[::]:7999", "--device=x1", "--pool-ipv4=10.99.0.0/24", "--pool-ipv6=fd99::/64"]
"""What an instance of its own would have."""
RTMGRP_LINK = 1
"""linux/rtnetlink.h: devices that come, change and go."""


@contextlib.contextmanager
def watching(host):
    """Gives a function that tells whether a network device of `host` came, changed or went since."""
    with inside(host):
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    with sock:
        sock.setblocking(False)
        sock.bind((0, RTMGRP_LINK))

        def touched():
            try:
                return bool(sock.recv(4096))
            except BlockingIOError:
                return False

        yield touched


@pytest.fixture
def attempt(shared_network, tmp_path):
    """Runs a daemon that must not come up. Returns (exit status, what it wrote, whether it touched a device)."""

    def run(text, *flags, prefix=(), mode=0o600, name="server"):
        file = tmp_path / f"{name}.conf"
        file.write_text(text)
        file.chmod(mode)
        with watching(shared_network.server) as touched:
            done = shared_network.server.run(
                [*prefix, sys.executable, "-m", "bulkvpnd", "--config", file, "--runtime-directory", tmp_path / "run",
                 "--state-directory", tmp_path / "state", *flags],
                check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            return done.returncode, done.stderr, touched()

    return run


@pytest.fixture
def good(shared_network):
    """The text of a configuration that works."""
    text = (shared_network.directory / "server.conf").read_text()
    # It will be read from elsewhere.
    return text.replace("crl = crl.pem", f"crl = {shared_network.directory / 'crl.pem'}")


def without_key(text):
    return text[: text.index("<key>")] + text[text.index("</key>") + len("</key>") :]


def also(line):
    return lambda text: f"{line}\n{text}"


BAD = {
    # what is wrong: (change to the file, flags, mode, exit status, what the line names)
    "unknown key": (also("colour = red"), [], 0o600, os.EX_CONFIG, "server.conf:1: colour: unknown option"),
    "bad value": (also("mtu = large"), [], 0o600, os.EX_CONFIG, "server.conf:1: mtu = large: should be"),
    "twice": (also("mode = server"), [], 0o600, os.EX_CONFIG, "mode: given twice, first on line 1"),
    "no key": (without_key, [], 0o600, os.EX_CONFIG, "server.conf: key: missing"),
    "others read the key": (str, [], 0o644, os.EX_CONFIG, "chmod 600"),
    "others write the key": (str, [], 0o602, os.EX_CONFIG, "chmod 600"),
    "contradiction": (str, ["--keepalive=9", "--keepalive-timeout=8"], 0o600, os.EX_CONFIG, "keepalive-timeout = 8"),
    "bad flag": (str, ["--mtu=large"], 0o600, os.EX_USAGE, "--mtu = large: should be"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_configuration_ends_it_before_anything_is_touched(attempt, good, tmp_path, wrong):
    change, flags, mode, expected, names = BAD[wrong]
    status, said, touched = attempt(change(good), *flags, mode=mode)
    assert status == expected, said
    assert names in said and said.count("\n") == 1, "one line that names what is wrong"
    assert "Traceback" not in said and "PRIVATE KEY" not in said
    assert not touched and not (tmp_path / "run").exists() and not (tmp_path / "state").exists()


def test_key_file_that_others_can_read(attempt, good, tmp_path):
    key = tmp_path / "server.key"
    key.write_text(good[good.index("<key>") + len("<key>\n") : good.index("</key>")])
    key.chmod(0o640 | 0o004)
    status, said, touched = attempt(without_key(good) + f"key = {key}\n")
    assert (status, touched) == (os.EX_CONFIG, False)
    assert f"{key}: holds a private key" in said and f"chmod 600 {key}" in said


def test_port_in_use(attempt, good, shared_network):
    """The device comes before the listener, so it shows here; and it is gone when the daemon is."""
    with inside(shared_network.server), socket.create_server(("192.0.2.1", 7443)):
        status, said, touched = attempt(good, "--listen=192.0.2.1:7443")
    assert status == 1 and touched
    assert "ERROR: listen = 192.0.2.1:7443: Address already in use; see who has it with: ss -ltnp" in said
    assert "bulk0" not in shared_network.server.ip("-br", "link")


@pytest.fixture
def first(good, shared_network):
    """An instance that runs, translates addresses and answers as before when it is over."""
    file = shared_network.directory / "first.conf"
    file.write_text(good)
    file.chmod(0o600)
    instance = Daemon(shared_network.server, shared_network.directory, "first", ["--nat=yes"]).wait_ready()
    before = snapshot.take(shared_network.server)
    yield instance
    assert instance.status()["instance"] == "first"
    assert snapshot.differences(before, snapshot.take(shared_network.server)) == []
    assert instance.stop() == 0
    assert "bulk0" not in shared_network.server.ip("-br", "link")


@pytest.mark.parametrize("others", [["--listen=[::]:7443"], OWN], ids=["same port", "nothing in common"])
def test_a_second_instance_of_one_name(attempt, good, first, others):
    """By its name are known the instance's table, what it wants of the kernel and its name servers."""
    status, said, touched = attempt(good, f"--runtime-directory={first.runtime}-other", "--nat=yes", *others,
                                    name="first")
    assert (status, touched) == (1, False)
    assert f"instance first runs already, as process {first.process.pid}; stop that" in said
    assert not pathlib.Path(f"{first.runtime}-other").exists()


def test_a_second_instance_with_one_runtime_directory(attempt, good, first):
    """It ends before it touches anything."""
    status, said, touched = attempt(good, f"--runtime-directory={first.runtime}")
    assert (status, touched) == (1, False)
    assert f"{first.runtime}: another instance runs with this runtime directory" in said


def test_address_of_nobody(attempt, good):
    status, said, _ = attempt(good, "--listen=198.51.100.1:7443")
    assert status == 1
    assert "ERROR: listen = 198.51.100.1:7443: Cannot assign requested address; no device here has that" in said


def test_device_of_somebody_else(attempt, good, shared_network):
    shared_network.server.ip("tuntap", "add", "dev", "theirs", "mode", "tun")
    status, said, touched = attempt(good, "--device=theirs")
    assert (status, touched) == (1, False)
    assert "theirs exists already" in said
    assert "theirs" in shared_network.server.ip("-br", "link"), "it stays where it was"


def test_without_the_privilege(attempt, good):
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    status, said, touched = attempt(good, prefix=powerless)
    assert (status, touched) == (os.EX_NOPERM, False)
    assert "it needs root or CAP_NET_ADMIN" in said
