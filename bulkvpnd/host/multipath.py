"""One prefix carried by several instances: this instance's membership in the kernel's next-hop group for it.

    apply   own hop made, added to the group that the route for the prefix leads to; the first makes group and route
    undo    own hop deleted: the kernel takes it out of the group, and the last one out takes group and route with it

The kernel's own state is the truth, and a device that is gone, as after a crash, is the same to it as `undo`: nothing
is left to clean. Instances take turns by a lock in the directory that they share, only because the kernel has no call
that adds one member to a group. What a group is, and why a resilient one, is in nexthop.py.

A kernel without next-hop objects (Linux before 5.3) gets a route that names its hops. There a device that is gone takes
the route for IPv4 with it, so `apply` is called again and again while the tunnel is up.
"""

import contextlib
import errno
import ipaddress
import os
import socket
import time

from bulkvpnd.host import lock
from bulkvpnd.host.nexthop import FAMILIES, METRICS, Netlink
from bulkvpnd.host.sysctl import SHARED_DIRECTORY

PROTOCOL = 87
"""Who made a route or a next hop (rtnetlink(7), rtm_protocol; /etc/iproute2/rt_protos): a number that nobody of that
list has (choice). Not the number of routes that belong to one instance, because these belong to several."""
FIRST_ID = 0x62760000
"""Ids of next-hop objects are taken from here on: administrators and routing daemons begin with small ones (choice)."""
HASH_POLICY = {4: "net.ipv4.fib_multipath_hash_policy", 6: "net.ipv6.fib_multipath_hash_policy"}
"""1: by ports too, so that flows between the same two hosts are spread (Documentation/networking/ip-sysctl.rst)."""
LOCK_NAME = "multipath.lock"
LOCK_TIME = 2.0
"""Seconds to wait for another instance that is just joining, which takes milliseconds (choice)."""
JOIN_TRIES = 4
"""A member may leave, or die, between a look at the group and the change; it asks nobody (choice)."""


class MultipathError(Exception):
    """This instance cannot become a member. The message names the prefix and says why."""


