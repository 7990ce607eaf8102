"""The shapes that preference rows come in: conversion to TRL's shape, and what is wrong with the others."""

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from datasets import Features, IterableDataset, Json, Value
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from ..columns import PREFERENCE_COLUMNS, ROW_INDEX, STREAM_ROW_INDEX, TEMPLATE_COLUMNS, with_row_index
from .chat_template import INSPECTED_ROWS, first_rows, reads_parts
from .errors import reading_rows
from .messages import is_conversation, is_message, message_text
from .sources import Rows, column_names


ANSWERS = ("chosen", "rejected")

# ShareGPT's roles, as several data sets write them; other roles keep their names
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

# What a conversion did, for the user
PARSED = "text that holds messages as JSON became messages"
SHAREGPT = "`from` and `value` became `role` and `content`"
SINGLE = "single messages became lists of one message"
TEXT_ANSWERS = "text answers to a conversation became messages of the assistant"
FLATTENED = "content parts became text, since the chat template does not read parts"
NULLS = "null keys inside tools and tool calls, as Parquet adds them, were removed"
ONE_CHOSEN = "lists of one chosen answer became that answer"
SEVERAL = "each rejected answer of a list became a pair"
CHANGES = (PARSED, SHAREGPT, SINGLE, TEXT_ANSWERS, FLATTENED, NULLS, ONE_CHOSEN, SEVERAL)

VERSION = 2  # part of the key of cached rows; increase it if rows are converted in another way

WANTED = "text or a list of messages with `role` and `content`"


@reading_rows()
def convert(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, list[str]]:
    """
    Convert rows to the shape that TRL trains on: text, or lists of messages.

    The first rows decide whether rows are converted; all rows do if their columns hold more than text and plain
    messages. Each row is then converted by itself, and a row of no known shape is left for the audit.

    If `rejected` lists several answers, each becomes a pair. Numbers of pairs are unique: the first pair of a row has
    the row's number, the second one that number plus n, the third one plus 2 n, and so on, where n is one more than
    the largest number, or one billion in a stream.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Rows from [`load_preferences`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, whose chat template decides whether content parts become text.

    Returns:
        `tuple[Dataset or IterableDataset, list[str]]`: The rows, and what was done to them; the same object if there
        was nothing to do.
    """
    names = column_names(rows)
    if not set(ANSWERS) <= set(names):
        return rows, []
    start = list(islice(rows, INSPECTED_ROWS))
    conversion = _Conversion(
        parses=tuple(name for name in PREFERENCE_COLUMNS if _holds_json(row.get(name) for row in start)),
        fills_nulls=tuple(name for name, feature in (rows.features or {}).items() if not _is_exact(feature)),
        flattens=not reads_parts(tokenizer),
    )
    changes: set[str] = set()
    of_text = set(PREFERENCE_COLUMNS)
    for row in first_rows(rows):
        for pair in conversion.pairs(row, changes):
            of_text = {name for name in of_text if pair.get(name) is None or isinstance(pair[name], str)}
    notes = [change for change in CHANGES if change in changes]
    if not notes:
        return rows, []
    if SEVERAL in changes:
        rows = with_row_index(rows)
    if isinstance(rows, IterableDataset):
        # One row at a time, so that none is read ahead
        return rows.map(conversion, batched=True, batch_size=1), notes
    if ROW_INDEX in rows.column_names:
        conversion = replace(conversion, step=max(rows[ROW_INDEX]) + 1)
    features = Features({name: _feature_after(name, rows.features[name], of_text) for name in rows.column_names})
    return rows.map(conversion, batched=True, features=features), notes


