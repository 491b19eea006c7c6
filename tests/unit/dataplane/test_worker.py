"""dataplane.worker as the process that it is, with sockets in place of the TUN, its inbox and its sibling's."""

import errno
import itertools
import os
import pathlib
import resource
import signal
import socket
import sys

import gevent
import gevent.socket
import pytest

# Not the standard one: once a loop of gevent watches children it reaps all of them, and a status that somebody else has
# reaped is 0 for the standard library.
from gevent import subprocess
from inmemory import FRAME_SIZE, HERE, THERE, entries_of, entry, until
from ends import CIPHER, OURS, SETTINGS, THEIRS, Peer, joined, payload

from bulkvpnd.dataplane.worker import COUNTERS, DROPS, LINGER
from bulkvpnd.protocol import frame, packet
from bulkvpnd.workerlink import LinkClosed, WorkerLink

ROOT = pathlib.Path(__file__).parents[3]
SEQPACKET = socket.AF_UNIX, socket.SOCK_SEQPACKET
ANY = bytes([192, 0, 2, 1])


class Main:
    """The main process, as one worker of two sees it."""

    def __init__(self, tun=None):
        self.link, theirs = gevent.socket.socketpair(*SEQPACKET)
        self.tun, worker_tun = gevent.socket.socketpair(*SEQPACKET)
        self.to_worker, inbox = gevent.socket.socketpair(*SEQPACKET)
        self.sibling, worker_sibling = gevent.socket.socketpair(*SEQPACKET)
        for sock in (worker_tun, inbox, worker_sibling):
            sock.setblocking(False)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bulkvpnd.dataplane", str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        )  # fmt: skip
        theirs.close()
        self.messages = []
        self.peers = []
        self._socket, self.link = self.link, WorkerLink(self.link)
        self._numbers = itertools.count(1)
        self._reading = gevent.spawn(self._read)
        self.link.send(
            {"type": "start", "index": 0, "workers": 2, "frame_size": FRAME_SIZE},
            [worker_tun.fileno() if tun is None else tun, inbox.fileno(), worker_sibling.fileno()],
        )
        for sock in (worker_tun, inbox, worker_sibling):
            sock.close()

    def _read(self):
        try:
            while True:
                self.messages.append(self.link.receive()[0])
        except LinkClosed:
            self.messages.append({"type": "end"})

    def stop_reading(self):
        self._reading.kill()

    def read_on(self):
        self._reading = gevent.spawn(self._read)

    def close(self):
        self._reading.kill()
        for one in (self.link, self.tun, self.to_worker, self.sibling, *self.peers):
            one.close()
        until(lambda: self.process.poll() is not None, "the worker ends")
        self.errors = self.process.stderr.read().decode()
        self.process.stderr.close()

    def send(self, type, descriptors=(), **fields):
        self.link.send({"type": type, **fields}, descriptors)

    def message(self, type, **fields):
        """The next message with these fields, once it has come."""

        def find():
            for number, message in enumerate(self.messages):
                if message["type"] == type and fields.items() <= message.items():
                    return self.messages.pop(number)
            return None

        return until(find, f"{type} {fields}")

    def status(self):
        request = next(self._numbers)
        self.send("status", request=request)
        return self.message("status", request=request)

    def attach(self, addresses=(THERE,), number=1, session=1, index=0, head=None, is_small=False, networks=(),
               replaces=False, **changed):
        """The Peer of a new connection, which is not established yet."""
        ours, theirs = joined(is_small)
        peer = Peer(theirs)
        self.peers.append(peer)
        self.send(
            "attach", [ours.fileno()], connection=number, index=index, session=session,
            addresses=[address.hex() for address in addresses], any_address=False, networks=networks, cipher=CIPHER,
            secret_out=OURS.hex(), secret_in=THEIRS.hex(), settings={**SETTINGS, **changed},
            head=head(peer).hex() if head else "", replaces=replaces,
        )  # fmt: skip
        ours.close()
        return peer

    def establish(self, **arguments):
        """The Peer of a connection that carries packets."""
        peer = self.attach(**arguments)
        peer.send(frame.PONG)
        self.message("established", connection=arguments.get("number", 1))
        return peer


@pytest.fixture
def main(request):
    mains = []

    def make(**arguments):
        mains.append(Main(**arguments))
        mains[-1].message("ready", pid=mains[-1].process.pid)
        return mains[-1]

    with gevent.Timeout(40):
        yield make
        for one in mains:
            one.close()
            assert not one.errors and one.process.returncode == 0


def descriptors(main):
    return len(os.listdir(f"/proc/{main.process.pid}/fd"))


