"""What `bulkvpnctl doctor` looks at: this machine, its kernel, the path and the other end. Changes nothing anywhere.

The seam of admin.checks, whose tests have a double with the same methods. Each method takes a bounded time, but
for the system's look-up of a name, which the caller bounds.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import errno
import importlib.metadata
import ipaddress
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import dns.exception
import dns.message
import dns.query

from bulkvpnd import config
from bulkvpnd.admin import status
from bulkvpnd.control import ciphers, clients, gateway, tls, transport
from bulkvpnd.host import device, firewall, redirect, resolvconf, routes, sysctl, tun, tuning
from bulkvpnd.host.dns import RESOLVED
from bulkvpnd.protocol.errors import RemoteError

TIMEOUT = 5.0
"""Seconds to connect, and for the TLS handshake (choice)."""
ALERT_TIME = 1.0
"""Seconds, beside two round trips, in which a server that refuses our certificate says so: with TLS 1.3 its alert comes
when our side of the handshake is over already (RFC 8446 section 4.4.2)."""
TIME_ERROR = 5
"""adjtimex(2): nothing keeps the clock right."""
LISTEN, SYN_RECEIVED = "0A", "03"
"""TCP_LISTEN and TCP_SYN_RECV in /proc/net/tcp (net/tcp_states.h)."""


@dataclasses.dataclass(frozen=True)
class Greeting:
    """What became of a connection to the server. stage: of "connect", "tls" and "done", the one it came to. error: a
    text, None when the server let us in. address: text. mtu: bytes that the kernel takes the path to carry, or None.
    name: the one in the server's certificate, None where none was seen."""

    stage: str
    error: str | None
    address: str
    mtu: int | None = None
    name: str | None = None


