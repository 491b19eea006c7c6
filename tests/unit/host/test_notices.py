"""The kernel's own notices, in a network namespace of their own; and what is done without them."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from bulkvpnd.host import notices

ROOT = pathlib.Path(__file__).parents[3]
BEGIN = """
import socket, subprocess
from bulkvpnd.host import notices

def run(*words):
    subprocess.run(words, check=True)

def nft(text):
    run("nft", text)

socket.setdefaulttimeout(10)
nft("add table inet bulkvpnd_x; add chain inet bulkvpnd_x out; add rule inet bulkvpnd_x out drop; "
    "add table inet other; add chain inet other out; add rule inet other out drop")
"""


def run(program):
    """In a user namespace, where everybody may subscribe (user_namespaces(7)). Returns what it printed."""
    for name in ("ip", "nft"):
        if not shutil.which(name):
            pytest.skip(f"needs {name}")
    unshare = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, see unshare(1)")
    done = subprocess.run([*unshare, sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("command", [
    "flush ruleset", "flush table inet bulkvpnd_x", "delete table inet bulkvpnd_x", "flush chain inet bulkvpnd_x out",
    "delete table inet other; delete table inet bulkvpnd_x",
])  # fmt: skip
def test_whoever_takes_something_from_the_table_is_noticed(command):
    assert run(f"""
given = notices.of_table("bulkvpnd_x")
next(given)
print("at once")
nft({command!r})
next(given)
print("noticed")
""") == ["at once", "noticed"]


def test_what_happens_in_other_tables_does_not_matter():
    assert run("""
socket.setdefaulttimeout(0.3)
given = notices.of_table("bulkvpnd_x")
next(given)
nft("delete table inet other")
try:
    next(given)
except TimeoutError:
    print("nothing")
""") == ["nothing"]


def test_lost_notices_are_one_of_everything():
    assert run("""
subscribed = notices._subscribed

def with_little_room(*arguments):
    sock = subscribed(*arguments)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    return sock

notices._subscribed = with_little_room
given = notices.of_table("bulkvpnd_x")
next(given)
nft("; ".join(f"add table inet other{number}" for number in range(500)))
next(given)
print("noticed")
""") == ["noticed"]


def test_without_the_subscription_it_is_time_every_few_seconds(monkeypatch):
    """As it is without CAP_NET_ADMIN."""
    waits = []

    def refuses(*_arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(notices, "_subscribed", refuses)
    monkeypatch.setattr(notices.time, "sleep", waits.append)
    given = notices.of_table("bulkvpnd_x")
    for _ in range(3):
        next(given)
    assert waits == [notices.PERIOD] * 2


def test_a_device_that_goes_down_and_up():
    """Also when nobody looked meanwhile."""
    assert run("""
run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
run("ip", "link", "set", "veth0", "up")
subscribed = notices._subscribed

def followed_by_changes(*arguments):
    sock = subscribed(*arguments)
    for device, state in (("veth1", "up"), ("veth1", "down"), ("veth0", "down"), ("veth0", "up")):
        run("ip", "link", "set", device, state)
    return sock

notices._subscribed = followed_by_changes
given = notices.of_device(socket.if_nametoindex("veth0"))
while next(given):
    pass
print("down")
while not next(given):
    pass
print("up")
""") == ["down", "up"]
