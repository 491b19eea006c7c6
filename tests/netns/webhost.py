"""A host of the Internet, run as a program: it says over HTTP from which address it was asked, and answers DNS.

    python3 webhost.py LOG NAME=ADDRESS ...

HTTP on port 80, IPv4 and IPv6. DNS on port 53: the given names. Each query is a line of LOG: the asker and the name.
"""

import ipaddress
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset


def plain(address):
    return address.removeprefix("::ffff:")


class Who(BaseHTTPRequestHandler):
    def do_GET(self):
        body = plain(self.client_address[0]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Web(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def answer(query, names):
    question = query.question[0]
    reply = dns.message.make_response(query)
    reply.flags |= dns.flags.RA
    kind = {4: dns.rdatatype.A, 6: dns.rdatatype.AAAA}
    for name, address in names:
        if question.name.to_text() == name + "." and question.rdtype == kind[address.version]:
            reply.answer.append(dns.rrset.from_text(question.name, 1, "IN", question.rdtype, str(address)))
    return reply


def main(log, *pairs):
    names = [(name, ipaddress.ip_address(address)) for name, _, address in (pair.partition("=") for pair in pairs)]
    threading.Thread(target=Web(("::", 80), Who).serve_forever, daemon=True).start()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock, open(log, "a", buffering=1) as lines:
        sock.bind(("::", 53))
        while True:
            data, peer = sock.recvfrom(4096)
            query = dns.message.from_wire(data)
            lines.write(f"{plain(peer[0])} {query.question[0].name}\n")
            sock.sendto(answer(query, names).to_wire(), peer)


if __name__ == "__main__":
    main(*sys.argv[1:])
