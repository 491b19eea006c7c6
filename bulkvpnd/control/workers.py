"""The worker processes: started, fed, watched, replaced.

Each worker has a link (messages, descriptors), a queue of the TUN, and an inbox in which its siblings put packets that
they cannot carry. The main process keeps all of them open, so that a worker that takes another's place finds the queue
and the inbox where they were.
"""

import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import gevent
from gevent.event import AsyncResult, Event

from bulkvpnd import events
from bulkvpnd.service import printable
from bulkvpnd.workerlink import LinkClosed, WorkerLink

log = logging.getLogger(__name__)

SILENCE_MAX = 10.0
"""Seconds without a sign of life after which a worker is replaced: it reports once a second (choice)."""
START_MAX = 30.0
"""Seconds that a new worker has until it is ready (choice)."""
SEND_MAX = 2.0
"""Seconds that a message may wait for room in the link: a worker that reads none for so long hangs (choice)."""
RESTART_PAUSE = 0.2
"""Seconds before the first restart; doubles to RESTART_PAUSE_MAX while a worker keeps dying (choice)."""
RESTART_PAUSE_MAX = 5.0
LIVED = 60.0
"""Seconds after which a worker counts as one that worked: the next pause is short again (choice)."""
BUG_LINES, BUG_WIDTH = 40, 200
"""Lines of a worker's traceback that are logged, the last ones, and characters of each (choice)."""
STOP_TIME = 2.0
"""Seconds that a worker has for ending before it is killed (choice)."""


class Worker:
    """The main process's view of one worker. index: its number and its queue's."""

    def __init__(self, index):
        self.index = index
        self.process = None
        self.link = None
        self.ready = Event()
        self.is_running = False
        self.alive_at = 0.0
        self.started_at = 0.0
        self.restarts = 0
        self.failures = 0  # restarts in a row, each soon after the last

    @property
    def pid(self):
        return self.process.pid if self.process else None

    @property
    def pause(self):
        """Seconds before the next restart."""
        return min(RESTART_PAUSE * 2 ** min(self.failures, 16), RESTART_PAUSE_MAX)


