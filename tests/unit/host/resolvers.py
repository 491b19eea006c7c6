"""Programs in the place of resolvectl and resolvconf, which write down how they are called, and the helper of the
package, which is started for each connection as systemd does it.
"""

import os
import select
import socket
import subprocess
import sys
import threading
import time

from bulkvpnd.host.dns import Dns

SCRIPT = """#!/bin/sh
echo "{program} $*" >>{log}
case "$1" in
{cases}
-a) cat >{records}/"$2"; cat {records}/"$2" >>{log};;
-d) {first}; rm -f {records}/"$2"; echo removed >>{log};;
esac
{last}
"""
HELPER = """
import pathlib, sys
from bulkvpnd.host import resolvconf
resolvconf.main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))
"""


class Machine:
    """directory: for all of it. resolved: exists while systemd-resolved runs. records: as resolvconf.RECORDS."""

    def __init__(self, directory, monkeypatch):
        self.directory = directory
        self.log = directory / "calls"
        self.resolved, self.records = directory / "stub-resolv.conf", directory / "resolvconf"
        self.socket = directory / "socket"
        self._kept = self.records / "interface"
        self._kept.mkdir(parents=True)
        # Nothing of the real machine is asked: a resolvectl there would be found behind ours.
        (directory / "bin").mkdir()
        for program in ("sh", "cat", "rm", "tail"):
            os.symlink(f"/usr/bin/{program}", directory / "bin" / program)
        monkeypatch.setenv("PATH", str(directory / "bin"))

    def install(self, program, fails=(), hangs="none", first=":", last=":"):
        """fails: {first argument: what it says on standard error}. hangs: the first argument with which it never ends.

        first, last: lines for the shell, the one with -d before it does anything, the other whenever it is done."""
        cases = "".join(f'{one}) echo "{said}" >&2; exit 1;;\n' for one, said in dict(fails).items())
        cases += f"{hangs}) exec tail -f /dev/null;;\n"
        file = self.directory / "bin" / program
        file.write_text(SCRIPT.format(program=program, log=self.log, records=self._kept, cases=cases, first=first,
                                      last=last))
        file.chmod(0o755)

    def calls(self):
        """The lines since the last time; "removed" where resolvconf has removed a record."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def leave(self, instance):
        """A record that a run has left."""
        (self._kept / f"tun.bulkvpnd-{instance}").touch()

    def names(self):
        """{record: its text} of all that resolvconf has."""
        return {file.name: file.read_text() for file in self._kept.iterdir()}

    def dns(self, root=True):
        return Dns("bulk0", "home", self.resolved, self.records, self.socket, root)


class Helpers:
    """Context manager. Listens at `machine.socket`; `processes` are the helpers, in the order in which they came.

    capabilities: that who connects must have; these tests may run without any.
    """

    def __init__(self, machine, capabilities=0):
        self._capabilities = capabilities
        self.processes = []
        self._machine = machine
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(machine.socket))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept)

    def __enter__(self):
        self._thread.start()
        return self

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                command = [sys.executable, "-c", HELPER, self._machine.directory, self._machine.records,
                           str(self._capabilities)]
                self.processes.append(subprocess.Popen(command, stdin=connection, stderr=subprocess.PIPE, text=True))

    def __exit__(self, *exception):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for process in self.processes:
            process.terminate()
            process.communicate(timeout=20)


def until(condition, what, seconds=10):
    """Polls `condition` until it is true. Raises AssertionError with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        select.select([], [], [], 0.01)
