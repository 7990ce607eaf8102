"""Batches of pairs that know which rows they are made of."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from .alignment import ALIGNMENT


ROW_INDEX = "dposhift_row_index"  # a name that no data set uses for a column of its own


class PairCollator:
    """
    Wraps a collator of preference rows and adds the indices of their rows, so that a score can name its row, and the
    alignment of their gradients where it was measured.

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
        if ALIGNMENT in examples[0]:
            batch[ALIGNMENT] = torch.tensor([example[ALIGNMENT] for example in examples])
        return batch


def with_row_index(dataset):
    """
    Number the rows of a dataset, or of each in a dictionary, from 0; rows that are numbered keep their numbers.

    Args:
        dataset (`Dataset`, `IterableDataset`, a dictionary of them, or anything else, which passes unchanged):
            Preference rows.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: with_row_index(rows) for name, rows in dataset.items()})
    if isinstance(dataset, Dataset) and ROW_INDEX not in dataset.column_names:
        return dataset.add_column(ROW_INDEX, range(len(dataset)))
    if isinstance(dataset, IterableDataset) and ROW_INDEX not in (dataset.column_names or next(iter(dataset), {})):
        return dataset.map(lambda row, index: {ROW_INDEX: index}, with_indices=True)
    return dataset
