"""The worker: one event loop, one queue of the TUN, its share of the connections.

Outbound, in this file and then in connection.py:
 1. The reader, a native thread of the hub's thread pool, waits on the queue and reads the first batch.
 2. routing.Routes finds each packet's connection.
 3. Connection.append puts it into the connection's send queue.
 4. The connection's sender greenlet seals and sends.
 5. While packets keep coming the hub reads the queue itself; when it is empty, back to 1.

Inbound is wholly in connection.py.

It never reads a file, resolves a name or decides who may connect: the main process tells it everything over the link.
"""

import collections
import gc
import os
import signal
import socket
import sys
import time
import traceback

import gevent
from gevent.hub import get_hub

from bulkvpnd.dataplane.connection import COUNTERS, Connection
from bulkvpnd.dataplane.frames import Frame, FramePool
from bulkvpnd.dataplane.routing import Routes, Session
from bulkvpnd.dataplane.tun import TunQueue
from bulkvpnd.protocol.keys import Opener, Sealer
from bulkvpnd.workerlink import LinkClosed, WorkerLink

POOL_FRAMES = 256
"""Frames of a worker for all its connections: 64 MiB with frames of 256 KiB (choice)."""
READER_WAIT = 1.0
"""Seconds that the reader waits before the hub sees it again (choice; bounds how late a stop is noticed)."""
SWITCH_INTERVAL = 0.0005
"""Seconds; how long callbacks may run before gevent's loop looks at its descriptors again."""
STATUS_CONNECTIONS = 100
"""Connections in one status message, so that it fits the link."""

DROPS = (
    "no_session", "no_connection", "queue_full", "sibling_full", "connection_lost", "closing",
    "foreign_source", "not_ip", "ip_length", "tun_refused",
)  # fmt: skip


class Sibling:
    """A sink: hands packets to another worker. descriptor: of its inbox, non-blocking SEQPACKET."""

    def __init__(self, descriptor, drops):
        self._descriptor = descriptor
        self._drops = drops
        self.packets = 0

    def append(self, batch, start, end, packets):
        for at in batch.starts:
            if start < at < end:
                size = int.from_bytes(batch.buffer[at - 4 : at], "big")
                try:
                    os.write(self._descriptor, batch.view[at : at + size])
                    self.packets += 1
                except OSError:
                    # Full, or being replaced: as with any full queue, the packet goes.
                    self._drops["sibling_full"] += 1


