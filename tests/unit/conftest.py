"""What tests of several parts need."""

import contextlib
import os

import pytest
from hypothesis import settings

from bulkvpnd import cli

# The deadline of 200 ms for each example says more about the machine than about what is tested.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture
def ctl(capsys):
    """Runs bulkvpnctl with these arguments, in this process: (exit status, standard output, standard error)."""

    def run(*arguments):
        try:
            status = cli.bulkvpnctl([str(one) for one in arguments])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def unprivileged():
    """As a user who owns nothing here. A context manager, because root sets up and looks at the result."""

    @contextlib.contextmanager
    def drop():
        if os.geteuid() != 0:
            pytest.skip("needs root, to become somebody else")
        try:
            os.seteuid(1234)
        except OSError as error:
            pytest.skip(f"this namespace has no user 1234: {error}")
        try:
            yield
        finally:
            os.seteuid(0)

    return drop
