"""Routes to single networks through the tunnel, in the main table, each with our protocol number.

A route that is there already is somebody's: it stays, and ours is left out. The kernel removes routes with their
device, so a crash leaves none.
"""

import ipaddress
import socket

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bulkvpnd.host.netlink import listing, reason

PROTOCOL = 86
"""Who made a route or a rule, `proto 86` in ip(8): free in linux/rtnetlink.h and in iproute2's rt_protos (choice)."""
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
"""linux/rtnetlink.h"""
_NOT_ASKED = tuple(ipaddress.ip_network(text) for text in ("fe80::/10", "ff00::/8", "224.0.0.0/4", "169.254.0.0/16"))
"""What every link has of its own."""


class Routes:
    """Routes to networks through one device."""

    def __init__(self, device):
        self._device = device

    def apply(self, networks):
        """Makes `networks` (ipaddress networks) those that are reached through the device.

        Returns {network: why it is not}; empty when all of them are.
        """
        refused = {}
        with IPRoute() as netlink:
            index = _index(netlink, self._device)
            present = list(_main_table(netlink))
            ours = {network for network, message in present if _is_ours(message, index)}
            for network in ours.difference(networks):
                self._change(netlink, "del", network, index)
            taken = {network: message.get_attr("RTA_OIF") for network, message in present if network not in ours}
            for network in dict.fromkeys(networks):
                if network in ours or taken.get(network) == index:
                    continue
                if network in taken:
                    refused[network] = f"there is a route already, by {_name(netlink, taken[network])}"
                elif error := self._change(netlink, "add", network, index):
                    refused[network] = error
        return refused

    def undo(self):
        """Removes all of ours. With the device they are gone anyway."""
        try:
            self.apply(())
        except (NetlinkError, OSError):
            pass  # the device is gone

    @staticmethod
    def _change(netlink, command, network, index):
        """Returns None, or why not."""
        try:
            netlink.route(command, family=FAMILIES[network.version], dst=str(network), oif=index, proto=PROTOCOL,
                          table=RT_TABLE_MAIN)
        except NetlinkError as error:
            return reason(error)
        return None


def connected(without):
    """The networks that this machine reaches directly, by a device other than `without`."""
    with IPRoute() as netlink:
        own = set(netlink.link_lookup(ifname=without)) | set(netlink.link_lookup(ifname="lo"))
        return [
            network
            for network, message in _main_table(netlink)
            if message.get_attr("RTA_OIF") not in {None, *own}
            and message["type"] == RTN_UNICAST
            and network.prefixlen
            and not _has_gateway(message)
            and not _is_of_every_link(network)
        ]


def present():
    """[(network, name of its device), ...] of the main table, without default routes, what every link has of its own,
    and what bulkvpnd leads around the tunnel. Raises OSError."""
    with IPRoute() as netlink:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in listing(netlink.get_links)}
        return [
            (network, names.get(message.get_attr("RTA_OIF"), "several devices"))
            for network, message in _main_table(netlink)
            if message["type"] == RTN_UNICAST
            and network.prefixlen
            and not (message["proto"] == PROTOCOL and _has_gateway(message))
            and not _is_of_every_link(network)
        ]


def _main_table(netlink):
    """(network, message) of each route there."""
    for version, family in FAMILIES.items():
        everything = {4: "0.0.0.0", 6: "::"}[version]
        for message in listing(netlink.get_routes, family=family, table=RT_TABLE_MAIN):
            if message.get_attr("RTA_TABLE") == RT_TABLE_MAIN:
                text = f"{message.get_attr('RTA_DST') or everything}/{message['dst_len']}"
                yield ipaddress.ip_network(text), message


def _has_gateway(message):
    return any(message.get_attr(name) for name in ("RTA_GATEWAY", "RTA_VIA"))


def _is_of_every_link(network):
    return any(one.version == network.version and network.subnet_of(one) for one in _NOT_ASKED)


def _is_ours(message, index):
    return message["proto"] == PROTOCOL and message.get_attr("RTA_OIF") == index


def _index(netlink, device):
    found = netlink.link_lookup(ifname=device)
    if not found:
        raise OSError(f"{device}: the device is gone")
    return found[0]


def _name(netlink, index):
    links = netlink.get_links(index) if index else []
    return links[0].get_attr("IFLA_IFNAME") if links else "several ways"
