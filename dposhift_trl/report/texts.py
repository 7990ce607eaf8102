"""Prompts and answers as plain text of bounded length, and numbers as text."""

import json
from collections.abc import Mapping
from typing import Any

from ..data.messages import message_as_text, tool_calls


LONGEST_TEXT = 4_000  # characters of a prompt or answer
LONGEST_NAME = 60


def as_text(content: Any) -> str:
    """A prompt or an answer, text or conversation, as plain text of bounded length."""
    if isinstance(content, list):
        text = "\n".join(map(as_text, content))
    elif isinstance(content, dict) and "role" in content:
        has_calls = bool(tool_calls(content))
        text = f"{content['role']}: {message_as_text(content) if has_calls else as_text(content.get('content'))}"
    elif isinstance(content, dict) and isinstance(content.get("text"), str):
        text = content["text"]
    elif content is None:
        text = "(missing)"
    else:
        text = content if isinstance(content, str) else json.dumps(content, default=str)
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT} more characters are not shown)"
    return text


def opening(content: Any, length: int) -> str:
    """The first words of a prompt, on one line."""
    words = " ".join(as_text(content).split())
    return words if len(words) <= length else f"{words[:length]} …"


def row_name(index: Any, row: Mapping[str, Any]) -> str:
    """A row by its number, of several sources with the source, and by its id if it has one."""
    number, source, identity = row.get("row", index), row.get("source"), row.get("id")
    return (
        f"Row {number}"
        + (f" of {opening(source, LONGEST_NAME)}" if source is not None else "")
        + (f", id {opening(str(identity), LONGEST_NAME)}" if identity is not None else "")
    )


def plain(value: float, digits: int = 2) -> str:
    """A number with a minus sign that is as wide as a plus."""
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """A number that always has its sign."""
    return f"{value:+z.{digits}f}".replace("-", "−")
