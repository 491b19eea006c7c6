"""The worker: one event loop, one queue of the TUN, its share of the connections.

Outbound, in this file and then in connection.py:
 1. The reader, a native thread of the hub's thread pool, waits on the queue and reads the first batch.
 2. routing.Routes finds each packet's connection.
 3. Connection.append puts it into the connection's send queue.
 4. The connection's sender greenlet seals and sends.
 5. While packets keep coming the hub reads the queue itself; when none came for LINGER seconds, back to 1.

Inbound is wholly in connection.py.

It never reads a file, resolves a name or decides who may connect: the main process tells it everything over the link.
"""

import collections
import gc
import ipaddress
import os
import signal
import socket
import sys
import time
import traceback

import gevent
import gevent.socket
from gevent.event import Event
from gevent.hub import get_hub

from bulkvpnd import hardening
from bulkvpnd.dataplane.connection import COUNTERS, Connection
from bulkvpnd.dataplane.frames import IDLE_TIME, Frame, FramePool
from bulkvpnd.dataplane.routing import Isolation, Routes, Session
from bulkvpnd.dataplane.tun import TunQueue
from bulkvpnd.protocol.keys import Opener, Sealer
from bulkvpnd.workerlink import LinkClosed, WorkerLink

POOL_FRAMES = 256
"""Frames of a worker for all its connections: 64 MiB with frames of 256 KiB (choice)."""
READER_WAIT = 1.0
"""Seconds that the reader waits before the hub sees it again (choice; bounds how late a stop is noticed)."""
LINGER = 1.0
"""Seconds without a packet after which the hub leaves the queue to the reader again. Handing a batch over costs two
switches between threads, about 0.1 ms, which a flow that pauses for a moment need not pay (benchmarks, idle_rtt_ms)."""
BATCHES_MAX = 4
"""Full batches read one after the other. What is read waits in send queues, where it is controlled, and no longer in
the device, where a ping is behind all else; more would keep the connections waiting (choice)."""
SWITCH_INTERVAL = 0.0005
"""Seconds; how long callbacks may run before gevent's loop looks at its descriptors again."""
STATUS_CONNECTIONS = 100
"""Connections in one status message, so that it fits the link."""

DROPS = (
    "no_session", "no_connection", "queue_delay", "queue_full", "sibling_full", "stalled", "connection_lost",
    "closing", "foreign_source", "no_source", "client_to_client", "not_ip", "ip_length", "tun_refused",
)  # fmt: skip

_READ = 1  # of libev


class Sibling:
    """A sink, and its own only lane: hands packets to another worker. descriptor: of its inbox, non-blocking."""

    def __init__(self, descriptor, drops):
        self.sink = self
        self._descriptor = descriptor
        self._drops = drops
        self.packets = 0

    def append(self, batch, lanes, first, stop):
        for number in range(first, stop):
            try:
                os.write(self._descriptor, batch.view[batch.starts[number] : batch.begin(number + 1)])
                self.packets += 1
            except OSError:
                # Full, or being replaced: as with any full queue, the packet goes.
                self._drops["sibling_full"] += 1


