"""Flows of numbered datagrams that never pause, and which of their packets came late."""

import collections
import contextlib
import select
import socket
import struct
import threading
import time

from harness import inside, wait_until

RECEIVE_BUFFER = 1 << 20
"""Bytes: a second of all flows, should this process not get its turn."""
IP_PKTINFO = 8
"""linux/in.h"""
PACKET = struct.Struct("=IId")  # flow, number, when it was sent
Arrival = collections.namedtuple("Arrival", "number device sent came")


class Flows:
    """`count` sockets of one host that send to one socket of another, as a context manager.

    sender, receiver: (Host, address). port: the receiver's. period: seconds between two packets of a flow. overlap:
    seconds within which what is overtaken by a packet that has come will have come, too.
    arrived: {flow: [Arrival]} in the order in which they came; device: index of the one by which it came.
    """

    def __init__(self, count, sender, receiver, port, period, overlap):
        self._from, self._to = sender, receiver
        self._target = (receiver[1], port)
        self._period, self._overlap = period, overlap
        self.arrived = {flow: [] for flow in range(count)}
        self.sent = 0  # of each flow
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._receive, self._send)]

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            with inside(self._to[0]):
                self._receiver = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self._receiver.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            self._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._receiver.bind(self._target)
            self._receiver.settimeout(0.2)
            with inside(self._from[0]):
                self._senders = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                                 for _ in self.arrived]
            for sender in self._senders:
                # Not connected, so that the kernel looks for the way of each packet, as of those that it forwards.
                sender.bind((self._from[1], 0))
                sender.setblocking(False)
            self._close = stack.pop_all().close
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._close()

    def _send(self):
        due = time.monotonic()
        while not self._stop.is_set():
            for flow, sender in enumerate(self._senders):
                # No route for a moment, or no room: a packet that is lost, as any other.
                with contextlib.suppress(OSError):
                    sender.sendto(PACKET.pack(flow, self.sent, time.monotonic()), self._target)
            self.sent += 1
            due += self._period
            select.select([], [], [], max(0.0, due - time.monotonic()))

    def _receive(self):
        while not self._stop.is_set():
            try:
                data, ancillary, _, _ = self._receiver.recvmsg(64, 64)
            except TimeoutError:
                continue
            flow, number, sent = PACKET.unpack(data)
            device = struct.unpack_from("=i", ancillary[0][2])[0]
            self.arrived[flow].append(Arrival(number, device, sent, time.monotonic()))

    def settle(self):
        """Waits until what is sent from now on has come, of every flow. Returns the number of the next packet of each;
        all before it have come, or will never come."""
        number = self.sent + 1
        wait_until(lambda: all(list_ and list_[-1].number >= number for list_ in self.arrived.values()), 20,
                   "all flows arrive")
        number = self.sent + 1
        wait_until(lambda: self.sent > number + self._overlap / self._period, 20, "what was overtaken arrives")
        return number

    def sources(self):
        """[(address, port) from which a flow is sent], in the order of the flows."""
        return [sender.getsockname() for sender in self._senders]

    def between(self, first, last):
        """{flow: the arrivals whose numbers are from `first` on and below `last`}"""
        return {flow: [one for one in list(arrivals) if first <= one.number < last]
                for flow, arrivals in self.arrived.items()}


def late(arrivals):
    """Those that were overtaken by a packet that was sent after them."""
    found, highest = [], -1
    for one in arrivals:
        if one.number < highest:
            found.append(one)
        highest = max(highest, one.number)
    return found


def disturbed(flows, first, last, moved):
    """(how many packets of the flows in `moved` are lost, {flow: those that came late}) of the numbers from `first` on
    and below `last`. Of the other flows none is, and no packet comes twice."""
    lost, overtaken = 0, {}
    for flow, arrivals in flows.between(first, last).items():
        numbers = [one.number for one in arrivals]
        assert len(set(numbers)) == len(numbers), f"flow {flow}: a packet came twice"
        if flow in moved:
            lost += last - first - len(numbers)
            overtaken[flow] = late(arrivals)
        else:
            assert numbers == list(range(first, last)), f"flow {flow} stays, and something is lost or overtaken"
    return lost, overtaken
