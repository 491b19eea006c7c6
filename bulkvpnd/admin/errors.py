"""What ends a command of bulkvpnctl before it is done."""


class CommandError(Exception):
    """message: one line for the administrator, empty if all has been said. status: of exit."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status
