"""What tests of several commands need."""

import pytest

from bulkvpnd import cli


@pytest.fixture
def ctl(capsys):
    """Runs bulkvpnctl with these arguments: (exit status, standard output, standard error)."""

    def run(*arguments):
        try:
            status = cli.bulkvpnctl([str(one) for one in arguments])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def pki_ctl(ctl, tmp_path):
    """The same for `bulkvpnctl pki` COMMAND in the site of tmp_path/site."""

    def run(command, *arguments, directory=tmp_path / "site"):
        return ctl("pki", command, "--directory", directory, *arguments)

    return run
