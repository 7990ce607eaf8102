"""What the commands print. Names of files, models and columns, and texts of a data set, never act on a terminal."""

import sys


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


def say(*lines: object) -> None:
    """Print lines."""
    for line in lines:
        print(printable(line), flush=True)


def complain(*lines: object) -> None:
    """Print lines to stderr."""
    for line in lines:
        print(printable(line), file=sys.stderr, flush=True)


def rewrite(line: object) -> None:
    """Print over the last line of a terminal, which stays open."""
    print(f"\r\033[K{printable(line)}", end="", flush=True)
