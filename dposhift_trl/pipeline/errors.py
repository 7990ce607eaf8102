"""What ends a run before its time. Each message is written for the user."""

RUN_AGAIN = "Run the same command again to continue."


class RunError(RuntimeError):
    """The run cannot start or continue."""


class WriteError(RuntimeError):
    """The disk is full or cannot be written, or a model cannot be pushed to the Hub."""