@dataclass(frozen=True)
class _Conversion:
    """
    Converts rows, for `map` with `batched=True`.

    Args:
        parses (`tuple[str]`):
            Columns whose text is JSON.
        fills_nulls (`tuple[str]`):
            Columns in which a null may stand for a key that a message lacks.
        flattens (`bool`):
            Whether content parts become text.
        step (`int`):
            Difference between the numbers of two pairs of a row.
        version (`int`):
            Version of the conversion.
    """

    parses: tuple[str, ...]
    fills_nulls: tuple[str, ...]
    flattens: bool
    step: int = 10**9
    version: int = VERSION

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        pairs = [pair for row in rows for pair in self.pairs(row, set())]
        return {name: [pair[name] for pair in pairs] for name in batch}

    def pairs(self, row: dict[str, Any], changes: set[str]) -> list[dict[str, Any]]:
        """The pairs of a row. What was done is added to `changes`."""
        row = dict(row)
        for name in self.parses:
            row[name] = _parsed(row[name], changes)
        for name in TEMPLATE_COLUMNS:
            if name in self.fills_nulls and isinstance(row.get(name), (dict, list)):
                row[name] = _without_nulls(row[name], changes)
        if _is_list_of_one_answer(row["chosen"]):
            changes.add(ONE_CHOSEN)
            row["chosen"] = row["chosen"][0]
        pairs = []
        for place, answer in enumerate(_rejected_answers(row, changes)):
            pair = {**row, "rejected": answer}
            for name in (ROW_INDEX, STREAM_ROW_INDEX):
                if name in row:
                    pair[name] = row[name] + place * self.step
            for name in PREFERENCE_COLUMNS:
                if name in row:
                    pair[name] = self._messages(name, pair[name], changes)
            if is_conversation(pair.get("prompt")):
                for name in ANSWERS:
                    if isinstance(pair[name], str):
                        changes.add(TEXT_ANSWERS)
                        pair[name] = [{"role": "assistant", "content": pair[name]}]
            pairs.append(pair)
        return pairs

    def _messages(self, name: str, value: Any, changes: set[str]) -> Any:
        """A list of messages, if the value is one in another shape; otherwise the value."""
        if _resembles_message(value):
            changes.add(SINGLE)
            value = [value]
        if not isinstance(value, list) or not all(map(_resembles_message, value)):
            return value
        return [self._message(name, message, changes) for message in value]

    def _message(self, name: str, message: dict[str, Any], changes: set[str]) -> dict[str, Any]:
        if not isinstance(message.get("role"), str):
            changes.add(SHAREGPT)
            message = _from_sharegpt(message)
        if name in self.fills_nulls:
            message = _without_nulls(message, changes)
        if self.flattens and is_message(message) and isinstance(message.get("content"), list):
            changes.add(FLATTENED)
            message = {**message, "content": message_text(message)}
        return message


def _without_nulls(value: Any, changes: set[str]) -> Any:
    """A message, tools, or keywords without the nulls inside, which templates would write."""
    # transformers removes the outermost ones of a message by itself
    kept = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value
    without = remove_none_values(value)
    if without == kept:
        return value
    changes.add(NULLS)
    return without


def _resembles_message(value: Any) -> bool:
    """Whether a value is a message, of TRL's or of ShareGPT's kind, whatever its content."""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("role"), str) or (isinstance(value.get("from"), str) and "value" in value)


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    others = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    role = message["from"]
    calls = _calls(message["value"]) if role == "function_call" else []
    content = {"content": "", "tool_calls": calls} if calls else {"content": message["value"]}
    return {"role": SHAREGPT_ROLES.get(role, role), **content, **others}


def _calls(text: Any) -> list[dict[str, Any]]:
    """Tool calls that are written as JSON: one with `name` and `arguments`, or a list of them."""
    value = _loads(text) if isinstance(text, str) else text
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _rejected_answers(row: dict[str, Any], changes: set[str]) -> list[Any]:
    """Each answer of a list of rejected answers; a list of messages is one answer if `chosen` is a list too."""
    value = row["rejected"]
    if not isinstance(value, list) or not value:
        return [value]
    of_texts = all(answer is None or isinstance(answer, (str, list)) for answer in value)
    is_single = isinstance(row["chosen"], (str, dict))
    of_messages = is_single and len(value) > 1 and all(map(_resembles_message, value))
    if not of_texts and not of_messages:
        return [value]
    changes.add(SEVERAL)
    return value