def state(main):
    return pathlib.Path(f"/proc/{main.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


# Replacement


@pytest.mark.parametrize("replaces", [False, True])
def test_a_connection_takes_over_with_its_first_authentic_frame(main, replaces):
    worker = main()
    old = worker.establish()
    fresh = worker.attach(number=2, replaces=replaces)
    # Until then everything goes the old way.
    worker.tun.send(entry(1, 1))
    assert old.data(1) == [entry(1, 1)]
    back = [entry(1, number, source=THERE, destination=HERE) for number in range(2)]
    fresh.send(frame.PING, bytes(8))
    fresh.send(frame.DATA, payload(back[1]))
    worker.message("established", connection=2)
    worker.tun.send(entry(1, 2))
    assert fresh.data(1) == [entry(1, 2)]
    if replaces:
        # What the peer sent the old way goes before it.
        old.send(frame.DATA, payload(back[0]))
        assert worker.tun.recv(2000) == back[0]
        frames = [old.frame()]
        while frames[-1][0] != frame.CLOSE:
            frames.append(old.frame())
        assert frames[-1] == (frame.CLOSE, b"moved") and frame.DATA not in [kind for kind, _ in frames]
        old.send(frame.CLOSE, b"moved")
        assert worker.tun.recv(2000) == back[1]
    else:
        assert worker.tun.recv(2000) == back[1]
        # Whether it is to go, the main process says.
        worker.send("detach", connection=1, reason="replaced")
    assert worker.message("closed", connection=1)["clean"]


# The link


def test_it_ends_with_the_link(main):
    worker = main()
    assert worker.process.poll() is None
    worker.link.shutdown()
    until(lambda: worker.process.poll() is not None, "the worker ends")
    assert worker.process.returncode == 0


def test_it_ends_when_the_main_process_was_killed_before_it_could_say_anything():
    ours, theirs = socket.socketpair(*SEQPACKET)
    with ours, subprocess.Popen(
        [sys.executable, "-P", "-m", "bulkvpnd.dataplane", str(theirs.fileno())], pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        theirs.close()
        ours.close()
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_does_not_end_it(main, number):
    worker = main()
    worker.process.send_signal(number)
    peer = worker.establish()
    worker.tun.send(entry(1, 1))
    assert peer.data(1) == [entry(1, 1)]


def test_a_device_that_fails_ends_it_loudly():
    directory = os.open("/", os.O_RDONLY)
    worker = Main(tun=directory)
    os.close(directory)
    try:
        message = worker.message("bug")
        assert os.strerror(errno.EISDIR) in message["traceback"]
        worker.message("end")
    finally:
        worker.close()
    assert worker.process.returncode == 1 and "IsADirectoryError" in worker.errors


def test_a_connection_that_finds_no_descriptor_is_the_only_one_to_end(main):
    worker = main()
    peer = worker.establish()
    limit = resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE)
    taken = set(os.listdir(f"/proc/{worker.process.pid}/fd"))
    free = next(number for number in itertools.count() if str(number) not in taken)
    resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE, (free, limit[1]))
    worker.attach(number=2, index=1)
    closed = worker.message("closed", connection=2)
    assert "LimitNOFILE" in closed["reason"] and not closed["clean"]
    worker.tun.send(entry(1, 1))
    assert peer.data(1) == [entry(1, 1)]
    resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE, limit)
    worker.establish(number=3, index=1)


def test_it_says_that_it_lives(main):
    worker = main()
    worker.message("alive")
    worker.message("alive")


def test_what_it_says_of_itself(main):
    worker = main()
    empty = worker.status()
    assert empty["connections"] == [] and empty["drops"] == dict.fromkeys(DROPS, 0) and empty["last"]
    for number in range(103):
        worker.attach(number=number, index=number)
    parts = []
    worker.send("status", request=9)
    while not (parts and parts[-1]["last"]):
        parts.append(worker.message("status", request=9))
    described = [one for part in parts for one in part["connections"]]
    assert sorted(one["connection"] for one in described) == list(range(103)) and len(parts) == 2
    assert {"established", "age", "queued", "rtt_ms", *COUNTERS} <= set(described[0])
    assert not any(one["established"] for one in described)


# Sessions and connections


def test_nothing_is_carried_before_the_peers_first_frame(main):
    worker = main()
    peer = worker.attach()
    worker.tun.send(entry(1, 1))
    until(lambda: worker.status()["drops"]["no_session"] == 1)
    assert peer.frame()[0] == frame.PING
    peer.send(frame.PONG)
    worker.message("established", connection=1)
    worker.tun.send(entry(1, 2))
    assert peer.data(1) == [entry(1, 2)]


