"""One outer TCP connection in its worker.

Outbound: append --> send queue --> sender greenlet: seal, send
                 '-> much at once and nothing waits: seal, send; the sender greenlet gets what the socket left
Inbound:  receiver greenlet: recv_into, open, inspect --> TUN queue

Replaced: the worker routes packets to another connection of the same index --> what is queued here, then CLOSE "moved"
          --> end, when the peer's "moved" has come too. The other one delivers nothing before: no packet of a flow
          overtakes those that were sent here.

Both greenlets belong to this connection alone: whatever goes wrong in them ends it and nothing else. Each waits in
the hub for one thing, which its own watcher or `_wake` brings; nothing else may block in them.
"""

import struct
import time

import gevent
from gevent.event import Event
from gevent.hub import get_hub

from bulkvpnd.dataplane import frames, tcpinfo
from bulkvpnd.dataplane.pathrate import PathRate
from bulkvpnd.dataplane.sendqueue import SendQueue
from bulkvpnd.protocol import frame, packet
from bulkvpnd.protocol.errors import RemoteError

TURN_TIME = 0.001
"""Seconds of a turn of the event loop that all connections of a session share; then the others come, whatever a peer
has sent (choice: far below what anybody notices, and enough for a bulk frame of 256 KiB)."""
BULK_SIZE = 32 * 1024
"""Bytes of a frame that is handled in the turn in which it came: few of these fit into a receive buffer, and to wait
before each took a tenth of the throughput (benchmarks, tcp4)."""
REKEYS_EXTRA = 16
"""Times that a peer may replace its key for time's sake beyond what its age allows (choice: of the shortest interval,
1 s, more than the two ends' clocks of one connection begin apart)."""
RECEIVE_EXTRA = 256 * 1024
"""Bytes of the receive buffer beyond one frame, so that one system call can bring several (choice)."""
QUIET_BYTES = 4096
"""Bytes between two ticks that a quiet connection may receive (choice: a page)."""
STALL_TIME = 1.0
"""Seconds after which what waits for a socket that takes nothing is dropped: nobody wants it any more (choice)."""
CLOSE_TIME = 5.0
"""Seconds that CLOSE may wait for a peer that reads nothing; then its connection ends without it (choice)."""
MOVE_TIME = 15.0
"""Seconds that a replaced connection has for what is queued at both ends, full buffers of a slow path too (choice)."""
DIRECT_MIN = 16 * 1024
"""Bytes of a run of packets that are sealed where they lie; less is copied, and may share a frame with the next run:
a frame costs as much as copying this (benchmarks, tcp4)."""

_READ, _WRITE = 1, 2  # of libev

_STAMP = struct.Struct(">Q")

COUNTERS = (
    "bytes_out", "frames_out", "packets_out", "segments_out",
    "bytes_in", "frames_in", "packets_in", "segments_in",
)  # fmt: skip


