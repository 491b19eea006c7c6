"""What makes a server's machine a gateway: rules of nftables, forwarding, routes to the networks behind clients.

    clients ── bulk0 ─┬─ prerouting   what comes another way is not for the tunnel's own addresses
                      ├─ forward      nothing goes back into the tunnel, unless clients may reach each other
                      └─ postrouting  masquerade, if wanted ── eth0

The rules are a part of the instance's table and go with it, sysctls are the ledger's, and routes are undone here.
"""

import errno
import socket

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bulkvpnd.host.firewall import DROP, address, chain, meta, source_type
from bulkvpnd.host.link import LinkError, device_name
from bulkvpnd.host.nexthop import FAMILIES, Netlink

RAW, FILTER, SRCNAT = -300, 0, 100
"""Priorities of nft(8), "Standard priority names"."""
PROTOCOL = 86
"""Who made a route (rtnetlink(7), rtm_protocol; /etc/iproute2/rt_protos): a number that nobody of that list has
(choice). In ``ip route`` it is ``proto 86``."""
RTPROT_RA = 9
"""linux/rtnetlink.h: the route comes from a router advertisement."""
FORWARDING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


def rules(device, interfaces, nat, client_to_client):
    """The objects of the firewall's part "gateway".

    device: name of the TUN device. interfaces: the server's own in the tunnel, with the length of the pool. nat:
    whether the pools are masqueraded. client_to_client: whether the kernel may send back into the tunnel what came
    from it.
    """
    elsewhere = meta("iifname", device, negated=True)
    # As wg-quick(8) has it. Without it whoever shares a network with this machine could send to the addresses inside
    # the tunnel, or try out from the answers what goes on there (CVE-2019-14899).
    objects = chain("own_addresses", "prerouting", RAW, *(
        [elsewhere, address("daddr", interface.ip), source_type("local", negated=True), *DROP]
        for interface in interfaces
    ))
    if not client_to_client:
        objects += chain("hairpin", "forward", FILTER, [meta("iifname", device), meta("oifname", device), *DROP])
    if nat:
        objects += chain("nat", "postrouting", SRCNAT, *(
            [address("saddr", interface.network), meta("oifname", device, negated=True), {"masquerade": None}]
            for interface in interfaces
        ), kind="nat")
    return objects


def forward(ledger, versions):
    """Lets the kernel forward packets of these IP versions until the ledger is restored. Returns its Outcomes.

    A machine that forwards IPv6 takes no route from router advertisements any more and forgets those it has, unless it
    is told to with accept_ra = 2 (Documentation/networking/ip-sysctl.rst): where its default route is such a one, it
    is told first.
    """
    outcomes = []
    if 6 in versions:
        for device in advertised_defaults():
            key = f"net/ipv6/conf/{device}/accept_ra"
            try:
                # 0: not the kernel but another program takes them.
                is_taken = ledger.read(key) == "1"
            except OSError:
                continue
            if is_taken:
                outcomes.append(ledger.want(key, "2"))
    return outcomes + [ledger.want(FORWARDING[version], "1") for version in versions]


def advertised_defaults():
    """The names of the devices with a default route that a router advertised."""
    names = []
    with Netlink() as netlink:
        for route in netlink.routes(6, RTPROT_RA):
            if route.prefix.prefixlen == 0:
                names += [socket.if_indextoname(index) for index in route.hops]
    return names


class Routes:
    """Routes into the tunnel, as a change. device: name of the TUN device."""

    def __init__(self, device):
        self._device = device

    def apply(self, networks):
        """Leads `networks` of ipaddress to the device. Raises LinkError, also for one that has a route already."""
        with IPRoute() as route:
            index = socket.if_nametoindex(self._device)
            for network in networks:
                self._check_free(network)
                try:
                    route.route("add", dst=str(network), family=FAMILIES[network.version], oif=index, proto=PROTOCOL)
                except NetlinkError as error:
                    reason = error.args[1] if len(error.args) > 1 else error
                    hint = "; it needs root or CAP_NET_ADMIN" if error.code == errno.EPERM else ""
                    raise LinkError(f"{self._device}: route to {network}: {reason}{hint}") from None

    def _check_free(self, network):
        # Asked for and not left to the kernel: to it a route with another metric is another route.
        with Netlink() as netlink:
            for found in netlink.routes(network.version, containing=network.network_address):
                if found.prefix == network:
                    devices = " and ".join(device_name(index) for index in found.hops) or "another"
                    raise LinkError(f"{self._device}: route to {network}: there is one already, by {devices}; remove "
                                    "it, or take the network from its client")

    def undo(self):
        """Removes every route of ours to the device. Raises nothing: those that are left go with the device."""
        try:
            index = socket.if_nametoindex(self._device)
            with Netlink() as netlink, IPRoute() as route:
                for version, family in FAMILIES.items():
                    for found in netlink.routes(version, PROTOCOL):
                        if index in found.hops:
                            route.route("del", dst=str(found.prefix), family=family, oif=index, proto=PROTOCOL)
        except (OSError, NetlinkError):
            return
