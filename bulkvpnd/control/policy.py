"""What a client takes of the routes that its server pushes, and how its own spare the outer connections.

Nothing here touches the machine: networks come in, networks and reasons go out.
"""

import ipaddress


def accept_routes(pushed, allowed, servers, connected):
    """Divides pushed networks into those to take and those to leave out.

    pushed, allowed, connected: ipaddress networks: what the server wants, what the configuration lets it, what this
    machine reaches without a router. servers: addresses of the outer connections. Returns ([network, ...],
    {network: why not}).
    """
    taken, refused = [], {}
    for network in pushed:
        reason = _objection(network, allowed, servers, connected)
        if reason:
            refused[network] = reason
        else:
            taken.append(network)
    return taken, refused


def _objection(network, allowed, servers, connected):
    if network.prefixlen == 0:
        return "a default route is only taken with redirect-gateway = yes"
    if not any(_is_inside(network, one) for one in allowed):
        return "not in accept-routes; add it there to have it"
    for server in servers:
        if server in network:
            return f"it covers the server's address {server}; the server has to use another network"
    for one in connected:
        if one.version == network.version and one.overlaps(network):
            return (f"it overlaps {one}, which this machine reaches directly; use another network at one end, or set "
                    "routes for what is left of it")
    return None


def _is_inside(network, other):
    return network.version == other.version and network.subnet_of(other)


def around(networks, servers):
    """The networks without single addresses: what is left of each is the fewest networks that have all the rest."""
    for server in servers:
        alone = ipaddress.ip_network(server)
        networks = [
            part
            for network in networks
            for part in (sorted(network.address_exclude(alone)) if _is_inside(alone, network) else [network])
        ]
    return list(dict.fromkeys(networks))
