"""The kill switch: rules by which nothing leaves this machine but through a tunnel.

Two chains in the instance's own table. What passes: the tunnels of all clients on this machine (by their group), or two
kill switches would shut each other in; the outer connections (by their mark), loopback, the
networks that the administrator names, and what an interface needs to have an address and neighbours at all: DHCP,
DHCPv6 and neighbour discovery. ARP is no IP and never comes here. The rest is dropped and counted. Dropped and not
refused: a connection that was open waits for the tunnel to come back, and goes on.
"""

from bulkvpnd.host.device import GROUPS
from bulkvpnd.host.firewall import DROP, address, chain, meta

PART = "kill-switch"
"""Of the table, see host.firewall."""
FILTER = 0
"""Priority of filter chains (nft(8))."""
_ACCEPT = {"accept": None}
_NEIGHBOURS = ["nd-router-solicit", "nd-neighbor-solicit", "nd-neighbor-advert", "mld-listener-report",
               "mld2-listener-report"]  # fmt: skip
"""RFC 4861; and RFC 3810, without which a switch may not pass on what neighbours ask."""


def objects(mark, networks):
    """The part of the table. mark: of outer connections. networks: reached outside all the same.

    Returns what Firewall.apply takes.
    """
    tunnel = [[meta("oifgroup", GROUPS["client"]), _ACCEPT]]
    local = [[address("daddr", network), _ACCEPT] for network in networks]
    return [
        *chain("kill-switch-output", "output", FILTER, [meta("oifname", "lo"), _ACCEPT], *tunnel,
               [meta("mark", mark), _ACCEPT], *local, *_CONFIGURATION, DROP),
        # What other machines or containers send by way of this one; what comes out of the tunnel may go on to them.
        *chain("kill-switch-forward", "forward", FILTER, *tunnel,
               [meta("iifgroup", GROUPS["client"]), _ACCEPT], *local, DROP),
    ]  # fmt: skip


def _field(protocol, name, value):
    return {"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": name}}, "right": value}}


_CONFIGURATION = (
    # Ports of RFC 2131 and RFC 8415.
    [_field("udp", "sport", 68), _field("udp", "dport", 67), _ACCEPT],
    [_field("udp", "sport", 546), _field("udp", "dport", 547), _ACCEPT],
    [_field("icmpv6", "type", {"set": _NEIGHBOURS}), _ACCEPT],
)
