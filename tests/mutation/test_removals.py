"""The runner of removals does what it says; with --long, the tests of docs/security.md fail without their checks."""

import pytest
from remove import Tree, complaints, named, skipped
from removals import REMOVALS

NAMED = named()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return Tree(tmp_path_factory.mktemp("removals"))


def test_how_the_tests_of_a_removal_may_end():
    passed, failed, skip = ("passed", ""), ("failure", "assert False"), ("skipped", "needs root")
    at_begin, at_end = ("error", "failed on setup with ..."), ("error", "failed on teardown with ...")
    good = ((1, [failed]), (1, [passed, failed]), (1, [skip, failed]), (1, [passed, at_end]), (0, [skip]))
    bad = ((0, [passed]), (0, [passed, skip]), (1, [at_begin]), (2, []), (4, []), (5, []), (2, [failed]))
    assert all(complaints(status, {"test": cases}) == [] for status, cases in good)
    assert all(complaints(status, {"test": cases}) for status, cases in bad)
    assert complaints(None, {}) and complaints(1, {"test": [failed], "other": [passed]})
    assert complaints(1, {"test": [failed], "other": [skip]}) == []


def test_a_removal_is_run_and_put_back(tree):
    """The first of the table, which takes seconds; then nothing, with the same test."""
    removal = NAMED["C1.1"]
    for cuts, expected in ((removal.cuts, "failure"), ((), "passed")):
        _, outcomes = tree.run(removal.tests, cuts)
        assert [kind for cases in outcomes.values() for kind, _ in cases] == [expected]


@pytest.mark.long
def test_all_pass_while_nothing_is_taken_out(tree):
    tests = sorted({test for removal in REMOVALS for test in removal.tests})
    status, outcomes = tree.run(tests, timeout=3600)
    assert status == 0, {test: cases for test, cases in outcomes.items() if {kind for kind, _ in cases} - {"passed"}}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMED)
def test_without_its_check_it_fails(tree, name):
    removal = NAMED[name]
    status, outcomes = tree.run(removal.tests, removal.cuts)
    assert complaints(status, outcomes) == []
    if skipped(outcomes):
        pytest.skip(skipped(outcomes))
