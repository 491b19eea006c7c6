"""A server over loopback: real TLS, real certificates, and doubles in place of the workers and the device."""

import dataclasses
import types

import pytest
from doubles import Authority, Link, Tun, Workers, configuration, context, free_port

from bulkvpnd.control import server as server_module
from bulkvpnd.control.server import Server
from bulkvpnd.control.tls import make_context


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """One authority, the server's end, and the TLS contexts of three clients."""
    authority = Authority()
    directory = tmp_path_factory.mktemp("site")
    clients = {name: context(directory, "client", authority.issue(name)) for name in ("alice", "bob", "carol")}
    return types.SimpleNamespace(authority=authority, server=authority.issue("server", "server"), clients=clients)


@pytest.fixture
def start(site, tmp_path, monkeypatch):
    """Starts a server with options. It gets the attributes port, link, workers."""
    running = []

    def start_server(ciphers=("aes-256-gcm",), workers=2, clients=(), **options):
        link = Link()
        monkeypatch.setattr(server_module, "link", link)
        monkeypatch.setattr(server_module.gateway, "reapply", lambda *arguments: None)
        port = free_port()
        settings = configuration(tmp_path, "server", site.server, listen=f"127.0.0.1:{port}", **options)
        settings = dataclasses.replace(settings, clients=clients)
        ready = []
        server = Server(settings, make_context(settings), Tun(), ciphers, lambda: ready.append(1), None)
        server.workers = Workers(workers)
        server.start()
        assert ready == [1]
        server.port, server.link = port, link
        running.append(server)
        return server

    yield start_server
    for server in running:
        # Nobody reports the end of connections here; stopping is not to wait for it.
        server._sessions.connections.clear()
        server.stop()
        server.workers.close()


@pytest.fixture
def server(start):
    return start()
