"""control.client with several remotes, which may be one server or several: where a session's connections go."""

import dataclasses

import pytest
from doubles import establish, until
from scripted import Server, attached, clients, ends, granting, make_site

from bulkvpnd.protocol.handshake import Refuse

SHUTDOWN = "closed by the peer: shutdown"


def knows(session):
    """What a server answers that knows this session and begins no other."""
    return lambda hello: (granting(hello, session=session, connections=hello.connections)
                          if hello.session in (None, session) else Refuse("session"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_site(tmp_path_factory)


@pytest.fixture
def start(site, tmp_path, monkeypatch):
    """Starts a client with a remote for each session: (client, server, ...)."""
    servers = []
    with clients(site, tmp_path, monkeypatch) as start_client:

        def start_with(*sessions, count=2):
            servers.extend(Server(site.server, knows(session)) for session in sessions)
            remotes = tuple(("127.0.0.1", server.port) for server in servers)
            return start_client(count=count, replace={"remote": remotes}), *servers

        yield start_with
    for server in servers:
        server.stop()


def sessions(server):
    return [hello.session for hello in server.hellos]


def test_a_connection_that_ends_is_made_again_at_the_server_of_its_session(start):
    client, one, other = start(b"1" * 16, b"2" * 16)
    messages = attached(client, 2)
    for number in range(3):
        ends(client, messages[number])
        messages = attached(client, 3 + number)
    assert len(one.tries) == 5 and other.tries == []
    assert sessions(one).count(None) == 1, "it is one session still"


def test_while_one_connection_lives_no_other_server_is_asked(start):
    client, one, other = start(b"1" * 16, b"2" * 16)
    messages = attached(client, 2)
    one.resets = True
    ends(client, messages[0])
    tried = len(one.tries)
    until(lambda: len(one.tries) >= tried + 4, "it is asked again and again")
    assert other.tries == []
    one.resets = False
    attached(client, 3)
    assert sessions(one).count(None) == 1


@pytest.mark.parametrize("reason", ["gone", SHUTDOWN])
def test_a_server_that_is_gone_is_followed_by_the_next(start, reason):
    client, one, other = start(b"1" * 16, b"2" * 16)
    messages = attached(client, 2)
    one.stop()
    for message in messages:
        ends(client, message, reason)
    attached(client, 4)
    assert sessions(other).count(None) == 1 and sessions(other)[-1] == b"2" * 16
    assert client._welcome.session == b"2" * 16
    # And there it stays, although it is not the first one.
    ends(client, attached(client, 4)[-1])
    attached(client, 5)
    assert sessions(other)[-1] == b"2" * 16


def test_a_goodbye_ends_the_session_and_nobody_tries_to_join_it(start):
    client, one, _ = start(b"1" * 16, b"2" * 16)
    for message in attached(client, 2):
        ends(client, message, SHUTDOWN)
    attached(client, 4)
    assert sessions(one) == [None, b"1" * 16, None, b"1" * 16]


def test_another_way_to_the_same_server_goes_on_with_the_session(start):
    client, one, other = start(b"1" * 16, b"1" * 16)
    messages = attached(client, 2)
    one.stop()
    for message in messages:
        ends(client, message)
    attached(client, 4)
    assert set(sessions(other)) == {b"1" * 16}
    assert sorted(hello.index for hello in other.hellos) == [0, 1]


def test_servers_that_do_not_answer_are_tried_in_turn_by_all_diallers_together(start):
    client, one, other = start(b"1" * 16, b"2" * 16, count=4)
    messages = attached(client, 4)
    before = len(one.tries)
    one.resets = other.resets = True
    for message in messages:
        ends(client, message, SHUTDOWN)
    until(lambda: len(other.tries) >= 6)
    assert abs(len(one.tries) - before - len(other.tries)) <= 1


def test_a_server_that_moved_takes_the_session_with_it(start):
    client, one, other, third = start(b"1" * 16, b"1" * 16, b"3" * 16, count=1)
    (old,) = attached(client, 1)
    establish(client, old["connection"])
    client._configuration = dataclasses.replace(client._configuration, replace_interval=0.05)
    ends(client, old)
    old = attached(client, 2)[1]
    establish(client, old["connection"])
    client.reconfigure(dataclasses.replace(client._configuration, remote=(("127.0.0.1", third.port),)))
    until(lambda: len(third.hellos) >= 2, "its connection is to be replaced by one to another server")
    assert set(sessions(third)) == {b"1" * 16} and client._connections, "which refuses, and nothing has changed"
    client.reconfigure(dataclasses.replace(client._configuration, remote=(("127.0.0.1", other.port),)))
    fresh = attached(client, 3)[2]
    assert other.hellos[0].replaces
    establish(client, fresh["connection"])
    ends(client, old, "moved")
    until(lambda: client._server == ("127.0.0.1", other.port))
    ends(client, fresh)
    until(lambda: not other.hellos[-1].replaces, "further ones go there, too")
    assert set(sessions(other)) == {b"1" * 16} and len(one.hellos) == 2
