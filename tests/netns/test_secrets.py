"""Where secrets are: the private key in the main process alone, and nothing of them in a log at any level.

Each search is held against a process or a text in which the secret has to be found.
"""

import base64
import contextlib
import os
import re
import signal
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from harness import wait_until
from rawclient import RawClient

from bulkvpnd import config
from bulkvpnd.protocol import frame

CHUNK = 1 << 24
NO_PRIVILEGE = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
"""How the main process starts its workers, when it is root's."""
HEX = re.compile(r"[0-9A-Fa-f]{24,}")
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{40,}")
"""What looks like a key or a token, whatever it is."""


@pytest.fixture(scope="module")
def tunnel(shared_network):
    """The server and a client that log all there is, with new keys every second."""
    flags = ("--log-level=debug", "--rekey-interval=1")
    server = shared_network.start_server(*flags).wait_ready()
    client = shared_network.start_client(*flags).wait_ready()
    client.wait_connections(4)
    shared_network.add_client("mallory")
    yield shared_network, server, client
    assert [one.stop() for one in (client, server)] == [0, 0]


def workers(daemon):
    return [worker["pid"] for worker in daemon.status()["workers"]]


def key_forms(file):
    """The forms in which a private key may lie in memory: PEM, DER, the number as OpenSSL and as RFC 5915 has it."""
    pem = config.pem_text(config.load(["--config", str(file)])[0], "key")
    key = serialization.load_pem_private_key(pem.encode(), None)
    number = key.private_numbers().private_value
    size = (key.key_size + 7) // 8
    return {
        "PEM": pem.splitlines()[1].encode(),
        "DER": base64.b64decode("".join(pem.splitlines()[1:-1]))[-60:],
        "limbs": number.to_bytes(size, "little"),
        "octets": number.to_bytes(size, "big"),
    }


def found_in_memory(pid, forms):
    """Which of `forms` are in memory that a process can write to, in its arguments or in its environment."""
    found = set()
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            place, permissions = line.split()[:2]
            if not permissions.startswith("rw"):
                continue
            first, last = (int(one, 16) for one in place.split("-"))
            before = b""
            with contextlib.suppress(OSError):  # a mapping that cannot be read, such as a device's
                memory.seek(first)
                while first < last and (data := memory.read(min(CHUNK, last - first))):
                    first += len(data)
                    found |= {name for name, form in forms.items() if form in before + data}
                    before = data[-100:]
    for file in ("cmdline", "environ"):
        with open(f"/proc/{pid}/{file}", "rb") as stream:
            text = stream.read()
        found |= {name for name, form in forms.items() if form in text}
    return found


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_private_key_is_in_the_main_process_alone(tunnel, role):
    network, server, client = tunnel
    daemon = {"server": server, "client": client}[role]
    forms = key_forms(network.directory / f"{role}.conf")
    # It is where it is used, so the search can find it; and of the others' keys there is none.
    assert found_in_memory(daemon.process.pid, forms)
    assert len(workers(daemon)) >= 1
    for pid in workers(daemon):
        assert found_in_memory(pid, forms) == set()


def test_a_token_is_in_the_main_process_alone(tunnel):
    network, server, _ = tunnel
    with RawClient(network, "mallory") as raw:
        welcome = raw.join()
        assert raw.ping()
        forms = {"token": welcome.token, "hex": welcome.token.hex().encode()}
        assert found_in_memory(server.process.pid, forms)
        for pid in workers(server):
            assert found_in_memory(pid, forms) == set()


def status_of(pid):
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_worker_has_no_capability_and_cannot_get_one(tunnel, role):
    daemon = dict(zip(("server", "client"), tunnel[1:]))[role]
    assert int(status_of(daemon.process.pid)["CapEff"], 16)
    for pid in workers(daemon):
        status = status_of(pid)
        assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [0] * 5
        assert status["NoNewPrivs"] == "1"


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_worker_is_confined_in_each_of_its_threads(tunnel, role):
    daemon = dict(zip(("server", "client"), tunnel[1:]))[role]
    if daemon.lines("not confined by all"):
        pytest.skip(f"needs a kernel with it: {daemon.lines('not confined by all')}")
    assert status_of(daemon.process.pid)["Seccomp"] == "0"
    for pid in workers(daemon):
        threads = os.listdir(f"/proc/{pid}/task")
        assert len(threads) >= 2, "the event loop's, and the reader's"
        assert {status_of(f"{pid}/task/{thread}")["Seccomp"] for thread in threads} == {"2"}


def may_be_read(pid):
    """Whether a process of the same user without capabilities, as a worker is, may read the memory of `pid`."""
    done = subprocess.run([*NO_PRIVILEGE, "sh", "-c", f"exec 3</proc/{pid}/mem"], capture_output=True, text=True)
    assert done.returncode == 0 or "Permission denied" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("role", ["server", "client"])
def test_no_process_has_a_core_file_or_can_be_read_by_its_like(tunnel, role):
    daemon = dict(zip(("server", "client"), tunnel[1:]))[role]
    with subprocess.Popen([*NO_PRIVILEGE, "sleep", "60"]) as ordinary:
        try:
            wait_until(lambda: os.readlink(f"/proc/{ordinary.pid}/exe").endswith("sleep"), 5, "it runs")
            assert may_be_read(ordinary.pid), "or this test says nothing"
        finally:
            ordinary.kill()
    for pid in (daemon.process.pid, *workers(daemon)):
        assert not may_be_read(pid)
        with open(f"/proc/{pid}/limits") as limits:
            (line,) = [line for line in limits if line.startswith("Max core file size")]
        assert line.split()[-3:-1] == ["0", "0"]


def test_no_secret_is_in_a_log_at_any_level(tunnel):
    network, server, client = tunnel
    with RawClient(network, "mallory") as first, RawClient(network, "mallory") as second:
        welcome = first.join()
        assert first.ping()
        second.join(session=welcome.session.hex(), token=welcome.token.hex(), index=1)
        assert second.ping()
        # What is wrong is logged too, and with more words.
        with RawClient(network, "mallory") as wrong:
            wrong.authenticate()
            wrong.send_hello(token=welcome.token.hex())
            assert wrong.ended()
        with RawClient(network, "mallory") as wrong:
            wrong.authenticate()
            wrong.send_message(b'{"token": "' + welcome.token.hex().encode() + b'", ')
            assert wrong.ended()
        first.send(frame.pack_header(frame.PING, 8) + bytes(8 + 16))
        assert first.ended()
    assert network.ping()
    os.kill(workers(client)[0], signal.SIGKILL)
    wait_until(lambda: client.lines("ended unexpectedly"), 10, "the worker's end is logged")
    client.wait_connections(4)

    secrets = {"token": welcome.token.hex(), "session": welcome.session.hex(), "random": welcome.random.hex()}
    for role in ("server", "client"):
        forms = key_forms(network.directory / f"{role}.conf")
        secrets |= {f"{role}'s key": forms["PEM"].decode(), f"{role}'s number": forms["octets"].hex()}
    texts = {"server": server.text(), "client": client.text(), "status": str(server.status()) + str(client.status())}
    for name, text in texts.items():
        assert len(text) > 500
        assert [what for what, secret in secrets.items() if secret in text.lower() or secret in text] == [], name
        assert HEX.findall(text) + BASE64.findall(text.replace(str(network.directory), "")) == [], name
    # And the patterns do find what they are for.
    assert HEX.search(f"token {welcome.token.hex()} of") and BASE64.search(secrets["server's key"])
