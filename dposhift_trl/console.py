"""What the commands print. Names of files, models and columns, and texts of a data set, never act on a terminal."""

import os
import stat
import sys
import textwrap
import warnings


MAX_LINE = 4_000  # characters of a message; the longest useful one lists transformers' optimizers


def printable(text: object) -> str:
    r"""
    Text as one line for a terminal: line breaks and all other characters that are not printable are escaped.

    >>> printable("größer\x1b[31m\n")
    'größer\\x1b[31m\\n'
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def one_line(message: str) -> str:
    """Format a message for a terminal: a single line of bounded length, with unprintable characters escaped."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} [...] {line[-MAX_LINE // 2 :]}"


def ignore_warnings() -> None:
    """Do not show warnings that no setting of a user caused."""
    # TRL 1.16 reads a name that transformers has deprecated in every forward pass
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    # transformers pins memory by default, and torch says at each pass over the rows that a CPU needs none
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set", category=UserWarning)


_line_is_open = False  # whether the terminal shows a line from `rewrite`


def say(*lines: object) -> None:
    """Print lines."""
    _close_line()
    for line in lines:
        print(printable(line), flush=True)


def complain(*lines: object) -> None:
    """Print lines to stderr."""
    _close_line()
    for line in lines:
        print(printable(line), file=sys.stderr, flush=True)


def rewrite(line: object) -> None:
    """Print over the last line of a terminal, which stays open until the next line is printed."""
    global _line_is_open
    print(f"\r\033[K{printable(line)}", end="", flush=True)
    _line_is_open = bool(line)


def _close_line() -> None:
    if _line_is_open:
        rewrite("")


def is_terminal() -> bool:
    """Whether stdout is a terminal on which a line can be rewritten."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def columns() -> int | None:
    """Width of the terminal that shows stdout, through a pipe too; `None` if it is a file or there is no terminal."""
    try:
        if stat.S_ISREG(os.fstat(1).st_mode):
            return None
    except OSError:
        return None
    for descriptor in (1, 2):
        try:
            return os.get_terminal_size(descriptor).columns or None
        except OSError:
            continue
    return None


def wrapped(text: str, indent: int = 0) -> list[str]:
    """A paragraph as lines that fit the terminal, later ones indented; a single line if there is none."""
    width = columns()
    if width is None:
        return [text]
    hanging = " " * min(indent, width // 2)
    return textwrap.wrap(text, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
