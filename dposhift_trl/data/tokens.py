"""Preference rows as TRL tokenizes and truncates them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, SFTConfig, is_conversational

from .errors import DataError
from .messages import template_inputs


ANSWERS = ("chosen", "rejected")


class PairTokens(NamedTuple):
    """Token ids of a row, split where the tokenized answers depart from the tokenized prompt."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Truncation:
    """
    How a stage truncates prompt and answer.

    Args:
        max_length (`int`, *optional*):
            Maximum number of tokens in prompt and answer together. `None` keeps all.
        mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end is kept: `keep_start` truncates the answer, `keep_end` the start of the prompt first.
    """

    max_length: int | None
    mode: str = "keep_start"

    @classmethod
    def from_args(cls, args: SFTConfig | DPOConfig) -> "Truncation":
        """Truncation in the stage with these settings."""
        if isinstance(args, SFTConfig) and args.packing:
            # `bfd` discards what exceeds `max_length`; the other strategies move it into another sequence
            return cls(args.max_length if args.packing_strategy == "bfd" else None)
        return cls(args.max_length, args.truncation_mode)

    def loses_answers(self, tokens: PairTokens) -> bool:
        """Whether no token of an answer is left. TRL drops such rows."""
        return self.max_length is not None and self.mode == "keep_start" and len(tokens.prompt_ids) >= self.max_length

    def cuts_an_answer(self, tokens: PairTokens) -> bool:
        """Whether an answer does not fit: behind the whole prompt with `keep_start`, on its own with `keep_end`."""
        if self.max_length is None:
            return False
        prompt_length = len(tokens.prompt_ids) if self.mode == "keep_start" else 0
        return prompt_length + max(len(tokens.chosen_ids), len(tokens.rejected_ids)) > self.max_length


def tokenize_pair(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PairTokens:
    """
    Tokenize a row with an explicit prompt as [`~trl.DPOTrainer`] does.

    Args:
        row (`dict[str, Any]`):
            Row with `prompt`, `chosen` and `rejected`, and optionally `tools` and `chat_template_kwargs`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template if the row is conversational.

    Raises:
        DataError: If the chat template cannot render the row.
    """
    try:
        template_kwargs = template_inputs(row)  # TRL reads it for text too
        if is_conversational(row):
            prompt_ids = _render(tokenizer, row["prompt"], add_generation_prompt=True, **template_kwargs)
            answers = [_render(tokenizer, row["prompt"] + row[name], **template_kwargs) for name in ANSWERS]
            return _split(prompt_ids, *answers)
    except Exception as error:  # a template is a program that runs on whatever the row contains
        raise DataError(f"The chat template cannot render a row: {error}: {shorten(row['prompt'])}") from error
    eos = tokenizer.eos_token or ""
    texts = [row[name] if row[name].endswith(eos) else row[name] + eos for name in ANSWERS]
    prompt_ids, *answers = (tokenizer(row["prompt"] + text)["input_ids"] for text in ("", *texts))
    return _split(prompt_ids, *answers)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]
    return ids


def _split(prompt_ids: list[int], chosen: list[int], rejected: list[int]) -> PairTokens:
    start = min(_common_length(prompt_ids, answer) for answer in (chosen, rejected))
    return PairTokens(prompt_ids[:start], chosen[start:], rejected[start:])


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    shortest = min(len(left), len(right))
    return next((place for place in range(shortest) if left[place] != right[place]), shortest)


def shorten(value: Any) -> str | None:
    """A value as text of at most 200 characters that any file can hold."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:200] + "..."
