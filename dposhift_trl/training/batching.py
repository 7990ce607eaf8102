"""How pairs are grouped into batches: by length, up to a number of tokens, or at random."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from ..columns import PROMPT_IDS, TOKEN_COLUMNS
from ..config import DPOShiftConfig
from .checks import check_rows_left


def pair_lengths(dataset: Dataset, max_length: int | None, truncation_mode: str, shared: bool) -> list[int]:
    """
    Number of tokens that are read for each pair of a tokenized dataset.

    Args:
        dataset (`Dataset`):
            Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length (`int`, *optional*):
            Maximum length of each of a pair's two rows (prompt and completion); longer rows are truncated.
        truncation_mode (`str`):
            End to keep when truncating, `"keep_start"` or `"keep_end"`.
        shared (`bool`):
            Whether the tokens that both rows share at their start are read once. Otherwise both rows are padded to the
            longer one.

    Returns:
        `list[int]`: Tokens of each pair, at least 1.
    """
    kept = slice(None, max_length) if truncation_mode == "keep_start" else slice(-(max_length or 0), None)
    lengths = []
    for prompt, chosen, rejected in zip(*(dataset[column] for column in TOKEN_COLUMNS), strict=True):
        rows = [np.asarray([*prompt, *answer][kept]) for answer in (chosen, rejected)]
        shorter, longer = sorted(map(len, rows))
        if shared:
            differences = np.flatnonzero(rows[0][:shorter] != rows[1][:shorter])
            lengths.append(max(1, shorter + longer - int(differences[0] if len(differences) else shorter)))
        else:
            lengths.append(max(1, 2 * longer))
    return lengths


class SeededByEpoch(Sampler[int]):
    """
    Sampler whose order depends only on `seed + epoch`, so that a resumed run continues where it stopped.

    Args:
        sampler (`Sampler`):
            Sampler that draws from its `generator` attribute, such as transformers' `LengthGroupedSampler`.
        seed (`int`):
            Seed of the order.
    """

    def __init__(self, sampler: Any, seed: int):
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch


class TokenBudgetSampler(Sampler[list[int]]):
    """
    Batch sampler that yields the evenly filled batches of one process, each with at most `max_tokens` tokens.

    The number of batches is the smallest multiple of `gradient_accumulation_steps` with which every batch is within
    the budget, and is the same in every epoch. Pairs are distributed longest first, each to the batch with the fewest
    tokens. The order of batches, and which pairs of equal length are batched together, depend only on `seed + epoch`,
    so that a resumed run continues where it stopped.

    With several processes, pairs are distributed in groups of similar length, one pair per process, so that all
    processes get equally many pairs in each batch. The last group is completed by repeating the shortest pairs.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each pair, from [`pair_lengths`].
        max_tokens (`int`):
            Maximum number of tokens per batch and process.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Number of batches per optimizer step and process.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes.
        process_index (`int`, *optional*, defaults to `0`):
            Index of this process.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Raises:
        ValueError: If the longest pair has more than `max_tokens` tokens, or if there are fewer pairs than batches.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        gradient_accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
    ):
        longest = max(lengths)
        if longest > max_tokens:
            raise ValueError(
                f"`max_tokens_per_batch` must be at least the length of the longest pair ({longest} tokens), got "
                f"{max_tokens}. Increase it, or decrease `max_length`."
            )
        self.lengths = np.asarray(lengths)
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.epoch = 0
        self.sampler = self  # Accelerate sets the epoch of a wrapped batch sampler on its `sampler`
        sizes = self._groups(np.arange(len(self.lengths)))[1]
        step = gradient_accumulation_steps
        self.num_batches = -(-int(np.ceil(sizes.sum() / max_tokens)) // step) * step
        while self.num_batches <= len(sizes) and max(self._distribute(sizes)[1]) > max_tokens:
            self.num_batches += step
        if self.num_batches > len(sizes):
            raise ValueError(
                f"`max_tokens_per_batch` must allow at least one pair per batch on {num_processes} processes with "
                f"`gradient_accumulation_steps={step}`, got {max_tokens} for {len(lengths)} pairs. Increase it, or "
                "decrease `gradient_accumulation_steps`."
            )

    def _groups(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Groups of pairs of similar length, one pair per process, and the tokens of the longest pair of each."""
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        fill = -len(order) % self.num_processes
        # Repeat the shortest pairs, whatever the order, so that the groups have the same sizes in every epoch
        groups = np.concatenate((order, np.resize(order[::-1], fill))).reshape(-1, self.num_processes)
        return groups, self.lengths[groups].max(axis=1)

    def _distribute(self, sizes: np.ndarray) -> tuple[list[list[int]], list[int]]:
        """The groups of each batch, as indices into `sizes`, and the number of tokens of each batch."""
        heap = [(0, batch) for batch in range(self.num_batches)]
        batches: list[list[int]] = [[] for _ in heap]
        for group, size in enumerate(sizes.tolist()):
            tokens, batch = heap[0]
            batches[batch].append(group)
            heapq.heapreplace(heap, (tokens + size, batch))
        return batches, [tokens for tokens, _ in heap]

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups, sizes = self._groups(torch.randperm(len(self.lengths), generator=generator).numpy())
        batches, _ = self._distribute(sizes)
        for batch in torch.randperm(len(batches), generator=generator).tolist():
            yield groups[batches[batch], self.process_index].tolist()

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch


def make_token_sampler(
    dataset: Any, args: DPOShiftConfig, accelerator: Accelerator | PartialState, shares_prompts: bool
) -> TokenBudgetSampler | None:
    """
    Create the sampler for `max_tokens_per_batch`. Returns `None` if the setting is `None`.

    Args:
        dataset (`Dataset`):
            Tokenized training rows.
        args ([`DPOShiftConfig`]):
            Settings of the run.
        accelerator ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`]):
            Provides the number of processes and the index of this one.
        shares_prompts (`bool`):
            Whether the tokens that both rows of a pair share are read once.

    Raises:
        ValueError: If `max_tokens_per_batch` is set with padded rows, an iterable dataset or a
            `train_sampling_strategy`, or does not suit the lengths of the pairs.
    """
    if args.max_tokens_per_batch is None:
        return None
    reason = None
    if not shares_prompts:
        reason = "padded rows (`shared_prompt` is off)"
    elif not isinstance(dataset, Dataset):
        reason = "iterable datasets, whose lengths are unknown"
    elif args.train_sampling_strategy != "random":
        reason = f"`train_sampling_strategy={args.train_sampling_strategy!r}`, which it replaces"
    if reason is not None:
        raise ValueError(
            f"`max_tokens_per_batch` is not supported with {reason}, got {args.max_tokens_per_batch}. Set "
            "`per_device_train_batch_size` instead."
        )
    check_rows_left(dataset, "train", args.max_length)
    return TokenBudgetSampler(
        pair_lengths(dataset, args.max_length, args.truncation_mode, shared=True),
        args.max_tokens_per_batch,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        seed=data_seed(args),
    )


def token_budget_dataloader(
    dataset: Dataset, sampler: TokenBudgetSampler, collator: Callable, args: DPOShiftConfig
) -> DataLoader:
    """Create a dataloader for the batches of a [`TokenBudgetSampler`], which belong to one process already."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)


def with_lengths(dataset: Any, args: DPOShiftConfig, shares_prompts: bool) -> Any:
    """Add the column from which transformers reads lengths, if `train_sampling_strategy` is `group_by_length`."""
    name = args.length_column_name
    grouped = args.train_sampling_strategy == "group_by_length" and isinstance(dataset, Dataset)
    if not grouped or name in dataset.column_names:
        return dataset
    return dataset.add_column(name, pair_lengths(dataset, args.max_length, args.truncation_mode, shares_prompts))


def without_lost_rows(dataset: Any, max_length: int | None, truncation_mode: str) -> Any:
    """Tokenized rows without those that TRL drops: their prompt fills `max_length`, so that no answer is left."""
    if max_length is None or truncation_mode != "keep_start":
        return dataset
    return dataset.filter(lambda prompt_ids: len(prompt_ids) < max_length, input_columns=PROMPT_IDS)


def data_seed(args: DPOShiftConfig) -> int:
    """Seed for the order of the rows."""
    return args.seed if args.data_seed is None else args.data_seed
