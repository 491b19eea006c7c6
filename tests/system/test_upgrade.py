"""A newer package on machines where the former one carries a TCP connection."""

import pytest

import machines
from pair import INNER, booted

pytestmark = pytest.mark.long

ECHO = """
import socket
connection, _ = socket.create_server(("", 6000)).accept()
while data := connection.recv(65536):
    connection.sendall(data)
"""
# One line after the other, ten a second: each is in the journal when it has come back.
TALK = """
import itertools, socket, sys, time
with socket.create_connection((sys.argv[1], 6000)) as connection, connection.makefile("rw") as stream:
    for number in itertools.count():
        print(number, file=stream, flush=True)
        if stream.readline() != f"{number}\\n":
            sys.exit("the connection has ended")
        print(number, flush=True)
        time.sleep(0.1)
"""


def start_talking(pair):
    """A TCP connection through the tunnel that is made once and used all the time."""
    pair.server.run("systemd-run", "--quiet", "--unit=echo", "python3", "-c", ECHO)
    machines.wait_until(lambda: ":6000" in pair.server.run("ss", "-Hltn").stdout, 10, "the echo listens")
    pair.client.run("systemd-run", "--quiet", "--unit=talk", "python3", "-c", TALK, INNER[4])
    wait_for_answers(pair)


def wait_for_answers(pair):
    """Waits until the connection has carried another line. Raises AssertionError if it has ended."""

    def said():
        return pair.client.run("journalctl", "--unit=talk", "--lines=1", "--output=cat", "--quiet").stdout.strip()

    before = said()
    machines.wait_until(lambda: said() not in ("", before), 60, "the connection carries something")
    assert pair.client.run("systemctl", "is-active", "talk").stdout.strip() == "active"


def main_process(machine, unit):
    """Its process id, None while it does not run and is ready."""
    shown = machine.run("systemctl", "show", "--property=ActiveState,MainPID", unit).stdout
    state = dict(line.split("=", 1) for line in shown.splitlines())
    return state["MainPID"] if state["ActiveState"] == "active" else None


def configuration(machine):
    """Checksums of what the administrator has in /etc/bulkvpn. The examples there are the package's."""
    return machine.run("find", "/etc/bulkvpn", "-type", "f", "!", "-name", "*.example", "-exec", "sha256sum", "{}", "+"
                       ).stdout


def test_upgrade(image, tmp_path, former, package):
    with booted(image, tmp_path / "upgrade", former, package) as pair:
        pair.make_tunnel()
        start_talking(pair)
        for machine, unit in ((pair.server, "bulkvpnd@server"), (pair.client, "bulkvpnd@client")):
            version = machine.run("dpkg-query", "--show", "bulkvpnd").stdout
            process, kept = main_process(machine, unit), configuration(machine)
            # With nobody there who could answer, dpkg fails where it has a question about a configuration file.
            package.install(machine)
            assert machine.run("dpkg-query", "--show", "bulkvpnd").stdout != version
            assert machine.run("dpkg", "--verify", "bulkvpnd").stdout == ""
            machines.wait_until(lambda: main_process(machine, unit) not in (None, process), 60, f"{unit} is another")
            pair.wait_through()
            wait_for_answers(pair)
            assert configuration(machine) == kept
