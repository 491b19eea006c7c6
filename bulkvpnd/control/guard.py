"""Puts back what others take from under an instance while it runs.

    nft flush ruleset             the kernel's notice --> is the table whole? --> written again
    ip link set bulk0 down, up    the kernel's notice --> addresses, routes and the full tunnel again

With the table the kill switch, the NAT and the isolation of clients are gone, and nothing else would show it. A device
that goes down loses what leads into it, and does not get it back by coming up again.
"""

import logging

import gevent

from bulkvpnd import events
from bulkvpnd.host import notices
from bulkvpnd.host.firewall import FirewallError
from bulkvpnd.host.link import LinkError

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds after the table was written again: somebody who goes on removing it shall not keep this process busy
(choice)."""
RETRY = 1.0
"""Seconds until what could not be put back is tried again (choice)."""


class Guard:
    """As a context manager: leaving it ends the guard, before what it guards is undone.

    firewall: host.firewall.Firewall. device, index: name and number of the TUN device. role: Server or Client, with
    restore(). tuner: control.tuning.Tuner. notices: the module host.notices, or a double.
    """

    def __init__(self, firewall, device, index, role, tuner, notices=notices):
        self._firewall = firewall
        self._device = device
        self._index = index
        self._role = role
        self._tuner = tuner
        self._notices = notices
        self._greenlets = []

    def __enter__(self):
        self._greenlets = [gevent.spawn(self._keep_rules), gevent.spawn(self._keep_device)]
        return self

    def __exit__(self, *exception):
        gevent.killall(self._greenlets)

    def restore(self):
        """Everything is put back, whatever became of it. Raises FirewallError, LinkError, OSError."""
        self._firewall.rewrite()
        self._tuner.restore()
        self._role.restore()

    def _keep_rules(self):
        for _ in self._notices.of_table(self._firewall.table):
            while True:
                try:
                    is_back = self._mend_rules()
                    break
                except FirewallError as error:
                    log.error("%s", error)
                    gevent.sleep(RETRY)
            if is_back:
                gevent.sleep(PAUSE)

    def _mend_rules(self):
        is_back = self._firewall.mend()
        if is_back:
            log.warning("nftables table inet %s: something else removed it, or a part of it; it is there again",
                        self._firewall.table, extra={"MESSAGE_ID": events.ID["rules-removed"]})
            self._tuner.restore()
        return is_back

    def _keep_device(self):
        was_up = True
        for is_up in self._notices.of_device(self._index):
            if is_up is False:
                if was_up:
                    log.warning("device %s is down: something else did that, and nothing passes the tunnel; run: "
                                "ip link set %s up", self._device, self._device,
                                extra={"MESSAGE_ID": events.ID["device-down"]})
            elif is_up is None or not was_up:
                self._restore_device()
            was_up = is_up is not False

    def _restore_device(self):
        try:
            self._role.restore()
        except (FirewallError, LinkError, OSError) as error:
            log.error("device %s is up again, but not all could be put back: %s", self._device, error)
        else:
            log.info("device %s is up again, with its addresses and routes", self._device)
