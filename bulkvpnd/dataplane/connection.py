"""One outer TCP connection in its worker.

Outbound: append --> send queue of frames --> sender greenlet: seal, send
Inbound:  receiver greenlet: recv_into, open, inspect --> TUN queue

Both greenlets belong to this connection alone: whatever goes wrong in them ends it and nothing else.
"""

import collections
import struct
import time

import gevent
from gevent.event import Event

from bulkvpnd.protocol import frame, packet
from bulkvpnd.protocol.errors import RemoteError

SEND_QUEUE_FRAMES = 4
"""Frames that wait for a connection before packets are dropped: 1 MiB with frames of 256 KiB (choice)."""
CONTROL_QUEUE_MAX = 32
"""Control frames that wait; a peer that makes more (PINGs without reading the PONGs) is cut off (choice)."""
RECEIVE_EXTRA = 256 * 1024
"""Bytes of the receive buffer beyond one frame, so that one system call can bring several (choice)."""

_STAMP = struct.Struct(">Q")

COUNTERS = (
    "bytes_out", "frames_out", "packets_out", "segments_out",
    "bytes_in", "frames_in", "packets_in", "segments_in",
)  # fmt: skip


class Connection:
    """Carries the packets of one session over one socket.

    number: the main process's name for it. sock: connected, gevent's. session: routing.Session. sealer, opener:
    protocol.keys. settings: frame_size, offloads, peer_offloads, keepalive, keepalive_timeout, rekey_bytes,
    rekey_interval. worker: has queue, pool, scratch, drops, established(connection), closed(connection, reason,
    clean). head: bytes that came behind the handshake.
    """

    def __init__(self, number, sock, session, sealer, opener, settings, worker, head=b""):
        self.number = number
        self.session = session
        self.is_established = False
        self.rtt = None
        for name in COUNTERS:
            setattr(self, name, 0)
        self._socket = sock
        self._sealer = sealer
        self._opener = opener
        self._worker = worker
        self._frame_size = settings["frame_size"]
        self._offloads = frozenset(settings["offloads"])
        self._peer_offloads = frozenset(settings["peer_offloads"])
        self._passes_all = self._peer_offloads.issuperset(packet.OFFLOADS)
        self._keepalive = settings["keepalive"]
        self._keepalive_timeout = settings["keepalive_timeout"]
        self._rekey_bytes = settings["rekey_bytes"]
        self._rekey_interval = settings["rekey_interval"]
        now = time.monotonic()
        self.since = now
        self._rekey_at = now + self._rekey_interval
        self._received_at = now
        self._pinged_at = now
        self._queue = collections.deque()
        self._control = collections.deque()
        self._wake = Event()
        self._ended = False
        self._buffer = memoryview(bytearray(frame.OVERHEAD + self._frame_size + RECEIVE_EXTRA))
        self._buffer[: len(head)] = head
        self._filled = len(head)
        self._greenlets = []

    def start(self):
        self._greenlets = [gevent.spawn(self._guard, loop) for loop in (self._send_loop, self._receive_loop)]
        # The first frame tells the peer that this end has the keys.
        self._ping(time.monotonic())

    # Outbound

    def append(self, batch, start, end, packets):
        """Queues the entries batch[start:end], `packets` of them; drops and counts them when the queue is full."""
        if not self._passes_all and not self._split_up(batch, start, end):
            return
        size = end - start
        queue = self._queue
        last = queue[-1] if queue else None
        if last is None or last.end + size > self._frame_size:
            if size > self._frame_size:
                self._append_singly(batch, start, end)
                return
            last = self._next_frame(packets)
            if last is None:
                return
            if start == 0 and end == batch.end:
                last.exchange(batch)
                self._count(last, 0, end, packets)
                self._wake.set()
                return
        at = last.end
        last.view[at : at + size] = batch.view[start:end]
        last.end = at + size
        self._count(batch, start, end, packets)
        self._wake.set()

    def _next_frame(self, packets):
        fresh = None if len(self._queue) >= SEND_QUEUE_FRAMES else self._worker.pool.take()
        if fresh is None:
            self._worker.drops["queue_full"] += packets
        else:
            self._queue.append(fresh)
        return fresh

    def _count(self, batch, start, end, packets):
        self.packets_out += packets
        # Only entries larger than a packet can be super-packets; they are few, so looking at them one by one is cheap.
        if end - start > packets * 1600:
            self.segments_out += sum(
                packet.segment_count(batch.buffer, at, at + int.from_bytes(batch.buffer[at - 4 : at], "big"))
                for at in batch.starts
                if start < at < end
            )
        else:
            self.segments_out += packets

    def _entries(self, batch, start, end):
        for at in batch.starts:
            if start < at < end:
                yield at, at + int.from_bytes(batch.buffer[at - 4 : at], "big")

    def _append_singly(self, batch, start, end):
        """A peer with smaller frames than ours."""
        for at, entry_end in self._entries(batch, start, end):
            self.append(batch, at - 4, entry_end, 1)

    def _split_up(self, batch, start, end):
        """For a peer without offload: sends each entry as plain packets. Returns True if all may go as they are."""
        plain = [
            (at, entry_end, packet.plain_packets(batch.buffer, at, entry_end, self._peer_offloads))
            for at, entry_end in self._entries(batch, start, end)
        ]
        if all(packets is None for _, _, packets in plain):
            return True
        for at, entry_end, packets in plain:
            for one in packets or [batch.buffer[at + packet.VNET_SIZE : entry_end]]:
                self._append_plain(one)
        self._wake.set()
        return False

    def _append_plain(self, one):
        size = frame.LENGTH_SIZE + packet.VNET_SIZE + len(one)
        last = self._queue[-1] if self._queue else None
        if last is None or last.end + size > self._frame_size:
            last = self._next_frame(1)
            if last is None:
                return
        at = last.end
        last.view[at : at + size] = (size - frame.LENGTH_SIZE).to_bytes(4, "big") + packet.VNET_NONE + one
        last.end = at + size
        self.packets_out += 1
        self.segments_out += 1

    def _send_loop(self):
        pool, queue, control = self._worker.pool, self._queue, self._control
        while True:
            self._wake.wait()
            self._wake.clear()
            while control or queue:
                sealed = pool.take(reserve=True)
                try:
                    if control:
                        kind, payload = control.popleft()
                        size = self._seal(kind, payload, sealed.view)
                    else:
                        self._rekey_if_due()
                        if control:
                            continue
                        kind, ready = frame.DATA, queue.popleft()
                        size = self._seal(kind, ready.view[: ready.end], sealed.view)
                        pool.give_back(ready)
                    self._send_all(sealed.view[:size])
                finally:
                    pool.give_back(sealed)
                self.frames_out += 1
                self.bytes_out += size
                if kind == frame.REKEY:
                    self._sealer.ratchet()
                    self._rekey_at = time.monotonic() + self._rekey_interval
                elif kind == frame.CLOSE:
                    return self._end(payload.decode("ascii"), clean=True)

    def _rekey_if_due(self):
        if self._sealer.bytes >= self._rekey_bytes or time.monotonic() >= self._rekey_at:
            self._control.append((frame.REKEY, b""))

    def _seal(self, kind, payload, out):
        header = frame.pack_header(kind, len(payload))
        out[: frame.HEADER_SIZE] = header
        return frame.HEADER_SIZE + self._sealer.seal_into(header, payload, out[frame.HEADER_SIZE :])

    def _send_all(self, data):
        send = self._socket.send
        sent = send(data)
        while sent < len(data):
            sent += send(data[sent:])

    def close(self, reason):
        """Sends CLOSE behind what is being sent, then ends. reason: one of frame.CLOSE_REASONS."""
        self._drop_queue("closing")
        self._control.append((frame.CLOSE, reason.encode("ascii")))
        self._wake.set()

    # Inbound

    def _receive_loop(self):
        buffer, receive, turn = self._buffer, self._socket.recv_into, self._worker.turn()
        whole = buffer.toreadonly()
        start, end = 0, self._filled
        while True:
            # Whole frames first: the handshake may have left some behind it.
            needed = frame.HEADER_SIZE
            while end - start >= frame.HEADER_SIZE:
                kind, size = frame.unpack_header(whole, start, self._frame_size)
                needed = frame.HEADER_SIZE + size
                if end - start < needed:
                    break
                body = start + frame.HEADER_SIZE
                self._frame(kind, bytes(whole[start:body]), whole[body : start + needed])
                start += needed
                needed = frame.HEADER_SIZE
            if start == end:
                start = end = 0
            elif len(buffer) - start < needed:
                buffer[: end - start] = buffer[start:end]
                start, end = 0, end - start
            turn()
            count = receive(buffer[end:])
            if count == 0:
                return self._end("the peer closed it without CLOSE")
            end += count
            self.bytes_in += count
            self._received_at = time.monotonic()

    def _frame(self, kind, header, sealed):
        worker = self._worker
        scratch = worker.scratch
        size = self._opener.open_into(header, sealed, scratch)
        self.frames_in += 1
        if not self.is_established:
            self.is_established = True
            worker.established(self)
        if kind == frame.DATA:
            spans, segments = packet.inspect(
                worker.scratch_read, size, self._offloads, self.session.sources, worker.drops
            )
            refused = worker.queue.write_batch(worker.scratch_read, spans)
            if refused:
                worker.drops["tun_refused"] += refused
            self.packets_in += len(spans)
            self.segments_in += segments
        else:
            self._CONTROL_FRAMES[kind](self, bytes(scratch[:size]))

    def _on_ping(self, payload):
        self._send_control(frame.PONG, payload[: _STAMP.size])

    def _on_pong(self, payload):
        if len(payload) == _STAMP.size:
            # The stamp is ours and came back sealed; a peer that makes one up deceives only this display.
            elapsed = time.monotonic_ns() - _STAMP.unpack(payload)[0]
            if 0 <= elapsed < 3600 * 10**9:
                self.rtt = elapsed / 1e9

    def _on_rekey(self, payload):
        self._opener.ratchet()

    def _on_control(self, payload):
        """Reserved; a later version may use it."""

    def _on_close(self, payload):
        self._end(f"closed by the peer: {frame.close_reason(payload)}", clean=True)
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
        """Liveness; called about once a second. now: time.monotonic()."""
        silent = now - self._received_at
        if silent >= self._keepalive_timeout:
            self._end(f"nothing came from the peer for {silent:.0f} s")
        elif silent >= self._keepalive and now - self._pinged_at >= self._keepalive:
            self._ping(now)

    def _ping(self, now):
        self._pinged_at = now
        self._send_control(frame.PING, _STAMP.pack(time.monotonic_ns()))

    def _send_control(self, kind, payload):
        if len(self._control) >= CONTROL_QUEUE_MAX:
            raise RemoteError("flood", "the peer asks faster than it reads answers")
        self._control.append((kind, payload))
        self._wake.set()

    @property
    def queued(self):
        """Bytes that wait in the send queue."""
        return sum(waiting.end for waiting in self._queue)

    def _guard(self, loop):
        try:
            loop()
        except RemoteError as error:
            self._end(str(error), blame="peer")
        except OSError as error:
            self._end(error.strerror or "the socket failed")
        except gevent.GreenletExit:
            raise
        except Exception as error:
            # Our own bug: it may cost this connection, never the others of this worker.
            self._worker.bug(error)
            self._end("internal error")

    def _drop_queue(self, cause):
        while self._queue:
            waiting = self._queue.popleft()
            self._worker.drops[cause] += max(1, len(waiting.starts))
            self._worker.pool.give_back(waiting)

    def _end(self, reason, clean=False, blame=None):
        if self._ended:
            return
        self._ended = True
        self._drop_queue("connection_lost")
        self._socket.close()
        current = gevent.getcurrent()
        gevent.killall([one for one in self._greenlets if one is not current], block=False)
        self._worker.closed(self, reason, clean, blame)
