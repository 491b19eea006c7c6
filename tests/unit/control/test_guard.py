"""What the guard puts back, and when: the kernel's notices come from a double, and what it guards are doubles too."""

import logging

import gevent
import gevent.queue
import pytest
from doubles import until

from bulkvpnd.control import guard
from bulkvpnd.host.firewall import FirewallError
from bulkvpnd.host.link import LinkError


class Machine:
    """In place of the firewall, the role and the tuner. done: what was put back, in order."""

    table = "bulkvpnd_x"

    def __init__(self):
        self.done = []
        self.is_whole = True
        self.failures = []  # of the next tries
        self.unrestorable = None

    def mend(self):
        if self.failures:
            raise self.failures.pop()
        if self.is_whole:
            return False
        self.rewrite()
        return True

    def rewrite(self):
        if self.failures:
            raise self.failures.pop()
        self.is_whole = True
        self.done.append("rules")


class Role:
    def __init__(self, machine):
        self._machine = machine

    def restore(self):
        if self._machine.unrestorable:
            raise self._machine.unrestorable
        self._machine.done.append("device")


class Tuner:
    def __init__(self, machine):
        self._machine = machine

    def restore(self):
        self._machine.done.append("timeouts")


class Notices:
    """In place of host.notices: what a test puts, and of the table one at once."""

    def __init__(self):
        self.tables, self.devices = gevent.queue.JoinableQueue(), gevent.queue.JoinableQueue()
        self.tables.put(None)

    def of_table(self, name):
        assert name == Machine.table
        return taken(self.tables)

    def of_device(self, index):
        assert index == 7
        return taken(self.devices)


def taken(queue):
    while True:
        yield queue.get()
        queue.task_done()


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def notices():
    return Notices()


@pytest.fixture
def made(machine, notices):
    return guard.Guard(machine, "bulk0", 7, Role(machine), Tuner(machine), notices)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def seen(queue):
    """Waits until all notices have been dealt with."""
    assert queue.join(5), "what was put is dealt with"


def test_nothing_is_done_while_nothing_is_missing(made, machine, notices, caplog):
    with made:
        for queue, notice in ((notices.tables, None), (notices.devices, True)):
            queue.put(notice)
            seen(queue)
    assert machine.done == [] and warnings(caplog) == []


def test_what_is_missing_at_the_start_or_later_comes_back(made, machine, notices, caplog, monkeypatch):
    monkeypatch.setattr(guard, "PAUSE", 0)
    machine.is_whole = False
    with made:
        seen(notices.tables)
        assert machine.done == ["rules", "timeouts"]
        machine.is_whole = False
        notices.tables.put(None)
        seen(notices.tables)
        assert machine.done == ["rules", "timeouts"] * 2
    assert warnings(caplog) == ["nftables table inet bulkvpnd_x: something else removed it, or a part of it; it is "
                                "there again"] * 2


def test_who_goes_on_removing_it_does_not_keep_the_daemon_busy(made, machine, notices):
    machine.is_whole = False
    with made:
        until(lambda: machine.done)
        machine.is_whole = False
        notices.tables.put(None)
        gevent.sleep(0)
        assert machine.done == ["rules", "timeouts"], "the next one has to wait"
        seen(notices.tables)
        assert machine.done == ["rules", "timeouts"] * 2


def test_what_could_not_be_written_is_tried_again(made, machine, caplog, monkeypatch):
    monkeypatch.setattr(guard, "RETRY", 0)
    machine.failures = [FirewallError("refused")] * 2
    machine.is_whole = False
    with made:
        until(lambda: machine.done)
    assert warnings(caplog)[:2] == ["refused"] * 2


@pytest.mark.parametrize(
    ("changes", "done", "said"),
    [
        ([True, True], [], 0),
        ([False], [], 1),
        ([False, False, True, True], ["device"], 1),
        ([False, True, False, True], ["device"] * 2, 2),
        ([None], ["device"], 0),  # some notices were lost
        ([False, None, True], ["device"], 1),
    ],
)
def test_a_device_that_is_up_again(made, machine, notices, caplog, changes, done, said):
    with made:
        for is_up in changes:
            notices.devices.put(is_up)
        seen(notices.devices)
    assert machine.done == done
    assert warnings(caplog) == ["device bulk0 is down: something else did that, and nothing passes the tunnel; run: ip "
                                "link set bulk0 up"] * said


def test_what_cannot_be_put_back_is_said(made, machine, notices, caplog):
    machine.unrestorable = LinkError("bulk0: route to 10.0.0.0/8: there is a route already")
    with made:
        notices.devices.put(None)
        seen(notices.devices)
        machine.unrestorable = None
        notices.devices.put(None)
        seen(notices.devices)
    assert machine.done == ["device"]
    assert warnings(caplog) == ["device bulk0 is up again, but not all could be put back: bulk0: route to 10.0.0.0/8: "
                                "there is a route already"]


def test_nothing_comes_back_after_the_end(made, machine, notices):
    with made:
        seen(notices.tables)
    machine.is_whole = False
    notices.tables.put(None)
    notices.devices.put(None)
    gevent.sleep(0.01)
    assert machine.done == []


def test_a_reload_puts_everything_back_whether_or_not_it_seems_to_be_there(made, machine):
    made.restore()
    assert machine.done == ["rules", "timeouts", "device"]
    machine.failures = [FirewallError("refused")]
    with pytest.raises(FirewallError):
        made.restore()
