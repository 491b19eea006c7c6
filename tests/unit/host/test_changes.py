"""What is undone, in which order, and what a crash left."""

import pytest

from bulkvpnd.host.changes import Changes


class Ledger:
    def __init__(self, said):
        self._said = said

    def recover(self):
        self._said.append("recover")

    def restore(self):
        self._said.append("restore")


class Firewall:
    def __init__(self, said):
        self._said = said

    def undo(self):
        self._said.append("table gone")


class Change:
    def __init__(self, said, name, fails=False):
        self._said, self._name, self._fails = said, name, fails

    def apply(self, value=None):
        self._said.append(f"apply {self._name}")
        if self._fails:
            raise OSError(self._name)
        return value

    def undo(self):
        self._said.append(f"undo {self._name}")


def test_the_reverse_of_the_order():
    said = []
    with Changes(Ledger(said), Firewall(said)) as changes:
        assert changes.make(Change(said, "a"), 7) == 7
        changes.make(Change(said, "b"))
    assert said == ["recover", "undo a", "apply a", "undo b", "apply b", "undo b", "undo a", "table gone", "restore"]


def test_a_failure_half_way_undoes_that_too():
    said = []
    with pytest.raises(OSError), Changes(Ledger(said), Firewall(said)) as changes:
        changes.make(Change(said, "a"))
        changes.make(Change(said, "b", fails=True))
    assert said[-4:] == ["undo b", "undo a", "table gone", "restore"]


def test_what_is_not_wanted_any_more_is_only_cleaned():
    said = []
    with Changes(Ledger(said), Firewall(said)) as changes:
        assert changes.make(Change(said, "a"), wanted=False) is None
    assert said == ["recover", "undo a", "table gone", "restore"]