class Workers:
    """All workers of an instance. They are launched early, and start when there is a device for them.

    count: of them. program: arguments for the interpreter that make it a worker; the descriptor of its link comes
    behind them.
    """

    def __init__(self, count, program=("-m", "bulkvpnd.dataplane")):
        self._program = program
        self._stopping = False
        self._is_told = False
        self._requests = {}
        self._next_request = 0
        self._inboxes = []
        self.all = [Worker(index) for index in range(count)]

    def __len__(self):
        return len(self.all)

    def launch(self):
        """Makes the processes, which import what they need and then wait for their start. Returns None, or why not."""
        try:
            for worker in self.all:
                self._launch(worker)
        except OSError as error:
            return str(error)
        return None

    def start(self, tun, frame_size, handler):
        """Starts all and waits until each is ready. Raises OSError when a worker cannot be started.

        tun: host.tun.Tun, one queue each. frame_size: bytes. handler: has worker_ready(index), worker_lost(index),
        established(number, index), closed(message, index).
        """
        self._tun = tun
        self._frame_size = frame_size
        self._handler = handler
        self._inboxes = [
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) for _ in self.all
        ]
        for worker in self.all:
            self._start(worker)
        for worker in self.all:
            if not worker.ready.wait(START_MAX):
                raise OSError(f"worker {worker.index} did not start within {START_MAX:.0f} s; the log before this "
                              "line has what it said, if it said anything")

    def _launch(self, worker):
        worker.link, theirs = WorkerLink.pair()
        with theirs:
            worker.process = subprocess.Popen(
                [*_unprivileged(), sys.executable, *_interpreter_flags(), *self._program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=_environment(), cwd="/",
            )  # fmt: skip

    def _start(self, worker):
        worker.alive_at = worker.started_at = time.monotonic()
        worker.is_running = True
        gevent.spawn(self._serve, worker, worker.link)
        receiving, sending = self._inboxes[worker.index][1], [pair[0] for pair in self._inboxes]
        try:
            worker.link.send(
                {"type": "start", "index": worker.index, "workers": len(self.all), "frame_size": self._frame_size},
                [self._tun.descriptors[worker.index], receiving.fileno()]
                + [sock.fileno() for index, sock in enumerate(sending) if index != worker.index],
            )
        except LinkClosed:
            # It died at once; whoever serves it sees that too.
            pass

    def _serve(self, worker, link):
        """Reads what a worker says until it is gone; then there is another."""
        while True:
            try:
                message, descriptors = link.receive()
            except LinkClosed:
                break
            worker.alive_at = time.monotonic()
            try:
                for descriptor in descriptors:
                    # Workers have none to give.
                    os.close(descriptor)
                self._MESSAGES[message["type"]](self, worker, message)
            except Exception:
                # One message that cannot be handled must not cost all that follow.
                log.exception("internal error with a message of worker %d", worker.index,
                              extra={"WORKER": worker.index})
        if not self._stopping:
            self._replace(worker)

    def _replace(self, worker):
        """A worker died: its connections are gone, its queue and its inbox are not."""
        worker.ready.clear()
        worker.is_running = False
        worker.link.close()
        worker.process.kill()
        status = worker.process.wait()
        log.error("worker %d ended unexpectedly (%s); starting another", worker.index, _ending(status),
                  extra={"WORKER": worker.index, "MESSAGE_ID": events.ID["worker-lost"]})
        self._handler.worker_lost(worker.index)
        if time.monotonic() - worker.started_at > LIVED:
            worker.failures = 0
        while not worker.is_running:
            gevent.sleep(worker.pause)
            if self._stopping:
                return
            worker.failures += 1
            worker.restarts += 1
            try:
                self._launch(worker)
                self._start(worker)
            except OSError as error:
                log.error("worker %d cannot be started: %s", worker.index, error, extra={"WORKER": worker.index})

    def _on_ready(self, worker, message):
        worker.ready.set()
        if message["missing"] and not self._is_told:
            self._is_told = True
            log.info("workers are not confined by all that could be, see SECURITY.md: %s",
                     printable("; ".join(message["missing"]), 200))
        log.debug("worker %d runs as process %d", worker.index, worker.pid, extra={"WORKER": worker.index})
        self._handler.worker_ready(worker.index)

    def _on_alive(self, worker, message):
        """Receiving anything is what counts."""

    def _on_established(self, worker, message):
        self._handler.established(message["connection"], worker.index)

    def _on_closed(self, worker, message):
        self._handler.closed(message, worker.index)

    def _on_bug(self, worker, message):
        # Line by line, since lines are what a traceback is for; and a worker that was taken over may send anything.
        lines = [printable(line, BUG_WIDTH) for line in message["traceback"].splitlines()[-BUG_LINES:]]
        log.error("worker %d: internal error:\n%s", worker.index, "\n".join(lines),
                  extra={"WORKER": worker.index})

    def _on_status(self, worker, message):
        waiting = self._requests.get((worker.index, message["request"]))
        if waiting is None:
            return
        parts, result = waiting
        parts.append(message)
        if message["last"]:
            result.set(parts)

    _MESSAGES = {
        "ready": _on_ready,
        "alive": _on_alive,
        "established": _on_established,
        "closed": _on_closed,
        "bug": _on_bug,
        "status": _on_status,
    }

    def send(self, index, message, descriptors=()):
        """Returns False when that worker is gone; whoever sent it then waits for worker_lost and worker_ready."""
        worker = self.all[index]
        if not worker.ready.is_set():
            return False
        with gevent.Timeout(SEND_MAX, False):
            try:
                worker.link.send(message, descriptors)
                return True
            except LinkClosed:
                return False
        # Whoever waits here may be what reads another worker's messages, so one that hangs must not hold it.
        log.error("worker %d does not read its messages; ending it", index, extra={"WORKER": index})
        worker.process.kill()
        return False

    def broadcast(self, message):
        for worker in self.all:
            self.send(worker.index, message)

    def kill_silent(self, now):
        """Ends workers that gave no sign of life; they are then replaced like any that died. now: monotonic."""
        for worker in self.all:
            if worker.is_running and now - worker.alive_at > (SILENCE_MAX if worker.ready.is_set() else START_MAX):
                log.error("worker %d is silent for %.0f s; ending it", worker.index, now - worker.alive_at,
                          extra={"WORKER": worker.index})
                worker.alive_at = now
                worker.process.kill()

    def status(self, seconds=2.0):
        """What every worker says of itself: {index: {"pid", "ready", "drops", "counters", "connections"}}."""
        self._next_request += 1
        request = self._next_request
        waiting = {(worker.index, request): ([], AsyncResult()) for worker in self.all}
        self._requests.update(waiting)
        for (index, _), (_, result) in waiting.items():
            if not self.send(index, {"type": "status", "request": request}):
                result.set([])
        gevent.wait([result for _, result in waiting.values()], timeout=seconds)
        for key in waiting:
            del self._requests[key]
        return {
            index: self._reported(self.all[index], result.value or []) for (index, _), (_, result) in waiting.items()
        }

    @staticmethod
    def _reported(worker, parts):
        return {
            "index": worker.index,
            "pid": worker.pid,
            "alive": worker.ready.is_set() and bool(parts),
            "restarts": worker.restarts,
            "drops": parts[-1]["drops"] if parts else {},
            "counters": parts[-1]["counters"] if parts else {},
            "connections": [connection for part in parts for connection in part["connections"]],
        }

    def stop(self):
        """Ends all workers: closing the link is the order."""
        self._stopping = True
        for worker in self.all:
            if worker.link:
                # Shut down and not only closed: the greenlet that receives still holds the socket.
                worker.link.shutdown()
        deadline = time.monotonic() + STOP_TIME
        for worker in self.all:
            if worker.process is None:
                continue
            try:
                worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        for pair in self._inboxes:
            for sock in pair:
                sock.close()


def _ending(status):
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _interpreter_flags():
    """Isolated where the main process is (-I), and never with the current directory in sys.path."""
    return ["-I"] if sys.flags.isolated else ["-P"]


def _environment():
    """The least that Python needs, and where this very package is, for a main process that runs from a source tree."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
    return {**kept, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}


def _unprivileged():
    """What comes before the interpreter so that a worker has no capability: it never needs one.

    setpriv(1) is part of util-linux, which is essential. Under the unit the capability is ambient and clearing the
    ambient set is enough; for root only the bounding set keeps exec from giving everything back (capabilities(7)).
    """
    if os.geteuid() == 0:
        return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    return ["setpriv", "--ambient-caps=-all", "--no-new-privs"]
