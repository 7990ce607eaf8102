"""What ends a run before its time. Each message is one line, written for the user."""

from ..console import one_line


RUN_AGAIN = "Run the same command again to continue."


class RunError(RuntimeError):
    """The run cannot start or continue. Each line of the message is one mistake."""

    def __init__(self, *mistakes: str):
        super().__init__("\n".join(map(one_line, mistakes)))


class WriteError(RuntimeError):
    """The disk is full or cannot be written, or a model cannot be pushed to the Hub."""

    def __init__(self, message: str):
        super().__init__(one_line(message))
