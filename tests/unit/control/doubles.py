"""Doubles and makers for the tests of the main process: certificates, configurations, workers, a TUN, a link."""

import contextlib
import datetime
import gc
import os
import types

import gevent
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from gevent import socket
from gevent.event import Event

from bulkvpnd import config, pki
from bulkvpnd.control import resolver, tls
from bulkvpnd.host.sysctl import Outcome
from bulkvpnd.protocol import handshake

NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)  # OpenSSL asks the real clock
DAY = datetime.timedelta(days=1)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def until(condition, what="it", seconds=5):
    """Lets the event loop run until condition() is true. Returns what it returned."""
    deadline = gevent.Timeout(seconds, TimeoutError(f"not within {seconds} s: {what}"))
    with deadline:
        while not (value := condition()):
            gevent.sleep(0.002)
    return value


# Certificates


class Authority:
    """A certificate authority: ends as `bulkvpnctl pki` makes them, and others that it never would make."""

    def __init__(self, name="authority"):
        self.pem, self.key = pki.create_authority(name, NOW, 100)

    def issue(self, name="alice", role="client"):
        """(ca, certificate, key), each PEM."""
        return (self.pem, *pki.issue(self.pem, self.key, name, role, NOW, 10))

    def odd(self, names=("alice",), usages=(CLIENT,), first=NOW - DAY, last=NOW + DAY, self_signed=False):
        """As issue, of any shape. names: str become DNS names. names, usages: None leaves the extension out."""
        key = ec.generate_private_key(ec.SECP256R1())
        signer = key if self_signed else serialization.load_pem_private_key(self.key.encode(), None)
        issuer = x509.load_pem_x509_certificate(self.pem.encode()).subject
        builder = x509.CertificateBuilder(
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "odd")]),
            issuer_name=issuer,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=first,
            not_valid_after=last,
        )
        extensions = [
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
        ]
        if names is not None:
            names = [x509.DNSName(name) if isinstance(name, str) else name for name in names]
            extensions.append(x509.SubjectAlternativeName(names))
        if usages is not None:
            extensions.append(x509.ExtendedKeyUsage(usages))
        for extension in extensions:
            builder = builder.add_extension(extension, False)
        certificate = builder.sign(signer, hashes.SHA256())
        pem = serialization.Encoding.PEM
        return (
            self.pem,
            certificate.public_bytes(pem).decode(),
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode(),
        )


# Configuration, by way of the real parser


def configuration(directory, mode, end, **options):
    """directory: private, for the files. mode: server or client. end: (ca, certificate, key). options: by name; a
    list is an option that is repeated."""
    lines = {"mode": mode, "pool-ipv4": "10.86.0.0/24"} if mode == "server" else {"mode": mode}
    lines |= {name.replace("_", "-"): value for name, value in options.items()}
    path = directory / f"{mode}.conf"
    path.touch(0o600)
    parts = [f"<{name}>\n{pem}</{name}>\n" for name, pem in zip(("ca", "certificate", "key"), end, strict=True)]
    values = {name: value if isinstance(value, list) else [value] for name, value in lines.items() if value is not None}
    path.write_text("".join(f"{name} = {value}\n" for name, several in values.items() for value in several)
                    + "".join(parts))
    arguments = ["--config", str(path), "--state-directory", str(directory / "state"),
                 "--runtime-directory", str(directory / "run")]
    return config.load(arguments)[0]


def context(directory, mode, end):
    """The SSLContext that the daemon would use."""
    options = {} if mode == "server" else {"remote": "127.0.0.1"}
    return tls.make_context(configuration(directory, mode, end, **options))


# Sockets


def free_port(host="127.0.0.1"):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        return sock.getsockname()[1]


