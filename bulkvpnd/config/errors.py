"""The error that everything about configurations raises, and how it shows what somebody wrote."""

import os
import re


class ConfigurationError(Exception):
    """A configuration that cannot be used.

    message: one line for the administrator. on_command_line: a flag is to blame, not a file. status: of exit.
    """

    def __init__(self, message, on_command_line=False, status=os.EX_CONFIG):
        # Arguments and file names may hold control characters; the message stays one line.
        super().__init__("".join(one if one.isprintable() else ascii(one)[1:-1] for one in message))
        self.on_command_line = on_command_line
        self.status = status


def escaped(value):
    """A value as a message shows it: on one line, escaped and cut."""
    value = value.encode("unicode_escape").decode("ascii")
    return value if len(value) <= 64 else value[:61] + "..."


def shown_line(text):
    """Like `escaped`, but nothing of what may be a key that was pasted without its <key> line."""
    return "(hidden)" if re.search(r"[A-Za-z0-9+/]{40}", text) else escaped(text)
