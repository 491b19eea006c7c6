"""control.workers with real processes: a stand-in of a few lines that does as it is told, or misbehaves."""

import logging
import os
import pathlib
import resource
import time
import types

import gevent
import pytest
from doubles import descriptors, until

from bulkvpnd.control import workers as workers_module
from bulkvpnd.control.workers import Workers

STAND_IN = r"""
import json, os, signal, socket, sys
link = socket.socket(fileno=int(sys.argv[2]))
link.setblocking(True)
def tell(type, **fields):
    link.send(json.dumps({"type": type, **fields}).encode())
def receive():
    data, descriptors, _, _ = socket.recv_fds(link, 1 << 17, 70)
    return (json.loads(data), descriptors) if data else sys.exit(0)
def status(message):
    for last in (False, True):
        tell("status", request=message["request"], last=last, connections=[{"connection": int(last)}],
             drops={"queue_full": 3}, counters={})
ORDERS = {
    "die": lambda message: os._exit(3),
    "hang": lambda message: signal.pause(),
    "say": lambda message: tell(**message["what"]),
    "garbage": lambda message: link.send(b"{garbage"),
    "descriptor": lambda message: (socket.send_fds(link, [b'{"type": "alive"}'], [0]), tell("closed", sent=True)),
    "status": status,
    "echo": lambda message: tell("closed", echo=message),
}
start, descriptors = receive()
if sys.argv[1] == "dies":
    os._exit(3)
if sys.argv[1] == "never ready":
    signal.pause()
missing = ["Landlock: Function not implemented"] if sys.argv[1] == "less confined" else []
tell("ready", missing=missing)
if sys.argv[1] == "stubborn":
    signal.pause()
tell("closed", start=start, descriptors=len(descriptors))
while True:
    message, descriptors = receive()
    ORDERS[message["type"]](message)
"""


class Handler:
    """Notes what the role would be told. broken: raises at every report of an established connection."""

    def __init__(self):
        self.events = []
        self.broken = False

    def worker_ready(self, index):
        self.events.append(("ready", index))

    def worker_lost(self, index):
        self.events.append(("lost", index))

    def established(self, number, index):
        if self.broken:
            raise RuntimeError("a bug of ours")
        self.events.append(("established", number, index))

    def closed(self, message, index):
        self.events.append(("closed", index, message))

    def count(self, *event):
        return self.events.count(event)

    def echoes(self, index):
        return [event[2]["echo"]["value"] for event in self.events if event[:2] == ("closed", index)
                and "echo" in event[2]]  # fmt: skip


@pytest.fixture
def make(monkeypatch):
    """Makes Workers of the stand-in, whose behaviour is given. Nothing of them outlives the test."""
    monkeypatch.setattr(workers_module, "RESTART_PAUSE", 0.02)
    monkeypatch.setattr(workers_module, "RESTART_PAUSE_MAX", 0.1)
    monkeypatch.setattr(workers_module, "STOP_TIME", 0.3)
    made, queues = [], []

    def make_workers(count=2, behaviour="good"):
        pipes = [os.pipe() for _ in range(count)]
        queues.extend(descriptor for pair in pipes for descriptor in pair)
        tun = types.SimpleNamespace(descriptors=[pair[0] for pair in pipes])
        workers = Workers(count, ("-c", STAND_IN, behaviour))
        workers.tun, workers.handler = tun, Handler()
        made.append(workers)
        assert workers.launch() is None
        return workers

    yield make_workers
    pids = [worker.pid for workers in made for worker in workers.all if worker.pid]
    for workers in made:
        workers.stop()
    for descriptor in queues:
        os.close(descriptor)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def start(workers):
    workers.start(workers.tun, 262144, workers.handler)


@pytest.fixture
def workers(make):
    workers = make()
    start(workers)
    return workers


def replaced(workers, index, times=1):
    until(lambda: workers.handler.count("ready", index) == 1 + times, f"worker {index} is replaced")


def test_each_worker_gets_its_number_its_queue_and_the_inboxes(make):
    workers = make(3)
    start(workers)
    until(lambda: len([event for event in workers.handler.events if event[0] == "closed"]) == 3)
    told = {index: (message["start"], message["descriptors"])
            for _, index, message in [event for event in workers.handler.events if event[0] == "closed"]}  # fmt: skip
    assert told == {
        index: ({"type": "start", "index": index, "workers": 3, "frame_size": 262144}, 1 + 1 + 2) for index in range(3)
    }
    assert [workers.handler.count("ready", index) for index in range(3)] == [1, 1, 1]


def test_a_launched_worker_waits_for_its_start(make):
    workers = make(2)
    until(lambda: all(pathlib.Path(f"/proc/{worker.pid}/comm").read_text() != "setpriv\n" for worker in workers.all))
    assert not any(worker.ready.is_set() for worker in workers.all) and workers.handler.events == []
    pids = [worker.pid for worker in workers.all]
    start(workers)
    assert [worker.pid for worker in workers.all] == pids and not any(worker.restarts for worker in workers.all)


