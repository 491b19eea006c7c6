"""workerlink: what passes, what does not, and that nothing of it stays open."""

import os
import resource
import socket

import gevent
import pytest
from gevent import socket as gevent_socket

from bulkvpnd.workerlink import DESCRIPTORS_MAX, MESSAGE_MAX, LinkClosed, WorkerLink


@pytest.fixture
def link():
    """(a link, a link, the socket of the second), joined, on gevent's sockets as in both processes."""
    pair = gevent_socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with gevent.Timeout(10):
        yield WorkerLink(pair[0]), WorkerLink(pair[1]), pair[1]
    for sock in pair:
        sock.close()


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_messages_and_descriptors_pass_in_order(link):
    ours, theirs, _ = link
    reading, writing = os.pipe()
    ours.send({"type": "a", "text": "\u00e9\n\x1b"}, [writing])
    ours.send({"type": "b"})
    os.close(writing)
    message, (copy,) = theirs.receive()
    assert message == {"type": "a", "text": "\u00e9\n\x1b"}
    os.write(copy, b"here")
    assert os.read(reading, 10) == b"here"
    for descriptor in (copy, reading):
        os.close(descriptor)
    assert theirs.receive() == ({"type": "b"}, [])


def test_the_largest_message_passes_and_a_larger_one_is_our_bug(link):
    ours, theirs, _ = link
    overhead = len('{"type":"x","text":""}')
    ours.send({"type": "x", "text": "x" * (MESSAGE_MAX - overhead)}, [0] * DESCRIPTORS_MAX)
    message, copies = theirs.receive()
    for descriptor in copies:
        os.close(descriptor)
    assert len(message["text"]) == MESSAGE_MAX - overhead and len(copies) == DESCRIPTORS_MAX
    with pytest.raises(ValueError, match="worker message of"):
        ours.send({"type": "x", "text": "x" * (MESSAGE_MAX - overhead + 1)})


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"{}" + b" " * MESSAGE_MAX, 3),  # cut by its size
        (b"{garbage", 3),
        (b"\xff\xfe", 3),
        (b"[" * 100_000, 3),
    ],
    ids=["size", "garbage", "encoding", "nesting"],
)
def test_what_is_no_message_closes_the_link_and_leaves_no_descriptor(link, data, count):
    _, theirs, _ = link
    raw = link[0]._socket
    before = descriptors()
    socket.send_fds(raw, [data], [0] * count)
    with pytest.raises(LinkClosed):
        theirs.receive()
    assert descriptors() <= before


def test_descriptors_that_this_process_may_not_have_are_missing(link):
    ours, theirs, _ = link
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0) for _ in range(3)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, limit[1]))
        os.close(taken.pop())
        ours.send({"type": "a"}, [0, 0])
        message, copies = theirs.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    for descriptor in (*copies, *taken):
        os.close(descriptor)
    assert message == {"type": "a"} and len(copies) == 1
    ours.send({"type": "b"}, [0])
    message, (copy,) = theirs.receive()
    os.close(copy)
    assert message == {"type": "b"}


def test_the_end(link):
    ours, theirs, _ = link
    ours.send({"type": "last"})
    ours.shutdown()
    assert theirs.receive() == ({"type": "last"}, [])
    for method in (theirs.receive, lambda: theirs.send({"type": "x"}), ours.receive, lambda: ours.send({"type": "x"})):
        with pytest.raises(LinkClosed):
            method()
    ours.shutdown()
    ours.close()
    with pytest.raises(LinkClosed):
        ours.send({"type": "x"})


def test_shutdown_ends_a_greenlet_that_receives(link):
    ours, _, _ = link
    receiving = gevent.spawn(ours.receive)
    gevent.sleep(0)
    ours.shutdown()
    with pytest.raises(LinkClosed):
        receiving.get(timeout=5)


def test_close_ends_a_greenlet_that_waits_for_room(link):
    ours, _, _ = link

    def fill():
        while True:
            ours.send({"type": "x", "text": "x" * 50000})

    filling = [gevent.spawn(fill) for _ in range(3)]
    gevent.sleep(0.01)
    ours.close()
    for one in filling:
        with pytest.raises(LinkClosed):
            one.get(timeout=5)


def test_many_greenlets_send_at_once_and_every_message_arrives_whole_and_in_order(link):
    ours, theirs, _ = link

    def send(sender):
        for number in range(30):
            ours.send({"type": "x", "sender": sender, "number": number, "text": "x" * 20000})

    senders = [gevent.spawn(send, sender) for sender in range(4)]
    gevent.sleep(0.01)  # all of them wait for room now
    assert not any(sender.ready() for sender in senders)
    seen = [theirs.receive()[0] for _ in range(4 * 30)]
    gevent.joinall(senders, raise_error=True)
    for sender in range(4):
        assert [message["number"] for message in seen if message["sender"] == sender] == list(range(30))


class FullAtFirst:
    """A socket as gevent's is when others took the room that it had waited for: sendmsg then returns 0."""

    def __init__(self):
        self.tries = 0
        self.sent = []

    def sendmsg(self, buffers, *_):
        self.tries += 1
        if self.tries < 3:
            return 0
        self.sent += buffers
        return sum(map(len, buffers))


def test_no_message_is_lost_when_there_is_no_room_after_waiting():
    sock = FullAtFirst()
    WorkerLink(sock).send({"type": "x"})
    assert (sock.tries, sock.sent) == (3, [b'{"type":"x"}'])
