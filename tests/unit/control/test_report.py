"""control.status.session_report: what a report says of a session."""

from bulkvpnd.control.status import session_report


def test_a_session_without_a_connection_keeps_what_it_carried():
    report = session_report({"identity": "alice"}, [], {"bytes_out": 7, "frames_in": 2, "something_else": 1})
    assert report["identity"] == "alice" and report["connections"] == []
    assert (report["bytes_out"], report["frames_in"], report["bytes_in"]) == (7, 2, 0)
    assert "something_else" not in report


def test_a_session_is_the_sum_of_its_connections_and_of_those_before_them():
    connections = [
        {"index": 2, "bytes_out": 100, "rate_in": 8, "retransmits": 1},
        {"index": 0, "bytes_out": 20, "rate_in": 80, "retransmits": 2},
        {"index": 1},  # its worker did not answer
    ]
    report = session_report({}, connections, {"bytes_out": 3, "retransmits": 50})
    assert report["bytes_out"] == 123
    # Of the present only.
    assert (report["rate_in"], report["rate_out"], report["retransmits"]) == (88, 0, 3)
    assert [one["index"] for one in report["connections"]] == [0, 1, 2]
