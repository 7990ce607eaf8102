"""Batches of pairs that know which rows they are made of."""

from collections.abc import Callable
from typing import Any

import torch

from ..columns import ROW_INDEX


class PairCollator:
    """
    Wraps a collator of preference rows and adds the indices of their rows, so that a score can name its row.

    Args:
        collator (`Callable`):
            [`~trl.trainer.dpo_trainer.DataCollatorForPreference`] or one with the same output.
        by_row (`bool`, *optional*, defaults to `False`):
            Whether to give the indices of the chosen rows, then again those of the rejected rows, so that accelerate,
            which cuts a stream's batches by their rows, leaves each process the indices of its own.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], by_row: bool = False):
        self.collator = collator
        self.by_row = by_row

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # before it is set, as while a worker unpickles
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [example.get(ROW_INDEX, -1) for example in examples]
        batch = self.collator(examples)
        batch[ROW_INDEX] = torch.tensor(rows * 2 if self.by_row else rows)
        return batch
