"""bulkvpnd.protocol.errors: a reason for counters, and a message that is a sentence of its own."""

import pytest

from bulkvpnd.protocol.errors import Refused, RemoteError


@pytest.mark.parametrize("kind", [RemoteError, Refused])
def test_the_message_of_an_error_is_without_its_reason(kind):
    error = kind("length", "an entry is cut off")
    assert (error.reason, str(error)) == ("length", "an entry is cut off")
