"""
A batch of preference pairs as one run of tokens, in which every token that both answers share appears once.

A collator adds a [`PairLayout`] to each batch. It tells attention, head and scores where a pair starts, where its
answers part, and which token predicts which.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask


# Tokens of a block of flex attention
BLOCK = 128


@dataclass
class PairLayout:
    r"""
    A batch of preference pairs as one run of unique tokens, without padding.

    Each pair is laid out as a prefix, the rest of the chosen row and the rest of the rejected row. The prefix ends
    before the first position at which the rows differ in their token or in the token they predict, so that every
    position predicts at most one token: both branches start with a copy of the last shared token. Tokens that no score
    depends on (the last one of every row) are left out.

    Built on the CPU by [`PairLayout.from_batch`]; `.to(device)` moves it like a tensor.

    Args:
        input_ids (`torch.Tensor`):
            The unique tokens. Shape: `(1, tokens)`.
        position_ids (`torch.Tensor`):
            Position of each token in its own row. Shape: `(1, tokens)`.
        spans (`torch.Tensor`):
            For each token, the index of its pair's first token, the index after its pair's prefix, and the index of
            its own branch's first token (that of the pair for a token of the prefix). Shape: `(3, tokens)`.
        rows (`torch.Tensor`):
            Indices, increasing, of the tokens that predict a completion token. Shape: `(rows,)`.
        labels (`torch.Tensor`):
            The token that each of `rows` predicts. Shape: `(1, rows)`.
        cells (`torch.Tensor`):
            Flat indices of the completion tokens among the padded scores, of `shape`. Shape: `(cells,)`.
        sources (`torch.Tensor`):
            Index into `rows` of the row that predicts each of `cells`. Shape: `(cells,)`.
        key_index (`torch.Tensor`):
            The tokens whose keys and values attention by segments reads: for each pair, prefix and first branch for
            the first segment, then prefix and second branch for the second. Shape: `(keys,)`.
        key_places (`torch.Tensor`):
            For each token, the first and the last place in `key_index` that holds it. Shape: `(2, tokens)`.
        query_offsets, key_offsets (`torch.Tensor`):
            Where segments start and end, among the tokens and in `key_index`. Shape: `(segments + 1,)`, `int32`.
        most_queries, most_keys (`int`):
            Tokens and keys of the longest segment.
        lengths (`tuple[tuple[int, int, int], ...]`):
            Tokens of the prefix, of the first branch and of the second branch of each pair.
        shape (`tuple[int, int]`):
            Shape of the scores, `(2 * batch_size, width - 1)`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    cells: torch.Tensor
    sources: torch.Tensor
    key_index: torch.Tensor
    key_places: torch.Tensor
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    most_queries: int
    most_keys: int
    lengths: tuple[tuple[int, int, int], ...]
    shape: tuple[int, int]
    _masks: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_batch(cls, batch: Mapping[str, torch.Tensor]) -> "PairLayout":
        """
        Lay out a batch from TRL's `DataCollatorForPreference`.

        Args:
            batch (`Mapping[str, torch.Tensor]`):
                `input_ids`, `attention_mask` and `completion_mask`: chosen rows, then rejected rows, padded on the
                right. Shape: `(2 * batch_size, width)` each.

        Returns:
            `PairLayout`: On the device of the batch, best the CPU: its sizes depend on the values.

        Raises:
            ValueError: If the rows are not pairs, or not padded on the right.
        """
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        if len(ids) % 2:
            raise ValueError(
                f"`input_ids` must hold chosen rows, then as many rejected rows, got {len(ids)} rows. "
                "Collate with TRL's `DataCollatorForPreference`."
            )
        if (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError(
                "`attention_mask` must be padded on the right, got a token after padding. "
                "Collate with TRL's `DataCollatorForPreference`."
            )
        pairs, width = len(ids) // 2, ids.shape[1]
        predicts = (batch["completion_mask"].bool() & real)[:, 1:]
        steps = torch.arange(width, device=ids.device)

        # A row is needed up to the token that predicts its last completion token
        needed = ((steps[:-1] + 1) * predicts).amax(1) if width > 1 else ids.new_zeros(len(ids))
        if not needed.any():
            needed[0] = 1
        chosen, rejected = needed[:pairs], needed[pairs:]
        parted = ids[:pairs] != ids[pairs:]
        parted[:, :-1] |= predicts[:pairs] & predicts[pairs:] & parted[:, 1:]
        parted |= steps >= torch.minimum(chosen, rejected)[:, None]
        parted = torch.cat((parted, parted.new_ones(pairs, 1)), 1)
        prefix = parted.int().argmax(1)

        kept = torch.cat((steps < chosen[:, None], (steps >= prefix[:, None]) & (steps < rejected[:, None])), 1)
        index = (kept.flatten().cumsum(0) - 1).view(pairs, 2, width)
        predictor = torch.cat((index[:, 0], torch.where(steps < prefix[:, None], index[:, 0], index[:, 1])))[:, :-1]
        rows, sources = predictor[predicts].unique(return_inverse=True)
        labels = ids.new_empty(len(rows)).index_copy_(0, sources, ids[:, 1:][predicts])

        # With an empty first branch the second one simply continues the prefix
        first, second = chosen - prefix, rejected - prefix
        first, second = torch.where(first > 0, first, second), torch.where(first > 0, second, 0)
        lengths = torch.stack((prefix, first, second), 1)
        start = lengths.sum(1).cumsum(0) - lengths.sum(1)
        branch = torch.stack((start, start, start + prefix + first), 1)
        branch[:, 1] = torch.where(second > 0, start + prefix, start)
        spans = torch.stack((start[:, None].expand(-1, 3), (start + prefix)[:, None].expand(-1, 3), branch))

        again = torch.where(second > 0, prefix, 0)
        queries, keys = (torch.stack((prefix + first, rest), 1) for rest in (second, again + second))
        filled = queries > 0
        queries, keys = queries[filled], keys[filled]
        pieces = torch.stack((prefix + first, again, second), 1).flatten()
        # From a place among the keys to the token that it is of
        ahead = torch.stack((start, start, start + prefix + first), 1).flatten() - (pieces.cumsum(0) - pieces)
        key_index = torch.arange(int(pieces.sum()), device=ids.device) + ahead.repeat_interleave(pieces)
        places, tokens = torch.arange(len(key_index), device=ids.device), int(lengths.sum())
        return cls(
            input_ids=torch.cat((ids[:pairs], ids[pairs:]), 1)[kept][None],
            position_ids=steps.repeat(pairs, 2)[kept][None],
            spans=spans.flatten(1).repeat_interleave(lengths.flatten(), 1),
            rows=rows,
            labels=labels[None],
            cells=predicts.flatten().nonzero()[:, 0],
            sources=sources,
            key_index=key_index,
            key_places=torch.stack(
                [
                    places.new_zeros(tokens).scatter_reduce(0, key_index, places, end, include_self=False)
                    for end in ("amin", "amax")
                ]
            ),
            query_offsets=nn.functional.pad(queries.cumsum(0), (1, 0)).int(),
            key_offsets=nn.functional.pad(keys.cumsum(0), (1, 0)).int(),
            most_queries=int(queries.max()),
            most_keys=int(keys.max()),
            lengths=tuple(map(tuple, lengths.tolist())),
            shape=(predicts.shape[0], predicts.shape[1]),
        )

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PairLayout":
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        moved: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PairLayout":
        """The same layout on `device`."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PairLayout":
        """The same layout in page-locked memory."""
        return self._apply(torch.Tensor.pin_memory)

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """
        Assign the value of each row to the completion tokens that it predicts.

        Args:
            values (`torch.Tensor`):
                One value a row. Shape: `(rows,)`.

        Returns:
            `torch.Tensor`: The values in TRL's layout, zero outside completions. Shape: `shape`.
        """
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy(0, self.cells, values.index_select(0, self.sources)).view(self.shape)

    def branch_mask(self, queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """
        Additive mask for the last `queries` of a causal sequence of `keys` tokens, made once for all layers.

        Returns:
            `torch.Tensor` or `None`: Shape: `(1, 1, queries, keys)`.
        """
        kind = (queries, keys, window, like.dtype, like.device)
        if kind not in self._masks:
            allowed = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
            if window is not None:
                allowed = allowed.triu(keys - queries - window + 1)
            mask = torch.zeros(1, 1, queries, keys, dtype=like.dtype, device=like.device)
            self._masks[kind] = mask.masked_fill_(~allowed, torch.finfo(like.dtype).min)
        return self._masks[kind]

    @property
    def padded_length(self) -> int:
        """Tokens of the run, filled up to whole blocks of flex attention."""
        return -(-len(self) // BLOCK) * BLOCK

    def block_mask(self, window: int | None, make: Callable[..., Any] = create_block_mask) -> Any:
        """
        The mask of the padded run for flex attention, made once for all layers with the same sliding window.

        Args:
            window (`int`, *optional*):
                Sliding window, in tokens.
            make (`Callable`, *optional*):
                [`~torch.nn.attention.flex_attention.create_block_mask`], compiled where nothing dense may be made.
        """
        kind = ("block", window)
        if kind not in self._masks:
            length, device = self.padded_length, self.spans.device
            padding = torch.arange(len(self), length, device=device)  # each token of which sees itself alone
            start, shared_end, branch_start = torch.cat((self.spans, padding.expand(3, -1)), 1)
            position = torch.cat((self.position_ids[0], padding))
            # One function whatever the window, since torch compiles eight variants and then none
            oldest = position - (length if window is None else window)

            def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
                prefix = (key >= start[query]) & (key < shared_end[query])
                seen = (key <= query) & (prefix | (key >= branch_start[query]))
                return seen & (position[key] > oldest[query])

            with torch.no_grad():  # always, since torch compiles a variant for each mode
                self._masks[kind] = make(visible, None, None, length, length, device=device)
        return self._masks[kind]


class SealedLayout:
    """
    A layout as an argument of a model's forward.

    FSDP2 casts the arguments of each module, and copies a dataclass for that, so that each layer would make the
    layout's masks anew.

    Args:
        layout ([`PairLayout`]):
            The layout, which no wrapper of the model looks into.
    """

    def __init__(self, layout: PairLayout):
        self.layout = layout


def unsealed(kwargs: Mapping[str, Any]) -> PairLayout | None:
    """The layout among the arguments of a forward, if there is one."""
    sealed = kwargs.get("packed_pairs")
    return None if sealed is None else sealed.layout
