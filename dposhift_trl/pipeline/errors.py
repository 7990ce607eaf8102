"""What ends a run before its time. Each message is one line, written for the user."""

from ..console import one_line


RUN_AGAIN = "Run the same command again to continue."


class RunError(RuntimeError):
    """The run cannot start or continue."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class WriteError(RuntimeError):
    """The disk is full or cannot be written."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Terminated(BaseException):
    """SIGTERM arrived and everything is saved. Not an `Exception`, so that no library handles it."""
