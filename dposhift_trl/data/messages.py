"""Messages as TRL reads them: with text, a list of text parts, or tool calls and no content."""

import json
from typing import Any

from ..columns import TEMPLATE_COLUMNS


def is_conversation(value: Any) -> bool:
    """Whether a value is a non-empty list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value: Any) -> bool:
    """Whether a value has a role, and text, text parts or tool calls, next to which the content may be null."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if content is None:
        return bool(tool_calls(value))
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_text_part, content)))


def _is_text_part(value: Any) -> bool:
    # Templates without images write other parts as Python prints them, or not at all
    return isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str)


def tool_calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a message."""
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) and all(isinstance(call, dict) for call in calls) else []


def message_text(message: dict[str, Any]) -> str:
    """The text of a message: its content, or the text parts of it."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def message_as_text(message: dict[str, Any]) -> str:
    """The text of a message, then its tool calls as JSON, one per line."""
    calls = [json.dumps(call.get("function") or call, ensure_ascii=False, default=str) for call in tool_calls(message)]
    return "\n".join(filter(None, [message_text(message), *calls]))


def template_inputs(row: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is given with the messages of a row: its `tools`, and its `chat_template_kwargs`."""
    tools, kwargs = (_from_json(name, row.get(name)) for name in TEMPLATE_COLUMNS)
    return {"tools": tools, **(kwargs or {})}


def _from_json(name: str, value: Any) -> Any:
    """A value, read from JSON if it is text. A blank cell of a CSV file is nothing."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"`{name}` must be JSON, got {value[:50]!r}") from error


def is_empty(answer: str | list[dict[str, Any]]) -> bool:
    """Whether an answer has neither text nor a tool call."""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(message_text(message).strip() or tool_calls(message) for message in answer)
