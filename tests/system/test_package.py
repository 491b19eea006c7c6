"""The package as each Debian release builds, checks, installs and removes it."""

import pytest

pytestmark = pytest.mark.long


def test_two_builds_are_identical(package):
    assert package.digests[0] == package.digests[1]


def test_lintian_has_nothing_to_say(package):
    assert package.lintian == []


def test_a_build_passes_its_own_tests(builder, clone, package):
    """The unit tests, with the release's own Python and versions of everything; they leave no trace in the package."""
    assert builder.digest(builder.build(clone, "/build/checked")) == package.digests[0]
