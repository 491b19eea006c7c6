"""Name servers and search domains of the tunnel, given to whatever manages them on this machine.

systemd-resolved keeps them with the device, by resolvectl(1); with the device they are gone, after a crash too. For the
service's user polkit decides, by the rule that the package ships. Else resolvconf(8), which keeps them under the
instance's name and only lets root write. Both are started with an argument vector; no shell sees what a server sent.
"""

import os
import pathlib
import shutil
import subprocess

RESOLVED = pathlib.Path("/run/systemd/resolve/stub-resolv.conf")
"""Written by systemd-resolved while it runs (systemd-resolved.service(8))."""
RECORDS = pathlib.Path("/run/resolvconf")
"""Below it both kinds of resolvconf keep a file for each interface."""
TIMEOUT, UNDO_TIMEOUT = 10, 2
"""Seconds that one of the programs may take to do it and to take it back (choice: less than a stop has)."""
NO_ANSWER = "no answer"
EVERYTHING = "~."
"""resolvectl(1): a routing domain that all names belong to."""


class Dns:
    """What one instance has set. device: of the tunnel. instance: its name. resolved, records: see above."""

    def __init__(self, device, instance, resolved=RESOLVED, records=RECORDS):
        self._device = device
        # wg-quick(8) does the same: in resolvconf's interface-order, "tun." stands before the usual devices.
        self._record = f"tun.bulkvpnd-{instance}"
        self._resolved = resolved
        self._records = records
        self._forget = ["resolvconf", "-d", self._record, "-f"]
        self._undo = None

    def apply(self, servers, domains, everything):
        """servers: IP addresses. domains: names. everything: all names are asked there, not only those of `domains`.

        Returns None, or why it is not done.
        """
        self.undo()
        if not servers and not domains:
            return None
        if self._resolved.exists() and shutil.which("resolvectl"):
            return self._by_resolved(servers, domains, everything)
        if shutil.which("resolvconf"):
            return self._by_resolvconf(servers, domains)
        return "neither systemd-resolved nor resolvconf is here; install one, or set the name servers by hand"

    def _by_resolved(self, servers, domains, everything):
        # Without domains there is nothing to tell by which names belong there: all of them do, beside the others.
        alone = "yes" if everything or not domains else "no"
        names = [*domains, *([EVERYTHING] if everything else [])]
        self._undo = ["resolvectl", "revert", self._device]
        for command, values in (("dns", servers), ("domain", names), ("default-route", [alone])):
            # Without a value it would show what is set. Nothing is, after undo().
            error = values and _run(["resolvectl", command, self._device, *map(str, values)], TIMEOUT)
            if error:
                self.undo()
                return f"systemd-resolved: {error}{_mend(error)}"
        return None

    def _by_resolvconf(self, servers, domains):
        lines = [f"nameserver {server}" for server in servers]
        if domains:
            lines.append("search " + " ".join(domains))
        self._undo = self._forget
        # -m 0 -x, of openresolv: before all others, and alone. Debian's resolvconf does not look at them.
        error = _run(["resolvconf", "-a", self._record, "-m", "0", "-x"], TIMEOUT, "\n".join(lines) + "\n")
        if error:
            self.undo()
            return f"resolvconf: {error}; it needs root"
        return None

    def undo(self):
        """Takes it back, and what a crashed run left with resolvconf."""
        command, self._undo = self._undo, None
        if command is None and any(self._records.glob(f"interface*/{self._record}")):
            command = self._forget
        if command:
            # What it says is no news: with the device gone there is nothing left to take back.
            _run(command, UNDO_TIMEOUT)


def _mend(error):
    """What helps when systemd-resolved does not do it, as the end of a sentence."""
    if "denied" in error or "authentication" in error:
        return "; is polkitd installed?"
    # Where it was installed after dbus-daemon had read its configuration, it has no name on the bus until then.
    return "; run: systemctl restart systemd-resolved" if error.startswith(NO_ANSWER) else ""


def _run(command, timeout, text=""):
    """Returns None, or the first line of what it complained about."""
    # Not the whole environment: in English it can be told what was said, and resolvectl would tell $NOTIFY_SOCKET of
    # its failure, which systemd takes from the main process only.
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", timeout=timeout,
                              env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"})
    except subprocess.TimeoutExpired:
        return f"{NO_ANSWER} within {timeout} s"
    except OSError as error:
        return error.strerror
    if done.returncode == 0:
        return None
    said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0].rstrip(".")
    return said.encode("unicode_escape").decode("ascii")[:200]
