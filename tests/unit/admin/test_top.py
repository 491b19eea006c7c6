"""admin.top: the history behind its bars, and the command."""

from reports import REPORT, changed

from bulkvpnd.admin import status, top


def test_a_history_has_the_last_rates_of_those_who_are_there():
    history = top.History(3)
    for rate in range(5):
        history.add([changed(session__rate_in=rate)])
    assert list(history.rates["server", "alice", "in"]) == [2, 3, 4]
    assert list(history.rates["server", "alice", "out"]) == [1_500_000] * 3
    history.add([changed(sessions=[])])
    assert history.rates == {}


def test_once(ctl, monkeypatch):
    monkeypatch.setattr(status, "ask_all", lambda instance: ([REPORT], []))
    code, out, _ = ctl("top", "--once")
    assert code == 0 and "● server  well" in out and "alice" in out


def test_nobody_to_ask(ctl, monkeypatch):
    answers = [([REPORT], [status.StatusError("instance b does not answer")])]

    def ask_all(instance):
        if not answers:
            raise status.StatusError("no instance is running", 69)
        return answers.pop()

    monkeypatch.setattr(status, "ask_all", ask_all)
    monkeypatch.setattr(top, "PERIOD", 0.01)
    code, out, error = ctl("top")
    assert code == 69 and "instance b does not answer" in out and "no instance is running" in error
