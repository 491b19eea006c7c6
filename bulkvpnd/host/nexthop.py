"""Next-hop objects of the kernel, and routes that lead to them: the part of rtnetlink(7) that pyroute2 does not know.

    hop    one device, an object of its own          ip nexthop add id 1 dev bulk0
    group  hops with weights, an object too          ip nexthop add id 9 group 1,1/2,1 type resilient …
    route  leads to a group by its id                ip route add 10.2.0.0/16 nhid 9

When a hop goes, because it is deleted or because its device is gone, the kernel takes it out of its groups; a group
that is empty goes too, and so does every route that leads to it.

No release of pyroute2 up to 0.9.5 has these messages, and how one adds some differs from release to release; the six
that are needed are packed here. Errors are OSError with the kernel's errno and, where it says one, its reason.
"""

import dataclasses
import errno
import functools
import ipaddress
import os
import socket
import struct

from pyroute2.netlink.exceptions import NetlinkDumpInterrupted

from bulkvpnd.host.netlink import listing

# linux/netlink.h
SOL_NETLINK = 270
NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 11, 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_DUMP_INTR, NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x10, 0x100, 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_INT, _UINT, _USHORT = struct.Struct("=i"), struct.Struct("=I"), struct.Struct("=H")

# linux/rtnetlink.h
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_MULTIPATH, RTA_NH_ID = 1, 4, 5, 6, 7, 9, 30
RT_TABLE_MAIN, RTN_UNICAST = 254, 1
RT_SCOPE_UNIVERSE = 0
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, lengths, tos, table, protocol, scope, type, flags
_RTNEXTHOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, weight - 1, device

# linux/nexthop.h
NHA_ID, NHA_GROUP, NHA_GROUP_TYPE, NHA_OIF, NHA_RES_GROUP = 1, 2, 3, 5, 12
NHA_RES_GROUP_BUCKETS, NHA_RES_GROUP_IDLE_TIMER, NHA_RES_GROUP_UNBALANCED_TIMER = 1, 2, 3
NEXTHOP_GRP_TYPE_RES = 1
_NEXTHOP = struct.Struct("=BBBBI")  # struct nhmsg: family, scope, protocol, reserved, flags
_MEMBER = struct.Struct("=IBBH")  # struct nexthop_grp: id, weight - 1, reserved twice
USER_HZ = 100
"""Units of the timers of a resilient group, as everywhere between kernel and user space (time(7))."""

BUCKETS = 256
"""Shares that a resilient group deals out: eight instances still get their weights to 3 % (choice)."""
IDLE_SECONDS = 1
"""A bucket without a packet for so long may move to another hop: longer than a packet is under way in any tunnel that
still works well, so that no flow is reordered by it (choice)."""
UNBALANCED_SECONDS = 10
"""After this time buckets move although they are in use, if too few are idle: a hop that came back gets its share under
full load, too (choice). In a group of one hop all buckets are idle to the kernel, because fib_select_path() of
net/ipv4/fib_semantics.c does not look at them there, so the second one gets its half at once."""
ROUTER = ipaddress.IPv6Address("fe80::1")
"""A link-local address that nothing needs to have, see add_multipath_route (choice)."""
TIMEOUT = 5.0
"""Seconds in which the kernel answers; it does so at once (choice)."""


