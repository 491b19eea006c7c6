"""What the daemon tells systemd, and that it does not wait for it."""

import socket

from harness import wait_until


def test_ready_status_watchdog_stopping(network):
    server = network.start_server(environment={"WATCHDOG_USEC": "400000"}).wait_ready()
    assert "STOPPING=1" not in server.notified()
    wait_until(lambda: "STATUS=0 sessions" in server.notified(), 10, "the status is told")
    seen = server.notified().count("WATCHDOG=1")
    wait_until(lambda: server.notified().count("WATCHDOG=1") > seen + 3, 5, "the watchdog is fed")
    client = network.start_client()
    client.wait_ready().wait_connections(4)
    wait_until(lambda: "STATUS=1 sessions, 4 connections" in server.notified(), 10, "the new status is told")
    assert server.stop() == 0 and "STOPPING=1" in server.notified()
    wait_until(lambda: "STATUS=connecting" in client.notified(), 10, "the client's status is told")


def test_nobody_listens(network):
    """The socket of a service manager that hangs fills up; tunnel, status and stop go on without it."""
    path = str(network.directory / "silent")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as silent, socket.socket(
        socket.AF_UNIX, socket.SOCK_DGRAM
    ) as probe:
        silent.bind(path)
        probe.setblocking(False)
        server = network.start_server(environment={"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "100000"})
        wait_until(lambda: server.lines("ready: "), 20, "the server is up")

        def is_full():
            try:
                probe.sendto(b"", path)
            except BlockingIOError:
                return True

        wait_until(is_full, 10, "the socket is full")
        client = network.start_client().wait_ready()
        client.wait_connections(4)
        assert len(server.connections()) == 4 and network.ping()
        assert client.stop() == 0
        assert server.stop() == 0
        assert silent.recv(100).startswith(b"READY=1")
