"""Errors in preference data, reported to the user in one line."""

import contextlib
from collections.abc import Iterator

from datasets.exceptions import DatasetsError
from datasets.table import CastError
from pandas.errors import ParserError
from pyarrow import ArrowException

from ..console import MAX_LINE as MAX_LINE
from ..console import one_line as one_line


class DataError(ValueError):
    """Preference data that cannot be trained on. The message is one line, written for the user."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@contextlib.contextmanager
def reading_rows() -> Iterator[None]:
    """Raise a [`DataError`] in place of whatever the file readers raise while rows are read."""
    try:
        yield
    except Exception as error:
        if not _is_reader_error(error):
            raise
        raise DataError(f"The rows of `data` cannot be read: {reason(error)}. Fix the file.") from error


def reason(error: Exception) -> str:
    """Why rows cannot be read, in words for the user: what the library says, and what made it say so."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnicodeDecodeError):
            return (
                f"the file must be UTF-8 text, got the byte {cause.object[cause.start]:#04x} of another encoding. "
                "Save it as UTF-8, for example with `iconv -f latin1 -t utf-8`"
            )
        cause = cause.__cause__
    return f"{error}{': ' if error.__cause__ else ''}{error.__cause__ or ''}"


def _is_reader_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno is None  # Arrow raises it for broken Parquet files
    if isinstance(error, TypeError):
        return str(error).startswith("Couldn't cast")
    return isinstance(error, (ArrowException, CastError, DatasetsError, ParserError, UnicodeDecodeError))
