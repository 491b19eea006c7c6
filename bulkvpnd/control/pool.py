"""The addresses of a server: one lease for each identity, kept across restarts.

    a session is begun --> its addresses are lent --first authentic frame--> settled: leased to its identity
                                        '--------- none in time -----------> released: all is as it was before

An identity has the same addresses as long as nobody else needs them: when all are leased, the one whose lease has been
unused for the longest goes to the newcomer, and never one that a session has. What the administrator gave to one
identity for good is never leased to another.
"""

import ipaddress
import json
import logging

from bulkvpnd.control.latest import LatestFile
from bulkvpnd.protocol.errors import Refused

log = logging.getLogger(__name__)

LEASES_MAX = 65536
"""Leases kept; the file stays below about 10 MiB (choice)."""


class Pool:
    """networks: (IPv4Network or None, IPv6Network or None). path: of the lease file. fixed: {identity: {4 or 6:
    address}} of those who keep theirs for good. file: its writer, a latest.LatestFile; None makes one.

    The server's own addresses are the first of each network.
    """

    def __init__(self, networks, path, fixed=None, file=None):
        self._networks = [network for network in networks if network is not None]
        self._path = path
        self._file = file or LatestFile(path, "leases")
        self._leases = {}  # identity: number of the host within each network, oldest use first
        self._lent = {}  # identity: likewise, where it is not what it has a lease of
        self._sessions = {}  # identity: how many it has
        self._fix(fixed or {})
        self._load()

    def set_fixed(self, fixed):
        """Others keep theirs for good from now on. Who has what is theirs now loses it; addresses() tells."""
        self._fix(fixed)
        self.save()

    def _fix(self, fixed):
        self._fixed = fixed
        self._reserved = self._reserve()
        self._leases, self._lent = (
            {identity: number for identity, number in numbers.items()
             if number not in self._reserved and self._needs_lease(identity)}
            for numbers in (self._leases, self._lent)
        )

    @property
    def _size(self):
        """Numbers 2 … size: network and server addresses come first, the broadcast address of IPv4 last."""
        hosts = [network.num_addresses - (1 if network.version == 4 else 0) for network in self._networks]
        return min(*hosts, LEASES_MAX + 2)

    def _reserve(self):
        """The numbers that lead to somebody's fixed address, in whichever network."""
        first = {network.version: int(network.network_address) for network in self._networks}
        numbers = [
            int(address) - first[version]
            for addresses in self._fixed.values()
            for version, address in addresses.items()
            if version in first
        ]
        return {number for number in numbers if 2 <= number < self._size}

    def _needs_lease(self, identity):
        return any(network.version not in self._fixed.get(identity, {}) for network in self._networks)

    @property
    def server_interfaces(self):
        """The server's address in each network, with its prefix length."""
        return [self._interface(network, 1) for network in self._networks]

    @staticmethod
    def _interface(network, number):
        return ipaddress.ip_interface(f"{network[number]}/{network.prefixlen}")

    def lease(self, identity):
        """Addresses for a session, {4: IPv4Interface, 6: IPv6Interface}, which it has until the release.

        Nobody loses a lease for them before settle(). Raises Refused("pool") if all are used.
        """
        if identity not in self._lent and self._needs_lease(identity):
            own = self._leases.get(identity)
            # It may be lent to another by now.
            if own is None or own in self._lent.values():
                self._lent[identity] = self._free_number()
        self._sessions[identity] = self._sessions.get(identity, 0) + 1
        return self.addresses(identity)

    def _number(self, identity):
        return self._lent.get(identity, self._leases.get(identity))

    def addresses(self, identity):
        """What the identity has now, as lease() returns it; None where it has no lease, but needs one."""
        fixed = self._fixed.get(identity, {})
        number = self._number(identity)
        if number is None and self._needs_lease(identity):
            return None
        return {
            network.version: ipaddress.ip_interface((fixed[network.version], network.prefixlen))
            if network.version in fixed
            else self._interface(network, number)
            for network in self._networks
        }

    def _free_number(self):
        used = {number for number in map(self._number, self._sessions) if number is not None}
        taken = self._reserved.union(used, self._leases.values())
        if len(taken) < self._size - 2:
            return next(number for number in range(2, self._size) if number not in taken)
        for number in self._leases.values():
            if number not in used:
                return number
        raise Refused("pool", "every address of the pool is in use")

    def settle(self, identity):
        """A session of the identity has shown that it is there: what it was lent is its lease from now on."""
        own = self._leases.pop(identity, None)
        number = self._lent.pop(identity, own)
        for former, its in self._leases.items():
            if its == number:
                log.info("the pool is full; the lease of %s, unused for the longest, goes to another", former,
                         extra={"IDENTITY": former})
                del self._leases[former]
                break
        if number is not None:
            self._leases[identity] = number
        self.save()

    def release(self, identity):
        """A session of the identity has ended. Each lease() needs one."""
        left = self._sessions.pop(identity) - 1
        if left:
            self._sessions[identity] = left
        else:
            self._lent.pop(identity, None)

    # The file: {"leases": {identity: number}}, oldest use first. Numbers and not addresses, so that a changed pool
    # keeps everybody's place.

    def _load(self):
        try:
            leases = json.loads(self._path.read_text(encoding="ascii"))["leases"]
            valid = {
                str(identity): number
                for identity, number in leases.items()
                if type(number) is int and 2 <= number < self._size
            }
        except FileNotFoundError:
            return
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s: leases cannot be read (%s); clients may get other addresses than before",
                        self._path, error.__class__.__name__)
            return
        seen = set(self._reserved)
        for identity, number in valid.items():
            if number not in seen and self._needs_lease(identity):
                seen.add(number)
                self._leases[identity] = number

    def save(self):
        """Has the leases written soon. A full disk costs the memory of leases, never the tunnel."""
        self._file.save(lambda: json.dumps({"leases": self._leases}))

    def flush(self):
        """Waits, for a limited time, until they are."""
        self._file.flush()
