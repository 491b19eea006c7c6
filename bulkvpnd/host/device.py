"""Network devices: MTU, queue length and features as texts, so that a ledger can keep them; and which device leads to
an address."""

import contextlib
import errno
import os
import re
import socket

from pyroute2 import IPRoute
from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool
from pyroute2.netlink.exceptions import NetlinkError

from bulkvpnd.host.netlink import listing

# linux/rtnetlink.h, linux/if.h
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
IFF_LOOPBACK = 0x8

GROUPS = {"server": 7443, "client": 7444}
"""Numbers of the groups (`ip link show group 7443`) that the TUN devices of all servers, and of all clients, of this
machine are in: by them the rules of one instance know the devices of the others (choice: the default port, and the next
one)."""


class Number:
    """A number of a device that RTM_SETLINK sets. option: pyroute2's name of it. attribute: the kernel's."""

    def __init__(self, option, attribute):
        self._option = option
        self._attribute = attribute

    def read(self, device):
        """Raises OSError."""
        with _netlink() as route:
            return str(_link(route, device).get_attr(self._attribute))

    def write(self, device, value):
        """Raises OSError: ENODEV, EPERM, EINVAL for what is no number, or one that the driver does not take."""
        # A ledger that others can write may have any text for it.
        if not re.fullmatch("[0-9]{1,9}", value):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with _netlink() as route:
            route.link("set", index=_link(route, device)["index"], **{self._option: int(value)})


class Feature:
    """`on` or `off`, as `ethtool -k` shows it. name: of the kernel's netdev_features_strings."""

    def __init__(self, name):
        self._name = name

    def read(self, device):
        """Raises OSError."""
        with _ethtool(device) as (_, features):
            return "on" if features.is_active(self._name) else "off"

    def write(self, device, value):
        """Raises OSError."""
        with _ethtool(device) as (ethtool, features):
            features.set_value(self._name, value == "on")
            ethtool.set_features(features)


KINDS = {
    # The first word of a ledger's key; the device is the second.
    "mtu": Number("mtu", "IFLA_MTU"),
    "txqueuelen": Number("txqlen", "IFLA_TXQLEN"),
    "rx-udp-gro-forwarding": Feature("rx-udp-gro-forwarding"),
}


def resolve(endpoints):
    """The addresses of (host, port) pairs, as texts; those that cannot be resolved are left out."""
    addresses = []
    for host, port in endpoints:
        # UnicodeError: a label of no or more than 63 characters.
        with contextlib.suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses += [address[0].partition("%")[0] for *_, address in found]
    return list(dict.fromkeys(addresses))


def towards(addresses, mark=None):
    """Names of the devices that lead to `addresses` (texts, IPv4 and IPv6), each once; None: of the default routes.
    Loopback is left out, and any tunnel of ours, and what cannot be reached. mark: of the packets, None for those that
    have none. Raises OSError."""
    marked = {"mark": mark} if mark else {}
    with _netlink() as route:
        indexes = []
        for address in addresses or ():
            # OSError: an address with a zone, as link-local ones have.
            with contextlib.suppress(NetlinkError, OSError):
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                found = route.route("get", dst=address, family=family, **marked)
                indexes += [index for one in found for index in _outgoing(one)]
        if addresses is None:
            for family in (socket.AF_INET, socket.AF_INET6):
                routes = [one for one in listing(route.route, "dump", family=family) if _is_default(one)]
                routes.sort(key=lambda one: one.get_attr("RTA_PRIORITY") or 0)
                # The others are there for the day on which the best one goes.
                indexes += _outgoing(routes[0]) if routes else []
        names = []
        for index in dict.fromkeys(indexes):
            # One that went meanwhile has none.
            names += [link.get_attr("IFLA_IFNAME") for link in route.get_links(index)
                      if not link["flags"] & IFF_LOOPBACK and link.get_attr("IFLA_GROUP") not in GROUPS.values()]
        return names


def _is_default(route):
    return route["dst_len"] == 0 and route["type"] == RTN_UNICAST and route.get_attr("RTA_TABLE") == RT_TABLE_MAIN


def _outgoing(route):
    """Indexes of the devices of a route, which may have several next hops."""
    hops = [hop["oif"] for hop in route.get_attr("RTA_MULTIPATH") or ()]
    index = route.get_attr("RTA_OIF")
    return hops or ([index] if index else [])


def _link(route, device):
    for index in route.link_lookup(ifname=device):
        for link in route.get_links(index):
            return link
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


@contextlib.contextmanager
def _netlink():
    """An IPRoute whose errors are OSError."""
    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from None


@contextlib.contextmanager
def _ethtool(device):
    """(IoctlEthtool, the features that it found) of a device; errors are OSError."""
    ethtool = None
    try:
        ethtool = IoctlEthtool(device)
        yield ethtool, ethtool.get_features()
    except EthtoolError:
        # A device that is not there, or whose driver has no such thing.
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from None
    except KeyError:
        raise OSError(errno.EOPNOTSUPP, "this kernel has no such feature") from None
    finally:
        if ethtool is not None:
            ethtool.sock.close()
