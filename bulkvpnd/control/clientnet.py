"""What a client changes on its machine beyond the device: kill switch, routes, full tunnel, name servers.

    start, before the first connection      kill switch, mark of the outer connections
    a session begins                        routes, full tunnel, name servers: what the server pushes, and the networks
                                            of the addresses that it gives, by our policy
    connections and sessions come and go    all of it stays
    stop                                    undone by host.changes, in the reverse order

The kill switch alone outlives a failure: see ClientNetwork.came_up.
"""

import ipaddress
import logging

import gevent

from bulkvpnd.control import policy
from bulkvpnd.control.resolver import Resolver
from bulkvpnd.host import gateway, killswitch, link, redirect, routes
from bulkvpnd.host.dns import Dns
from bulkvpnd.host.firewall import FirewallError, Unavailable
from bulkvpnd.host.redirect import Redirect
from bulkvpnd.host.routes import Routes

log = logging.getLogger(__name__)

SERVERS_MAX = 64
"""Addresses of the server that routes are led around (choice)."""
LISTED_MAX = 32
"""Networks or addresses that one line of the log names (choice)."""
SRC_VALID_MARK = "net.ipv4.conf.all.src_valid_mark"
NAMING_WAIT = 2.0
"""Seconds that a start waits for the name servers (choice: polkit, started by the first question, takes 0.1)."""