@dataclasses.dataclass(frozen=True, slots=True)
class NextHop:
    """A hop or a group. id: its number. protocol: who made it. device: interface index of a hop, None for a group.

    members: {id of a hop: weight} of a group. kind: how a group deals flows out, NEXTHOP_GRP_TYPE_….
    """

    id: int
    protocol: int
    device: int | None
    members: dict
    kind: int


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table. metric: lower ones are preferred. group: id of the next-hop object that it leads to.

    hops: {interface index: weight}, whichever way it names them.
    """

    prefix: object
    protocol: int
    metric: int
    group: int | None
    hops: dict


def _understood(function):
    """Makes an answer of another shape than linux/*.h has an OSError too."""

    @functools.wraps(function)
    def called(*arguments, **options):
        try:
            return function(*arguments, **options)
        except (struct.error, ValueError, OverflowError):
            raise OSError(errno.EBADMSG, "the kernel's answer is not understood") from None

    return called


class Netlink:
    """A socket to the kernel's routing, as a context manager."""

    def __enter__(self):
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sock.settimeout(TIMEOUT)
        self._sequence = 0
        for option in (NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            try:
                self._sock.setsockopt(SOL_NETLINK, option, 1)
            except OSError:
                # Linux before 4.12 and 4.20: errors come without a reason, and listings unfiltered.
                pass
        return self

    def __exit__(self, *exception):
        self._sock.close()

    # Hops and groups

    @_understood
    def nexthops(self):
        """{id: NextHop} of this network namespace. EOPNOTSUPP: the kernel has no such objects (Linux before 5.3)."""
        found = {}
        for body in listing(self._dump, RTM_GETNEXTHOP, RTM_NEWNEXTHOP, bytes(_NEXTHOP.size)):
            _, _, protocol, _, _ = _NEXTHOP.unpack_from(body)
            attributes = _attributes(body[_NEXTHOP.size :])
            members = attributes.get(NHA_GROUP, b"")
            hop = NextHop(_number(_UINT, attributes, NHA_ID), protocol, _number(_UINT, attributes, NHA_OIF),
                          {id: weight + 1 for id, weight, _, _ in _MEMBER.iter_unpack(members)},
                          _number(_USHORT, attributes, NHA_GROUP_TYPE) or 0)
            found[hop.id] = hop
        return found

    def add_hop(self, id, protocol, family, device):
        """Makes a hop that leads to the device with the interface index `device`."""
        body = _NEXTHOP.pack(family, 0, protocol, 0, 0)
        self._do(RTM_NEWNEXTHOP, NLM_F_CREATE | NLM_F_EXCL,
                 body + _attribute(NHA_ID, _UINT.pack(id)) + _attribute(NHA_OIF, _UINT.pack(device)))

    def add_group(self, id, protocol, members):
        """Makes a group with `members`, {id of a hop: weight from 1 to 255}: a resilient one where the kernel has them.

        In such a one only the flows of a hop that goes are dealt out anew; otherwise others would change places too,
        and be reordered (Documentation/networking/nexthop-group-resilient.rst of Linux, from 5.13).
        """
        common = _NEXTHOP.pack(0, 0, protocol, 0, 0) + _attribute(NHA_ID, _UINT.pack(id)) + _members(members)
        resilient = _attribute(NHA_GROUP_TYPE, _USHORT.pack(NEXTHOP_GRP_TYPE_RES)) + _attribute(
            NHA_RES_GROUP | NLA_F_NESTED,
            _attribute(NHA_RES_GROUP_BUCKETS, _USHORT.pack(BUCKETS))
            + _attribute(NHA_RES_GROUP_IDLE_TIMER, _UINT.pack(IDLE_SECONDS * USER_HZ))
            + _attribute(NHA_RES_GROUP_UNBALANCED_TIMER, _UINT.pack(UNBALANCED_SECONDS * USER_HZ)),
        )
        try:
            self._do(RTM_NEWNEXTHOP, NLM_F_CREATE | NLM_F_EXCL, common + resilient)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._do(RTM_NEWNEXTHOP, NLM_F_CREATE | NLM_F_EXCL, common)

    def set_group(self, group, members):
        """Gives the NextHop `group` other members, in one step."""
        body = (_NEXTHOP.pack(0, 0, group.protocol, 0, 0) + _attribute(NHA_ID, _UINT.pack(group.id))
                + _members(members) + _attribute(NHA_GROUP_TYPE, _USHORT.pack(group.kind)))
        self._do(RTM_NEWNEXTHOP, NLM_F_CREATE | NLM_F_REPLACE, body)

    def delete(self, id):
        """Removes a hop or a group, and what hangs on it alone. ENOENT where there is none."""
        self._do(RTM_DELNEXTHOP, 0, bytes(_NEXTHOP.size) + _attribute(NHA_ID, _UINT.pack(id)))

    # Routes

    @_understood
    def routes(self, version, protocol=0, containing=None):
        """[Route] of the main table for IP `version`, 4 or 6.

        protocol: only those that it made, unless it is 0. containing: only those whose prefix holds this address; a
        router may have a million others.
        """
        family = FAMILIES[version]
        bits = int(containing) if containing is not None else None
        found = []
        for body in self._dump_routes(_ROUTE.pack(family, 0, 0, 0, RT_TABLE_MAIN, protocol, 0, 0, 0)):
            _, length, _, _, table, made_by, _, _, _ = _ROUTE.unpack_from(body)
            attributes = _attributes(body[_ROUTE.size :])
            if table != RT_TABLE_MAIN or protocol not in (0, made_by):
                continue
            address = attributes.get(RTA_DST, bytes(WIDTHS[version] // 8))
            host_bits = WIDTHS[version] - length
            if bits is not None and bits >> host_bits != int.from_bytes(address, "big") >> host_bits:
                continue
            hops = dict(_route_hops(attributes.get(RTA_MULTIPATH, b"")))
            if RTA_OIF in attributes:
                hops[_number(_UINT, attributes, RTA_OIF)] = 1
            found.append(Route(ipaddress.ip_network((address, length)), made_by,
                               _number(_UINT, attributes, RTA_PRIORITY) or 0, _number(_UINT, attributes, RTA_NH_ID),
                               hops))
        return found

    def add_route(self, prefix, protocol, group, source=None):
        """Leads `prefix`, an ipaddress network, to the next-hop object `group`. EEXIST: somebody's route is there.

        source: the address that this host's own packets get, None for the kernel's choice.
        """
        self._do(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL,
                 _route(prefix, protocol, source) + _attribute(RTA_NH_ID, _UINT.pack(group)))

    def add_multipath_route(self, prefix, protocol, hops, source=None, replace=False):
        """The same with hops of its own, {interface index: weight}, for kernels without next-hop objects.

        The kernel takes several devices for IPv6 only with a router on each, so it gets one; a TUN asks for nobody.
        """
        router = _attribute(RTA_GATEWAY, ROUTER.packed) if prefix.version == 6 else b""
        packed = b"".join(_RTNEXTHOP.pack(_RTNEXTHOP.size + len(router), 0, weight - 1, device) + router
                          for device, weight in sorted(hops.items()))
        self._do(RTM_NEWROUTE, NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL),
                 _route(prefix, protocol, source) + _attribute(RTA_MULTIPATH, packed))

    def delete_route(self, prefix, protocol):
        """ESRCH where there is none."""
        self._do(RTM_DELROUTE, 0, _route(prefix, protocol, None))

    # The exchange with the kernel

    @_understood
    def _do(self, kind, flags, body):
        self._send(kind, NLM_F_ACK | flags, body)
        for _ in self._answers():
            pass

    def _dump(self, kind, answered, body):
        """Bodies of all messages of the type `answered`. Raises NetlinkDumpInterrupted, for host.netlink.listing."""
        self._send(kind, NLM_F_DUMP, body)
        messages = list(self._answers())
        if any(flags & NLM_F_DUMP_INTR for _, flags, _ in messages):
            raise NetlinkDumpInterrupted
        return [body for kind, _, body in messages if kind == answered]

    def _dump_routes(self, body):
        try:
            return listing(self._dump, RTM_GETROUTE, RTM_NEWROUTE, body)
        except FileNotFoundError:
            # A network namespace that never had a route of this version has no such table either.
            return []

    def _send(self, kind, flags, body):
        self._sequence += 1
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0) + body)

    def _answers(self):
        while True:
            data = self._sock.recv(1 << 17)
            at = 0
            while at < len(data):
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
                body = data[at + _HEADER.size : at + length]
                at += -(-length // 4) * 4
                if sequence != self._sequence:
                    continue  # of a request that was given up
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    _raise_error(body, flags, kind)
                    yield kind, flags, b""
                    return
                yield kind, flags, body


FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
WIDTHS = {4: 32, 6: 128}
"""Bits of an address."""
METRICS = {4: 0, 6: 1024}
"""Of a route for which none was asked for (IP6_RT_PRIO_USER of net/ip6_route.h)."""


def _raise_error(body, flags, kind):
    """Raises what the end of an answer tells: struct nlmsgerr for NLMSG_ERROR, a number for NLMSG_DONE."""
    code = -_INT.unpack_from(body)[0] if len(body) >= _INT.size else 0
    if code <= 0:
        return
    reason = os.strerror(code)
    if flags & NLM_F_ACK_TLVS and kind == NLMSG_ERROR:
        length = _HEADER.unpack_from(body, _INT.size)[0]
        said = body[_INT.size + (_HEADER.size if flags & NLM_F_CAPPED else length) :]
        reason = _attributes(said).get(NLMSGERR_ATTR_MSG, reason.encode()).rstrip(b"\0").decode("ascii", "replace")
    raise OSError(code, reason)


def _attribute(kind, value):
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data):
    """{type: bytes} of a run of attributes."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & NLA_TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += -(-length // 4) * 4
    return found


def _number(layout, attributes, kind):
    return layout.unpack(attributes[kind])[0] if kind in attributes else None


def _members(members):
    return _attribute(NHA_GROUP, b"".join(_MEMBER.pack(id, weight - 1, 0, 0) for id, weight in sorted(members.items())))


def _route(prefix, protocol, source):
    body = _ROUTE.pack(FAMILIES[prefix.version], prefix.prefixlen, 0, 0, RT_TABLE_MAIN, protocol, RT_SCOPE_UNIVERSE,
                       RTN_UNICAST, 0)
    body += _attribute(RTA_DST, prefix.network_address.packed)
    return body + (_attribute(RTA_PREFSRC, source.packed) if source is not None else b"")


def _route_hops(data):
    at = 0
    while at + _RTNEXTHOP.size <= len(data):
        length, _, weight, device = _RTNEXTHOP.unpack_from(data, at)
        if length < _RTNEXTHOP.size:
            return
        yield device, weight + 1
        at += -(-length // 4) * 4
