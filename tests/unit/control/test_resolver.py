"""Addresses of the remotes: by the system, by queries of our own, and from before."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from bulkvpnd.control.resolver import Resolver

ROOT = pathlib.Path(__file__).parents[3]
BEGIN = """
import contextlib, json, pathlib, socket, struct, subprocess, threading
from bulkvpnd.control import queries, resolver
import dns.message, dns.rrset

def ip(*words):
    subprocess.run(["ip", *words], check=True)

ip("link", "set", "lo", "up")
for address in ("192.0.2.53/32", "192.0.2.54/32", "2001:db8::53/128"):
    ip("address", "add", address, "dev", "lo")

class Server:
    '''A name server. records: lines of a zone. spoils: what becomes of an answer's bytes.'''

    def __init__(self, address, *records, spoils=lambda data: data):
        self.records, self.spoils, self.asked = records, spoils, []
        self.sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((address, 53))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            data, peer = self.sock.recvfrom(4096)
            query = dns.message.from_wire(data)
            question = query.question[0]
            self.asked.append(question.name.to_text())
            reply = dns.message.make_response(query)
            names = [question.name.to_text()]
            for record in self.records:
                name, kind, value = record.split()
                if name in names and (kind == "CNAME" or kind == dns.rdatatype.to_text(question.rdtype)):
                    reply.answer.append(dns.rrset.from_text(name, 60, "IN", kind, value))
                    names.append(value)
            for data in [self.spoils(reply.to_wire())]:
                if data is not None:
                    self.sock.sendto(data, peer)

def make(*servers, mark=7443, **options):
    file = pathlib.Path(DIRECTORY, "resolv.conf")
    file.write_text("".join(f"nameserver {one}\\n" for one in servers))
    queries.TIMEOUT = 0.3
    return resolver.Resolver(mark, (file, pathlib.Path(DIRECTORY, "missing")), **options)

def say(found):
    print(json.dumps(found))

def find(one, host):
    try:
        return [address[0] for _, address in one.find(host, 7443)]
    except OSError as error:
        return str(error)

"""


@pytest.fixture
def run(tmp_path):
    def in_a_network_of_its_own(program):
        """As root of a user namespace (user_namespaces(7)). Returns what it printed as JSON lines."""
        if not shutil.which("ip"):
            pytest.skip("needs ip of iproute2")
        unshare = ["unshare", "--map-root-user", "--net"]
        if subprocess.run([*unshare, "true"], capture_output=True).returncode:
            pytest.skip("needs user namespaces, see unshare(1)")
        begin = f"DIRECTORY = {str(tmp_path)!r}\n{BEGIN}"
        done = subprocess.run([*unshare, sys.executable, "-c", begin + program], capture_output=True, text=True,
                              timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return in_a_network_of_its_own


def test_names_are_asked_for_and_addresses_are_not(run):
    both, alias, literal, asked, nobody = run("""
server = Server("192.0.2.53", "www.test. CNAME vpn.test.", "vpn.test. A 203.0.113.1", "vpn.test. AAAA 2001:db8::1")
one = make("192.0.2.53")
say(find(one, "vpn.test"))
say(find(one, "www.test"))
server.asked.clear()
say([find(one, "203.0.113.7"), find(one, "2001:db8::7")])
say(server.asked)
say(find(one, "other.invalid"))
""")
    assert both == ["2001:db8::1", "203.0.113.1"]
    assert alias == ["2001:db8::1", "203.0.113.1"]
    assert literal == [["203.0.113.7"], ["2001:db8::7"]] and asked == []
    assert nobody.startswith("other.invalid: ")


def test_a_server_that_is_silent_or_lies_is_left_for_the_next(run):
    (answers,) = run("""
spoils = [lambda data: None, lambda data: b"", lambda data: data[:7], lambda data: b"\\0\\0" + data[2:],
          lambda data: data[:2] + b"\\xff" * 500, lambda data: data[:4] + b"\\xff" * 8 + data[12:]]
bad, good = Server("192.0.2.53"), Server("192.0.2.54", "vpn.test. A 203.0.113.1")
answers = []
for bad.spoils in spoils:
    answers.append(find(make("192.0.2.53", "192.0.2.54"), "vpn.test"))
say(answers)
""")
    assert answers == [["203.0.113.1"]] * 6


def test_what_was_found_before_stands_in(run):
    before, after, other = run("""
server = Server("2001:db8::53", "vpn.test. A 203.0.113.1")
one = make("2001:db8::53")
say(find(one, "vpn.test"))
server.spoils = lambda data: None
say(find(one, "vpn.test"))
say(find(one, "new.invalid"))
""")
    assert before == after == ["203.0.113.1"]
    assert other.startswith("new.invalid: ")


def test_servers_behind_the_tunnel_and_on_this_machine_are_not_asked(run):
    answers, asked = run("""
import ipaddress
inner, local, outer = [Server(one, "vpn.test. A 203.0.113.1") for one in ("192.0.2.53", "127.0.0.1", "192.0.2.54")]
one = make("192.0.2.54")
one.tunnel_servers = frozenset([ipaddress.ip_address("192.0.2.53")])
pathlib.Path(DIRECTORY, "resolv.conf").write_text("nameserver 192.0.2.53\\nnameserver 127.0.0.1\\n")
say(find(one, "vpn.test"))
say([len(server.asked) for server in (inner, local, outer)])
""")
    assert answers == ["203.0.113.1"]
    assert asked == [0, 0, 2], "that of before the tunnel was asked"


def test_without_a_mark_it_is_the_system(monkeypatch):
    one = Resolver()
    assert one.find("localhost", 7443)
    assert {address[0] for _, address in one.find("::1", 7443)} == {"::1"}
    with pytest.raises(OSError, match="^nosuchhost.invalid: "):
        one.find("nosuchhost.invalid", 7443)
    with pytest.raises(OSError, match="label"):
        one.find("a" * 64, 7443)
