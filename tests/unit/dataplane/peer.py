"""The other end of a connection, by hand, on gevent's sockets."""

import socket
import struct

import gevent.socket
from inmemory import FRAME_SIZE, entries_of

from bulkvpnd.protocol import frame, packet
from bulkvpnd.protocol.keys import Opener, Sealer

CIPHER = "aes-256-gcm"
OURS, THEIRS = b"o" * 32, b"t" * 32
SETTINGS = {
    "frame_size": FRAME_SIZE, "offloads": packet.OFFLOADS, "peer_offloads": packet.OFFLOADS, "keepalive": 1000,
    "keepalive_timeout": 3000, "rekey_bytes": 1 << 36, "rekey_interval": 900, "sndbuf": None, "congestion": "system",
    "queue_target": 0.005, "queue_interval": 0.1,
}  # fmt: skip


def payload(*entries):
    return b"".join(len(one).to_bytes(4, "big") + one for one in entries)


class Peer:
    """The other end by hand: frames of any kind, with its own keys."""

    def __init__(self, sock):
        self._socket = gevent.socket.socket(fileno=sock.detach())
        self.sealer, self.opener = Sealer(CIPHER, THEIRS), Opener(CIPHER, OURS)
        self.limit = FRAME_SIZE

    def sealed(self, kind, payload=b""):
        out = bytearray(len(payload) + 64)
        header = frame.pack_header(kind, len(payload))
        return header + out[: self.sealer.seal_into(header, payload, memoryview(out))]

    def send(self, kind, payload=b""):
        self.write(self.sealed(kind, payload))

    def write(self, data):
        self._socket.sendall(data)

    def _read(self, size):
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def frame(self):
        """(type, payload) of the next frame."""
        header = self._read(frame.HEADER_SIZE)
        kind, size = frame.unpack_header(header, 0, self.limit)
        out = bytearray(size + 64)
        size = self.opener.open_into(header, memoryview(self._read(size)), memoryview(out))
        if kind == frame.REKEY:
            self.opener.ratchet()
        return kind, bytes(out[:size])

    def frames(self):
        """All frames until the end of the stream."""
        try:
            while True:
                yield self.frame()
        except (EOFError, ConnectionResetError):
            return

    def data(self, count):
        """The next `count` entries."""
        entries = []
        while len(entries) < count:
            kind, payload = self.frame()
            if kind == frame.DATA:
                entries += entries_of(payload)
        assert len(entries) == count
        return entries

    def reset(self):
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self):
        self._socket.close()


def joined(is_small, segment=None):
    """Two TCP sockets; is_small: between them there is room for some 30 KiB. segment: bytes at once, at most."""
    ours = socket.socket()
    with socket.socket() as listener:
        for sock in (listener, ours) if segment else ():
            sock.setsockopt(socket.SOL_TCP, socket.TCP_MAXSEG, segment)
            # BBR would pace by what it saw while this process had no CPU.
            sock.setsockopt(socket.SOL_TCP, socket.TCP_CONGESTION, b"reno")
        for sock in (listener, ours) if is_small else ():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            # Segments that fit the window, or the kernel would wait for it to open.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs
