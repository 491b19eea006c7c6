"""An identity that is connected connects again: refused, or beside the first (test_clients.py has the default)."""

import pytest
from harness import wait_until
from rawclient import RawClient

from bulkvpnd.protocol import frame
from bulkvpnd.protocol.errors import Refused


@pytest.fixture
def starting(network):
    """Starts a server with this second-login."""
    running = []

    def start_server(second_login):
        running.append(network.start_server("--grace=1", f"--second-login={second_login}").wait_ready())
        return running[0]

    yield start_server
    for one in running:
        assert one.stop() == 0


def test_second_login_is_refused(network, starting):
    server = starting("refuse")
    with RawClient(network, "client") as first:
        first.join()
        assert first.ping()
        with RawClient(network, "client") as second, pytest.raises(Refused, match="identity"):
            second.join()
        assert first.ping() and len(server.status()["sessions"]) == 1
        first.send(first.seal(frame.CLOSE, b"done"))
        assert first.ended()
        with RawClient(network, "client") as third:
            third.join()
            assert third.ping()


def test_second_login_runs_beside_the_first(network, starting):
    server = starting("parallel")
    with RawClient(network, "client") as first, RawClient(network, "client") as second:
        addresses = {one.join().ipv4 for one in (first, second)}
        assert len(addresses) == 2
        assert first.ping() and second.ping() and first.ping()
        wait_until(lambda: len(server.status()["sessions"]) == 2, 10, "both are in")
        assert {one["identity"] for one in server.status()["sessions"]} == {"client"}
        assert {str(one["addresses"][0]) for one in server.status()["sessions"]} == {
            str(one.ip) for one in addresses
        }
