"""The main process runs on gevent's sockets and processes, and so do its tests, in one event loop.

The daemon patches the whole process for that. Here only the modules under test get gevent's, because other tests share
this process and want their threads.
"""

import logging
import socket
import types

import gevent
import gevent.socket
import gevent.subprocess
import pytest

from bulkvpnd import service, workerlink
from bulkvpnd.admin import status as admin_status
from bulkvpnd.control import client, hooks, listener, status, workers

DEADLINE = 20
"""Seconds for one test, far more than any needs: what waits for an event that never comes fails and does not hang."""

COOPERATIVE = types.SimpleNamespace(
    **vars(socket) | {name: getattr(gevent.socket, name) for name in ("getaddrinfo", "socket", "socketpair")}
)


@pytest.fixture(autouse=True)
def on_gevent(monkeypatch):
    for module in (admin_status, client, listener, status, workerlink, workers):
        monkeypatch.setattr(module, "socket", COOPERATIVE)
    for module in (hooks, workers):
        monkeypatch.setattr(module, "subprocess", gevent.subprocess)
    with gevent.Timeout(DEADLINE):
        yield


@pytest.fixture
def journal(caplog):
    """caplog, with what the daemon would log by default."""
    limit = service.RateLimit()
    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(limit)
    yield caplog
    caplog.handler.removeFilter(limit)
