"""A chat template for tokenizers that have none."""

from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import reading_rows
from .sources import Rows


# Plain text in which only the role names separate messages; answers end with EOS so that the model learns to stop
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)


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
    conversational = any(is_conversation(row.get("chosen")) for row in islice(rows, 100))
    if tokenizer.chat_template is not None or not conversational:
        return False
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return True


def is_conversation(value: Any) -> bool:
    """Whether a value is a non-empty list of messages."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
