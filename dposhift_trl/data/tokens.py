"""Preference rows as tokens, and how a stage truncates them."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trl import DPOConfig, SFTConfig


class PairTokens(NamedTuple):
    """
    Token ids of a row, split where the tokenized answers depart from the tokenized prompt.

    Args:
        prompt_ids, chosen_ids, rejected_ids (`list[int]`):
            Prompt and answers as in [`~trl.DPOTrainer`], with one end of the prompt for both answers.
    """

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
        return self.max_length is not None and self.length_needed(tokens) > self.max_length

    def length_needed(self, tokens: PairTokens) -> int:
        """The `max_length` with which no answer is cut."""
        prompt_length = len(tokens.prompt_ids) if self.mode == "keep_start" else 0
        return prompt_length + max(len(tokens.chosen_ids), len(tokens.rejected_ids))

    def read(self, tokens: PairTokens) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
        """What is left of prompt and chosen answer, and of prompt and rejected answer."""
        return self._read(tokens.prompt_ids, tokens.chosen_ids), self._read(tokens.prompt_ids, tokens.rejected_ids)

    def _read(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        if self.max_length is None:
            return prompt, answer
        if self.mode == "keep_start":
            return prompt[: self.max_length], answer[: max(self.max_length - len(prompt), 0)]
        answer = answer[-self.max_length :]
        return prompt[max(len(prompt) + len(answer) - self.max_length, 0) :], answer

    def digest(self, tokens: PairTokens) -> bytes:
        """Hash of what training reads of a row, or of all its tokens if no answer is left."""
        digest = hashlib.blake2b(digest_size=16)
        whole = Truncation(None) if self.loses_answers(tokens) else self
        for ids in (ids for side in whole.read(tokens) for ids in side):
            digest.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
        return digest.digest()


def split_pair(prompt_ids: list[int], chosen: list[int], rejected: list[int]) -> tuple[PairTokens, int, bool]:
    """
    Split tokenized answers where they depart from the tokenized prompt.

    Args:
        prompt_ids, chosen, rejected (`list[int]`):
            Token ids of the prompt, and of the prompt with each answer.

    Returns:
        `tuple[PairTokens, int, bool]`: Prompt and answers as in [`~trl.DPOTrainer`]; the number of tokens before the
        chosen answer as in [`~trl.SFTTrainer`], which sees no other; whether the prompt is a prefix of both answers.
    """
    starts = [_common_length(prompt_ids, answer) for answer in (chosen, rejected)]
    start = min(starts)
    return PairTokens(prompt_ids[:start], chosen[start:], rejected[start:]), starts[0], start == len(prompt_ids)


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    if left == right[: len(left)]:
        return len(left)
    shortest = min(len(left), len(right))
    return next((place for place in range(shortest) if left[place] != right[place]), shortest)


def shorten(value: Any) -> str | None:
    """A value as text of at most 200 characters that any file can hold."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:200] + "..."