def _is_list_of_one_answer(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list))


# JSON text


def _holds_json(values: Iterable[Any]) -> bool:
    """Whether all values are text or null, and a message or a list of messages can be read from most of the text."""
    texts = [value for value in values if value is not None]
    if not all(isinstance(text, str) for text in texts):
        return False
    holds = [_messages_in(text) is not None for text in texts if text.strip()]
    return 2 * sum(holds) > len(holds)


def _parsed(text: Any, changes: set[str]) -> Any:
    """The messages that a text holds; null if it is blank, empty, or broken JSON; any other text as it is."""
    if not isinstance(text, str):
        return text
    messages = _messages_in(text)
    if messages is None:
        is_text = _loads(text) if _begins_json(text) else text.strip()
        return text if is_text else None
    changes.add(PARSED)
    return messages


def _messages_in(text: str) -> Any:
    """The message or the list of messages that a text holds, or `None`."""
    value = _loads(text)
    messages = value if isinstance(value, list) else [value]
    return value if messages and all(map(_resembles_message, messages)) else None


def _begins_json(text: str) -> bool:
    return text.lstrip().startswith(("[", "{"))


def _loads(text: str) -> Any:
    if not _begins_json(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())  # as pandas writes lists to CSV
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


# Types of columns


def _is_exact(feature: Any) -> bool:
    """Whether a column holds each row as it was written, without nulls for keys that only other rows have."""
    return isinstance(getattr(feature, "feature", feature), (Json, Value))


def _feature_after(name: str, feature: Any, of_text: set[str]) -> Any:
    if name in PREFERENCE_COLUMNS:
        return Value("string") if name in of_text and "Json" not in repr(feature) else Json()
    return Json() if name in TEMPLATE_COLUMNS and not _is_exact(feature) else feature


# What is wrong with a row of no known shape


def wrong_shape(row: Mapping[str, Any]) -> str | None:
    """
    Say what keeps a converted row from being a preference row.

    Args:
        row (`Mapping[str, Any]`):
            Row with `chosen` and `rejected`, and `prompt` unless it is implicit.

    Returns:
        `str` or `None`: A sentence with the column, what it holds and what is wanted; `None` if the shape is right.
    """
    for name in PREFERENCE_COLUMNS:
        value = row.get(name)
        if (name in row or name in ANSWERS) and not isinstance(value, str) and not is_conversation(value):
            return f"`{name}` must be {WANTED}, got {_found(value)}."
    chosen, rejected = (row[name] for name in ANSWERS)
    if isinstance(chosen, str) != isinstance(rejected, str):
        return (
            "`chosen` and `rejected` must both be text or both be lists of messages, got "
            f"{_found(chosen)} and {_found(rejected)}."
        )
    if isinstance(chosen, str) and not isinstance(row.get("prompt", ""), str):
        return f"`prompt` must be text next to answers that are text, got {_found(row['prompt'])}."
    if "prompt" not in row and not isinstance(chosen, str) and chosen[0] != rejected[0]:
        return (
            "`chosen` and `rejected` must start with the same messages, which are the prompt, got different ones. Add "
            "a column `prompt`, or map it with `data.columns`."
        )
    return None


def _found(value: Any) -> str:
    """A value in a few words: its type, and its keys."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(str, value))}" if value else "an object without keys"
    if not isinstance(value, list):
        return f"{value!r}"
    if not value:
        return "an empty list"
    if is_conversation(value):
        return "a list of messages"
    odd = next(item for item in value if not is_message(item))
    if _resembles_message(odd) and odd.get("content", "") is None:
        return f"a list with a message by {odd['role']!r} whose `content` is null, without a tool call"
    if _resembles_message(odd) and "content" in odd:
        return f"a list with a message by {odd['role']!r} whose `content` is {_found(odd['content'])}"
    return f"a list of {_found(odd)}"
