"""The package as each Debian release builds, checks, installs and removes it."""

import pytest

pytestmark = pytest.mark.long


def test_two_builds_are_identical(package):
    assert package.digests[0] == package.digests[1]


def test_lintian_has_nothing_to_say(package):
    assert package.lintian == []
