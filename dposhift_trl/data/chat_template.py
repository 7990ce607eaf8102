"""What the chat template does with messages, and a template for tokenizers that have none."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..columns import PREFERENCE_COLUMNS
from .errors import DataError, reading_rows
from .messages import is_conversation, message_text, tool_calls
from .rendering import bounded, render
from .sources import Rows


# Plain text in which only the role names separate messages; answers end with EOS so that the model learns to stop
PLAIN_CHAT_TEMPLATE = (
    "{% if tools %}{{ 'Tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ (call['function'] or call) | tojson }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)

INSPECTED_ROWS = 100
PROBE = "zqprobe"  # a text that no template writes by itself
QUESTION = {"role": "user", "content": "x"}


@reading_rows()
def use_plain_chat_template(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> bool:
    """
    Set the plain chat template if the rows are conversational and the tokenizer has no chat template.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Preference rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, changed in place.

    Returns:
        `bool`: Whether the template was set.
    """
    conversational = any(is_conversation(row.get("chosen")) for row in islice(rows, INSPECTED_ROWS))
    if tokenizer.chat_template is not None or not conversational:
        return False
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return True


@reading_rows()
def check_template(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    Check that the chat template writes what the rows contain, and no more. TRL trains on what it writes, silently.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Preference rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `list[str]`: What is left out or added, one sentence each.

    Raises:
        DataError: If messages are tool calls that the template leaves out.
    """
    conversations = calls = tools = reasoning = False
    for row in first_rows(rows):
        prompt, chosen, rejected = (row[name] if is_conversation(row.get(name)) else [] for name in PREFERENCE_COLUMNS)
        conversations = conversations or bool(chosen)
        calls = calls or any(map(tool_calls, [*prompt, *chosen, *rejected]))
        tools = tools or bool(row.get("tools"))
        reasoning = reasoning or any("</think>" in message_text(message) for message in [*chosen, *rejected])
    notes: list[str] = []
    if not conversations:
        return notes
    if calls and _leaves_out([QUESTION, _call()], tokenizer):
        raise DataError(
            "The chat template must write tool calls, since the rows contain some, got one that leaves them out. Use "
            "a model whose chat template writes them, or remove these rows."
        )
    if tools and _leaves_out([QUESTION], tokenizer, tools=[_tool()]):
        notes.append("The chat template leaves out the column `tools`, so the model does not see it.")
    if reasoning and _leaves_out([QUESTION, _answer(f"<think>\n{PROBE}\n</think>\n\nx")], tokenizer):
        notes.append("The chat template leaves out the reasoning (`<think>`) of answers, so it is not trained on.")
    before, _, behind = (_written([QUESTION, _answer(PROBE)], tokenizer) or "").partition(PROBE)
    if behind.strip() and before.endswith(behind):
        notes.append(f"The chat template writes {behind!r} behind the last answer, and the model is trained on it.")
    if _adds_bos(tokenizer) and before and not before.startswith(str(tokenizer.bos_token)):
        notes.append(f"The chat template leaves out {tokenizer.bos_token!r}, which the tokenizer adds to text.")
    return notes


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


def first_rows(rows: Rows) -> Iterable[dict[str, Any]]:
    """The rows that show what a split contains: the first ones, or all if columns hold more than plain messages."""
    if isinstance(rows, Dataset) and not all(
        _is_plain(feature) for name, feature in rows.features.items() if name in PREFERENCE_COLUMNS
    ):
        return rows
    return islice(rows, INSPECTED_ROWS)


def reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template reads the text of content parts. Others fail, or write parts as Python prints them."""
    written = _written([{"role": "user", "content": [{"type": "text", "text": PROBE}]}], tokenizer) or ""
    return PROBE in written and "'text'" not in written and '"text"' not in written


def _is_plain(feature: Any) -> bool:
    message = feature.feature if isinstance(feature, List) else {"content": feature}
    return (
        isinstance(message, dict)
        and set(message) <= {"role", "content"}
        and all(value == Value("string") for value in message.values())
    )


def _answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _tool() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
    return {"type": "function", "function": {"name": PROBE, "description": "x", "parameters": parameters}}


def _call() -> dict[str, Any]:
    call = {"type": "function", "function": {"name": PROBE, "arguments": {"x": "x"}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _leaves_out(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> bool:
    written = _written(messages, tokenizer, **kwargs)
    return written is not None and PROBE not in written


def _written(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str | None:
    """What the chat template writes; `None` if there is none, or if it fails."""
    if tokenizer.chat_template is None:
        return None
    try:
        with bounded():
            return str(render(tokenizer, messages, **kwargs))
    except Exception:  # a template is a program that may refuse any conversation
        return None