class Worker:
    """Runs until the link closes. link: to the main process."""

    def __init__(self, link):
        self._link = link
        self.connections = {}
        self.drops = collections.Counter(dict.fromkeys(DROPS, 0))
        self.counters = collections.Counter(waits=0, batches=0, packets_read=0, from_siblings=0)
        self._turn_descriptor = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._handlers = {
            "session": self._on_session,
            "forget": self._on_forget,
            "attach": self._on_attach,
            "detach": self._on_detach,
            "status": self._on_status,
        }

    def run(self):
        """Serves the link. Returns the exit status."""
        try:
            message, descriptors = self._link.receive()
            self._start(message, descriptors)
            while True:
                message, descriptors = self._link.receive()
                self._handlers[message["type"]](message, descriptors)
        except LinkClosed:
            return 0

    def _start(self, message, descriptors):
        tun, inbox, *siblings = descriptors
        self.index = message["index"]
        self.queue = TunQueue(tun)
        self.pool = FramePool(message["frame_size"], POOL_FRAMES)
        # One place to open frames into: between opening and writing to the TUN nothing else runs.
        self.scratch = Frame(message["frame_size"]).view
        self.scratch_read = self.scratch.toreadonly()
        indexes = [index for index in range(message["workers"]) if index != self.index]
        self.siblings = {index: Sibling(fd, self.drops) for index, fd in zip(indexes, siblings, strict=True)}
        self.routes = Routes(self.drops, self.siblings)
        gevent.spawn(self._forever, self._outbound_loop)
        gevent.spawn(self._forever, self._inbox_loop, TunQueue(inbox), inbox)
        gevent.spawn(self._forever, self._tick_loop)
        gc.collect()
        gc.freeze()
        self._tell("ready", pid=os.getpid())

    # Outbound

    def _outbound_loop(self):
        queue, split, counters = self.queue, self.routes.split, self.counters
        apply = get_hub().threadpool.apply
        turn = self.turn()
        batch = Frame(self.pool.frame_size)
        while True:
            count = apply(queue.wait, (batch, READER_WAIT))
            counters["waits"] += 1
            while count:
                split(batch)
                counters["batches"] += 1
                counters["packets_read"] += count
                batch.clear()
                turn()
                count = queue.read_batch(batch)

    def _inbox_loop(self, inbox, descriptor):
        batch = Frame(self.pool.frame_size)
        turn = self.turn()
        while True:
            gevent.socket.wait_read(descriptor)
            count = inbox.read_batch(batch)
            self.routes.split(batch, from_sibling=True)
            self.counters["from_siblings"] += count
            batch.clear()
            turn()

    def turn(self):
        """A function for one greenlet: lets the event loop poll its descriptors once, then goes on.

        gevent.sleep(0) would not do: gevent runs up to 50 callbacks before it polls again, so a few busy greenlets
        can keep sockets waiting for milliseconds. An eventfd that is always readable ends every poll at once.
        """
        hub = get_hub()
        watcher = hub.loop.io(self._turn_descriptor, 1)
        return lambda: hub.wait(watcher)

    # The main process's orders

    def _on_session(self, message, _):
        session = self._session(message)
        session.siblings = tuple(index for index in message["workers"] if index != self.index)
        self.routes.add(session)

    def _session(self, message):
        """The session that a message names: a routed one, one whose first connection is not established, or new."""
        number = message["session"]
        if number in self.routes.sessions:
            return self.routes.sessions[number]
        for connection in self.connections.values():
            if connection.session.number == number:
                return connection.session
        addresses = frozenset(bytes.fromhex(address) for address in message["addresses"])
        return Session(number, addresses, message["any_address"])

    def _on_forget(self, message, _):
        session = self.routes.sessions.get(message["session"])
        if session:
            self.routes.remove(session)

    def _on_attach(self, message, descriptors):
        sock = socket.socket(fileno=descriptors[0])
        sock.setblocking(True)  # for gevent, which waits cooperatively; the descriptor itself is non-blocking
        connection = Connection(
            message["connection"],
            sock,
            self._session(message),
            Sealer(message["cipher"], bytes.fromhex(message["secret_out"])),
            Opener(message["cipher"], bytes.fromhex(message["secret_in"])),
            message["settings"],
            self,
            bytes.fromhex(message["head"]),
        )
        self.connections[connection.number] = connection
        connection.start()

    def _on_detach(self, message, _):
        connection = self.connections.get(message["connection"])
        if connection:
            connection.close(message["reason"])

    def _on_status(self, message, _):
        connections = list(self.connections.values())
        for at in range(0, len(connections) or 1, STATUS_CONNECTIONS):
            part = connections[at : at + STATUS_CONNECTIONS]
            self._tell(
                "status",
                request=message["request"],
                last=at + STATUS_CONNECTIONS >= len(connections),
                connections=[self._describe(connection) for connection in part],
                drops=dict(self.drops),
                counters={
                    **self.counters,
                    "to_siblings": sum(sibling.packets for sibling in self.siblings.values()),
                    "frames_in_use": self.pool.in_use,
                },
            )

    @staticmethod
    def _describe(connection):
        return {
            "connection": connection.number,
            "established": connection.is_established,
            "age": round(time.monotonic() - connection.since, 3),
            "queued": connection.queued,
            "rtt_ms": None if connection.rtt is None else round(connection.rtt * 1000, 3),
            **{name: getattr(connection, name) for name in COUNTERS},
        }

    # What connections report

    def established(self, connection):
        """The first authentic frame came: from now on the connection carries its session's packets."""
        connection.session.connections[connection.number] = connection
        self.routes.changed()
        self._tell("established", connection=connection.number)

    def closed(self, connection, reason, clean, blame):
        self.connections.pop(connection.number, None)
        if connection.session.connections.pop(connection.number, None):
            self.routes.changed()
        self._tell(
            "closed",
            connection=connection.number,
            reason=reason,
            clean=clean,
            blame=blame,
            counters={name: getattr(connection, name) for name in COUNTERS},
        )

    def bug(self, error):
        """An exception that should not have been; the main process logs it."""
        self._tell("bug", traceback="".join(traceback.format_exception(error))[-4000:])

    # Housekeeping

    def _tick_loop(self):
        while True:
            gevent.sleep(1)
            now = time.monotonic()
            for connection in list(self.connections.values()):
                connection.tick(now)
            self._tell("alive")

    def _tell(self, type, **fields):
        self._link.send({"type": type, **fields})

    def _forever(self, loop, *arguments):
        """A loop that everyone in this worker needs: if it fails the worker is useless, and a new one is better."""
        try:
            loop(*arguments)
        except LinkClosed:
            os._exit(0)
        except Exception as error:
            traceback.print_exc()
            try:
                self.bug(error)
            finally:
                os._exit(1)


def main():
    """The worker process: ``python3 -m bulkvpnd.dataplane DESCRIPTOR``."""
    # The main process stops workers by closing the link; a signal to the whole process group must not come first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL)
    status = Worker(WorkerLink(socket.socket(fileno=int(sys.argv[1])))).run()
    # The reader may sit in its native thread for another second; nothing here needs an orderly end.
    os._exit(status)
