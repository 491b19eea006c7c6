"""service: what systemd is told, what the journal gets, and how much of it."""

import logging
import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkvpnd import events, service


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """The socket at which systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"READY": 1}, b"READY=1"),
        ({"STOPPING": 1}, b"STOPPING=1"),
        ({"WATCHDOG": 1}, b"WATCHDOG=1"),
        ({"STATUS": "2 sessions, 8 connections"}, b"STATUS=2 sessions, 8 connections"),
        ({"READY": 1, "STATUS": "x"}, b"READY=1\nSTATUS=x"),
    ],
)
def test_systemd_hears_what_it_is_told(systemd, variables, expected):
    service.notify(**variables)
    assert systemd.recv(1000) == expected


def test_without_systemd_nothing_happens(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service.notify(READY=1)


@pytest.mark.parametrize("path", ["/nonexistent/notify", "relative"])
def test_a_systemd_that_cannot_be_told_costs_one_line(monkeypatch, caplog, path):
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    service.notify(WATCHDOG=1)
    (record,) = caplog.records
    assert "systemd cannot be notified" in record.getMessage()


@pytest.mark.parametrize(
    ("environment", "period"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid() + 1)}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_watchdog_period(monkeypatch, environment, period):
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert service.watchdog_period() == period


# text from outside


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("alice", "alice"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\0", r"\x00"),
        ("back\\slash", r"back\\slash"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udc80", r"\udc80"),
        ("é", r"\xe9"),
        (b"bytes", "b'bytes'"),
        ("x" * 64, "x" * 64),
        ("x" * 65, "x" * 61 + "..."),
        ("\x1b" * (1 << 20), (r"\x1b" * 16)[:61] + "..."),
    ],
    ids=range(12),
)
def test_printable(text, shown):
    assert service.printable(text) == shown


@given(st.text(alphabet=st.characters()))
def test_printable_is_one_short_line_of_ascii(text):
    shown = service.printable(text)
    assert shown.isascii() and (shown.isprintable() or not shown) and len(shown) <= 64


# how much


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def limit():
    clock = Clock()
    made = service.RateLimit(clock)

    def passes(message="connection from %s turned away", arguments=("peer",), line=1, **fields):
        record = logging.LogRecord("x", logging.WARNING, "a.py", line, message, arguments, None)
        vars(record).update(fields)
        return record.getMessage() if made.filter(record) else None

    return clock, passes


def test_a_burst_passes_and_then_one_in_a_while(limit):
    clock, passes = limit
    pause = service.RATE_PERIOD / service.RATE_BURST
    assert all(passes() for _ in range(service.RATE_BURST))
    assert not any(passes() for _ in range(1000))
    clock.now += pause * 0.99
    assert not passes()
    clock.now += pause * 0.02
    assert passes() == "connection from peer turned away (1001 more like this before)"
    assert not passes()
    clock.now += pause
    assert passes() == "connection from peer turned away (1 more like this before)"
    clock.now += pause * 1000
    assert sum(passes() is not None for _ in range(1000)) == service.RATE_BURST


def test_each_kind_of_line_has_a_budget_of_its_own(limit):
    _, passes = limit
    for number in range(100):
        passes(arguments=("another peer",), message=f"whatever it says: {number} %s")
    assert not passes()
    assert passes(line=2) and passes(pathname="b.py")


def test_each_identity_has_a_budget_of_its_own(limit):
    _, passes = limit
    assert sum(passes(IDENTITY="mallory") is not None for _ in range(100)) == service.RATE_BURST
    assert passes(IDENTITY="alice") and passes()


def test_a_place_may_say_more_at_once(limit):
    clock, passes = limit
    assert sum(passes(burst=50) is not None for _ in range(100)) == 50
    clock.now += service.RATE_PERIOD / 2
    assert sum(passes(burst=50) is not None for _ in range(100)) == 25


@pytest.mark.parametrize("event", events.EVENTS, ids=lambda event: event.name)
def test_every_event_has_a_rate(limit, event):
    """Whatever it carries: nothing gets a line around the limit."""
    _, passes = limit
    fields = {"MESSAGE_ID": event.id, "limited": False, "PEER": "192.0.2.1:1", "SESSION": 1, "CONNECTION": 0}
    assert sum(passes(event.subject.replace("%", ""), (), **fields) is not None for _ in range(1000)) == (
        service.RATE_BURST)


def test_kinds_are_remembered_in_a_bounded_table(limit, monkeypatch):
    _, passes = limit
    monkeypatch.setattr(service, "KINDS_MAX", 3)
    for name in "abcd":
        assert all(passes(IDENTITY=name) for _ in range(service.RATE_BURST))
    assert not any(passes(IDENTITY=name) for name in "bcd")
    assert passes(IDENTITY="a"), "the oldest is forgotten"


# where to


def run(code, **environment):
    """A process that logs; returns what it wrote to standard error."""
    code = "import logging\nfrom bulkvpnd import service\n" + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20, check=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}).stderr


def test_without_the_journal_a_line_has_time_instance_and_level():
    lines = run("service.set_up_logging('office', 'info')\nlogging.info('a')\nlogging.debug('b')\n"
                "logging.error('c', extra={'PEER': 'x'})\n").splitlines()  # fmt: skip
    assert [line.split(" ", 2)[2] for line in lines] == ["bulkvpnd@office INFO: a", "bulkvpnd@office ERROR: c"]


def test_a_stream_that_is_not_the_journal_s_is_not_taken_for_it():
    assert "hello" in run("service.set_up_logging('x', 'info')\nlogging.info('hello')", JOURNAL_STREAM="1:2")
    assert "hello" in run("service.set_up_logging('x', 'info')\nlogging.info('hello')", JOURNAL_STREAM="garbage")


def test_the_limit_holds_for_every_logger():
    text = run("service.set_up_logging('x', 'info')\n"
               "for _ in range(100): logging.getLogger('bulkvpnd.x').warning('w')")
    assert text.count("WARNING: w") == service.RATE_BURST
