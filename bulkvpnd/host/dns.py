"""Name servers and search domains of the tunnel, given to whatever manages them on this machine.

systemd-resolved keeps them with the device, by resolvectl(1); with the device they are gone, after a crash too. For the
service's user polkit decides, by the rule that the package ships. Else resolvconf(8), which keeps them under the
instance's name: by the package's helper, or directly where that is not here and this process is root.
"""

import os
import pathlib
import shutil

from bulkvpnd.host import program, resolvconf

RESOLVED = pathlib.Path("/run/systemd/resolve/stub-resolv.conf")
"""Written by systemd-resolved while it runs (systemd-resolved.service(8))."""
EVERYTHING = "~."
"""resolvectl(1): a routing domain that all names belong to."""


class Dns:
    """What one instance has set. device: of the tunnel. instance: its name. resolved: see above.

    records, helper: resolvconf.RECORDS and resolvconf.SOCKET. root: whether this process is.
    """

    def __init__(self, device, instance, resolved=RESOLVED, records=resolvconf.RECORDS, helper=resolvconf.SOCKET,
                 root=os.geteuid() == 0):
        self._device = device
        self._resolved = resolved
        self._helper = helper
        self._root = root
        self._direct = resolvconf.Record(instance, records)
        self._held = resolvconf.HeldRecord(instance, records, helper)
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
        self._undo = self._revert
        for command, values in (("dns", servers), ("domain", names), ("default-route", [alone])):
            # Without a value it would show what is set. Nothing is, after undo().
            error = values and program.run(["resolvectl", command, self._device, *map(str, values)], program.TIMEOUT)
            if error:
                self.undo()
                return f"systemd-resolved: {error}{_mend(error)}"
        return None

    def _revert(self):
        # What it says is no news: with the device gone there is nothing left to take back.
        program.run(["resolvectl", "revert", self._device], program.UNDO_TIMEOUT)

    def _by_resolvconf(self, servers, domains):
        record = self._record()
        if record is None:
            return "resolvconf needs root; run: systemctl start bulkvpnd-resolvconf.socket"
        self._undo = record.remove
        error = record.set(servers, domains)
        if error:
            self.undo()
            return f"resolvconf: {error}"
        return None

    def _record(self):
        """What has a way to resolvconf(8), None if nothing has."""
        if self._helper.exists():
            return self._held
        return self._direct if self._root else None

    def lasts(self):
        """Whether what was applied is still there. With systemd-resolved that is not asked."""
        return self._undo in (None, self._revert) or self._direct.is_there()

    def undo(self):
        """Takes it back, and what a crashed run left with resolvconf."""
        undo, self._undo = self._undo, None
        if undo is None and self._direct.is_there():
            record = self._record()
            undo = record and record.remove
        if undo:
            undo()


def _mend(error):
    """What helps when systemd-resolved does not do it, as the end of a sentence."""
    if "denied" in error or "authentication" in error:
        return "; is polkitd installed?"
    # Where it was installed after dbus-daemon had read its configuration, it has no name on the bus until then.
    return "; run: systemctl restart systemd-resolved" if error.startswith(program.NO_ANSWER) else ""
