"""What tests of several commands need."""

import pytest


@pytest.fixture
def pki_ctl(ctl, tmp_path):
    """As ctl, for `bulkvpnctl pki` COMMAND in the site of tmp_path/site."""

    def run(command, *arguments, directory=tmp_path / "site"):
        return ctl("pki", command, "--directory", directory, *arguments)

    return run
