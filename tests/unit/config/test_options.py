"""bulkvpnd.config.options: the rows of the table are right in themselves."""

import contextlib

import pytest
from examples import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkvpnd import config


@pytest.mark.parametrize("option", config.OPTIONS, ids=lambda option: option.name)
def test_every_default_is_a_value_and_every_help_says_it(option):
    if option.default is not None:
        option.parse(option.default)
        assert option.default in config.help_text(option)
    assert option.help and option.metavar and option.role in (None, "server", "client")


@given(st.sampled_from(config.OPTIONS), TEXT)
@settings(deadline=None, max_examples=1000)
def test_any_text_is_a_value_or_a_value_error(option, raw):
    with contextlib.suppress(ValueError):
        option.parse(raw)
