"""Errors by blame."""


class RemoteError(Exception):
    """The other end sent what it must not; its connection ends, nothing else does.

    reason: one word, for what kind of thing that was. The message is ours and holds no peer's bytes.
    """

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class Refused(Exception):
    """The server does not take a client, and its answer to HELLO is REFUSE. reason: one of handshake.REFUSALS.

    Raised at both ends: where it is decided, and where it is read.
    """

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason
