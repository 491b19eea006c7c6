"""The main process runs on gevent's sockets and processes, and so do its tests, in one event loop."""

from gevent import monkey

monkey.patch_socket()
monkey.patch_subprocess()

import gevent  # noqa: E402  what must come first has come first
import pytest  # noqa: E402

DEADLINE = 20
"""Seconds for one test, far more than any needs: what waits for an event that never comes fails and does not hang."""


@pytest.fixture(autouse=True)
def deadline():
    with gevent.Timeout(DEADLINE):
        yield