class ClientNetwork:
    """device: of the tunnel. changes: host.changes.Changes. mark: of outer sockets, None without a full tunnel."""

    def __init__(self, configuration, device, changes):
        self._configuration = configuration
        self._device = device
        self._changes = changes
        self.mark = redirect.choose_mark() if configuration.redirect_gateway else None
        self.resolver = Resolver(self.mark)
        self._routes = Routes(device)
        self._redirect = Redirect(device, self.mark)
        self._dns = Dns(device, configuration.name)
        self._servers = []  # addresses of the outer connections
        self._welcome = None  # of the last session
        self._led = None  # networks that routes lead into the tunnel
        self._named = None  # what the name servers were set from
        self._naming = gevent.Greenlet()
        self._waiting = gevent.Greenlet()

    def start(self):
        """Before the first connection. Raises FirewallError."""
        for change in (self._routes, self._redirect, self._dns):
            self._changes.make(change, wanted=False)
            self._changes.callback(change.undo)
        self._changes.callback(lambda: gevent.killall([self._waiting, self._naming]))
        if self._configuration.kill_switch:
            self._close()
        if self.mark:
            self._let_answers_in()

    def _close(self):
        firewall, local = self._changes.firewall, self._configuration.local_networks
        if firewall.exists():
            # A run that crashed closed it; a start that fails must not open it.
            firewall.hold(killswitch.PART)
        firewall.apply(killswitch.PART, killswitch.objects(self.mark, local))
        log.info("kill switch: only the tunnel leads out of this machine%s",
                 ", except to " + _listed(local) if local else "")

    def _let_answers_in(self):
        try:
            self._changes.firewall.apply("full-tunnel", redirect.restore_mark(self.mark))
        except Unavailable as error:
            log.warning("where rp_filter is 1, answers of the server will be dropped: %s", error)
            return
        outcome = self._changes.ledger.want(SRC_VALID_MARK, "1")
        if outcome.why_not:
            log.warning("where rp_filter is 1, answers of the server will be dropped: %s", outcome)

    def came_up(self, then):
        """The tunnel carries traffic. Calls then() when the name servers are set too, or after NAMING_WAIT without.

        From now on a failure leaves the kill switch closed until the next start.
        """
        if self._configuration.kill_switch:
            self._changes.firewall.hold(killswitch.PART)
        self._waiting = gevent.spawn(self._await_names, then)

    def _await_names(self, then):
        naming = self._naming
        naming.join(NAMING_WAIT)
        if not naming.ready():
            log.warning("name servers: no answer within %.0f s from their manager here; going on without", NAMING_WAIT)
        then()

    def reconfigure(self, configuration):
        """Other routes and name servers are wanted; they are set at once where there is a session."""
        former, self._configuration = self._configuration, configuration
        if self._welcome is None:
            return
        if (former.routes, former.accept_routes) != (configuration.routes, configuration.accept_routes):
            self._lead()
        self._naming.kill()
        self._naming = gevent.spawn(self._name)

    def know(self, addresses):
        """addresses: text, of a remote that is about to be connected to. No route may lead there."""
        known = set(self._servers)
        for address in map(_address, addresses):
            if address not in known and len(self._servers) < SERVERS_MAX:
                self._servers.append(address)
        if self._led and any(address in network for address in self._servers for network in self._led):
            self._lead()

    def take(self, welcome):
        """A session has begun and the device has its addresses. Raises LinkError, OSError."""
        self._welcome = welcome
        self._guard()
        self._direct()
        # In a greenlet of its own, because other programs do it, which take their time.
        self._naming.kill()
        self._naming = gevent.spawn(self._name)

    def restore(self):
        """The device is up again, without what it lost while it was down. Raises LinkError, OSError."""
        if self._welcome is not None:
            link.set_addresses(self._device, own_addresses(self._welcome))
            self._direct()

    def _direct(self):
        self._lead()
        if self.mark:
            self._redirect.apply(_carried(self._welcome))
            log.info("full tunnel: everything goes through %s", self._device)

    def _guard(self):
        """Packets for the own addresses come by the tunnel or not at all."""
        rules = gateway.own_addresses(self._device, _interfaces(self._welcome))
        try:
            self._changes.firewall.apply("own-addresses", rules)
        except FirewallError as error:
            log.warning("other interfaces may reach the addresses in the tunnel: %s", error)

    def _lead(self):
        """The routes of single networks. The pools are some of them, since the device has its addresses alone: the
        server chooses the length of their prefix, and so what else would lead into the tunnel."""
        # What several instances carry together has a route of its own kind, see control.multipath.
        shared = {wish.prefix for wish in self._configuration.multipath}
        own = [network for network in self._configuration.routes if network not in shared]
        pools = [interface.network for interface in _interfaces(self._welcome)]
        pushed = [network for network in dict.fromkeys((*pools, *self._welcome.routes))
                  if network not in {*own, *shared}]
        allowed = [network for one in self._configuration.accept_routes for network in one]
        taken, refused = policy.accept_routes(pushed, allowed, self._servers, routes.connected(self._device))
        wanted = {version: [] for version in (4, 6)}
        for network in (*own, *taken):
            wanted[network.version].append(network)
        for version in {4, 6} - _carried(self._welcome):
            refused |= dict.fromkeys(wanted.pop(version), f"the tunnel carries no IPv{version}")
        self._led = policy.around([network for some in wanted.values() for network in some], self._servers)
        refused |= {network: f"{reason}; see: ip route" for network, reason in self._routes.apply(self._led).items()}
        for reason in dict.fromkeys(refused.values()):
            log.warning("no route to %s through the tunnel: %s",
                        _listed(f"{network} (the server's pool)" if network in pools else network
                                for network, why in refused.items() if why == reason), reason)
        led = [network for network in self._led if network not in {*refused, *pools}]
        if led:
            log.info("routes through the tunnel: %s", _listed(led))

    def _name(self):
        """The name servers."""
        accepted = self._configuration.accept_dns
        servers = self._configuration.dns or (self._welcome.dns if accepted else ())
        domains = self._configuration.dns_search or (self._welcome.dns_search if accepted else ())
        if (servers, domains) == self._named and self._dns.lasts():
            return
        self.resolver.tunnel_servers = frozenset(servers)
        reason = self._dns.apply(servers, domains, everything=bool(self.mark))
        # What failed is tried again by the next session or reload.
        self._named = None if reason else (servers, domains)
        if reason:
            log.warning("name servers %s, domains %s: not set: %s", _listed(servers), _listed(domains), reason)
        elif servers or domains:
            log.info("name servers %s, domains %s", _listed(servers), _listed(domains))


def own_addresses(welcome):
    """What the device gets of a session: its addresses alone, as interfaces."""
    return [ipaddress.ip_interface(one.ip) for one in _interfaces(welcome)]


def _interfaces(welcome):
    """What the session has: one address for each version of IP at most, with the pool that it is from."""
    return [interface for interface in (welcome.ipv4, welcome.ipv6) if interface]


def _carried(welcome):
    """The versions of IP that the session has addresses of."""
    return {interface.version for interface in _interfaces(welcome)}


def _address(text):
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _listed(values):
    """What one line of the log says of them."""
    texts = list(map(str, values))
    more = [f"{len(texts) - LISTED_MAX} more"] if len(texts) > LISTED_MAX else []
    return ", ".join(texts[:LISTED_MAX] + more) or "none"
