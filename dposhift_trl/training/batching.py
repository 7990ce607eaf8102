"""Which pairs share a batch: by their lengths, up to a number of tokens, or at random."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from ..config import DPOShiftConfig
from .checks import check_rows_left


def pair_lengths(dataset: Dataset, max_length: int | None, truncation_mode: str, shared: bool) -> list[int]:
    """
    Tokens read for each pair of a tokenised dataset.

    Args:
        dataset (`Dataset`):
            Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length (`int`, *optional*):
            Tokens kept of each of a pair's two rows; `None` keeps all.
        truncation_mode (`str`):
            End that is kept, `"keep_start"` or `"keep_end"`.
        shared (`bool`):
            Whether tokens with which both rows start are read once; else a pair counts as its longer row twice.

    Returns:
        `list[int]`: One number a pair, at least 1.
    """
    kept = slice(None, max_length) if truncation_mode == "keep_start" else slice(-(max_length or 0), None)
    lengths = []
    for prompt, chosen, rejected in zip(
        dataset["prompt_ids"], dataset["chosen_ids"], dataset["rejected_ids"], strict=True
    ):
        rows = [np.asarray([*prompt, *answer][kept]) for answer in (chosen, rejected)]
        shorter, longer = sorted(map(len, rows))
        if shared:
            parted = np.flatnonzero(rows[0][:shorter] != rows[1][:shorter])
            lengths.append(max(1, shorter + longer - int(parted[0] if len(parted) else shorter)))
        else:
            lengths.append(max(1, 2 * longer))
    return lengths


class SeededByEpoch(Sampler[int]):
    """
    A sampler whose order is drawn from `seed + epoch` alone, so that a resumed run reads on where it stopped.

    Args:
        sampler (`Sampler`):
            Sampler that draws from its `generator`, such as transformers' `LengthGroupedSampler`.
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
        """Draw the order of this epoch."""
        self.epoch = epoch


class TokenBudgetSampler(Sampler[list[int]]):
    """
    Batches of pairs that are evenly filled and hold at most `max_tokens` tokens, for one of several processes.

    Pairs are dealt, longest first, each to the batch that is least full, into the smallest number of batches that
    keeps within the budget. For each process that number is a multiple of `gradient_accumulation_steps` and the same
    in every epoch; which pairs of equal length meet, and the order of batches, are drawn anew in each, from `seed +
    epoch` alone, so that a resumed run reads on where it stopped. All processes get as many pairs at the same time:
    with several, pairs are dealt in groups of like length, one pair for each, of which the last is filled up with the
    shortest pairs once more.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each pair, as of [`pair_lengths`].
        max_tokens (`int`):
            Most tokens of one batch on one process.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Batches of an optimizer step on one process.
        num_processes (`int`, *optional*, defaults to `1`), process_index (`int`, *optional*, defaults to `0`):
            The processes, and which this one is.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Raises:
        ValueError: If the longest pair is longer than `max_tokens`, or there are too few pairs for one step.
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
                f"`max_tokens_per_batch` must hold the longest pair, {longest} tokens, got {max_tokens}. Raise it, or "
                "lower `max_length`."
            )
        self.lengths = np.asarray(lengths)
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.epoch = 0
        self.sampler = self  # through which accelerate hands on the epoch to a batch sampler it has wrapped
        sizes = self._groups(np.arange(len(self.lengths)))[1]
        step = gradient_accumulation_steps
        self.num_batches = -(-int(np.ceil(sizes.sum() / max_tokens)) // step) * step
        while self.num_batches <= len(sizes) and max(self._deal(sizes)[1]) > max_tokens:
            self.num_batches += step
        if self.num_batches > len(sizes):
            raise ValueError(
                f"`max_tokens_per_batch` must leave a pair for each of {num_processes} processes and "
                f"{step} `gradient_accumulation_steps`, got {max_tokens} for {len(lengths)} pairs. Raise it, or lower "
                "`gradient_accumulation_steps`."
            )

    def _groups(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs in groups of like length, one for each process, and the tokens of the longest of each group."""
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        fill = -len(order) % self.num_processes
        # The shortest ones, whatever the order, so that no epoch's groups are larger than another's
        groups = np.concatenate((order, np.resize(order[::-1], fill))).reshape(-1, self.num_processes)
        return groups, self.lengths[groups].max(axis=1)

    def _deal(self, sizes: np.ndarray) -> tuple[list[list[int]], list[int]]:
        """Indices into `sizes`, longest first, each to the batch that is least full; and how full the batches are."""
        heap = [(0, place) for place in range(self.num_batches)]
        batches: list[list[int]] = [[] for _ in heap]
        for index, size in enumerate(sizes.tolist()):
            load, place = heap[0]
            batches[place].append(index)
            heapq.heapreplace(heap, (load + size, place))
        return batches, [load for load, _ in heap]

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups, sizes = self._groups(torch.randperm(len(self.lengths), generator=generator).numpy())
        batches, _ = self._deal(sizes)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield groups[batches[place], self.process_index].tolist()

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch."""
        self.epoch = epoch


def make_token_sampler(
    dataset: Any, args: DPOShiftConfig, accelerator: Accelerator | PartialState, shares_prompts: bool
) -> TokenBudgetSampler | None:
    """
    The sampler that `max_tokens_per_batch` asks for, or `None` if it is not set.

    Args:
        dataset (`Dataset`):
            Tokenized training rows.
        args ([`DPOShiftConfig`]):
            Settings of the run.
        accelerator ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`]):
            Knows the processes.
        shares_prompts (`bool`):
            Whether shared tokens are read once.

    Raises:
        ValueError: If rows are padded, their lengths are unknown, or another setting arranges the batches.
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
    """A dataloader of the sampler's batches, which are those of one process already."""
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
    """The dataset with the column in which transformers looks for lengths, if pairs are to be grouped by them."""
    name = args.length_column_name
    grouped = args.train_sampling_strategy == "group_by_length" and isinstance(dataset, Dataset)
    if not grouped or name in dataset.column_names:
        return dataset
    return dataset.add_column(name, pair_lengths(dataset, args.max_length, args.truncation_mode, shares_prompts))


def data_seed(args: DPOShiftConfig) -> int:
    """Seed of the order of the rows."""
    return args.seed if args.data_seed is None else args.data_seed