class Machine:
    """This machine, for one instance. configuration: its own."""

    def __init__(self, configuration):
        self._configuration = configuration

    def check_files(self):
        """Raises ConfigurationError for what only the daemon looks at: single clients, a binding for NAT."""
        clients.load(self._configuration)
        gateway.check(self._configuration)

    def forwards_for(self):
        """What of a server's configuration asks the kernel to forward: names. Raises ConfigurationError."""
        return gateway.forwards_for(self._with_clients())

    def forwarded(self):
        """The IP versions that a server has the kernel forward. Raises ConfigurationError."""
        configuration = self._with_clients()
        return gateway.forwarded(configuration, filter(None, (configuration.pool_ipv4, configuration.pool_ipv6)))

    def _with_clients(self):
        return dataclasses.replace(self._configuration, clients=clients.load(self._configuration))

    def cipher(self):
        """The name of the cipher that is offered first; with cipher = auto it is measured, for some 15 ms."""
        return ciphers.offer(self._configuration)[0]

    def pem(self, name):
        """Text of the option ca, certificate, key or crl. Raises ConfigurationError."""
        return config.pem_text(self._configuration, name)

    def now(self):
        return datetime.datetime.now(datetime.timezone.utc)

    def report(self):
        """Of the running instance. Raises StatusError."""
        return status.ask(self._configuration.runtime_directory / status.SOCKET_NAME)

    def requirements(self):
        """[(package, least version, installed version or None), ...]. Raises LookupError where it is not known, as in a
        source tree."""
        found = []
        try:
            lines = importlib.metadata.requires("bulkvpnd") or ()
        except importlib.metadata.PackageNotFoundError:
            raise LookupError("this is a source tree, not a package") from None
        for line in lines:
            match = re.match(r"([A-Za-z0-9._-]+)\s*\(?>=\s*([0-9.]+)", line)
            if match:
                installed = None
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    installed = importlib.metadata.version(match[1])
                found.append((match[1], match[2], installed))
        if not found:
            raise LookupError("the package does not say what it needs; Debian's leaves that to apt")
        return found

    def open_tun(self):
        """Opens the control device and closes it, which makes nothing. Raises OSError."""
        os.close(os.open(tun.CONTROL_DEVICE, os.O_RDWR | os.O_CLOEXEC))

    def clock_is_kept(self):
        """Whether some daemon keeps the kernel's clock right (adjtimex(2), which reads with modes 0)."""
        # struct timex has 208 bytes on 64-bit machines, fewer elsewhere; its first field is modes.
        return ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) != TIME_ERROR

    # The path

    def resolve(self, host, port):
        """[(family, socket address), ...]. Raises OSError."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(str(error)) from None
        return [(family, address) for family, _, _, _, address in found]

    def greet(self, remote):
        """Connects to a remote and authenticates as the instance would, then leaves. Returns a Greeting; raises OSError
        when the name has no address, ConfigurationError for certificates that cannot be used."""
        context = tls.make_context(self._configuration)
        # Whoever asks compares the name, to say which one it is; no session begins here.
        context.check_hostname = False
        greeting = None
        for family, address in self.resolve(*remote):
            greeting = self._greet(context, family, address)
            if greeting.stage != "connect":
                break
        return greeting

    def _greet(self, context, family, address):
        shown = transport.shown(address)
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT)
            # Without root nothing is said of the path.
            transport.mark(sock, self._mark())
            try:
                sock.connect(address)
            except OSError as error:
                return Greeting("connect", error.strerror or str(error), shown)
            mtu = _path_mtu(sock)
            try:
                shake = tls.Handshake(sock, context, self._configuration.server_name)
                began = time.monotonic()
                name = shake.authenticate()
                sock.settimeout(ALERT_TIME + 2 * (time.monotonic() - began))
                with contextlib.suppress(TimeoutError):
                    # It waits for our HELLO, which does not come: no session begins.
                    shake.receive_message()
            except (RemoteError, OSError) as error:
                return Greeting("tls", getattr(error, "strerror", None) or str(error) or "no answer", shown, mtu)
        return Greeting("done", None, shown, mtu, name)

    def _mark(self):
        """By which packets go past the tunnel, as the instance's own connections do; None where no full tunnel is."""
        return redirect.choose_mark() if self._configuration.redirect_gateway else None

    def towards(self, addresses):
        """Names of the devices that lead to addresses, or with None to anywhere. Raises OSError."""
        return device.towards(addresses, self._mark())

    def mtu(self, name):
        """Raises OSError."""
        return int(device.KINDS["mtu"].read(name))

    def ping(self, address, size):
        """Whether `address` answers a ping whose packet of `size` bytes may not be cut. Raises OSError without ping."""
        headers, mark = 48 if ":" in address else 28, self._mark()
        command = ["ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-w", "3", "-M", "do", "-s", str(size - headers),
                   *(("-m", str(mark)) if mark else ()), address]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=6)
        if b"failed to set mark" in done.stderr:
            # It has only warned, and gone into the tunnel.
            raise PermissionError(errno.EPERM, "cannot be pinged past the tunnel; run it as root")
        return done.returncode == 0

    def hop(self, name, address, distance):
        """Who answers a packet to `address` by the device `name` that comes no further than `distance` hops: a router
        there, or `address` itself; None for nobody. Raises OSError without ping."""
        command = ["ping", "-n", "-c", "1", "-W", "2", "-w", "2", "-t", str(distance), "-I", name, address]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=6)
        match = re.search(r"[Ff]rom ([0-9a-f.:]*[0-9a-f]):? icmp_seq=1 ", done.stdout)
        return match and match[1]

    # Kernel and firewall

    def listening(self):
        """Ports on which something here accepts TCP connections."""
        return {port for port, _ in _tcp_sockets(LISTEN)}

    def half_open(self):
        """Addresses, texts, that began to connect to a port of `listen`, and have not acknowledged the answer."""
        ports = {port for _, port in self._configuration.listen}
        return list(dict.fromkeys(address for port, address in _tcp_sockets(SYN_RECEIVED) if port in ports))

    def ruleset(self):
        """All of nftables, as objects of libnftables-json(5). Raises FirewallError, OSError."""
        return firewall.run([{"list": {"ruleset": None}}])

    def sysctl(self, key):
        """Raises OSError."""
        return self._ledger().read(key)

    def tuned(self, name, addresses, refused):
        """[(Wish, Outcome), ...] of host.tuning. name: of the TUN device, None if there is none. refused: {key: why
        not} of what the instance could not set."""
        ledger = self._ledger()
        situation = tuning.situation(self._configuration, name, addresses, ledger)
        return tuning.examine(self._configuration, situation, ledger, refused)

    def _ledger(self):
        directory = sysctl.shared_directory(self._configuration.runtime_directory)
        return sysctl.Ledger(directory, sysctl.BY_HAND, by_hand=True)

    def routes(self):
        """[(network, device name), ...], see host.routes.present. Raises OSError."""
        return routes.present()

    # Names

    def dns_manager(self):
        """What takes name servers of the tunnel here, None if nothing does."""
        if RESOLVED.exists() and shutil.which("resolvectl"):
            return "systemd-resolved"
        return "resolvconf" if shutil.which("resolvconf") else None

    def name_servers(self, name):
        """Addresses that systemd-resolved has for the device `name`; None where it does not answer."""
        try:
            done = subprocess.run(["resolvectl", "dns", name], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  errors="replace", timeout=3)
        except subprocess.TimeoutExpired:
            return None
        except OSError:
            return []
        found = []
        for word in done.stdout.partition(":")[2].split() if done.returncode == 0 else ():
            with contextlib.suppress(ValueError):
                found.append(str(ipaddress.ip_address(word)))
        return found

    def recorded(self):
        """Addresses of name servers that resolvconf has from this instance."""
        return _name_servers(resolvconf.Record(self._configuration.name).file())

    def asked(self):
        """Addresses of the name servers that programs here ask, by resolv.conf(5)."""
        return _name_servers(pathlib.Path("/etc/resolv.conf"))

    def asks(self, server):
        """Whether a name server answers; what does not matter."""
        try:
            dns.query.udp(dns.message.make_query(".", "NS"), server, timeout=2)
        except (OSError, dns.exception.DNSException):
            return False
        return True


def _tcp_sockets(state):
    """[(local port, remote address), ...] of the TCP sockets in a state, as proc(5) has them."""
    found = []
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            rows = [line.split() for line in pathlib.Path(file).read_text().splitlines()[1:]]
            found += [(int(row[1].rpartition(":")[2], 16), _address(row[2].partition(":")[0])) for row in rows
                      if row[3] == state]
    return found


def _address(digits):
    """Text of an address as /proc/net/tcp has it: words of 32 bits in the order of this machine."""
    words = [int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def _name_servers(file):
    """Of a file as resolv.conf(5) has it; None stands for one that is not there."""
    found = []
    with contextlib.suppress(OSError):
        for line in file.read_text(errors="replace").splitlines() if file else ():
            with contextlib.suppress(ValueError):
                key, address = line.split()
                if key == "nameserver":
                    found.append(str(ipaddress.ip_address(address)))
    return found


def _path_mtu(sock):
    """ip(7), ipv6(7): IP_MTU of a connected socket."""
    level, option = (socket.IPPROTO_IPV6, 24) if sock.family == socket.AF_INET6 else (socket.IPPROTO_IP, 14)
    try:
        return sock.getsockopt(level, option)
    except OSError:
        return None
