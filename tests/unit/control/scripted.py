"""Clients over loopback against servers whose every answer is given: real TLS, and a double in place of the workers."""

import contextlib
import dataclasses
import ipaddress
import socket
import struct
import time
import types

import gevent
from doubles import Authority, Link, Network, Tun, Workers, configuration, context, free_port, until
from gevent.server import StreamServer

from bulkvpnd.control import client as client_module
from bulkvpnd.control import tls
from bulkvpnd.control.client import Client
from bulkvpnd.protocol import handshake
from bulkvpnd.protocol.errors import RemoteError
from bulkvpnd.protocol.handshake import Hello, Welcome

WELCOME = Welcome(
    session=b"1" * 16, token=b"2" * 32, index=0, random=bytes(32), cipher="aes-256-gcm", connections=2,
    frame_size=262144, offloads=("csum", "tso"), ipv4=ipaddress.ip_interface("10.86.0.2/24"), ipv6=None, mtu=1400,
    sndbuf=None, rcvbuf=None, keepalive=5, keepalive_timeout=20, rekey_bytes=1 << 36, rekey_interval=900,
)  # fmt: skip


def make_site(tmp_path_factory):
    """A client's certificate and a server's context, of one authority."""
    authority = Authority()
    directory = tmp_path_factory.mktemp("site")
    return types.SimpleNamespace(
        authority=authority,
        client=authority.issue("alice"),
        server=context(directory, "server", authority.issue("server", "server")),
    )


class Server:
    """Answers every HELLO as script(hello) says: a message, raw bytes, or None to say nothing. resets: whoever comes
    is cut off instead."""

    def __init__(self, context, script):
        self._context = context
        self.script = script
        self.resets = False
        self.port = free_port()
        self.hellos = []
        self.tries = []
        self.answers = []  # (HELLO, WELCOME) as they went over the wire
        self._server = StreamServer(("127.0.0.1", self.port), self._serve)
        self._server.start()

    def _serve(self, sock, _address):
        self.tries.append(time.monotonic())
        if self.resets:
            # close(2) then says RST, socket(7).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        with contextlib.suppress(RemoteError, OSError):
            shake = tls.Handshake(sock, self._context)
            shake.authenticate()
            body = shake.receive_message()
            hello = Hello.decode(body)
            self.hellos.append(hello)
            answer = self.script(hello)
            if answer is None:
                gevent.sleep(100)
            encoded = answer if isinstance(answer, bytes) else handshake.encode(answer)
            shake.send(encoded)
            self.answers.append((body, encoded[2:], hello))
            shake.finish()

    def stop(self):
        self._server.stop()


def granting(hello, **changes):
    return dataclasses.replace(WELCOME, **{"index": hello.index, "random": bytes([hello.index]) * 32, **changes})


@contextlib.contextmanager
def clients(site, tmp_path, monkeypatch):
    """A function that starts a client against a scripted server; options as in the file, `replace` has fields of the
    configuration."""
    running = []
    monkeypatch.setattr(client_module, "PAUSE_MIN", 0.02)

    def start_client(script=granting, count=2, replace=(), remote=None, ciphers=("aes-256-gcm",), **options):
        server = Server(site.server, script)
        link = Link()
        monkeypatch.setattr(client_module, "link", link)
        remote = remote or f"127.0.0.1:{server.port}"
        settings = configuration(tmp_path, "client", site.client, remote=remote, connections=count, **options)
        settings = dataclasses.replace(settings, **dict(replace))
        told = []
        client = Client(settings, tls.make_context(settings), Tun(), ciphers, lambda: told.append("ready"),
                        lambda reason: told.append(reason))
        client.network = Network()
        client.workers, client.link, client.told, client.server = Workers(2), link, told, server
        running.append(client)
        client.prepare()
        client.start()
        return client

    yield start_client
    for client in running:
        client._connections.clear()
        client.stop()
        client.server.stop()
        client.workers.close()


def attached(client, count):
    return until(lambda: len(client.workers.told("attach")) >= count and client.workers.told("attach"),
                 f"{count} connections attached")  # fmt: skip


def ends(client, message, reason="gone"):
    connection = client._connections.get(message["connection"])
    report = {"connection": message["connection"], "reason": reason, "counters": {"bytes_in": 5}}
    client.closed(report, connection.worker if connection else 0)
