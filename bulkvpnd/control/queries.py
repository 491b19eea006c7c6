"""Queries of our own to name servers, from marked sockets."""

import logging
import socket

import dns.exception
import dns.message
import dns.query
import dns.rdatatype
import dns.resolver

from bulkvpnd.control import transport

log = logging.getLogger(__name__)

TIMEOUT = 2.0
"""Seconds for one query (choice: resolv.conf(5) has 5 with a second try; here the next try is the dialler's)."""


def name_servers(file):
    """The name servers in a resolv.conf(5), texts; none where it cannot be read."""
    try:
        # dnspython leaves out what it does not understand.
        return list(map(str, dns.resolver.Resolver(filename=str(file)).nameservers))
    except (OSError, ValueError, dns.exception.DNSException):
        return []


def addresses(host, server, port, mark):
    """What a name server answers of `host`, IPv6 first, texts; none if it does not. mark: of the socket."""
    return [one for kind in (dns.rdatatype.AAAA, dns.rdatatype.A) for one in _ask(host, kind, server, port, mark)]


def _ask(host, kind, server, port, mark):
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            transport.mark(sock, mark)
            sock.setblocking(False)
            response = dns.query.udp(dns.message.make_query(host, kind), server, TIMEOUT, port, sock=sock)
        answer = response.resolve_chaining().answer
        return [str(one.address) for one in answer or ()]
    except (OSError, ValueError, UnicodeError, dns.exception.DNSException) as error:
        log.debug("name server %s: %s: %s", server, host, error)
        return []
