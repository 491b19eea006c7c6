"""What ends soon is in the log of the daemon that runs, and is renewed under it: nobody is cut off."""

import signal

from harness import wait_until

from bulkvpnd import pki


def test_warnings_and_a_renewed_authority(network):
    network.pki("renew", "server", "--days", "10")
    network.pki("crl", "--days", "5")
    server = network.start_server().wait_ready()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    wait_until(lambda: server.lines("the certificate of this end expires in 9 days"), 10, "the certificate ends soon")
    wait_until(lambda: server.lines("the revocation list expires in 4 days"), 10, "the list ends soon")
    assert not server.lines("authority expires") and not client.lines("expires")

    ca_file = network.directory / "pki" / "ca.crt"
    former = ca_file.read_text()
    network.pki("renew", pki.describe_authority(former)[0])
    network.pki("renew", "server")
    network.pki("crl")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.lines("reloaded: in force: ca, certificate, key"), 10, "they are in force")
    assert network.ping() and len(client.connections()) == 4
    assert len(server.lines(r" expires in \d+ days")) == 2, "nothing more to warn of"

    # With the certificate of the former authority, and then with the one that it gets with its next configuration.
    assert client.stop() == 0
    file = network.directory / "client.conf"
    assert former.strip() in file.read_text()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    assert network.ping() and client.stop() == 0
    file.unlink()
    network.pki("renew", "client", "--remote", "192.0.2.1", "--output", str(file))
    assert ca_file.read_text().strip() in file.read_text()
    client = network.start_client().wait_ready()
    client.wait_connections(4)
    assert network.ping() and client.stop() == 0 and server.stop() == 0