class Worker:
    """Runs until the link closes. link: to the main process. missing: what this process is not confined by, text."""

    def __init__(self, link, missing=()):
        self._link = link
        self._missing = list(missing)
        self.connections = {}
        self.drops = collections.Counter(dict.fromkeys(DROPS, 0))
        self.counters = collections.Counter(waits=0, batches=0, packets_read=0, from_siblings=0)
        self._isolation = None
        self._outbox = collections.deque()
        self._has_outbox = Event()
        self._handlers = {
            "isolate": self._on_isolate,
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
        self.queue = TunQueue(tun, self.drops)
        self.pool = FramePool(message["frame_size"], POOL_FRAMES)
        # One place to open frames into: between opening and writing to the TUN nothing else runs, or it is copied.
        self.scratch = Frame(message["frame_size"]).view
        self.scratch_read = self.scratch.toreadonly()
        self.plain = Frame(message["frame_size"])
        indexes = [index for index in range(message["workers"]) if index != self.index]
        self.siblings = {index: Sibling(fd, self.drops) for index, fd in zip(indexes, siblings, strict=True)}
        self.routes = Routes(self.drops, self.siblings)
        gevent.spawn(self._forever, self._outbound_loop)
        gevent.spawn(self._forever, self._inbox_loop, TunQueue(inbox, self.drops), inbox)
        gevent.spawn(self._forever, self._report_loop)
        gevent.spawn(self._forever, self._tick_loop)
        gc.freeze()
        gc.enable()
        self._tell("ready", pid=os.getpid(), missing=self._missing)

    # Outbound

    def _outbound_loop(self):
        hub, queue, split, counters = get_hub(), self.queue, self.routes.split, self.counters
        resume = gevent.getcurrent().switch
        readable, lapse = hub.loop.io(queue.fileno(), _READ), hub.loop.timer(LINGER, LINGER)
        batch = Frame(self.pool.frame_size)
        while True:
            count = hub.threadpool.apply(queue.wait, (batch, READER_WAIT))
            counters["waits"] += 1
            if not count:
                continue
            readable.start(resume, True)
            lapse.start(resume, False)
            seen = 0
            while True:
                for _ in range(BATCHES_MAX):
                    counters["batches"] += 1
                    counters["packets_read"] += len(batch.starts)
                    is_full = queue.is_full(batch)
                    split(batch)
                    batch.clear()
                    if not is_full or not queue.read_batch(batch):
                        break
                if hub.switch():
                    queue.read_batch(batch)
                elif seen == counters["packets_read"]:
                    break
                else:
                    seen = counters["packets_read"]
            readable.stop()
            lapse.stop()

    def _inbox_loop(self, inbox, descriptor):
        batch = Frame(self.pool.frame_size)
        while True:
            gevent.socket.wait_read(descriptor)
            count = inbox.read_batch(batch)
            self.routes.split(batch, from_sibling=True)
            self.counters["from_siblings"] += count
            batch.clear()

    # The main process's orders

    def _on_isolate(self, message, _):
        """What every client of a server has in common: where its packets may not go."""
        self._isolation = Isolation(
            [ipaddress.ip_network(network) for network in message["networks"]],
            frozenset(ipaddress.ip_address(address).packed for address in message["exempt"]),
        )
        for session in {*self.routes.sessions.values(), *(one.session for one in self.connections.values())}:
            session.isolate(self._isolation)

    def _on_session(self, message, _):
        session = self._session(message)
        session.siblings = tuple(index for index in message["workers"] if index != self.index)
        self.routes.add(session)
        self._retry()

    def _session(self, message):
        """The session that a message names: a routed one, one whose first connection is not established, or new."""
        number = message["session"]
        if number in self.routes.sessions:
            return self.routes.sessions[number]
        for connection in self.connections.values():
            if connection.session.number == number:
                return connection.session
        addresses = frozenset(bytes.fromhex(address) for address in message["addresses"])
        networks = tuple(ipaddress.ip_network(network) for network in message["networks"])
        return Session(number, addresses, message["any_address"], networks, self._isolation)

    def _on_forget(self, message, _):
        session = self.routes.sessions.get(message["session"])
        if session:
            self.routes.remove(session)
            # What waits for it must not go to whoever has its addresses next.
            self._retry()

    def _on_attach(self, message, descriptors):
        if not descriptors:
            # That is no reason to end the others.
            self._tell("closed", connection=message["connection"], reason="its worker may have no more descriptors, "
                       "see LimitNOFILE of systemd.exec(5)", clean=False, blame="own", counters={})
            return
        # Read and written without blocking, by watchers of our own: gevent's socket makes a new one for each wait.
        sock = socket.socket(fileno=descriptors[0])
        sock.setblocking(False)
        connection = Connection(
            message["connection"],
            message["index"],
            sock,
            self._session(message),
            Sealer(message["cipher"], bytes.fromhex(message["secret_out"])),
            Opener(message["cipher"], bytes.fromhex(message["secret_in"])),
            message["settings"],
            self,
            bytes.fromhex(message["head"]),
            message["replaces"],
        )
        self.connections[connection.number] = connection
        self._choose_joining()
        connection.start()

    def _on_detach(self, message, _):
        connection = self.connections.get(message["connection"])
        if connection:
            connection.close(message["reason"])

    def _on_status(self, message, _):
        connections, now = list(self.connections.values()), time.monotonic()
        for at in range(0, len(connections) or 1, STATUS_CONNECTIONS):
            part = connections[at : at + STATUS_CONNECTIONS]
            self._tell(
                "status",
                request=message["request"],
                last=at + STATUS_CONNECTIONS >= len(connections),
                connections=[connection.describe(now) for connection in part],
                drops=dict(self.drops),
                counters={
                    **self.counters,
                    "to_siblings": sum(sibling.packets for sibling in self.siblings.values()),
                    "frames_in_use": self.pool.in_use,
                    "waiting": len(self.routes.waiting),
                },
            )

    # What connections report

    def established(self, connection):
        """The first authentic frame came: from now on the connection carries its session's packets."""
        other = connection.session.connections.get(connection.index)
        connection.session.connections[connection.index] = connection
        # The peer's answers may come before the main process has told everybody of a new session.
        self.routes.add(connection.session)
        self._tell("established", connection=connection.number)
        self._retry()
        if other is not None and connection.replaces:
            connection.follow(other)
            other.move()

    def _retry(self):
        """Something has changed for the packets that wait for a connection."""
        if self.routes.waiting:
            batch = self.pool.take()
            self.routes.retry(batch)
            self.pool.give_back(batch)

    def closing(self, connection):
        """It says CLOSE and takes no more packets."""
        if connection.session.connections.get(connection.index) is connection:
            del connection.session.connections[connection.index]
            self.routes.changed()

    def closed(self, connection, reason, clean, blame):
        self.connections.pop(connection.number, None)
        self._choose_joining()
        self.closing(connection)
        self._tell(
            "closed",
            connection=connection.number,
            reason=reason,
            clean=clean,
            blame=blame,
            counters={name: getattr(connection, name) for name in COUNTERS},
        )

    def _choose_joining(self):
        """For a peer that does not take datagrams joined, each would have to be made again."""
        self.queue.joins = all("uso" in connection.peer_offloads for connection in self.connections.values())

    def bug(self, error):
        """An exception that should not have been; the main process logs it."""
        self._tell("bug", traceback=_traceback(error))

    def _tell(self, type, **fields):
        # Never sent from here: a link that is full would block the greenlet of a connection.
        self._outbox.append({"type": type, **fields})
        self._has_outbox.set()

    def _report_loop(self):
        while True:
            self._has_outbox.wait()
            self._has_outbox.clear()
            while self._outbox:
                self._link.send(self._outbox.popleft())

    # Housekeeping

    def _tick_loop(self):
        idle = seen = 0
        while True:
            gevent.sleep(1)
            now = time.monotonic()
            for connection in list(self.connections.values()):
                connection.tick(now)
            idle = idle + 1 if not self.pool.in_use and self.counters["packets_read"] == seen else 0
            seen = self.counters["packets_read"]
            if idle == IDLE_TIME:
                self.pool.release_memory()
            if not self._outbox:
                self._tell("alive")

    def _forever(self, loop, *arguments):
        """A loop that everyone in this worker needs: if it fails the worker is useless, and a new one is better."""
        try:
            loop(*arguments)
        except LinkClosed:
            os._exit(0)
        except Exception as error:
            traceback.print_exc()
            try:
                self._link.send({"type": "bug", "traceback": _traceback(error)})
            finally:
                os._exit(1)


def _traceback(error):
    return "".join(traceback.format_exception(error))[-4000:]


def main():
    """The worker process: ``python3 -m bulkvpnd.dataplane DESCRIPTOR``."""
    # The main process stops workers by closing the link; a signal to the whole process group must not come first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    hardening.hide_memory()
    sys.setswitchinterval(SWITCH_INTERVAL)
    missing = hardening.confine()
    status = Worker(WorkerLink(gevent.socket.socket(fileno=int(sys.argv[1]))), missing).run()
    # The reader may sit in its native thread for another second; nothing here needs an orderly end.
    os._exit(status)
