"""Clients of a server, by hand: from connect to their worker, and what a server has of them."""

import dataclasses
import ipaddress
import json
import logging
import os

from doubles import HELLO, connected, establish, shaken, until
from gevent import socket

from bulkvpnd.control.clients import Client
from bulkvpnd.protocol import handshake, keys
from bulkvpnd.protocol.handshake import Welcome

FIXED = (
    Client("alice", {4: ipaddress.ip_address("10.86.0.77")}, (ipaddress.ip_network("192.168.7.0/24"),)),
    Client("bob", {}, (ipaddress.ip_network("fd07::/64"), ipaddress.ip_network("192.168.8.0/24"))),
)


@dataclasses.dataclass
class Admitted:
    """What a client has after WELCOME."""

    welcome: Welcome
    secrets: dict
    sock: socket.socket
    number: int
    message: dict


def admit(site, server, name="alice", joins=None, behind=b"", **changes):
    """One connection from connect to its worker. joins: Welcome of the session to join. Raises Refused."""
    if joins:
        changes = {"session": joins.session, "token": joins.token, **changes}
    hello = dataclasses.replace(HELLO, **changes)
    sock = connected(server.port)
    before = len(server.workers.told("attach"))
    with shaken(sock, site.clients[name]) as shake:
        body = handshake.encode(hello)
        shake.send(body)
        answer = shake.receive_message()
        welcome = Welcome.decode(answer)
        shake.finish()
        sock.sendall(behind)
        until(lambda: len(server.workers.told("attach")) > before, "a worker got the connection")
        kept = socket.socket(fileno=os.dup(sock.fileno()))
    secrets = keys.traffic_secrets(body[handshake.PREFIX_SIZE :], answer, hello.random, welcome.random)
    message = server.workers.told("attach")[-1]
    return Admitted(welcome, secrets, kept, message["connection"], message)


def live(site, server, *arguments, **changes):
    """As admit; its first authentic frame has come."""
    admitted = admit(site, server, *arguments, **changes)
    establish(server, admitted.number)
    server._pool.flush()  # what writes the lease has a descriptor
    return admitted


def closes(server, number, reason="gone", clean=False, blame=None):
    """The worker of a connection says that it ended."""
    connection = server._sessions.connections.get(number)
    message = {"connection": number, "reason": reason, "clean": clean, "blame": blame, "counters": {"bytes_in": 5}}
    server.closed(message, connection.worker if connection else 0)


def raw_message(body):
    """Any bytes where HELLO belongs, with their length in front."""
    return len(body).to_bytes(2, "big") + body


def json_hello(**changes):
    return raw_message(json.dumps({**HELLO.to_json(), **changes}).encode())


def state(server):
    """Everything that a connection could have changed."""
    sessions = [
        (session.number, session.identity, session.is_live, session.idle_since, sorted(session.connections))
        for session in server._sessions
    ]
    return sessions, sorted(server._sessions.connections), len(server.workers.sent), dict(server._pool._leases)


def lines(caplog):
    """What the log says by default."""
    return [record for record in caplog.records if record.levelno >= logging.INFO]
