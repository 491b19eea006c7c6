"""What the log says of expiries, at times that are arguments: when first, how often, and when not."""

import datetime
import logging

import pytest

from bulkvpnd import events, pki
from bulkvpnd.control.expiry import EXPIRED_PERIOD, KINDS, WARNING_PERIOD, Expiry

END = datetime.datetime(2030, 1, 31, tzinfo=datetime.timezone.utc)
DAY, SECOND = datetime.timedelta(days=1), datetime.timedelta(seconds=1)
EVENTS = {"certificate": "certificate-expires", "ca": "authority-expires", "crl": "revocations-expired"}


@pytest.fixture
def said(caplog):
    """Runs a check and returns what it logged: [(level, text)]."""

    def run(expiry, expiries, now):
        caplog.clear()
        expiry.check(expiries, now)
        return [(record.levelno, record.getMessage()) for record in caplog.records]

    return run


def test_nothing_is_said_too_early(said):
    expiry, ends = Expiry(), dict.fromkeys(KINDS, END)
    assert said(expiry, ends, END - pki.WARNING_TIME - SECOND) == []
    assert len(said(expiry, ends, END - pki.WARNING_TIME)) == len(KINDS)


@pytest.mark.parametrize("option", KINDS)
def test_a_warning_each_day_then_an_error_each_hour(said, caplog, option):
    expiry, ends = Expiry(), {option: END}
    first = END - 10 * DAY
    ((level, text),) = said(expiry, ends, first)
    assert level == logging.WARNING and text.startswith(f"{KINDS[option].name} expires in 10 days; ")
    assert "bulkvpnctl" in text and "NAME" not in text
    assert caplog.records[0].MESSAGE_ID == events.ID[EVENTS[option]]
    assert said(expiry, ends, first + WARNING_PERIOD - SECOND) == []
    assert "expires in 9 days" in said(expiry, ends, first + WARNING_PERIOD)[0][1]

    assert len(said(expiry, ends, END)) == 1, "until its last moment it is good"
    ((level, text),) = said(expiry, ends, END + SECOND)
    assert level == logging.ERROR and f"{KINDS[option].name} has expired, so " in text
    assert caplog.records[0].MESSAGE_ID == events.ID[EVENTS[option]]
    assert said(expiry, ends, END + EXPIRED_PERIOD) == []
    assert len(said(expiry, ends, END + EXPIRED_PERIOD + SECOND)) == 1


def test_each_has_its_own_time(said):
    expiry = Expiry()
    ends = {"certificate": END, "ca": END + 5 * DAY}
    first = END - pki.WARNING_TIME
    assert "end expires" in said(expiry, ends, first)[0][1]
    ((_, text),) = said(expiry, ends, first + 5 * DAY - SECOND)
    assert "of this end expires in 25 days" in text
    ((_, text),) = said(expiry, ends, first + 5 * DAY)
    assert "of the authority expires in 30 days" in text


def test_another_that_ends_soon_too_is_told_of_at_once_and_a_good_one_never(said):
    expiry, now = Expiry(), END - DAY
    assert said(expiry, {"crl": END}, now)
    assert said(expiry, {"crl": END + DAY}, now + SECOND) == [
        (logging.WARNING, "the revocation list expires in 1 days; make a new one with: bulkvpnctl pki crl")
    ]
    assert said(expiry, {"crl": END + 90 * DAY}, now + 2 * DAY) == []
    assert said(expiry, {}, now + 2 * DAY) == []