def test_packets_pass_both_ways_and_are_counted(main):
    worker = main()
    peer = worker.establish()
    for number in range(5):
        worker.tun.send(entry(1, number))
    assert peer.data(5) == [entry(1, number) for number in range(5)]
    back = [entry(1, number, source=THERE, destination=HERE) for number in range(3)]
    peer.send(frame.DATA, payload(*back, entry(1, 9, source=ANY)))
    assert [worker.tun.recv(2000) for _ in back] == back
    status = worker.status()
    (one,) = status["connections"]
    assert (one["packets_out"], one["packets_in"], one["established"]) == (5, 3, True)
    assert {name: count for name, count in status["drops"].items() if count} == {"foreign_source": 1}
    assert status["counters"]["packets_read"] == 5


def test_datagrams_are_joined_only_while_every_peer_takes_super_packets_of_them(main):
    worker = main()
    sent = [packet.VNET.pack(packet.NEEDS_CSUM, 0, 0, 0, 20, 6) + entry(1, number)[10:] for number in range(2)]

    def entries():
        # Both are there before it reads the first.
        worker.process.send_signal(signal.SIGSTOP)
        until(lambda: state(worker) == "T", "the worker stands still")
        for one in sent:
            worker.tun.send(one)
        worker.process.send_signal(signal.SIGCONT)
        made = []
        while sum(packet.segment_count(one, 0, len(one)) for one in made) < 2:
            kind, content = peer.frame()
            made += entries_of(content) if kind == frame.DATA else []
        return len(made)

    peer = worker.establish()
    assert entries() == 1
    worker.attach(number=2, index=1, peer_offloads=("csum", "tso"))
    worker.status()
    assert entries() == 2
    worker.send("detach", connection=2, reason="done")
    worker.message("closed", connection=2)
    assert entries() == 1


def test_the_first_frame_may_come_with_the_handshake(main):
    worker = main()
    first = entry(1, 1, source=THERE)
    peer = worker.attach(head=lambda peer: peer.sealed(frame.DATA, payload(first)))
    worker.message("established", connection=1)
    assert worker.tun.recv(2000) == first
    worker.tun.send(entry(1, 2))
    assert peer.data(1) == [entry(1, 2)]


def test_a_connection_is_closed_by_order(main):
    worker = main()
    before = descriptors(worker)
    peer = worker.establish()
    worker.tun.send(entry(1, 1))
    assert peer.data(1)
    worker.send("detach", connection=1, reason="replaced")
    worker.send("detach", connection=1, reason="done")
    worker.send("detach", connection=77, reason="done")
    assert list(peer.frames())[-1] == (frame.CLOSE, b"replaced")
    message = worker.message("closed", connection=1)
    assert (message["reason"], message["clean"], message["blame"]) == ("replaced", True, None)
    assert set(message["counters"]) == set(COUNTERS) and message["counters"]["frames_in"] == 1
    worker.tun.send(entry(1, 1))
    until(lambda: worker.status()["counters"]["waiting"] == 1)
    status = worker.status()
    assert status["connections"] == [] and status["counters"]["frames_in_use"] == 0
    assert descriptors(worker) == before


def test_a_hostile_peer_ends_its_own_connection(main):
    worker = main()
    bad, good = worker.establish(number=1), worker.establish(number=2, index=1)
    bad.write(bytes(100))
    message = worker.message("closed", connection=1)
    assert (message["clean"], message["blame"]) == (False, "peer") and "frame type" in message["reason"]
    for flow in range(20):
        worker.tun.send(entry(flow, 1))
    assert len(good.data(20)) == 20


def test_a_new_connection_takes_the_place_of_the_old_one(main):
    worker = main()
    old, new = worker.establish(number=1), worker.establish(number=2)
    worker.tun.send(entry(1, 1))
    assert new.data(1) == [entry(1, 1)]
    # The old one's end takes nothing from the new one.
    old.close()
    worker.message("closed", connection=1)
    worker.tun.send(entry(1, 2))
    assert new.data(1) == [entry(1, 2)]


def test_a_session_that_is_forgotten(main):
    worker = main()
    worker.establish()
    worker.send("forget", session=1)
    worker.send("forget", session=77)
    worker.tun.send(entry(1, 1))
    until(lambda: worker.status()["drops"]["no_session"] == 1)


