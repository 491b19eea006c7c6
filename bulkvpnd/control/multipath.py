"""Keeps this instance's memberships in step with its tunnel: a member while the tunnel carries the prefix, else not.

    role: a connection came or went --> changed() --> carries the prefix? --> Membership.apply or .undo
                                          ^
                                          '-- and once a CHECK_PERIOD, should somebody else have changed the routes
"""

import ipaddress
import logging

import gevent
from gevent.event import Event

from bulkvpnd.config import ConfigurationError
from bulkvpnd.control import clients
from bulkvpnd.host.multipath import HASH_POLICY, Membership, MultipathError

log = logging.getLogger(__name__)

CHECK_PERIOD = 1.0
"""Seconds between two looks at the kernel's state (choice)."""
DRAIN_TIME = 0.05
"""Seconds between leaving and the end of the tunnel, in which what waits in the device's queue is still sent: ten times
the default of `queue-target` (choice)."""


def check_configuration(configuration):
    """Raises ConfigurationError if a server is to carry a network that it could deliver to no client."""
    if configuration.mode != "server":
        return
    behind = {network for client in configuration.clients for network in client.networks}
    for wish in configuration.multipath:
        if wish.prefix not in behind:
            raise ConfigurationError(
                f"{configuration.path}: multipath = {wish.prefix}: is behind no client; write networks = {wish.prefix} "
                f"below a [client NAME] in {clients.directory_of(configuration)}/NAME.conf"
            )


class Multipath:
    """The memberships of one instance, as a context manager: leaving it ends them.

    wishes: config.Multipath objects. device: name of the TUN device. directory: where instances meet. role: Server or
    Client, with carries(prefix), outer_addresses() and on_change. ledger: host.sysctl.Ledger.
    """

    def __init__(self, wishes, device, directory, role, ledger, membership=Membership):
        self._role = role
        self._ledger = ledger
        self._memberships = [membership(device, wish.prefix, wish.weight, wish.source, directory) for wish in wishes]
        self._is_member = {}
        self._why_not = {}
        self._changed = Event()
        self._greenlet = None

    def check(self, peers=()):
        """Raises MultipathError if a prefix cannot be carried here. peers: outer addresses that are known, text."""
        for membership in self._memberships:
            membership.check(peers)

    def __enter__(self):
        if not self._memberships:
            return self
        for version in sorted({membership.prefix.version for membership in self._memberships}):
            outcome = self._ledger.want(HASH_POLICY[version], "1")
            if outcome.why_not:
                log.warning("multipath: flows between the same two hosts stay on one instance: %s", outcome)
        self._role.on_change = self._changed.set
        self._greenlet = gevent.spawn(self._keep)
        return self

    def __exit__(self, *exception):
        if self._greenlet is None:
            return
        self._role.on_change = _ignore
        self._greenlet.kill()
        # The list is made whole: every membership ends, whatever the first one said.
        if any([membership.undo() for membership in self._memberships]):
            gevent.sleep(DRAIN_TIME)

    def _keep(self):
        while True:
            for membership in self._memberships:
                self._update(membership)
            self._changed.wait(CHECK_PERIOD)
            self._changed.clear()

    def _update(self, membership):
        prefix = membership.prefix
        was_member = self._is_member.get(prefix, False)
        try:
            if self._role.carries(prefix):
                # A server may have thousands of them, so they are looked at only to join.
                membership.apply(() if was_member else self._role.outer_addresses())
                is_member, why_not = True, None
            else:
                membership.undo()
                is_member, why_not = False, "the tunnel is down"
        except MultipathError as error:
            is_member, why_not = False, str(error)
            if why_not != self._why_not.get(prefix):
                log.error("%s", error)
        if is_member != was_member:
            log.info("multipath: %s %s %s", membership.device, "carries" if is_member else "no longer carries", prefix)
        self._is_member[prefix], self._why_not[prefix] = is_member, why_not

    def status(self):
        """What `bulkvpnctl multipath show` puts together from all instances."""
        return [self._described(membership) for membership in self._memberships]

    def _described(self, membership):
        try:
            members = membership.members()
        except MultipathError as error:
            members, why_not = {}, str(error)
        else:
            why_not = None if membership.device in members else self._why_not.get(membership.prefix)
        return {
            "prefix": str(membership.prefix),
            "device": membership.device,
            "weight": membership.weight,
            "source": str(membership.source) if membership.source else None,
            "up": membership.device in members,
            "why_not": why_not,
            "members": members,
        }


def literal_addresses(endpoints):
    """Those of [(host, port)] that are addresses and not names, as text."""
    found = []
    for host, _ in endpoints:
        try:
            found.append(str(ipaddress.ip_address(host.partition("%")[0])))
        except ValueError:
            # A name: where it leads is known when it has been connected to.
            continue
    return found


def _ignore():
    """Nobody wants to know."""
