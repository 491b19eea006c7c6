"""Addresses of the remotes, found past the tunnel.

With a full tunnel the system's own look-ups go through the tunnel, which needs the answer to come up, or end at the
kill switch. So queries of our own go to the name servers from marked sockets, as the outer connections do:

    an address --> itself
    a name ------> marked queries --> what was found before --> getaddrinfo, which knows /etc/hosts

Without a mark it is getaddrinfo first.
"""

import ipaddress
import logging
import pathlib
import socket

import dns.exception
import dns.message
import dns.query
import dns.rdatatype
import dns.resolver

from bulkvpnd.control import transport

log = logging.getLogger(__name__)

RESOLV_CONF = (pathlib.Path("/etc/resolv.conf"), pathlib.Path("/run/systemd/resolve/resolv.conf"))
"""Where name servers stand: the host's, and behind systemd-resolved's stub the real ones (its manual)."""
TIMEOUT = 2.0
"""Seconds for one query (choice: resolv.conf(5) has 5 with a second try; here the next try is the dialler's)."""
SERVERS_MAX = 3
"""MAXNS of resolv.conf(5)."""
ADDRESSES_MAX = 16
"""Addresses of one name that are tried (choice)."""


class Resolver:
    """mark: of the outer connections, None for none. files: see RESOLV_CONF. port: of name servers.

    tunnel_servers: the name servers that the tunnel brought; they are behind it, so they are not asked.
    """

    def __init__(self, mark=None, files=RESOLV_CONF, port=53):
        self._mark = mark
        self._files = files
        self._port = port
        self._found = {}  # (host, port): what getaddrinfo would return, the last time
        self.tunnel_servers = frozenset()
        self._servers = self._name_servers() if mark else []

    def find(self, host, port):
        """[(family, socket address), ...] of a remote. Raises OSError that names the host."""
        ways = (self._ask, self._remembered, _look_up) if self._mark else (_look_up, self._remembered)
        error = None
        for way in ways:
            try:
                found = way(host, port)
            except OSError as failed:
                error = failed
                continue
            if found:
                self._found[host, port] = found
                return found
        raise error or OSError(f"{host}: no address")

    def _remembered(self, host, port):
        return self._found.get((host, port))

    def _ask(self, host, port):
        """Asks the name servers from marked sockets."""
        try:
            ipaddress.ip_address(host.partition("%")[0])
            return _look_up(host, port)
        except ValueError:
            pass
        for server in self._name_servers() or self._servers:
            addresses = [
                address for kind in (dns.rdatatype.AAAA, dns.rdatatype.A) for address in self._query(server, host, kind)
            ]
            if addresses:
                return [way for address in addresses[:ADDRESSES_MAX] for way in _look_up(address, port)]
        return []

    def _name_servers(self):
        """As resolv.conf(5) has them; none on this machine, whose own queries would have no mark."""
        servers = []
        for file in self._files:
            try:
                # dnspython leaves out what it does not understand.
                servers += dns.resolver.Resolver(filename=str(file)).nameservers
            except (OSError, ValueError, dns.exception.DNSException):
                continue
        return [one for one in dict.fromkeys(map(str, servers)) if self._is_outside(one)][:SERVERS_MAX]

    def _is_outside(self, server):
        try:
            address = ipaddress.ip_address(server.partition("%")[0])
        except ValueError:
            return False
        return not address.is_loopback and address not in self.tunnel_servers

    def _query(self, server, host, kind):
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                transport.mark(sock, self._mark)
                sock.setblocking(False)
                response = dns.query.udp(dns.message.make_query(host, kind), server, TIMEOUT, self._port, sock=sock)
            answer = response.resolve_chaining().answer
            return [str(one.address) for one in answer or ()]
        except (OSError, ValueError, UnicodeError, dns.exception.DNSException) as error:
            log.debug("name server %s: %s: %s", server, host, error)
            return []


def _look_up(host, port):
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        # UnicodeError: a label of no or more than 63 characters.
        raise OSError(f"{host}: {getattr(error, 'strerror', error)}") from None
    return [(family, address) for family, _, _, _, address in found]
