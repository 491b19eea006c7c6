"""Addresses, MTU and queue length of the TUN device, by netlink.

All of it goes with the device, so there is nothing to undo.
"""

import errno
import ipaddress
import socket

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bulkvpnd.host import routes
from bulkvpnd.host.netlink import listing, reason

IFA_F_NODAD = 0x02
"""linux/if_addr.h: use the address at once; nobody else can have it on a point-to-point device."""
TC_H_ROOT = 0xFFFFFFFF
"""linux/pkt_sched.h"""
IN6_ADDR_GEN_MODE_NONE = 1
"""linux/if_link.h: no link-local address, whose traffic the far end would only drop."""


NO_IPV6 = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EACCES)
"""What the kernel says of IPv6 addresses, routes and rules where it is not compiled in, or is switched off by
ipv6.disable or net.ipv6.conf.*.disable_ipv6."""
MEND_IPV6 = "see: sysctl -ar disable_ipv6; cat /proc/cmdline"
"""Where whoever wants it looks."""


class LinkError(Exception):
    """The kernel refused; the message names device, value and reason."""


def bring_up(name, mtu, txqueuelen, group):
    """Sets MTU (bytes) and queue length (packets) of the device `name`, and its state to up. Raises LinkError.

    group: of host.device.GROUPS.
    """
    with IPRoute() as route:
        index = _index(route, name)
        _do(f"{name}: group {group}", route.link, "set", index=index, group=group)
        _do(f"{name}: mtu {mtu}", route.link, "set", index=index, mtu=mtu)
        _do(f"{name}: txqueuelen {txqueuelen}", route.link, "set", index=index, txqlen=txqueuelen)
        try:
            mode = {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE]]}
            route.link("set", index=index, IFLA_AF_SPEC={"attrs": [["AF_INET6", mode]]})
        except NetlinkError:
            # A kernel without IPv6: there is no link-local address to keep away.
            pass
        try:
            # The device has queues of its own, which nothing holds back. In front of them the kernel would make 256
            # more, each as long, that are always empty: with 9000 packets 97 MB of its memory and 0.2 s.
            route.tc("add", "noqueue", index, parent=TC_H_ROOT)
        except NetlinkError:
            # It works with them, too.
            pass
        _do(f"{name}: up", route.link, "set", index=index, state="up")


def has_ipv6(name):
    """Whether the device `name`, which is up, can have IPv6 addresses. Raises LinkError."""
    with IPRoute() as route:
        for message in route.get_links(_index(route, name)):
            families = message.get_attr("IFLA_AF_SPEC")
            ipv6 = families and families.get_attr("AF_INET6")
            settings = ipv6 and ipv6.get_attr("IFLA_INET6_CONF")
            return bool(settings) and not settings["disable_ipv6"]
    return False


def check_addresses(name, interfaces):
    """Raises LinkError if another device than `name` has the address of one of `interfaces`."""
    for present, holder in _addresses_of_others(name):
        for interface in interfaces:
            if present.ip == interface.ip:
                raise _taken(name, interface, holder, present)


def check_networks(name, interfaces):
    """Raises LinkError if another device leads to the network of one of `interfaces`: the kernel would choose one."""
    taken = [(present.network, holder, present) for present, holder in _addresses_of_others(name)]
    taken += [(network, holder, f"a route to {network}") for network, holder in _routes_of_others(name)]
    for network, holder, what in taken:
        for interface in interfaces:
            if network == interface.network:
                raise _taken(name, interface, holder, what)


def inside(name, network):
    """[(network, device), ...]: parts of `network` that other devices have, by routes or addresses, the largest first.
    The longest prefix decides, so what goes there does not go by the device `name`."""
    routed = [(one, holder) for one, holder in _routes_of_others(name) if one != network]
    held = [(ipaddress.ip_network(one.ip), holder) for one, holder in _addresses_of_others(name)]
    found = {}
    for one, holder in sorted(routed, key=lambda entry: entry[0].prefixlen) + held:
        if one.version == network.version and one.subnet_of(network) and not any(map(one.subnet_of, found)):
            found[one] = holder
    return list(found.items())


def _taken(name, interface, holder, what):
    return LinkError(f"{name}: address {interface}: {holder} has {what} already; choose another "
                     f"pool-ipv{interface.version} at the server, or remove that")


def _addresses_of_others(name):
    """[(ipaddress interface, name of its device), ...]"""
    with IPRoute() as route:
        index = _index(route, name)
        return [
            (ipaddress.ip_interface(f"{message.get_attr('IFA_LOCAL') or message.get_attr('IFA_ADDRESS')}"
                                    f"/{message['prefixlen']}"), device_name(message["index"]))
            for message in listing(route.get_addr)
            if message["index"] != index
        ]


def _routes_of_others(name):
    """[(network, name of its device), ...], see host.routes.present."""
    return [(network, holder) for network, holder in routes.present() if holder != name]


def set_addresses(name, interfaces):
    """Makes `interfaces` (ipaddress interfaces, None is skipped) the only addresses of the device. Raises LinkError."""
    wanted = {str(interface): interface for interface in interfaces if interface is not None}
    with IPRoute() as route:
        index = _index(route, name)
        for message in listing(route.get_addr, index=index):
            present = f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
            if wanted.pop(present, None) is None:
                _do(f"{name}: address {present}", route.addr, "del", index=index,
                    address=message.get_attr("IFA_ADDRESS"), mask=message["prefixlen"])
        for text, interface in wanted.items():
            options = {"family": socket.AF_INET6, "flags": IFA_F_NODAD} if interface.version == 6 else {}
            _do(f"{name}: address {text}", route.addr, "add", index=index, address=str(interface.ip),
                mask=interface.network.prefixlen, **options)


def set_mtu(name, mtu):
    with IPRoute() as route:
        _do(f"{name}: mtu {mtu}", route.link, "set", index=_index(route, name), mtu=mtu)


def device_name(index):
    """The name of the device with this interface index, for a message."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return "a device that just went"


def _index(route, name):
    found = route.link_lookup(ifname=name)
    if not found:
        raise LinkError(f"{name}: the device is gone")
    return found[0]


def _do(what, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except NetlinkError as error:
        hint = {errno.EPERM: "; it needs root or CAP_NET_ADMIN", errno.EEXIST: "; it is there already"}
        raise LinkError(f"{what}: {reason(error)}{hint.get(error.code, '')}") from None
