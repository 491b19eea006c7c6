"""The server as a gateway: what its options ask of the machine, and what the log says of it.

    own addresses kept from other networks   always
    no way back into the tunnel              unless client-to-client = yes
    masquerade                               nat = yes
    routes into the tunnel                   networks behind clients
    forwarding                               any of nat, client-to-client, routes, networks

Without nftables everything works but what needs it: NAT is refused before anything is touched, and clients are kept
apart by the workers alone.
"""

import logging

from bulkvpnd.config import ConfigurationError
from bulkvpnd.host import firewall, gateway
from bulkvpnd.host.link import LinkError
from bulkvpnd.host.routes import Routes

log = logging.getLogger(__name__)

PART = "gateway"
"""Of the instance's table."""


def check(configuration):
    """Raises ConfigurationError if the configuration asks for what this machine cannot do. Touches nothing."""
    if configuration.nat:
        try:
            firewall.check()
        except firewall.Unavailable as error:
            raise ConfigurationError(f"{configuration.path}: nat = yes: {error}") from None


def apply(configuration, changes, device, interfaces):
    """Changes the machine, to be undone by `changes` (host.changes.Changes).

    device: name of the TUN device. interfaces: the server's own addresses in it. Raises FirewallError, LinkError.
    """
    _write_rules(configuration, changes.firewall, device, interfaces)
    _check_led(device, changes.make(Routes(device), _to_lead(configuration)))
    _let_forward(configuration, changes, interfaces)


def reapply(configuration, changes, device, interfaces):
    """The same for another configuration with other clients or routes. Raises LinkError when all else is done."""
    _let_forward(configuration, changes, interfaces)
    lead(configuration, device)


def lead(configuration, device):
    """The routes into the tunnel, those that are gone. Raises LinkError."""
    _check_led(device, Routes(device).apply(_to_lead(configuration)))


def _to_lead(configuration):
    """Networks behind clients. What several instances carry together has a route of its own kind: control.multipath."""
    shared = {wish.prefix for wish in configuration.multipath}
    return [network for client in configuration.clients for network in client.networks if network not in shared]


def _check_led(device, refused):
    for network, why_not in refused.items():
        raise LinkError(f"{device}: route to {network}: {why_not}; remove it, or take the network from its client")


def forwards_for(configuration):
    """The names of what asks the kernel to forward: options, and networks behind clients."""
    asked = {"nat": configuration.nat, "client-to-client": configuration.client_to_client,
             "routes": configuration.routes, "networks": any(client.networks for client in configuration.clients)}
    return [name for name, is_asked in asked.items() if is_asked]


def forwarded(configuration, own):
    """The IP versions that the kernel has to forward, sorted; none if nothing asks for it. own: addresses or pools."""
    networks = [network for client in configuration.clients for network in client.networks]
    return sorted({one.version for one in (*own, *networks)}) if forwards_for(configuration) else []


def _let_forward(configuration, changes, interfaces):
    versions = forwarded(configuration, interfaces)
    # After a reload. That a device still takes routes from advertisements (accept_ra) changes nothing then.
    changes.ledger.give_up([key for version, key in gateway.FORWARDING.items() if version not in versions])
    if versions:
        for outcome in gateway.forward(changes.ledger, versions):
            if outcome.why_not:
                log.warning("packets are not forwarded: %s", outcome)
        _warn_of_others()


def _write_rules(configuration, table, device, interfaces):
    ports = sorted({port for _, port in configuration.listen})
    rules = gateway.rules(device, interfaces, configuration.nat, configuration.client_to_client, ports)
    try:
        table.apply(PART, rules)
    except firewall.FirewallError as error:
        if configuration.nat:
            raise
        log.warning("no rules of nftables, so nothing but this daemon keeps clients apart: %s", error)
        return
    log.info("nftables table inet %s%s", table.table, ", with NAT" if configuration.nat else "")


def _warn_of_others():
    try:
        found = firewall.forward_drops()
    except firewall.FirewallError as error:
        log.debug("%s", error)
        return
    for chain in found:
        log.warning("the firewall of this machine drops what is forwarded unless a rule lets it pass: table %s; "
                    "traffic of the tunnel needs such a rule", chain)