def test_the_address_of_another_session(main):
    worker = main()
    old = worker.establish(number=1, session=1)
    new = worker.establish(number=2, session=2)
    worker.tun.send(entry(1, 1))
    assert new.data(1) == [entry(1, 1)]
    old.close()
    worker.message("closed", connection=1)
    worker.send("forget", session=1)
    worker.status()
    worker.tun.send(entry(1, 2))
    assert new.data(1) == [entry(1, 2)]


# Where a client's packets may come from and go to

BEHIND, FAR = bytes([192, 168, 7, 9]), bytes([192, 168, 8, 9])


def test_a_network_behind_a_client(main):
    worker = main()
    peer = worker.establish(networks=["192.168.7.0/24"])
    worker.tun.send(entry(1, 1, destination=FAR))
    until(lambda: worker.status()["drops"]["no_session"] == 1)
    worker.tun.send(entry(1, 2, destination=BEHIND))
    assert peer.data(1) == [entry(1, 2, destination=BEHIND)]
    peer.send(frame.DATA, payload(entry(1, 3, source=FAR), entry(1, 4, source=BEHIND), entry(1, 5, source=THERE)))
    assert [worker.tun.recv(2000) for _ in range(2)] == [entry(1, 4, source=BEHIND), entry(1, 5, source=THERE)]
    assert worker.status()["drops"]["foreign_source"] == 1
    worker.send("forget", session=1)
    worker.status()
    worker.tun.send(entry(1, 6, destination=BEHIND))
    until(lambda: worker.status()["drops"]["no_session"] == 2)


@pytest.mark.parametrize("is_isolated", [True, False])
def test_clients_that_may_or_may_not_reach_each_other(main, is_isolated):
    worker = main()
    if is_isolated:
        worker.send("isolate", networks=["10.86.0.0/24", "192.168.7.0/24", "fd86::/64"],
                    exempt=["10.86.0.1", "fd86::1"])
    peer = worker.establish()
    to_server, outside = entry(1, 1, source=THERE, destination=HERE), entry(1, 2, source=THERE, destination=FAR)
    others = (THERE, bytes([10, 86, 0, 9]), bytes([10, 86, 0, 255]), BEHIND)
    to_others = [entry(1, 3, source=THERE, destination=one) for one in others]
    peer.send(frame.DATA, payload(to_server, *to_others, *to_others, outside))
    expected = [to_server, outside] if is_isolated else [to_server, *to_others, *to_others, outside]
    assert [worker.tun.recv(2000) for _ in expected] == expected
    assert worker.status()["drops"]["client_to_client"] == (2 * len(to_others) if is_isolated else 0)


def test_another_network_that_clients_may_not_reach(main):
    """Holds for a session that is there, whose verdicts are remembered, and for one that waits for its first frame."""
    worker = main()
    worker.send("isolate", networks=["10.86.0.0/24"], exempt=["10.86.0.1"])
    first = worker.establish()
    waiting = worker.attach(number=2, session=2, addresses=(bytes([10, 86, 0, 9]),))
    behind = entry(1, 1, source=THERE, destination=BEHIND)
    first.send(frame.DATA, payload(behind))
    assert worker.tun.recv(2000) == behind
    worker.send("isolate", networks=["10.86.0.0/24", "192.168.7.0/24"], exempt=["10.86.0.1"])
    assert worker.status()["drops"]["client_to_client"] == 0
    first.send(frame.DATA, payload(behind))
    waiting.send(frame.DATA, payload(entry(1, 2, source=bytes([10, 86, 0, 9]), destination=BEHIND)))
    until(lambda: worker.status()["drops"]["client_to_client"] == 2)


# Load and slowness


def test_a_link_that_nobody_reads_holds_no_connection_up(main):
    worker = main()
    peer = worker.establish()
    worker.stop_reading()
    requests = 3000
    for request in range(requests):
        worker.send("status", request=request)
    for number in range(20):
        worker.tun.send(entry(1, number))
        assert peer.data(1) == [entry(1, number)]
    other = worker.attach(number=2, index=1)
    other.send(frame.DATA, payload(entry(1, 1, source=THERE)))
    assert worker.tun.recv(2000) == entry(1, 1, source=THERE)
    other.close()
    worker.read_on()
    for request in range(requests):
        worker.message("status", request=request)
    worker.message("established", connection=2)
    worker.message("closed", connection=2)


