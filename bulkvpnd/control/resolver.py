"""Addresses of the remotes, found past the tunnel.

With a full tunnel the system's own look-ups go through the tunnel, which needs the answer to come up, or end at the
kill switch. So queries of our own go to the name servers from marked sockets, as the outer connections do:

    an address --> itself
    a name ------> marked queries --> what was found before --> getaddrinfo, which knows /etc/hosts

Without a mark it is getaddrinfo first.
"""

import ipaddress
import pathlib
import socket

RESOLV_CONF = (pathlib.Path("/etc/resolv.conf"), pathlib.Path("/run/systemd/resolve/resolv.conf"))
"""Where name servers stand: the host's, and behind systemd-resolved's stub the real ones (its manual)."""
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
        if mark:
            # Most clients have none, and need not wait until dnspython is imported.
            from bulkvpnd.control import queries

            self._queries = queries
            self._servers = self._name_servers()

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
            addresses = self._queries.addresses(host, server, self._port, self._mark)
            if addresses:
                return [way for address in addresses[:ADDRESSES_MAX] for way in _look_up(address, port)]
        return []

    def _name_servers(self):
        """As resolv.conf(5) has them; none on this machine, whose own queries would have no mark."""
        servers = [server for file in self._files for server in self._queries.name_servers(file)]
        return [one for one in dict.fromkeys(servers) if self._is_outside(one)][:SERVERS_MAX]

    def _is_outside(self, server):
        try:
            address = ipaddress.ip_address(server.partition("%")[0])
        except ValueError:
            return False
        return not address.is_loopback and address not in self.tunnel_servers


def _look_up(host, port):
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        # UnicodeError: a label of no or more than 63 characters.
        raise OSError(f"{host}: {getattr(error, 'strerror', error)}") from None
    return [(family, address) for family, _, _, _, address in found]
