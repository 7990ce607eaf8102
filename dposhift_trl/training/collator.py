"""Adds the row indices, and the layout that reads shared tokens once, to batches of pairs."""

from collections.abc import Callable
from typing import Any

import torch

from ..columns import ROW_INDEX, SHARED_PROMPT, STREAM_ROW_INDEX
from ..scoring import PairLayout


class PairCollator:
    """
    Wraps a collator of preference rows and adds the row indices and, optionally, the [`PairLayout`] to each batch.

    For iterable datasets, rank 0 may collate for all processes, and Accelerate slices each tensor along dim 0. Their
    batches therefore hold tensors only, with the row index of each chosen completion, then of each rejected one.

    Args:
        collator (`Callable`):
            [`~trl.trainer.dpo_trainer.DataCollatorForPreference`], or a collator with the same output.
        shares_prompts (`bool`, *optional*, defaults to `False`):
            Whether to add the layout, under the key `shared_prompt`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], shares_prompts: bool = False):
        self.collator = collator
        self.shares_prompts = shares_prompts

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not set yet while a worker unpickles
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if STREAM_ROW_INDEX in examples[0]:
            batch[ROW_INDEX] = torch.tensor([example[STREAM_ROW_INDEX] for example in examples] * 2)
            return batch
        batch[ROW_INDEX] = torch.tensor([example.get(ROW_INDEX, -1) for example in examples])
        if self.shares_prompts:
            batch[SHARED_PROMPT] = PairLayout.from_batch(batch)
        return batch
