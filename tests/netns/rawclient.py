"""A client that does as it is told, step by step, and so also what no client should."""

import json
import os
import socket

from harness import inside

from bulkvpnd import config
from bulkvpnd.control import tls
from bulkvpnd.protocol import aead, frame, handshake, keys

SERVER = ("192.0.2.1", 7443)
TIMEOUT = 10
"""Seconds in which the server has to answer."""
ENDING = 4
"""Seconds in which it has to end a connection; a living one would bring a PING after 5 s at the latest."""


class RawClient:
    """One TCP connection to the server, as a context manager.

    network: it comes from its client host. identity: names the configuration file with its certificate and key.
    source: the address that it comes from, if it is not the host's first.
    """

    def __init__(self, network, identity, source=None):
        self.network = network
        self.frames_sent = self.frames_received = 0
        self._identity = identity
        with inside(network.client):
            self.socket = socket.create_connection(SERVER, TIMEOUT, source and (source, 0))
        self.address = "{}:{}".format(*self.socket.getsockname())
        self._received = b""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()

    # Step by step

    def context(self, identity=None):
        """The SSLContext that a good client of this identity has."""
        file = self.network.directory / f"{identity or self._identity}.conf"
        return tls.make_context(config.load(["--config", str(file)])[0])

    def authenticate(self, context=None):
        """The TLS handshake. Raises RemoteError."""
        self._shake = tls.Handshake(self.socket, context or self.context(), "server")
        self._shake.authenticate()

    def send_hello(self, **fields):
        """HELLO as a good client says it, but for `fields`, named as in JSON."""
        hello = handshake.Hello(None, None, 0, os.urandom(keys.RANDOM_SIZE), ("aes-256-gcm",), 4, 256 << 10, (),
                                64 << 30, 900, False)
        body = json.dumps({**hello.to_json(), **fields}).encode("ascii")
        self._hello, self._random = body, hello.random
        self.send_message(body)

    def send_message(self, body):
        """body: bytes, what should be JSON."""
        self.send_in_tls(len(body).to_bytes(handshake.PREFIX_SIZE, "big") + body)

    def send_in_tls(self, data):
        self._shake.send(data)

    def receive_welcome(self):
        """WELCOME, after which frames can be sealed and opened. Raises Refused."""
        body = self._shake.receive_message()
        try:
            self.welcome = handshake.Welcome.decode(body)
        finally:
            self._received = self._shake.finish()
        self.ipv4 = str(self.welcome.ipv4.ip)
        secrets = keys.traffic_secrets(self._hello, body, self._random, self.welcome.random)
        self._sealer = keys.Sealer(self.welcome.cipher, secrets[keys.CLIENT_TO_SERVER])
        self._opener = keys.Opener(self.welcome.cipher, secrets[keys.SERVER_TO_CLIENT])
        return self.welcome

    def join(self, **fields):
        """All of the above. Returns WELCOME; raises Refused."""
        self.authenticate()
        self.send_hello(**fields)
        return self.receive_welcome()

    # Frames

    def seal(self, kind, payload):
        """A whole frame."""
        self.frames_sent += 1
        header = frame.pack_header(kind, len(payload))
        out = memoryview(bytearray(len(payload) + aead.TAG_SIZE + aead.SLACK))
        return header + bytes(out[: self._sealer.seal_into(header, payload, out)])

    def send(self, *frames):
        self.socket.sendall(b"".join(frames))

    def receive_frame(self):
        """(type, payload) of the next frame; EOFError when the server ended the connection instead."""
        header = self._receive(frame.HEADER_SIZE)
        self.frames_received += 1
        kind, size = frame.unpack_header(header, 0, self.welcome.frame_size)
        out = memoryview(bytearray(size))
        return kind, bytes(out[: self._opener.open_into(header, self._receive(size), out)])

    def receive_sealed(self):
        """The next frame as it is; it counts as opened."""
        header = self._receive(frame.HEADER_SIZE)
        self.frames_received += 1
        _, size = frame.unpack_header(header, 0, self.welcome.frame_size)
        return header + self._receive(size)

    def receive_until(self, kind):
        """The payload of the next frame of this type; others are passed over."""
        while True:
            received, payload = self.receive_frame()
            if received == kind:
                return payload

    def ping(self):
        """Whether the connection lives: a PING is answered with what it carries."""
        stamp = os.urandom(8)
        self.send(self.seal(frame.PING, stamp))
        return self.receive_until(frame.PONG) == stamp

    def _receive(self, size):
        while len(self._received) < size:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self._received += data
        data, self._received = self._received[:size], self._received[size:]
        return data

    def ended(self):
        """Whether the server ends the connection now, whatever it still sends before."""
        self.socket.settimeout(ENDING)
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            # What the server had not read yet turns its close into a reset.
            pass
        except TimeoutError:
            return False
        return True