def test_one_that_dies_before_its_start_is_replaced(make):
    workers = make(2)
    workers.all[0].process.kill()
    workers.all[0].process.wait()
    start(workers)
    assert [worker.restarts for worker in workers.all] == [1, 0]


def test_launched_workers_end_without_a_start(make):
    workers = make(2)
    pids = [worker.pid for worker in workers.all]
    workers.stop()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_worker_has_no_capability(workers):
    for worker in workers.all:
        with open(f"/proc/{worker.pid}/status") as file:
            fields = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == int(fields["CapAmb"], 16) == 0
        assert fields["NoNewPrivs"] == "1"


@pytest.mark.parametrize(("behaviour", "times"), [("good", 0), ("less confined", 1)])
def test_what_a_kernel_lacks_to_confine_workers_is_said_once(make, caplog, behaviour, times):
    caplog.set_level(logging.INFO)
    workers = make(2, behaviour)
    start(workers)
    workers.send(0, {"type": "die"})
    replaced(workers, 0)
    assert caplog.text.count("see SECURITY.md: Landlock: Function not implemented") == times
    assert caplog.text.count("not confined") == times


def test_of_the_environment_a_worker_has_little(make, monkeypatch):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/bulkvpnd@server.service")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    for worker in make(2).all:
        lines = pathlib.Path(f"/proc/{worker.pid}/environ").read_bytes().decode().split("\0")
        names = {line.partition("=")[0] for line in lines if line}
        assert "PYTHONPATH" in names and names <= {"PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH"}


@pytest.mark.parametrize("how", ["dies", "is killed", "sends garbage"])
def test_a_worker_that_dies_is_replaced(workers, how, caplog):
    pid = workers.all[0].pid
    if how == "is killed":
        workers.all[0].process.kill()
    else:
        workers.send(0, {"type": {"dies": "die", "sends garbage": "garbage"}[how]})
    until(lambda: ("lost", 0) in workers.handler.events)
    assert not workers.send(0, {"type": "echo", "value": "too early"})
    replaced(workers, 0)
    assert workers.all[0].pid != pid and workers.all[0].restarts == 1
    assert workers.send(0, {"type": "echo", "value": 1})
    until(lambda: workers.handler.echoes(0) == [1])
    # The other one never knew.
    assert workers.handler.count("lost", 1) == 0 and workers.all[1].restarts == 0
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "worker 0 ended unexpectedly" in record.getMessage() and record.WORKER == 0


def test_nothing_is_left_of_a_worker_that_was_replaced(workers):
    before = len(descriptors())
    for times in range(1, 4):
        workers.send(0, {"type": "die"})
        replaced(workers, 0, times)
    assert len(descriptors()) <= before
    assert workers.all[0].restarts == 3


def test_pauses_grow_while_a_worker_keeps_dying_and_have_a_bound(make, monkeypatch):
    worker = workers_module.Worker(0)
    pauses = []
    for worker.failures in range(100):
        pauses.append(worker.pause)
    most = workers_module.RESTART_PAUSE_MAX
    assert pauses[0] == workers_module.RESTART_PAUSE and pauses[-1] == most
    assert all(later == min(2 * pause, most) for pause, later in zip(pauses, pauses[1:]))
    monkeypatch.setattr(workers_module, "START_MAX", 1.5)
    workers = make(1, "dies")
    with pytest.raises(OSError, match="worker 0 did not start"):
        start(workers)
    assert workers.all[0].failures > 0


def test_a_worker_that_lived_is_replaced_fast_again(workers):
    workers.all[0].failures = 10
    workers.all[0].started_at -= workers_module.LIVED + 1
    workers.send(0, {"type": "die"})
    replaced(workers, 0)
    assert workers.all[0].failures == 1


def test_a_silent_worker_is_replaced(workers):
    now = time.monotonic()
    workers.kill_silent(now + workers_module.SILENCE_MAX - 1)
    assert workers.all[0].process.poll() is None
    workers.all[1].alive_at = now + 100
    workers.kill_silent(now + workers_module.SILENCE_MAX + 1)
    replaced(workers, 0)
    assert workers.handler.count("lost", 1) == 0


def test_a_worker_that_is_never_ready_is_replaced_too(make, monkeypatch, caplog):
    workers = make(1, "never ready")
    monkeypatch.setattr(workers_module, "START_MAX", 0.2)
    with pytest.raises(OSError):
        start(workers)
    workers.kill_silent(time.monotonic() - 0.1)
    assert not caplog.records
    workers.kill_silent(time.monotonic() + 0.1)
    until(lambda: workers.all[0].restarts == 1)


def test_a_worker_that_is_being_replaced_is_not_called_silent(make, monkeypatch, caplog):
    workers = make(1)
    start(workers)
    monkeypatch.setattr(workers_module, "RESTART_PAUSE", 0.1)
    workers.send(0, {"type": "die"})
    until(lambda: workers.handler.count("lost", 0))
    caplog.clear()
    workers.kill_silent(time.monotonic() + 1000)
    assert not caplog.records
    replaced(workers, 0)