class Membership:
    """What one instance has to do with one prefix.

    device: name of its TUN device. prefix: ipaddress network. weight: its share, from 1 to 255. source: the address of
    this host's own packets to the prefix, or None. directory: where the instances of this machine meet. objects:
    whether the kernel has next-hop objects, None to find out.
    """

    def __init__(self, device, prefix, weight, source=None, directory=SHARED_DIRECTORY, objects=None):
        self.device = device
        self.prefix = prefix
        self.weight = weight
        self.source = source
        self._lock_path = directory / LOCK_NAME
        self._objects = objects
        self._hop = None  # id of this membership's own hop

    def check(self, peers=()):
        """Raises MultipathError if the route for the prefix is somebody else's, or would swallow the tunnel itself.

        peers: addresses of the far ends, text. Changes nothing.
        """
        with self._about(), Netlink() as netlink:
            for route in netlink.routes(self.prefix.version, containing=self.prefix.network_address):
                if (route.prefix, route.metric) == (self.prefix, METRICS[self.prefix.version]):
                    if route.protocol != PROTOCOL:
                        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            for peer in map(ipaddress.ip_address, peers):
                if peer.version == self.prefix.version and peer in self.prefix:
                    self._check_outer_path(netlink, peer)

    def _check_outer_path(self, netlink, peer):
        covering = netlink.routes(peer.version, containing=peer)
        if not any(route.prefix.prefixlen > self.prefix.prefixlen for route in covering):
            raise MultipathError(
                f"multipath = {self.prefix}: holds {peer}, the far end of the tunnel itself; choose a smaller prefix, "
                f"or add a route to {peer} first"
            )

    def apply(self, peers=()):
        """Makes this instance a member if it is none. Returns whether anything was changed. Raises MultipathError.

        peers: as for check().
        """
        if any(ipaddress.ip_address(peer) in self.prefix for peer in peers):
            self.check(peers)
        with self._about(), Netlink() as netlink, self._turn():
            index = socket.if_nametoindex(self.device)
            if not self._has_objects(netlink):
                return self._join_route(netlink, index)
            for _ in range(JOIN_TRIES - 1):
                try:
                    return self._join_group(netlink, index)
                except OSError:
                    # Most likely what JOIN_TRIES is for. If not, the last try says so.
                    continue
            return self._join_group(netlink, index)

    def undo(self):
        """Ends the membership. Raises nothing. Returns whether there was one."""
        with contextlib.suppress(MultipathError), self._about(), Netlink() as netlink:
            index = socket.if_nametoindex(self.device)
            if self._has_objects(netlink):
                return self._leave_group(netlink, index)
            with self._turn():
                return self._leave_route(netlink, index)
        return False

    def members(self):
        """{device: weight} of all members on this host; one that is down is none. Raises MultipathError."""
        with self._about(), Netlink() as netlink:
            route = self._own_route(netlink)
            if route and route.group:
                nexthops = netlink.nexthops()
                group = nexthops.get(route.group)
                hops = {nexthops[id].device: weight for id, weight in (group.members if group else {}).items()}
            else:
                hops = route.hops if route else {}
            named = {_name(index): weight for index, weight in hops.items()}
            return {name: weight for name, weight in named.items() if name}

    # With next-hop objects

    def _join_group(self, netlink, index):
        # In this order: a route that is still there leads to a group that was there before. The other way round the
        # last member can take both along between the two looks, and the route seen first is not made again.
        nexthops = netlink.nexthops()
        route = self._own_route(netlink)
        own = self._own_hop(nexthops, index, route)
        # Somebody may have removed the route alone; then the group is the one that already has this hop.
        group = nexthops.get(route.group) if route else _group_of(nexthops, own)
        if own and route and group and group.members.get(own.id) == self.weight:
            return False
        if own:
            self._hop = own.id
        else:
            self._hop = _free_id(nexthops)
            netlink.add_hop(self._hop, PROTOCOL, FAMILIES[self.prefix.version], index)
        try:
            if group:
                netlink.set_group(group, {**group.members, self._hop: self.weight})
                group_id = group.id
            else:
                group_id = _free_id(nexthops, self._hop + 1)
                netlink.add_group(group_id, PROTOCOL, {self._hop: self.weight})
            if not route:
                netlink.add_route(self.prefix, PROTOCOL, group_id, self.source)
        except OSError:
            # Half a membership is none.
            with contextlib.suppress(OSError):
                netlink.delete(self._hop)
            raise
        return True

    def _leave_group(self, netlink, index):
        own = self._own_hop(netlink.nexthops(), index, self._own_route(netlink))
        self._hop = None
        if own:
            netlink.delete(own.id)
        return bool(own)

    def _own_hop(self, nexthops, index, route):
        """This membership's hop. An instance has one for each prefix, so that it can leave one and stay in others."""
        group = nexthops.get(route.group) if route else None
        for id in (self._hop, *(group.members if group else ())):
            hop = nexthops.get(id)
            if hop and (hop.protocol, hop.device) == (PROTOCOL, index):
                return hop
        return None

    # Without

    def _join_route(self, netlink, index):
        route = self._own_route(netlink)
        if route and route.hops.get(index) == self.weight:
            return False
        hops = {**(route.hops if route else {}), index: self.weight}
        netlink.add_multipath_route(self.prefix, PROTOCOL, hops, self.source, replace=route is not None)
        return True

    def _leave_route(self, netlink, index):
        route = self._own_route(netlink)
        if not route or index not in route.hops:
            return False
        left = {device: weight for device, weight in route.hops.items() if device != index}
        if left:
            netlink.add_multipath_route(self.prefix, PROTOCOL, left, self.source, replace=True)
        else:
            netlink.delete_route(self.prefix, PROTOCOL)
        return True

    # With and without

    def _has_objects(self, netlink):
        if self._objects is None:
            try:
                netlink.nexthops()
                self._objects = True
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._objects = False
        return self._objects

    def _own_route(self, netlink):
        """The route for the prefix that an instance of this program made, or None."""
        routes = netlink.routes(self.prefix.version, PROTOCOL)
        return next((route for route in routes if route.prefix == self.prefix), None)

    @contextlib.contextmanager
    def _turn(self):
        """Keeps the other instances out. Where the lock cannot be had it goes on without: a change that is lost is made
        again by the next apply."""
        try:
            self._lock_path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            descriptor = os.open(self._lock_path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            yield
            return
        try:
            deadline = time.monotonic() + LOCK_TIME
            while not lock.take(descriptor) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _about(self):
        try:
            yield
        except OSError as error:
            mends = {
                errno.EEXIST: "; a route that is not bulkvpnd's is there already; remove it, or carry another prefix; "
                              f"see: ip route show {self.prefix}",
                errno.EPERM: "; it needs root or CAP_NET_ADMIN",
            }
            raise MultipathError(f"multipath = {self.prefix}: {error.strerror or error}"
                                 f"{mends.get(error.errno, '')}") from None


def _group_of(nexthops, hop):
    return next((group for group in nexthops.values() if hop and hop.id in group.members), None)


def _free_id(nexthops, first=FIRST_ID):
    while first in nexthops:
        first += 1
    return first


def _name(index):
    try:
        return socket.if_indextoname(index)
    except OSError:
        return None  # it went a moment ago
