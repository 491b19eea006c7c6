"""Configurations to begin with, and what comes of them."""

import pytest
from hypothesis import strategies as st

from bulkvpnd import config

SECRET = "MHcCAQEEIObhDmVnZXJ0aGVsZXNzdGhpc2lzbm90YXJlYWxrZXlhdGFsbA0K+/9z"
CERTIFICATE = f"-----BEGIN CERTIFICATE-----\n{'QUJD' * 16}\nQUJD\n-----END CERTIFICATE-----\n"
KEY = f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n{SECRET[:40]}\n-----END PRIVATE KEY-----\n"
IDENTITY = "ca = ca.crt\ncertificate = own.crt\nkey = own.key\n"
SERVER = f"mode = server\npool-ipv4 = 10.9.0.0/24\n{IDENTITY}"  # five lines
CLIENT = f"mode = client\nremote = a\n{IDENTITY}"  # five lines
TEXT = st.text(max_size=80) | st.text("0123456789.:/[]%-ag \n", max_size=30)
"""What may stand where a value should: anything, and what looks like one."""


def load(path, *flags):
    return config.load(["--config", str(path), *flags])[0]


def refused(function, *arguments, on_command_line=False):
    """The message of the ConfigurationError that it must raise."""
    with pytest.raises(config.ConfigurationError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.isprintable(), message
    assert SECRET[:8] not in message and SECRET[-8:] not in message
    assert caught.value.on_command_line is on_command_line
    return message
