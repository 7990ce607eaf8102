"""
One forward for a batch of preference pairs in which every token that both answers share is read once.

[`SharedPromptCollator`] adds a [`PairLayout`] to each batch, [`enable_shared_prompt`] prepares a model against which
[`shared_prompt_obstacle`] finds nothing, and [`shared_prompt_scores`] returns what TRL's fused head returns for the
padded rows.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from trl.trainer.utils import FusedCausalLMOutput

from .head import OPTIONAL_OUTPUTS, token_scores


PREFIX = "shared_prompt_"
BATCH = ("input_ids", "attention_mask", "completion_mask")
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass
class PairLayout:
    r"""
    A batch of preference pairs as one run of unique tokens, without padding.

    Each pair is laid out as a prefix, the rest of the chosen row and the rest of the rejected row. The prefix ends
    before the first position at which the rows hold different tokens or are to predict different ones, so that every
    position predicts one token at most: where answers part, both branches start with a copy of the last shared token.
    Tokens that nothing scored depends on (the last one of every row) are left out.

    Built on the CPU by [`PairLayout.from_batch`]; moves with `.to(device)`, as tensors do.

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
            The token each of `rows` is to predict. Shape: `(1, rows)`.
        cells (`torch.Tensor`):
            Flat indices of the completion tokens among the padded scores, of `shape`. Shape: `(cells,)`.
        sources (`torch.Tensor`):
            Index into `rows` of the row that predicts each of `cells`. Shape: `(cells,)`.
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
    lengths: tuple[tuple[int, int, int], ...]
    shape: tuple[int, int]
    _masks: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_batch(cls, batch: Mapping[str, torch.Tensor]) -> "PairLayout":
        """
        Lay out a batch as TRL's `DataCollatorForPreference` makes it.

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
        return cls(
            input_ids=torch.cat((ids[:pairs], ids[pairs:]), 1)[kept][None],
            position_ids=steps.repeat(pairs, 2)[kept][None],
            spans=spans.flatten(1).repeat_interleave(lengths.flatten(), 1),
            rows=rows,
            labels=labels[None],
            cells=predicts.flatten().nonzero()[:, 0],
            sources=sources,
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
        Hand each row's value to the completion tokens it predicts.

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

    def block_mask(self, window: int | None):
        """The mask of the whole run for flex attention, made once for all layers with the same sliding window."""
        kind = ("block", window)
        if kind not in self._masks:
            start, shared_end, branch_start = self.spans
            position = self.position_ids[0]
            # One function whatever the window, since torch compiles eight variants and then none
            oldest = position - (len(self) if window is None else window)

            def visible(batch, head, query, key):
                prefix = (key >= start[query]) & (key < shared_end[query])
                seen = (key <= query) & (prefix | (key >= branch_start[query]))
                return seen & (position[key] > oldest[query])

            make = _compiled(create_block_mask) if _on_gpu(self.spans) else create_block_mask
            with torch.no_grad():  # always, since torch compiles a variant for each mode
                self._masks[kind] = make(visible, None, None, len(self), len(self), device=self.spans.device)
        return self._masks[kind]


@dataclass
class SharedPromptCollator:
    """
    Data collator that adds `shared_prompt`, the [`PairLayout`] of the batch, to what another collator returns.

    Args:
        collator (`Callable`):
            Collator that returns TRL's layout, such as `DataCollatorForPreference`.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # before it is set, as while a worker unpickles
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(features)
        batch["shared_prompt"] = PairLayout.from_batch(batch)
        return batch


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Whether flex attention over the whole run and TRL's head are used, instead of attention by branch and ours."""
    return tensor.is_cuda


