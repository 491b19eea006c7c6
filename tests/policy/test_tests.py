"""The tests themselves: what pytest takes for granted."""

import collections
import pathlib

TESTS = pathlib.Path(__file__).parents[1]


def test_no_two_files_have_one_name():
    """Without packages pytest takes them for one module, and collects neither when both are asked for."""
    names = collections.Counter(file.name for file in TESTS.rglob("*.py") if file.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
