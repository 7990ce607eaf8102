"""What stops a report."""

from ..console import one_line


class ReportError(ValueError):
    """A report that cannot be written. The message is one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))