def connected(port, host="127.0.0.1"):
    sock = socket.create_connection((host, port), timeout=5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the client's; else each step waits 40 ms for an ACK
    return sock


def descriptors():
    """What this process has open, without the sockets that earlier tests left as garbage."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


# What the roles deal with


class Tun:
    name = "bulk0"
    offloads = ("csum", "tso")


class Link:
    """In place of host.link: takes note of what the device would get."""

    MEND_IPV6 = "see: sysctl"

    class LinkError(Exception):
        pass

    def __init__(self):
        self.calls = []
        self.failure = None
        self.taken = 0  # how often somebody else has the addresses still
        self.led = 0  # how often somebody else leads to their networks still
        self.parts = ()  # of a network, that somebody else has
        self.ipv6 = True  # whether the machine has it

    def has_ipv6(self, name):
        return self.ipv6

    def check_addresses(self, name, interfaces):
        self.taken -= 1
        if self.taken >= 0:
            raise self.LinkError("taken")

    def check_networks(self, name, interfaces):
        self.led -= 1
        if self.led >= 0:
            raise self.LinkError("led")

    def inside(self, name, network):
        return [(part, holder) for part, holder in self.parts if part.version == network.version]

    def set_addresses(self, name, interfaces):
        if self.failure:
            raise self.LinkError(self.failure)
        self.calls.append(("addresses", name, [str(interface) for interface in interfaces]))

    def set_mtu(self, name, mtu):
        self.calls.append(("mtu", name, mtu))


class Ledger:
    """In place of host.sysctl.Ledger: sets what is wanted, or says why it cannot."""

    def __init__(self, why_not=None):
        self.wanted = []
        self.why_not = why_not

    def recover(self):
        pass

    restore = recover

    def want(self, key, value):
        self.wanted.append((key, value))
        return Outcome(key, "0", value, "0" if self.why_not else value, self.why_not)


class Network:
    """In place of control.clientnet.ClientNetwork: nothing is changed, and names are looked up as ever."""

    def __init__(self):
        self.mark = None
        self.resolver = resolver.Resolver()
        self.calls = []
        self.failure = None

    def start(self):
        self.calls.append("start")

    def reconfigure(self, configuration):
        self.calls.append(("reconfigure", configuration.routes))

    def know(self, addresses):
        self.calls.append(("know", list(addresses)))

    def take(self, welcome):
        if self.failure:
            raise self.failure
        self.calls.append(("take", welcome.session))

    def came_up(self, then):
        self.calls.append("up")
        then()


class Workers:
    """In place of control.workers.Workers: keeps the messages, and the sockets that came with them."""

    def __init__(self, count=2):
        self.all = [types.SimpleNamespace(ready=Event()) for _ in range(count)]
        for worker in self.all:
            worker.ready.set()
        self.sent = []  # (index, message)
        self.sockets = {}  # connection: socket
        self.takes = True

    def __len__(self):
        return len(self.all)

    def send(self, index, message, descriptors=()):
        if not self.takes or not self.all[index].ready.is_set():
            return False
        for descriptor in descriptors:
            self.sockets[message["connection"]] = socket.socket(fileno=os.dup(descriptor))
        self.sent.append((index, message))
        return True

    def broadcast(self, message):
        for index in range(len(self.all)):
            self.send(index, message)

    def told(self, kind, index=None):
        """The messages of one type, of one worker or all."""
        return [message for at, message in self.sent if message["type"] == kind and index in (None, at)]

    def worker_of(self, number):
        """The index of the worker that has a connection, 0 for one that none has."""
        got = {message["connection"]: index for index, message in self.sent if message["type"] == "attach"}
        return got.get(number, 0)

    def close(self):
        for sock in self.sockets.values():
            sock.close()


def establish(role, number):
    """The worker of a connection reports its first authentic frame. role: Server or Client."""
    role.established(number, role.workers.worker_of(number))


class Routes:
    """What a worker makes of session and forget messages: which session owns each address."""

    def __init__(self, messages):
        self.owners = {}
        self.sessions = set()
        for message in messages:
            if message["type"] == "session":
                self.sessions.add(message["session"])
                self.owners.update(dict.fromkeys(message["addresses"], message["session"]))
            elif message["type"] == "forget":
                self.sessions.discard(message["session"])
                for address in [one for one, owner in self.owners.items() if owner == message["session"]]:
                    del self.owners[address]


HELLO = handshake.Hello(
    session=None, token=None, index=0, random=bytes(range(32)), ciphers=("aes-256-gcm", "chacha20-poly1305"),
    connections=4, frame_size=262144, offloads=("csum", "tso"), rekey_bytes=1 << 36, rekey_interval=900, replaces=False,
)  # fmt: skip


@contextlib.contextmanager
def shaken(sock, context, server_name="server"):
    """The client's end of a TLS connection whose handshake is done; closes the socket at the end."""
    with sock:
        shake = tls.Handshake(sock, context, server_name)
        shake.authenticate()
        yield shake