def test_a_stuck_peer_does_not_hold_up_another(main):
    worker = main()
    stuck = worker.establish(number=1, session=1, addresses=(ANY,), is_small=True)
    good = worker.establish(number=2, session=2)
    for number in range(200):
        for _ in range(10):
            worker.tun.send(entry(1, number, 1400, destination=ANY))
        worker.tun.send(entry(1, number))
        assert good.data(1) == [entry(1, number)]
    assert worker.status()["connections"][0]["queued"] > 0
    # It is dropped in the end, and the connection lives on.
    until(lambda: worker.status()["drops"]["stalled"] > 0)
    assert worker.status()["counters"]["frames_in_use"] <= 1
    stuck.send(frame.DATA, payload(entry(1, 1, source=ANY)))
    assert worker.tun.recv(2000) == entry(1, 1, source=ANY)


def test_the_queue_is_left_to_the_reader_and_taken_back(main):
    """After LINGER seconds without a packet, which is what this waits for."""
    worker = main()
    peer = worker.establish()
    worker.tun.send(entry(1, 1))
    assert peer.data(1)
    before = worker.status()["counters"]["waits"]
    until(lambda: worker.status()["counters"]["waits"] > before, seconds=10 * LINGER)
    for number in range(2, 5):
        worker.tun.send(entry(1, number))
        assert peer.data(1) == [entry(1, number)]


# Siblings


def test_without_a_connection_here_the_sibling_gets_it(main):
    worker = main()
    worker.send("session", session=1, addresses=[THERE.hex()], any_address=False, networks=[], workers=[0, 1])
    worker.status()
    worker.tun.send(entry(1, 1))
    assert worker.sibling.recv(2000) == entry(1, 1)
    peer = worker.establish()
    worker.tun.send(entry(1, 2))
    assert peer.data(1) == [entry(1, 2)]
    status = worker.status()
    assert status["counters"]["to_siblings"] == 1
    # The session is one and the same: when its connection here is lost it is the sibling's again.
    peer.close()
    worker.message("closed", connection=1)
    worker.tun.send(entry(1, 3))
    assert worker.sibling.recv(2000) == entry(1, 3)


def test_the_sibling_no_longer_has_one(main):
    worker = main()
    for workers in ([0, 1], [], [0]):
        worker.send("session", session=1, addresses=[THERE.hex()], any_address=False, networks=[], workers=workers)
    worker.status()
    worker.tun.send(entry(1, 1))
    until(lambda: worker.status()["counters"]["waiting"] == 1)
    # It has one again.
    worker.send("session", session=1, addresses=[THERE.hex()], any_address=False, networks=[], workers=[1])
    assert worker.sibling.recv(2000) == entry(1, 1)


def test_what_waits_for_a_session_is_for_nobody_else(main):
    worker = main()
    worker.send("session", session=1, addresses=[THERE.hex()], any_address=False, networks=[], workers=[])
    worker.status()
    worker.tun.send(entry(1, 1))
    until(lambda: worker.status()["counters"]["waiting"] == 1)
    worker.send("forget", session=1)
    peer = worker.establish(session=2)
    worker.tun.send(entry(1, 2))
    assert peer.data(1) == [entry(1, 2)]
    assert worker.status()["drops"]["no_session"] == 1


def test_what_a_sibling_hands_over_is_carried_or_waits(main):
    worker = main()
    worker.send("session", session=1, addresses=[THERE.hex()], any_address=False, networks=[], workers=[1])
    worker.status()
    worker.to_worker.send(entry(1, 1))
    until(lambda: worker.status()["counters"]["waiting"] == 1)
    peer = worker.establish()
    worker.to_worker.send(entry(1, 2))
    assert peer.data(2) == [entry(1, 1), entry(1, 2)]
    assert worker.status()["counters"]["from_siblings"] == 2
    worker.sibling.setblocking(False)
    with pytest.raises(BlockingIOError):
        worker.sibling.recv(1)


def test_a_sibling_that_reads_nothing_holds_nothing_up(main):
    worker = main()
    worker.send("session", session=1, addresses=[THERE.hex()], any_address=False, networks=[], workers=[1])
    worker.status()
    sent = 0
    while worker.status()["drops"]["sibling_full"] == 0:
        for _ in range(100):
            worker.tun.send(entry(1, sent, 1400))
            sent += 1
    until(lambda: worker.status()["counters"]["packets_read"] == sent)
    status = worker.status()
    assert status["counters"]["to_siblings"] + status["drops"]["sibling_full"] == sent


def test_a_sibling_that_is_gone_is_a_full_one(main):
    worker = main()
    worker.send("session", session=1, addresses=[THERE.hex()], any_address=False, networks=[], workers=[1])
    worker.status()
    worker.sibling.close()
    worker.tun.send(entry(1, 1))
    until(lambda: worker.status()["drops"]["sibling_full"] == 1)