class Connection:
    """Carries the packets of one session over one socket.

    number: the main process's name for it. index: its place in the session. sock: connected, non-blocking, a plain
    socket and not gevent's. session: routing.Session. sealer, opener: protocol.keys. settings: frame_size, offloads,
    peer_offloads, keepalive, keepalive_timeout, rekey_bytes, rekey_interval, queue_target, queue_interval, sndbuf,
    congestion.
    replaces: it is to take over from the one of its index that lives, without a packet lost or overtaken.
    worker: has queue, pool, scratch, plain, drops, established(connection), closing(connection), closed(connection,
    reason, clean, blame), bug(error). head: bytes that came behind the handshake.
    """

    def __init__(self, number, index, sock, session, sealer, opener, settings, worker, head=b"", replaces=False):
        self.number = number
        self.index = index
        self.session = session
        self.is_established = False
        self.replaces = replaces
        self.inbound_ended = Event()
        self.rtt = None
        self._stamp = None  # of the PING that waits for its answer
        for name in COUNTERS:
            setattr(self, name, 0)
        self._socket = sock
        self._sealer = sealer
        self._opener = opener
        self._worker = worker
        self._frame_size = settings["frame_size"]
        self._offloads = frozenset(settings["offloads"])
        self.peer_offloads = frozenset(settings["peer_offloads"])
        self._passes_all = self.peer_offloads.issuperset(packet.OFFLOADS)
        self._keepalive = settings["keepalive"]
        self._keepalive_timeout = settings["keepalive_timeout"]
        self._rekey_bytes = settings["rekey_bytes"]
        self._rekey_interval = settings["rekey_interval"]
        now = time.monotonic()
        self.since = now
        self._rekey_at = now + self._rekey_interval
        self._rekeyed_at = now  # by the peer
        self._timed_rekeys = 0  # of the peer, before enough bytes for one had come
        self._received_at = now
        self._pinged_at = now
        self._queue = SendQueue(self, worker.pool, worker.drops, self._frame_size,
                                settings["queue_target"], settings["queue_interval"])
        self._control = {}  # payloads of the control frames that wait, by type: one of each at most
        self._is_idle = False  # the sender waits for _wake; nothing is queued and the socket takes more
        self._left = None  # a sealed frame and its size, of which the socket took `_left[2]` bytes
        self._full_since = None  # when the socket took no more; None while it does
        self._writable = None  # watcher
        self._path = PathRate(sock, self._frame_size, owns_sndbuf=settings["sndbuf"] is None,
                              owns_congestion=settings["congestion"] == "auto")
        self._close_by = None
        self._farewell = None  # the CLOSE that follows what is queued
        self._outbound_ended = False
        self._follows = None  # the connection whose packets come before those of this one
        self._ended = False
        self._buffer = frames.memory(frame.OVERHEAD + self._frame_size + RECEIVE_EXTRA)
        self._buffer[: len(head)] = head
        self._filled = len(head)  # bytes of it
        self._quiet = None  # ticks without much that came; None while nothing is to be released
        self._ticked_at = now
        self._ticked = (0, 0)  # bytes in and out then
        self._rates = (0, 0)  # bits per second, in and out, between the last two ticks
        self._greenlets = []

    def start(self):
        self._greenlets = [gevent.spawn(self._guard, loop) for loop in (self._send_loop, self._receive_loop)]
        # The first frame tells the peer that this end has the keys.
        self._ping(time.monotonic())

    # Outbound

    def lane(self, flow):
        """The lane of a flow, by its hash."""
        lanes = self._queue.lanes
        return lanes[flow % len(lanes)]

    def append(self, batch, lanes, first, stop):
        """Queues the entries first … stop - 1 of the Frame `batch`, of which lanes[n] is the lane of entry n."""
        if self._full_since is not None and time.monotonic() - self._full_since > STALL_TIME:
            self._worker.drops["stalled"] += stop - first
            return
        try:
            if not self._passes_all:
                self._append_plain(batch, lanes, first, stop)
            elif not (self._is_idle and self._send_direct(batch, first, stop)):
                self._queue.append(batch, lanes, first, stop, time.monotonic())
            self._wake()
        except Exception as error:
            # The caller's loop serves all connections.
            self._fail(error)

    def _send_direct(self, batch, first, stop):
        """Seals and sends the entries where they lie, if they are worth a frame. Returns whether it did.

        They are, too, if they are all that was read: then nothing comes that could share one with them.
        """
        begin, end = batch.begin(first), batch.begin(stop)
        is_worth_it = end - begin >= DIRECT_MIN or first == 0 and stop == len(batch.starts)
        if not is_worth_it or end - begin > self._queue.budget or self._rekey_is_due():
            return False
        sealed = self._worker.pool.take()
        try:
            size = self._seal(frame.DATA, batch.view[begin:end], sealed.view)
            self.packets_out += stop - first
            self.segments_out += _segments(batch, first, stop)
            try:
                sent = self._socket.send(sealed.view[:size])
            except BlockingIOError:
                sent = 0
            self.bytes_out += sent
            if sent < size:
                self._left, sealed = (sealed, size, sent), None
            else:
                self.frames_out += 1
        finally:
            if sealed is not None:
                self._worker.pool.give_back(sealed)
        return True

    def _append_plain(self, batch, lanes, first, stop):
        """For a peer without offload: every entry as plain packets, unless it may go as it is."""
        plain = self._worker.plain
        now = time.monotonic()
        # It may hold what another connection failed over.
        plain.clear()

        def append(lane):
            self._queue.append(plain, [lane] * len(plain.starts), 0, len(plain.starts), now)
            plain.clear()

        for number in range(first, stop):
            start, end = batch.starts[number], batch.begin(number + 1)
            packets = packet.plain_packets(batch.buffer, start, end, self.peer_offloads)
            if packets is None:
                plain.copy(batch, number, number + 1)
            else:
                for one in packets:
                    # Very small segments, whose size a far host chooses, can be more than a frame with their headers.
                    if plain.end + frame.LENGTH_SIZE + packet.VNET_SIZE + len(one) > plain.limit:
                        append(lanes[number])
                    plain.add(packet.VNET_NONE + one)
            append(lanes[number])

    def _wake(self):
        if self._is_idle and (self._queue or self._control or self._left or self._farewell):
            self._is_idle = False
            get_hub().loop.run_callback(self._greenlets[0].switch)

    def _send_loop(self):
        hub = get_hub()
        pool, queue, control = self._worker.pool, self._queue, self._control
        self._path.begin()
        while True:
            if self._left:
                self._send_left()
            if not (control or queue):
                if self._farewell:
                    control[frame.CLOSE], self._farewell = self._farewell, None
                    continue
                self._is_idle = True
                self._path.idle()
                queue.budget = self._path.budget
                hub.switch()
                continue
            if queue.budget < self._frame_size:
                # The kernel would take a whole super-packet more than its limit: it looks only before the first byte.
                self._wait_writable()
            sealed = pool.take()
            try:
                if self._rekey_is_due():
                    kind, payload = frame.REKEY, b""
                    size = self._seal(kind, payload, sealed.view)
                elif control:
                    kind = next(iter(control))
                    payload = control.pop(kind)
                    size = self._seal(kind, payload, sealed.view)
                else:
                    taken = queue.take(time.monotonic())
                    if taken is None:
                        continue
                    kind, (filled, first, stop) = frame.DATA, taken
                    size = self._seal(kind, filled.view[filled.begin(first) : filled.begin(stop)], sealed.view)
                    self.packets_out += stop - first
                    self.segments_out += _segments(filled, first, stop)
                    queue.done()
                self._send_all(sealed.view[:size])
            finally:
                pool.give_back(sealed)
            self.frames_out += 1
            if kind == frame.REKEY:
                self._sealer.ratchet()
                self._rekey_at = time.monotonic() + self._rekey_interval
            elif kind == frame.CLOSE:
                self._outbound_ended = True
                if payload != b"moved" or self.inbound_ended.is_set():
                    self._end(payload.decode("ascii"), clean=True)
                return

    def _send_left(self):
        (sealed, size, sent), self._left = self._left, None
        try:
            self._wait_writable()
            self._send_all(sealed.view[sent:size])
        finally:
            self._worker.pool.give_back(sealed)
        self.frames_out += 1

    def _rekey_is_due(self):
        return self._sealer.is_due(self._rekey_bytes) or time.monotonic() >= self._rekey_at

    def _seal(self, kind, payload, out):
        header = frame.pack_header(kind, len(payload))
        out[: frame.HEADER_SIZE] = header
        return frame.HEADER_SIZE + self._sealer.seal_into(header, payload, out[frame.HEADER_SIZE :])

    def _send_all(self, data):
        send = self._socket.send
        while True:
            try:
                sent = send(data)
            except BlockingIOError:
                sent = 0
            self.bytes_out += sent
            self._path.sent += sent
            if sent == len(data):
                return
            data = data[sent:]
            self._wait_writable()

    def _wait_writable(self):
        hub = get_hub()
        self._full_since = time.monotonic()
        self._path.full(self._full_since)
        self._queue.is_full = True
        if self._writable is None:
            self._writable = hub.loop.io(self._socket.fileno(), _WRITE)
        self._writable.start(gevent.getcurrent().switch)
        try:
            hub.switch()
        finally:
            self._writable.stop()
        self._full_since = None
        self._queue.is_full = False
        self._path.writable(time.monotonic())
        self._queue.budget = self._path.budget

    def close(self, reason):
        """Sends CLOSE behind what is being sent, then ends. reason: one of frame.CLOSE_REASONS."""
        if self._close_by is not None:
            return
        self._close_by = time.monotonic() + CLOSE_TIME
        # At once, although CLOSE may have to wait: what is routed here until then would be lost.
        self._worker.closing(self)
        self._queue.drop_all("closing")
        if reason == "refused":
            # Its certificate was revoked: nothing that is on its way counts any more.
            gevent.killall(self._greenlets[1:], block=False)
        self._send_control(frame.CLOSE, reason.encode("ascii"))

    def move(self):
        """Sends what is queued, then CLOSE, and goes on receiving until the peer has done the same.

        From now on the packets of its session go over the connection that replaces it.
        """
        if self._close_by is not None:
            return
        self._close_by = time.monotonic() + MOVE_TIME
        self._farewell = b"moved"
        self._wake()

    # Inbound

    def follow(self, other):
        """What comes here has to wait until all that was sent over `other` is through."""
        self._follows = other

    def _wait(self, event):
        """Until `event`, whatever comes meanwhile. event: a function that waits for it."""
        self._readable.stop()
        try:
            event()
        finally:
            self._readable.start(gevent.getcurrent().switch)
        if self._ended:
            # The event was faster than the exception that is on its way here.
            raise gevent.GreenletExit
        self._begin_turn()

    def _begin_turn(self):
        # More connections bring a client no larger share of its worker.
        self._turn_ends = time.monotonic() + TURN_TIME / (len(self.session.connections) or 1)

    def _next_turn(self):
        """Lets the event loop look at everything else once."""
        # Not gevent.sleep(0): callbacks run fifty times before the loop looks at a descriptor, a timer does not.
        get_hub().wait(self._turn)

    def _receive_loop(self):
        hub = get_hub()
        buffer, receive = memoryview(self._buffer), self._socket.recv_into
        whole = buffer.toreadonly()
        start, end = 0, self._filled
        self._turn = hub.loop.timer(0)
        self._readable = watcher = hub.loop.io(self._socket.fileno(), _READ)
        # Once, and not for every wait: the loop looks at all connections in turn, and each receives once a turn.
        watcher.start(gevent.getcurrent().switch)
        try:
            while True:
                self._begin_turn()
                # Whole frames first: the handshake may have left some behind it.
                needed = frame.HEADER_SIZE
                while end - start >= frame.HEADER_SIZE:
                    kind, size = frame.unpack_header(whole, start, self._frame_size)
                    needed = frame.HEADER_SIZE + size
                    if end - start < needed:
                        break
                    if size < BULK_SIZE and time.monotonic() > self._turn_ends:
                        self._wait(self._next_turn)
                    body = start + frame.HEADER_SIZE
                    self._frame(kind, bytes(whole[start:body]), buffer[body : start + needed])
                    start += needed
                    needed = frame.HEADER_SIZE
                if start == end:
                    start = end = 0
                elif len(buffer) - start < needed:
                    buffer[: end - start] = buffer[start:end]
                    start, end = 0, end - start
                self._filled = end
                hub.switch()
                if self._ended:
                    # The watcher was faster than the exception that is on its way here.
                    return None
                try:
                    count = receive(buffer[end:])
                except BlockingIOError:
                    continue
                if count == 0:
                    return self._end("the peer closed it without CLOSE")
                self._filled = end = end + count
                self.bytes_in += count
                self._received_at = time.monotonic()
        finally:
            watcher.stop()
            watcher.close()
            self._turn.close()

    def _frame(self, kind, header, sealed):
        worker = self._worker
        scratch = worker.scratch
        size = self._opener.open_into(header, sealed, scratch)
        self.frames_in += 1
        # Not of one that is being closed: its session may have ended, and its addresses may be another's.
        if not self.is_established and self._close_by is None:
            self.is_established = True
            worker.established(self)
        if kind == frame.DATA:
            self._data(size, sealed)
        else:
            self._CONTROL_FRAMES[kind](self, bytes(scratch[:size]))

    def _data(self, size, sealed):
        """Writes the packets of the DATA that was opened last. size: its bytes. sealed: where it was, and may be."""
        worker, opened, at = self._worker, self._worker.scratch_read, 0
        while True:
            spans, segments, at = packet.inspect(
                opened, at, size, self._offloads, self.session.verdicts, worker.drops
            )
            refused = worker.queue.write_batch(opened, spans)
            if refused:
                worker.drops["tun_refused"] += refused
            self.packets_in += len(spans)
            self.segments_in += segments
            if at == size:
                return
            if time.monotonic() > self._turn_ends:
                if opened is worker.scratch_read:
                    # It has to go: meanwhile the others open theirs there.
                    sealed[at:size] = opened[at:size]
                    opened = sealed.toreadonly()
                self._wait(self._next_turn)

    def _on_ping(self, payload):
        # In the place of one that still waits: only the last is of use to who asks.
        self._send_control(frame.PONG, payload[: _STAMP.size])
        # Here, because a PING is the first frame of every connection, and the others need not look.
        if self._follows is not None:
            self._wait(self._follows.inbound_ended.wait)
            self._follows = None

    def _on_pong(self, payload):
        # Only what answers the last PING: any other stamp, though authentic, is made up or late.
        if payload == self._stamp:
            self.rtt = (time.monotonic_ns() - _STAMP.unpack(payload)[0]) / 1e9
            self._stamp = None

    def _on_rekey(self, payload):
        now = time.monotonic()
        if not self._opener.is_due(self._rekey_bytes):
            # For time's sake, then. Not from one to the next, which may come together after a path stood still.
            self._timed_rekeys += 1
            if self._timed_rekeys > REKEYS_EXTRA + 2 * (now - self.since) / self._rekey_interval:
                raise RemoteError("rekey", "the peer replaces its key before it is due")
        self._opener.ratchet()
        self._rekeyed_at = now

    def _on_control(self, payload):
        """Reserved; a later version may use it."""

    def _on_close(self, payload):
        reason = frame.close_reason(payload)
        self.inbound_ended.set()
        if reason != "moved" or self._outbound_ended:
            self._end(f"closed by the peer: {reason}", clean=True)
        raise gevent.GreenletExit

    _CONTROL_FRAMES = {
        frame.PING: _on_ping,
        frame.PONG: _on_pong,
        frame.REKEY: _on_rekey,
        frame.CONTROL: _on_control,
        frame.CLOSE: _on_close,
    }

    # Both

    def tick(self, now):
        """Liveness and what stands still; called about once a second. now: time.monotonic()."""
        if self._follows is not None:
            # It does not listen yet.
            self._received_at = self._rekeyed_at = now
        silent = now - self._received_at
        if self._peer_keeps_its_key(now):
            self._end("the peer did not replace its key in time", blame="peer")
            return
        if silent >= self._keepalive_timeout:
            self._end(f"nothing came from the peer for {silent:.0f} s")
        elif self._close_by is not None and now >= self._close_by:
            self._end("the peer does not read, not even CLOSE" if self._farewell is None else "moving took too long")
        elif now - self._pinged_at >= self._keepalive:
            # Also while packets come: it is what measures the round trip.
            self._ping(now)
        if self._full_since is not None and now - self._full_since > STALL_TIME:
            self._queue.drop_all("stalled")
        before, self._ticked = self._ticked, (self.bytes_in, self.bytes_out)
        if now > self._ticked_at:
            self._rates = [int(8 * (count - old) / (now - self._ticked_at)) for count, old in zip(self._ticked, before)]
        self._ticked_at = now
        self._release_memory(self.bytes_in - before[0])

    def _release_memory(self, came):
        """Of a connection that was busy and is quiet now; only what keeps it alive comes then, and takes a page."""
        if came > QUIET_BYTES:
            self._quiet = 0
        elif self._quiet is not None:
            self._quiet += 1
            if self._quiet == frames.IDLE_TIME:
                self._quiet = None
                frames.release(self._buffer, self._filled)

    def _peer_keeps_its_key(self, now):
        """Whether the peer sends on under a key that it should have replaced.

        It looks before each frame, so it is one frame late at most; and what it sent in time may have waited as long as
        a connection may be silent, or for the next PING.
        """
        return (
            self._opener.bytes > self._rekey_bytes + self._frame_size
            or now - self._rekeyed_at > self._rekey_interval + self._keepalive_timeout + self._keepalive
        )

    def _ping(self, now):
        self._pinged_at = now
        # While one waits for a full socket a second would only wait as well.
        if frame.PING not in self._control:
            self._stamp = _STAMP.pack(time.monotonic_ns())
            self._send_control(frame.PING, self._stamp)

    def _send_control(self, kind, payload):
        self._control[kind] = payload
        self._wake()

    @property
    def queued(self):
        """Bytes that wait in the send queue."""
        return self._queue.bytes

    def describe(self, now):
        """What `bulkvpnctl status` shows of it, for JSON. now: time.monotonic(). Rates are in bits per second."""
        try:
            tcp = tcpinfo.read(self._socket)
            of_kernel = {
                "tcp_rtt_ms": round(tcp.round_trip * 1000, 3),
                "tcp_least_rtt_ms": round(tcp.least_round_trip * 1000, 3),
                "retransmits": tcp.retransmits,
                "bytes_retransmitted": tcp.retransmitted,
                "delivery_rate": tcp.delivery_rate,
                "window": tcp.window,
                "congestion": tcpinfo.congestion_control(self._socket),
            }
        except OSError:
            # It is ending.
            of_kernel = {}
        return {
            "connection": self.number,
            "established": self.is_established,
            "age": round(now - self.since, 3),
            "rate_in": self._rates[0],
            "rate_out": self._rates[1],
            "queued": self.queued,
            "queue_delay_ms": round(self._queue.delay(now) * 1000, 3),
            "marked": self._queue.marked,
            "rtt_ms": None if self.rtt is None else round(self.rtt * 1000, 3),
            **of_kernel,
            **{name: getattr(self, name) for name in COUNTERS},
        }

    def _guard(self, loop):
        try:
            loop()
        except Exception as error:
            self._fail(error)

    def _fail(self, error):
        """Ends this connection, and this one only, for what went wrong in it."""
        if isinstance(error, RemoteError):
            self._end(str(error), blame="peer")
        elif isinstance(error, OSError):
            self._end(error.strerror or "the socket failed")
        else:
            # Our own bug: it may cost this connection, never the others of this worker.
            self._worker.bug(error)
            self._end("internal error")

    def _end(self, reason, clean=False, blame=None):
        if self._ended:
            return
        self._ended = True
        self.inbound_ended.set()
        self._queue.drop_all("connection_lost")
        current = gevent.getcurrent()
        gevent.killall([one for one in self._greenlets if one is not current], block=False)
        # Closed only when no watcher looks at it any more: the loop must never poll somebody else's descriptor.
        get_hub().loop.run_callback(self._close_socket)
        self._worker.closed(self, reason, clean, blame)

    def _close_socket(self):
        if self._writable is not None:
            self._writable.close()
        self._socket.close()


def _segments(filled, first, stop):
    """Packets of wire size that the entries first … stop - 1 of a Frame stand for."""
    count = stop - first
    # Only entries larger than a packet can be super-packets; they are few, so looking at each is cheap.
    if filled.begin(stop) - filled.begin(first) <= count * 1600:
        return count
    return sum([
        packet.segment_count(filled.buffer, filled.starts[number], filled.begin(number + 1))
        for number in range(first, stop)
    ])
