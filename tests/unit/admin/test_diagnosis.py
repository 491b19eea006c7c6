"""admin.diagnosis: whether an instance is well."""

import pytest
from reports import REPORT, changed

from bulkvpnd.admin.diagnosis import DELAY_MAX_MS, LOSS_BYTES_MIN, findings

CONNECTION = REPORT["sessions"][0]["connections"][0]
DEAD = [{"index": 0, "alive": True, "restarts": 0}, {"index": 1, "alive": False, "restarts": 3}]
LOST = {**CONNECTION, "bytes_retransmitted": LOSS_BYTES_MIN // 10}
SLOW = {**CONNECTION, "queue_delay_ms": DELAY_MAX_MS + 1}


def test_one_that_is_well():
    assert findings(REPORT) == []
    assert findings(changed(sessions=[])) == []  # a server without a client


@pytest.mark.parametrize(
    "report, is_fault, text",
    [
        (changed(mode="client", sessions=[]), True, "no connection to the server"),
        (changed(mode="client", session__connections=[]), True, "no connection to the server"),
        (changed(mode="client", sessions=[], failure="192.0.2.1:7443: timed out"), True,
         "no connection to the server: 192.0.2.1:7443: timed out"),
        (changed(draining=True), False, "new sessions are refused"),
        (changed(workers=DEAD), True, "no answer from worker 1"),
        (changed(session__agreed_connections=4), True, "2 of 4 connections of alice are up"),
        (changed(session__connections=[LOST], session__agreed_connections=1, session__bytes_out=2 * LOSS_BYTES_MIN),
         False, "5 % of what goes to alice is sent again"),
        (changed(session__connections=[SLOW], session__agreed_connections=1), False, "packets wait 101 ms for alice"),
        (changed(offload=[]), False, "no offload"),
        (changed(session__offload=["csum"]), False, "alice is without offload"),
        (changed(drops={"foreign_source": 1234}), True, "1,234 packets came from addresses"),
        (changed(drops={"tun_refused": 1}), True, "refused by the kernel"),
        (changed(drops={"queue_full": 5}), False, "5 packets found the send queue full"),
        (changed(drops={"stalled": 5}), False, "took nothing"),
    ],
)  # fmt: skip
def test_one_that_is_not(report, is_fault, text):
    (found,) = findings(report)
    assert found.is_fault is is_fault and text in found.text


def test_little_that_was_lost_says_nothing():
    lost = {**LOST, "bytes_retransmitted": 30_000}
    assert findings(changed(session__connections=[lost], session__agreed_connections=1,
                            session__bytes_out=LOSS_BYTES_MIN)) == []  # fmt: skip


def test_faults_come_first():
    found = findings(changed(offload=[], drops={"queue_full": 1, "foreign_source": 1}, workers=DEAD))
    assert [one.is_fault for one in found] == [True, True, False, False]