def _modeling(module: nn.Module) -> Any:
    """The file through whose `ALL_ATTENTION_FUNCTIONS` an attention module finds its implementation."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((file for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS")), None)


def _window(module: nn.Module, **kwargs) -> int | None:
    """The sliding window of an attention module, in tokens, on which module, call and config must agree."""
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    config = module.config
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or layer_types[module.layer_idx] == "sliding_attention"
    expected = getattr(config, "sliding_window", None) if slides else None
    if window != expected:
        raise ValueError(
            f"`{type(module).__name__}` must attend within the `sliding_window` of its config to share prompts, got "
            f"{window!r} instead of {expected!r}. Score the rows separately."
        )
    return window


def _register(base: str) -> str:
    """Register an attention that is `base` wherever it is not handed a layout; returns its name."""

    def attention(module, query, key, value, attention_mask, packed_pairs: PairLayout | None = None, **kwargs):
        if hooks := getattr(module, "shared_prompt_hooks", None):
            hooks.layout = packed_pairs
        modeling = _modeling(module)
        attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            base, getattr(modeling, "eager_attention_forward", None)
        )
        untouched = attention_mask is not None and attention_mask.numel() == 1 and kwargs.get("position_bias") is None
        if packed_pairs is None and not (untouched and key.shape[2] > 1):
            return attend(module, query, key, value, attention_mask, **kwargs)
        if packed_pairs is None or not untouched:
            raise ValueError(
                f"`{type(module).__name__}` must be handed the layout and an unchanged mask to share prompts, but the "
                "model withholds the one or changes the other. Score the rows separately."
            )
        window = _window(module, **kwargs)
        if _on_gpu(query) and not kwargs.get("dropout"):
            mask = packed_pairs.block_mask(window)
            return flex_attention_forward(module, query, key, value, mask, **kwargs)[0], None
        attend = functools.partial(attend, module, **kwargs)
        return _attend_by_branch(attend, query, key, value, packed_pairs, window, base == "sdpa"), None

    name = PREFIX + base
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


_NAMES = {base: _register(base) for base in ("sdpa", "eager")}


def _attend_by_branch(attend, query, key, value, layout: PairLayout, window: int | None, causal: bool) -> torch.Tensor:
    """
    Attention over a run of pairs, one call of the model's own implementation a branch.

    Args:
        attend (`Callable`):
            The implementation, called with query, key, value and `attention_mask`.
        query, key, value (`torch.Tensor`):
            Shape: `(1, heads, tokens, head_dim)`.
        layout (`PairLayout`):
            The run.
        window (`int`, *optional*):
            Sliding window, in tokens.
        causal (`bool`):
            Whether `attend` is causal when given no mask.

    Returns:
        `torch.Tensor`: Shape: `(1, tokens, heads, head_dim)`.
    """

    def branch(query, key, value):
        queries, keys = query.shape[2], key.shape[2]
        plain = causal and queries in (1, keys) and (window is None or keys <= window)
        mask = None if plain else layout.branch_mask(queries, keys, window, like=query)
        return attend(query, key, value, attention_mask=mask)[0]

    outputs: list[torch.Tensor] = []
    sizes = [sum(pair) for pair in layout.lengths]
    pairs = zip(layout.lengths, *(states.split(sizes, 2) for states in (query, key, value)), strict=True)
    for (prefix, first, second), queries, keys, values in pairs:
        if second:
            queries = queries.split((prefix + first, second), 2)
            (shared_keys, *keys), (shared_values, *values) = (
                x.split((prefix, first, second), 2) for x in (keys, values)
            )
            keys = [torch.cat((shared_keys, rest), 2) for rest in keys]
            values = [torch.cat((shared_values, rest), 2) for rest in values]
            outputs += map(branch, queries, keys, values)
        elif prefix + first:
            outputs.append(branch(queries, keys, values))
    return torch.cat(outputs, 1)


class _Hooks:
    """
    Forward hooks that let only the rows of a layout reach the feed-forward of the last layer and the head.

    On a GPU, TRL's fused head scores them. Elsewhere [`~dposhift_trl.head.token_scores`] is faster: TRL's head is
    given no row, and its empty output is replaced. In a like way, on every device, the eight operations of `gelu_new`
    (GPT-2, Phi) are given one number, and their output is replaced by that of PyTorch's one operation.
    """

    layout: PairLayout | None = None
    hidden: torch.Tensor | None = None
    preactivation: torch.Tensor | None = None

    def __getstate__(self):
        return {}  # a copy, as PEFT makes of a module, is not to start with what a forward has left

    def before_backbone(self, backbone, args):
        # Each attention sets it, in the second run of a checkpointed layer too
        self.layout = None

    def before_activation(self, activation, args):
        self.preactivation = None if self.layout is None else args[0]
        return None if self.layout is None else args[0].flatten()[:1]

    def after_activation(self, activation, args, output):
        if self.preactivation is None:
            return None
        values, self.preactivation = self.preactivation, None
        return nn.functional.gelu(values, approximate="tanh")

    def before_mlp(self, mlp, args):
        return None if self.layout is None else (args[0].index_select(1, self.layout.rows), *args[1:])

    def after_mlp(self, mlp, args, output):
        if self.layout is None:
            return None
        values, *rest = output if isinstance(output, tuple) else (output,)
        whole = values.new_zeros(1, len(self.layout), values.shape[-1]).index_copy(1, self.layout.rows, values)
        return (whole, *rest) if isinstance(output, tuple) else whole

    def after_backbone(self, backbone, args, kwargs, output):
        self.layout = None
        layout = kwargs.get("packed_pairs")
        if layout is None:
            return None
        hidden = output.last_hidden_state.index_select(1, layout.rows)
        if not _on_gpu(hidden):
            device = hidden.device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
            self.hidden, hidden = hidden[0].to(autocast), hidden[:, :0]
        output.last_hidden_state = hidden
        return output

    def after_model(self, causal_lm, args, kwargs, output):
        layout = kwargs.get("packed_pairs")
        if layout is None or self.hidden is None:
            return None
        hidden, self.hidden = self.hidden, None
        head = causal_lm.get_output_embeddings()
        outputs = tuple(name for name in OPTIONAL_OUTPUTS if getattr(output, name) is not None)
        transform = logit_transform(causal_lm.config)
        with torch.autocast(hidden.device.type, enabled=False):
            scores = token_scores(hidden, head.weight, head.bias, layout.labels[0], outputs, *transform)
        return FusedCausalLMOutput(**{name: values[None] for name, values in scores.items()})


def logit_transform(config) -> tuple[float, float | None]:
    """Factor and bound of a model's logits, from the fields in which TRL's fused head looks for them."""
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    scale, name = next(((x, name) for name in names if (x := getattr(config, name, None)) is not None), (1.0, None))
    if name == "logits_scaling" and config.model_type != "hyperclovax":
        scale = 1 / scale
    return scale, getattr(config, "final_logit_softcapping", None)


def _causal_lm(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _layers(causal_lm: Any) -> Any:
    """The decoder layers, or the backbone as the only one where it has no stack of them."""
    number = getattr(causal_lm.config, "num_hidden_layers", None)
    stacks = (m for m in causal_lm.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    return next(stacks, [causal_lm.base_model])


def _attentions(layer: nn.Module) -> list[Any]:
    """The attention modules of a layer that transformers dispatches."""
    return [m for m in layer.modules() if hasattr(m, "is_causal") and _modeling(m) is not None]


def shared_prompt_obstacle(model: nn.Module) -> str | None:
    """
    Why a model cannot read a shared prompt once and score it exactly.

    Judged by what the model is made of: every layer must mix tokens by causal attention that transformers dispatches,
    and by nothing else. No forward is run; [`verify_shared_prompt`] runs one.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.

    Returns:
        `str` or `None`: The reason, as a phrase that completes "it cannot share prompts:"; `None` if there is none.
    """
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if any(adapter.is_prompt_learning for adapter in adapters):
        return "its adapter learns a prompt"
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        return "its adapter starts where a row invokes it (aLoRA)"
    causal_lm = _causal_lm(model)
    config, backbone = causal_lm.config, causal_lm.base_model
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it has cross-attention"
    if getattr(config, "alibi", False) or any("alibi" in name for name in dir(backbone)):
        return "its attention is biased by distance (ALiBi)"
    if config.get_text_config() is not config or config.sub_configs:
        return "it takes more than text"
    for layer_type in getattr(config, "layer_types", None) or ():
        if layer_type not in _LAYER_TYPES:
            return f"it has layers of type `{layer_type}`"
    modules = list(backbone.modules())
    for module in modules:
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "it has convolutions"
        rope_types = getattr(module, "rope_type", None)
        rope_types = set(rope_types.values() if isinstance(rope_types, dict) else [rope_types])
        if rope_types & {"dynamic", "longrope"}:
            return f"its rotary frequencies depend on the longest row of a batch (`{rope_types.pop()}`)"
    for layer in _layers(causal_lm):
        attentions = _attentions(layer)
        if not attentions:
            return f"its `{type(layer).__name__}` has no attention that transformers dispatches"
        if not all(m.is_causal for m in attentions):
            return "its attention is not causal"
    if not causal_lm._supports_attention_backend:
        return "its attention does not take part in transformers' `AttentionInterface`"
    parameters = inspect.signature(backbone.forward).parameters
    if "position_ids" not in parameters or all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        return "it cannot be told the positions and pairs of its tokens"
    base = config._attn_implementation.removeprefix(PREFIX)
    if base not in _NAMES:
        return f"it runs with `attn_implementation={base!r}`; load it with `sdpa`"
    if base == "eager" and getattr(config, "reorder_and_upcast_attn", False):
        return "it runs with `reorder_and_upcast_attn`"
    if getattr(config, "output_router_logits", False):
        return "its load-balancing loss counts every token of every row"
    return None


def enable_shared_prompt(model: nn.Module) -> None:
    """
    Let a model be scored by [`shared_prompt_scores`]; everything else about it stays bitwise as it was.

    The attention implementation is exchanged for one that, outside [`shared_prompt_scores`], is the old one, and
    forward hooks are added. Enabling a model twice changes nothing.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model given TRL's fused head by [`~trl.trainer.utils.add_fused_lm_head`], before it is
            wrapped for distributed training.

    Raises:
        ValueError: If [`shared_prompt_obstacle`] names an obstacle.
    """
    if (obstacle := shared_prompt_obstacle(model)) is not None:
        raise ValueError(
            f"`model` must be able to share prompts exactly, got a `{type(_causal_lm(model)).__name__}`: {obstacle}. "
            "Score the rows separately."
        )
    causal_lm = _causal_lm(model)
    if any(isinstance(getattr(hook, "__self__", None), _Hooks) for hook in causal_lm._forward_hooks.values()):
        return
    base = causal_lm.config._attn_implementation.removeprefix(PREFIX)
    causal_lm.set_attn_implementation(_NAMES[base])
    hooks, layers = _Hooks(), _layers(causal_lm)
    for layer in layers:
        for attention in _attentions(layer):
            attention.shared_prompt_hooks = hooks
        for module in layer.modules():
            if isinstance(module, NewGELUActivation):
                module.register_forward_pre_hook(hooks.before_activation)
                module.register_forward_hook(hooks.after_activation)
    if isinstance(mlp := getattr(layers[-1], "mlp", None), nn.Module):
        mlp.register_forward_pre_hook(hooks.before_mlp)
        mlp.register_forward_hook(hooks.after_mlp)
    causal_lm.base_model.register_forward_pre_hook(hooks.before_backbone)
    causal_lm.base_model.register_forward_hook(hooks.after_backbone, with_kwargs=True)
    causal_lm.register_forward_hook(hooks.after_model, with_kwargs=True)


def shared_prompt_scores(model: nn.Module, layout: PairLayout) -> FusedCausalLMOutput:
    """
    Score the completions of a batch of pairs, each unique token read once.

    Args:
        model (`torch.nn.Module`):
            Model given to [`enable_shared_prompt`], as it is or wrapped (DDP, FSDP). It is called once.
        layout ([`PairLayout`]):
            The batch, on the device of the model.

    Returns:
        [`~trl.trainer.utils.FusedCausalLMOutput`]: The per-token fields the model's fused head computes, as it returns
        them for the padded rows: chosen half, then rejected half, zero outside completions. Gradients flow through
        `log_probs`; a token shared by both rows receives those of both. Shape: `(2 * batch_size, width - 1)` each.
    """
    output = model(
        input_ids=layout.input_ids,
        # Ready-made, so that no model builds one for the run
        attention_mask=layout.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool),
        position_ids=layout.position_ids,
        shift_labels=layout.labels if _on_gpu(layout.labels) else layout.labels[:, :0],
        use_cache=False,
        fused_lm_head=True,
        packed_pairs=layout,
    )
    if output.log_probs.shape != layout.labels.shape:
        raise RuntimeError(
            f"`model` must score the {layout.labels.numel()} rows of the layout, got {output.log_probs.numel()} "
            "scores. Call `enable_shared_prompt` on it, and let its forward hooks run."
        )
    names = ("log_probs", *OPTIONAL_OUTPUTS)
    scores = {name: layout.scatter(getattr(output, name)[0]) for name in names if getattr(output, name) is not None}
    return FusedCausalLMOutput(**scores, label_mask=layout.scatter(layout.labels.new_ones(len(layout.rows)).bool()))


@torch.no_grad()
def verify_shared_prompt(model: nn.Module, batch: Mapping[str, torch.Tensor] | None = None) -> float:
    """
    Compare the scores of [`shared_prompt_scores`] with those of the padded rows, on a small batch.

    Args:
        model (`torch.nn.Module`):
            Model given to [`enable_shared_prompt`], as it is or wrapped; in the latter case every process must call.
        batch (`Mapping[str, torch.Tensor]`, *optional*):
            Batch in the layout of TRL's `DataCollatorForPreference`. By default, two pairs of a few arbitrary tokens.

    Returns:
        `float`: The largest difference between two log-probabilities, in nats.
    """
    if batch is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(_causal_lm(model).config.vocab_size, (4, 12), generator=generator)
        steps = torch.arange(12)
        ids[2:] = torch.where(steps < torch.tensor([[6], [7]]), ids[:2], ids[2:])
        real = (steps < torch.tensor([[12], [9], [10], [11]])).long()
        ids *= real
        batch = {"input_ids": ids, "attention_mask": real, "completion_mask": real * (steps >= 5)}
    device = next(model.parameters()).device
    layout = PairLayout.from_batch({key: batch[key].cpu() for key in BATCH}).to(device)
    ids, real, scored = (batch[key].to(device) for key in BATCH)
    training = model.training
    model.eval()
    try:
        shared = shared_prompt_scores(model, layout).log_probs
        labels = ids.masked_fill(scored == 0, -100)
        rows = model(input_ids=ids, attention_mask=real, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    finally:
        model.train(training)
    return (shared - rows).abs().max().item()
