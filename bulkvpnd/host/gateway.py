"""What makes a server's machine a gateway: rules of nftables, and forwarding.

    clients ── bulk0 ─┬─ prerouting   what comes another way is not for the tunnel's own addresses
                      ├─ forward      nothing to this or another server's tunnel, unless clients may reach each other
                      └─ postrouting  masquerade, if wanted, but never with a port that is listened on ── eth0

The rules are a part of the instance's table and go with it, sysctls are the ledger's.
"""

import socket

from bulkvpnd.host.device import GROUPS
from bulkvpnd.host.firewall import DROP, address, chain, conntrack, meta, source_port, source_type
from bulkvpnd.host.nexthop import Netlink

RAW, FILTER, SRCNAT = -300, 0, 100
"""Priorities of nft(8), "Standard priority names"."""
RTPROT_RA = 9
"""linux/rtnetlink.h: the route comes from a router advertisement."""
HIGH, LOW = (32768, 65535), (1024, 32767)
"""Two ranges of ports, first and last; neither has a port that needs a privilege (choice)."""
FORWARDING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


def own_addresses(device, interfaces):
    """The objects by which packets for this end's addresses in the tunnel come from the tunnel, or not at all.

    As wg-quick(8) has it. Without it whoever shares a network with this machine could send to the addresses inside the
    tunnel, or try out from the answers what goes on there (CVE-2019-14899).
    """
    elsewhere = meta("iifname", device, negated=True)
    return chain("own_addresses", "prerouting", RAW, *(
        [elsewhere, address("daddr", interface.ip), source_type("local", negated=True), *DROP]
        for interface in interfaces
    ))


def rules(device, interfaces, nat, client_to_client, ports):
    """The objects of the firewall's part "gateway".

    device: name of the TUN device. interfaces: the server's own in the tunnel, with the length of the pool. nat:
    whether the pools are masqueraded. client_to_client: whether the kernel may send back into the tunnel what came
    from it; if not, neither to nor from the tunnel of another server on this machine. ports: the TCP ports that the
    server listens on.
    """
    objects = own_addresses(device, interfaces)
    if not client_to_client:
        # Each of the two has this device on either side too.
        objects += chain("hairpin", "forward", FILTER,
                         [meta("iifname", device), meta("oifgroup", GROUPS["server"]), *DROP],
                         [meta("iifgroup", GROUPS["server"]), meta("oifname", device), *DROP])
    if nat:
        objects += masquerade(device, interfaces, ports)
    return objects


def masquerade(device, interfaces, ports):
    """The objects by which clients go out with an address of this machine, but not with a port that it listens on.

    Arguments as of rules(). A connection that left this machine with the listener's own address and port would shadow
    it: whoever it leads to could then not connect from the port that it leads to, since the kernel takes that for an
    answer and sends it into the tunnel (CVE-2021-3773). So the kernel is told to choose another port for a client that
    has such a one. Where it ends up with one all the same, by chance among those that are taken or by somebody else's
    rule, the connection is dropped, in each table for the listener that it belongs to.
    """
    outside = meta("oifname", device, negated=True)
    nat = []
    for interface in interfaces:
        network = address("saddr", interface.network)
        for port in ports:
            first, last = LOW if port >= HIGH[0] else HIGH
            nat.append([source_port(port), network, outside, {"masquerade": {"port": {"range": [first, last]}}}])
        nat.append([network, outside, {"masquerade": None}])
    shadows = [[conntrack("state", "new"), conntrack("status", "snat"), source_port(port), *DROP] for port in ports]
    return chain("nat", "postrouting", SRCNAT, *nat, kind="nat") + chain("shadow", "postrouting", SRCNAT + 1, *shadows)


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
