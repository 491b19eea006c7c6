"""Errors by blame."""


class RemoteError(Exception):
    """The other end sent what it must not; its connection ends, nothing else does.

    reason: a word from a fixed list, for counters and the CLOSE frame. The message is ours and holds no peer's bytes.
    """

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class Refused(Exception):
    """The server answered HELLO with REFUSE. reason: one of handshake.REFUSALS."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason
