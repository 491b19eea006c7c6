"""admin.diagnosis: whether an instance is well."""

import pytest
from reports import REPORT, changed

from bulkvpnd.admin.diagnosis import DELAY_MAX_MS, LOSS_BYTES_MIN, NOTE, PROBLEM, verdicts

CONNECTION = REPORT["sessions"][0]["connections"][0]
DEAD = [{"index": 0, "alive": True, "restarts": 0}, {"index": 1, "alive": False, "restarts": 3}]
LOST = {**CONNECTION, "bytes_retransmitted": LOSS_BYTES_MIN // 10}
SLOW = {**CONNECTION, "queue_delay_ms": DELAY_MAX_MS + 1}


def test_one_that_is_well():
    assert verdicts(REPORT) == []
    assert verdicts(changed(sessions=[])) == []  # a server without a client


@pytest.mark.parametrize(
    "report, state, text",
    [
        (changed(mode="client", sessions=[]), PROBLEM, "no connection to the server"),
        (changed(mode="client", session__connections=[]), PROBLEM, "no connection to the server"),
        (changed(mode="client", sessions=[], failure="192.0.2.1:7443: timed out"), PROBLEM,
         "no connection to the server: 192.0.2.1:7443: timed out"),
        (changed(mode="client", sessions=[], failure="a:1: TLS: SSLV3_ALERT_CERTIFICATE_REVOKED"), PROBLEM,
         "CERTIFICATE_REVOKED: the server says that this client's certificate is revoked"),
        (changed(draining=True), NOTE, "new sessions are refused"),
        (changed(workers=DEAD), PROBLEM, "no answer from worker 1"),
        (changed(session__agreed_connections=4), PROBLEM, "2 of 4 connections of alice are up"),
        (changed(session__connections=[LOST], session__agreed_connections=1, session__bytes_out=2 * LOSS_BYTES_MIN),
         NOTE, "5 % of what goes to alice is sent again"),
        (changed(session__connections=[SLOW], session__agreed_connections=1), NOTE, "packets wait 101 ms for alice"),
        (changed(offload=[]), NOTE, "no offload"),
        (changed(session__offload=["csum"]), NOTE, "alice is without offload"),
        (changed(drops={"foreign_source": 1234}), PROBLEM, "1,234 packets came from addresses"),
        (changed(drops={"tun_refused": 1}), PROBLEM, "1 packet could not be written to the TUN"),
        (changed(drops={"queue_full": 5}), NOTE, "5 packets found the send queue full"),
        (changed(drops={"stalled": 5}), NOTE, "took nothing"),
    ],
)  # fmt: skip
def test_one_that_is_not(report, state, text):
    (found,) = verdicts(report)
    assert found.state == state and text in found.text


def test_little_that_was_lost_says_nothing():
    lost = {**LOST, "bytes_retransmitted": 30_000}
    assert verdicts(changed(session__connections=[lost], session__agreed_connections=1,
                            session__bytes_out=LOSS_BYTES_MIN)) == []  # fmt: skip


def test_problems_come_first():
    found = verdicts(changed(offload=[], drops={"queue_full": 1, "foreign_source": 1}, workers=DEAD))
    assert [one.state for one in found] == [PROBLEM, PROBLEM, NOTE, NOTE]