def test_a_worker_that_reads_nothing_holds_nobody_for_long(workers, monkeypatch, caplog):
    monkeypatch.setattr(workers_module, "SEND_MAX", 0.3)
    workers.send(0, {"type": "hang"})
    filler = {"type": "echo", "value": "x" * 60000}

    def fill():
        while workers.send(0, filler):
            pass
        return time.monotonic()

    begun = time.monotonic()
    # Several at once: a gevent socket lets one greenlet wait, the others must line up.
    filling = [gevent.spawn(fill) for _ in range(3)]
    # The other worker's messages are still read, and it is still told.
    workers.send(1, {"type": "say", "what": {"type": "established", "connection": 5}})
    until(lambda: ("established", 5, 1) in workers.handler.events)
    gevent.joinall(filling, raise_error=True)
    assert all(one.value - begun < 1.5 for one in filling)
    assert "worker 0 does not read its messages" in caplog.text
    replaced(workers, 0)
    assert workers.handler.count("lost", 1) == 0


def test_a_bug_in_handling_one_message_costs_that_message_only(workers, caplog):
    workers.handler.broken = True
    workers.send(0, {"type": "say", "what": {"type": "established", "connection": 1}})
    workers.send(0, {"type": "say", "what": {"type": "no such message"}})
    workers.send(0, {"type": "say", "what": {"type": "established"}})
    until(lambda: caplog.text.count("internal error with a message of worker 0") == 3)
    workers.handler.broken = False
    workers.send(0, {"type": "say", "what": {"type": "established", "connection": 2}})
    until(lambda: ("established", 2, 0) in workers.handler.events)
    assert workers.handler.count("lost", 0) == 0


def test_a_worker_s_descriptors_are_not_kept(workers):
    before = len(descriptors())
    for _ in range(5):
        workers.send(0, {"type": "descriptor"})
    until(lambda: len([event for event in workers.handler.events if event[2:] and event[2].get("sent")]) == 5)
    assert len(descriptors()) <= before


def test_a_bug_in_a_worker_is_logged(workers, caplog):
    workers.send(1, {"type": "say", "what": {"type": "bug", "traceback": "Traceback: here"}})
    until(lambda: "worker 1: internal error:\nTraceback: here" in caplog.text)


def test_what_a_worker_says_of_a_bug_is_escaped_and_bounded(workers, caplog):
    said = "gone\n" * 100 + "\x1b[2J\rNov 29 sshd: accepted\n" + "x" * 1000
    workers.send(1, {"type": "say", "what": {"type": "bug", "traceback": said}})
    until(lambda: "internal error" in caplog.text)
    (record,) = caplog.records
    first, *lines = record.getMessage().split("\n")
    assert first == "worker 1: internal error:" and record.getMessage().isascii()
    assert lines[-3:] == [r"\x1b[2J", "Nov 29 sshd: accepted", "x" * (workers_module.BUG_WIDTH - 3) + "..."]
    assert len(lines) == workers_module.BUG_LINES


def test_a_worker_that_cannot_be_started_is_tried_again(workers, caplog):
    """Out of descriptors at the moment when a worker dies: another is started once there are some."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        workers.send(0, {"type": "die"})
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
        until(lambda: caplog.text.count("worker 0 cannot be started: [Errno 24]") >= 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    replaced(workers, 0)


def test_a_launch_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    workers = Workers(2)
    assert "setpriv" in workers.launch()
    workers.stop()


def test_broadcast_reaches_those_that_live(workers):
    workers.send(0, {"type": "die"})
    until(lambda: workers.handler.count("lost", 0))
    workers.broadcast({"type": "echo", "value": 1})
    until(lambda: workers.handler.echoes(1) == [1])
    replaced(workers, 0)
    workers.broadcast({"type": "echo", "value": 2})
    until(lambda: workers.handler.echoes(1) == [1, 2] and workers.handler.echoes(0) == [2])


def test_status_joins_the_parts_and_says_who_is_silent(workers):
    workers.send(1, {"type": "hang"})
    begun = time.monotonic()
    report = workers.status(seconds=0.3)
    assert time.monotonic() - begun < 1
    assert (report[0]["alive"], report[1]["alive"]) == (True, False)
    assert report[0]["connections"] == [{"connection": 0}, {"connection": 1}]
    assert report[0]["drops"] == {"queue_full": 3} and report[1]["drops"] == {}
    assert workers._requests == {}


def test_status_while_a_worker_is_replaced(workers, monkeypatch):
    monkeypatch.setattr(workers_module, "RESTART_PAUSE", 0.5)
    workers.send(0, {"type": "die"})
    until(lambda: workers.handler.count("lost", 0))
    begun = time.monotonic()
    assert not workers.status()[0]["alive"] and time.monotonic() - begun < 0.4


@pytest.mark.parametrize("behaviour", ["good", "stubborn"])
def test_stop_ends_all(make, behaviour):
    workers = make(2, behaviour)
    start(workers)
    pids = [worker.pid for worker in workers.all]
    begun = time.monotonic()
    workers.stop()
    assert time.monotonic() - begun < 1
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert not [event for event in workers.handler.events if event[0] == "lost"]
