"""Metrics over HTTP, for Prometheus: whatever path is asked for, the answer is the metrics."""

from gevent import socket
from gevent.pool import Pool
from gevent.pywsgi import WSGIServer
from prometheus_client import make_wsgi_app

from bulkvpnd import metrics
from bulkvpnd.control import transport

REQUESTS_MAX = 8
"""Connections at a time (choice: a Prometheus has one or two)."""
REQUEST_TIME = 5.0
"""Seconds of silence after which a connection is closed (choice)."""


class Exporter:
    """Listens on `address`, (host, port). report: () -> report of the instance."""

    def __init__(self, address, report):
        self._address = address
        self._app = make_wsgi_app(metrics.registry(lambda: [report()]))
        self._server = None

    def start(self):
        """Raises OSError that names the address."""
        sock = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self._address)
            sock.listen(REQUESTS_MAX)
        except OSError as error:
            sock.close()
            raise transport.cannot_listen("metrics", self._address, error) from None
        # No log: what a stranger asks for would be its lines.
        self._server = _Server(sock, self._app, spawn=Pool(REQUESTS_MAX), log=None, error_log=None)
        self._server.start()

    def stop(self):
        if self._server:
            self._server.stop(timeout=0)


class _Server(WSGIServer):
    def handle(self, sock, address):
        sock.settimeout(REQUEST_TIME)
        super().handle(sock, address)
