"""A certificate is revoked, or expires, while its client is connected: that is out within seconds, and nobody else."""

import datetime
import os
import shutil
import signal

import pytest
from harness import wait_until
from rawclient import RawClient

from bulkvpnd import pki
from bulkvpnd.protocol import frame

CUT = 5
"""Seconds in which a revoked certificate's session has to be gone (issue: the promise)."""


@pytest.fixture
def tunnel(network):
    network.add_client("mallory")
    server = network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    yield network, server, client
    assert client.stop() == 0 and server.stop() == 0


def identities(server):
    return {session["identity"] for session in server.status()["sessions"]}


def test_revoked_while_connected(tunnel):
    network, server, client = tunnel
    before = server.connections()
    with RawClient(network, "mallory") as raw:
        raw.join()
        assert raw.ping()
        wait_until(lambda: "mallory" in identities(server), 10, "mallory is in")

        network.pki("revoke", "mallory")
        # Whatever it still sends, and it reads nothing.
        raw.send(raw.seal(frame.PING, bytes(8)))
        wait_until(lambda: "mallory" not in identities(server), CUT, "the session is gone")
        assert raw.receive_until(frame.CLOSE) == b"refused"
        assert raw.ended()
    with RawClient(network, "mallory") as raw:
        raw.authenticate()
        raw.send_hello()
        assert raw.ended()
    wait_until(lambda: server.lines(rf"{raw.address} turned away: the peer's certificate: certificate revoked"), 5,
               "it says why")
    assert network.ping() and identities(server) == {"client"}
    assert [one["connection"] for one in server.connections()] == [one["connection"] for one in before]

    # The name may come back, with another certificate.
    (network.directory / "mallory.conf").unlink()
    network.add_client("mallory")
    with RawClient(network, "mallory") as raw:
        raw.join()
        assert raw.ping()


def test_expired_while_connected(tunnel):
    network, server, client = tunnel
    ca, key = ((network.directory / "pki" / name).read_text() for name in ("ca.crt", "ca.key"))
    # The shortest certificate that can be ordered lives a day; this one lives for seconds.
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=5)
    blocks = dict(zip(("certificate", "key"), pki.issue(ca, key, "mallory", "client", end, 0)), ca=ca)
    (network.directory / "mallory.conf").write_text(
        "mode = client\nremote = 192.0.2.1\n" + "".join(f"<{name}>\n{pem}</{name}>\n" for name, pem in blocks.items()))
    with RawClient(network, "mallory") as raw:
        raw.join()
        assert raw.ping()
        wait_until(lambda: "mallory" in identities(server), 4, "mallory is in")
        wait_until(lambda: "mallory" not in identities(server), 5 + CUT, "the session is gone")
        assert raw.receive_until(frame.CLOSE) == b"refused"
        assert raw.ended()
    assert server.lines("session of mallory ended: its certificate has expired")
    assert network.ping() and identities(server) == {"client"}


def test_on_sighup_and_only_then_nothing_else_changes(network):
    # As under systemd, where the daemon has an old copy of its configuration.
    credentials = network.directory / "credentials"
    credentials.mkdir(0o700)
    shutil.copy2(network.directory / "server.conf", credentials)
    server = network.start_server(environment={"CREDENTIALS_DIRECTORY": str(credentials)}).wait_ready()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    read = r"revocation list read: 0 certificates"
    assert not server.lines(read)
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: server.lines(read), 5, "it is read again")
    assert network.ping() and len(server.connections()) == 4 and not server.lines("reloaded")
    assert client.stop() == 0 and server.stop() == 0


def test_list_that_expired_lets_nobody_in_and_is_mended_in_place(network):
    # The shortest list that can be ordered lives a day; one that is over is made by hand.
    server = network.start_server().wait_ready()
    base = network.directory
    ca, key = ((base / "pki" / name).read_text() for name in ("ca.crt", "ca.key"))
    now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=4)
    (base / "crl.pem").write_text(pki.create_crl(ca, key, {}, 1, now, 0))
    wait_until(lambda: server.lines("revocation list read"), 3, "the short list is in force")
    with RawClient(network, "client") as raw:
        raw.join()
        assert raw.ping()
        wait_until(lambda: server.lines("the revocation list has expired"), 10, "it says so")
        with RawClient(network, "client") as late:
            late.authenticate()
            late.send_hello()
            assert late.ended()
        wait_until(lambda: server.lines(rf"{late.address} turned away: the peer's certificate: CRL has expired"), 5,
                   "it says why")
        assert raw.ping(), "who is in stays in"
        network.pki("crl")
        wait_until(lambda: len(server.lines("revocation list read")) == 2, 5, "the new list is in force")
        with RawClient(network, "client") as again:
            again.join()
            assert again.ping()
    assert server.stop() == 0
