"""Both ends of a connection: one that is tested, and the other by hand, on gevent's sockets."""

import itertools
import socket
import struct

import gevent.socket
from inmemory import FRAME_SIZE, Worker, batch_of, entries_of, entry, identity, until

from bulkvpnd.dataplane.connection import Connection
from bulkvpnd.dataplane.routing import Session
from bulkvpnd.protocol import frame, packet
from bulkvpnd.protocol.keys import Opener, Sealer

CIPHER = "aes-256-gcm"
OURS, THEIRS = b"o" * 32, b"t" * 32
SETTINGS = {
    "frame_size": FRAME_SIZE, "offloads": packet.OFFLOADS, "peer_offloads": packet.OFFLOADS, "keepalive": 1000,
    "keepalive_timeout": 3000, "rekey_bytes": 1 << 36, "rekey_interval": 900, "sndbuf": None, "congestion": "system",
    "queue_target": 0.005, "queue_interval": 0.1,
}  # fmt: skip


def many(count, size=1400, flows=1, first=0):
    return [entry(n % flows, first + n // flows, size) for n in range(count)]


def in_order(entries):
    """Whether no packet of a flow was overtaken."""
    last = {}
    for one in entries:
        flow, number = identity(one)
        if last.get(flow, -1) >= number:
            return False
        last[flow] = number
    return True


def payload(*entries):
    return b"".join(len(one).to_bytes(4, "big") + one for one in entries)


class End:
    """A connection, its worker and its session."""

    numbers = itertools.count(1)

    def __init__(self, sock, secrets, worker=None, head=b"", sealer=None, sources=None, **changed):
        self.worker = worker or Worker()
        self.socket = sock
        self.session = Session(1, frozenset(sources or ()), sources is None)
        self.connection = Connection(
            next(self.numbers), 0, sock, self.session, sealer or Sealer(CIPHER, secrets[0]), Opener(CIPHER, secrets[1]),
            {**SETTINGS, **changed}, self.worker, head,
        )  # fmt: skip
        self.connection.start()

    def give(self, entries, size=None):
        """As routing gives a run."""
        batch = batch_of(entries, size or self.worker.pool.frame_size)
        lanes = [self.connection.lane(identity(one)[0] if not one[0] else 0) for one in entries]
        self.connection.append(batch, lanes, 0, len(entries))

    def give_part(self, entries):
        """As routing gives a run that others of its batch follow."""
        batch = batch_of([*entries, *many(1)], self.worker.pool.frame_size)
        self.connection.append(batch, [self.connection.lane(0)] * (len(entries) + 1), 0, len(entries))

    def idle(self):
        """Waits until its sender waits."""
        until(lambda: self.connection._is_idle, "the sender waits")

    @property
    def written(self):
        return self.worker.queue.written

    @property
    def end(self):
        """(reason, clean, blame) once it has ended."""
        mine = [end[1:] for end in self.worker.ends if end[0] == self.connection.number]
        assert len(mine) <= 1
        return mine[0] if mine else None


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
