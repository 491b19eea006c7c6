"""bulkvpnctl multipath show: what it makes of the reports of several instances."""

import io
import json

import pytest
import rich.console

from bulkvpnd.admin import multipath, status


def report(instance, prefix="10.2.0.0/16", up=True, members=(), why_not=None, **more):
    device = f"bulk-{instance}"
    return {"instance": instance, "multipath": [
        {"prefix": prefix, "device": device, "weight": 1, "source": None, "up": up, "why_not": why_not,
         "members": {**dict(members), **({device: 1} if up else {})}, **more}
    ]}  # fmt: skip


def test_each_prefix_has_its_members():
    found = multipath.collect([
        report("b", members={"bulk-a": 1}), report("a", weight=3, source="10.1.0.1"), report("c", "fd02::/48"),
        {"instance": "none", "multipath": []}, {"instance": "before an upgrade"},
    ])  # fmt: skip
    assert [(one["prefix"], [member["instance"] for member in one["members"]]) for one in found] == [
        ("10.2.0.0/16", ["a", "b"]), ("fd02::/48", ["c"])
    ]  # fmt: skip
    assert found[0]["members"][0] == {"instance": "a", "device": "bulk-a", "weight": 3, "source": "10.1.0.1",
                                      "up": True, "why_not": None}


def test_a_member_that_does_not_answer_is_shown():
    (found,) = multipath.collect([report("a", members={"bulk-hangs": 7})])
    assert found["members"][1] == {"instance": None, "device": "bulk-hangs", "weight": 7, "source": None, "up": True,
                                   "why_not": None}


def test_shown_as_a_table():
    stream = io.StringIO()
    found = multipath.collect([report("a"), report("b", up=False, why_not="the tunnel is [red]down")])
    multipath.show(found, rich.console.Console(file=stream, width=100))
    text = stream.getvalue()
    assert "10.2.0.0/16" in text and "down: the tunnel is [red]down" in text
    assert [line.split()[0] for line in text.splitlines() if "bulk-" in line] == ["a", "b"]


def test_nothing_to_show():
    stream = io.StringIO()
    multipath.show([], rich.console.Console(file=stream, width=100))
    assert "no instance that runs here has the option multipath" in stream.getvalue()


@pytest.fixture
def run(monkeypatch, tmp_path, ctl):
    """Runs `multipath show` with instances that answer as they are told."""

    def run(answers, *arguments):
        def ask(path):
            answer = answers[path.parent.name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        for name in answers:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / status.SOCKET_NAME).touch()
        monkeypatch.setattr(status, "RUNTIME_DIRECTORY", tmp_path)
        monkeypatch.setattr(status, "ask", ask)
        return ctl("multipath", "show", *arguments)

    return run


def test_json(run):
    code, out, _ = run({"a": report("a")}, "--json")
    assert code == 0 and [one["prefix"] for one in json.loads(out)] == ["10.2.0.0/16"]


def test_one_that_hangs_does_not_hide_the_others(run):
    code, out, error = run({"a": report("a"), "b": status.StatusError("instance b does not answer")})
    assert code == 1 and "bulk-a" in out and "instance b does not answer" in error


def test_nobody_runs(run):
    code, _, error = run({})
    assert code == 1 and "no instance is running" in error
