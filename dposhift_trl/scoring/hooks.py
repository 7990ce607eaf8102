"""
Prepare a model for shared prompts: another attention implementation, and forward hooks around its last layers.

[`enable_shared_prompt`] prepares a model against which [`shared_prompt_obstacle`] finds nothing, and
[`shared_prompt_scores`] returns what TRL's fused head returns for the padded rows.
"""

import functools
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput

from .attention import NAMES, PREFIX
from .head import OPTIONAL_OUTPUTS, logit_transform, score_rows
from .layout import PairLayout, SealedLayout, unsealed
from .operations import Operation, operation_for
from .sharded import gathered, whole
from .support import attentions, causal_lm_of, decoder_layers, shared_prompt_obstacle


class SharedPromptHooks:
    """
    Forward hooks that let only the rows of a layout reach the feed-forward of the last layer and the head.

    The model's head is given no row, and its empty output is replaced by that of [`~.head.score_rows`]. TRL's fused
    head is called once, to learn which statistics it returns: on a GPU it waits for the number of rows that a mask
    selects, which a layout knows. In the same way `gelu_new` (GPT-2, Phi) and, on a GPU, Llama's RMSNorm are given no
    row, and their empty output is replaced by that of a single PyTorch operation.

    Attributes:
        refused (`dict[str, str]`):
            Attention kernels and operations that are not to be used for this model, by name, with the reason.
        kernel (`str` or `None`):
            The attention kernel called last.
        operations (`set[str]`):
            Names of the operations that have replaced a module's forward.
        attended (`dict[str, str]`):
            Every attention kernel called so far, by name, with the reasons against those before it.
        outputs (`tuple[str, ...]` or `None`):
            What TRL's fused head returns beside log-probabilities, once it has been called.
        bypassed (`bool`):
            Whether the model's own forward passes the backbone's hooks by (OPT), so that TRL's is always called.
    """

    layout: PairLayout | None = None
    hidden: torch.Tensor | None = None
    values: torch.Tensor | None = None
    kernel: str | None = None
    outputs: tuple[str, ...] | None = None
    bypassed: bool = False

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        self.attended: dict[str, str] = {}
        self.operations: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Not what a forward has left, which PEFT's copies of a module share
        return {"refused": dict(self.refused), "attended": {}, "operations": set()}

    def before_model(self, causal_lm: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if unsealed(kwargs) is None or self.outputs is None or self.bypassed:
            return None
        return args, {name: value for name, value in kwargs.items() if name not in ("fused_lm_head", "shift_labels")}

    def before_backbone(self, backbone: nn.Module, args: Any) -> None:
        self.layout = None

    def before_layer(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.layout = unsealed(kwargs)

    def after_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if getattr(layer, "gradient_checkpointing", False) and hidden.requires_grad:
            hidden.register_hook(functools.partial(self._before_recomputing, self.layout))

    def _before_recomputing(self, layout: PairLayout | None, grad: torch.Tensor) -> None:
        # Newer releases of transformers recompute a layer without its hooks
        self.layout = layout

    def before_operations(self, module: nn.Module, args: Any, kwargs: Any, *, operation: Operation) -> Any:
        self.values = None
        if self.layout is None or len(args) != 1 or kwargs or operation.name in self.refused:
            return None
        if not operation.supports(module, args[0]):
            return None
        self.operations.add(operation.name)
        self.values = args[0]
        return (self.values.flatten(0, -2)[:0],), kwargs

    def after_operations(self, module: nn.Module, args: Any, output: Any, *, operation: Operation) -> Any:
        if self.values is None:
            return None
        values, self.values = self.values, None
        return operation.compute(module, values)

    def before_mlp(self, mlp: nn.Module, args: Any) -> tuple[Any, ...] | None:
        return None if self.layout is None else (args[0].index_select(1, self.layout.rows), *args[1:])

    def after_mlp(self, mlp: nn.Module, args: Any, output: Any) -> Any:
        if self.layout is None:
            return None
        values, *rest = output if isinstance(output, tuple) else (output,)
        whole = values.new_zeros(1, len(self.layout), values.shape[-1]).index_copy(1, self.layout.rows, values)
        return (whole, *rest) if isinstance(output, tuple) else whole

    def after_backbone(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self.layout = None
        layout = unsealed(kwargs)
        if layout is None:
            return None
        hidden = output.last_hidden_state[0].index_select(0, layout.rows)
        device = hidden.device.type
        self.hidden = hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
        output.last_hidden_state = output.last_hidden_state[:, :0]
        return output

    def after_model(self, causal_lm: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layout = unsealed(kwargs)
        if layout is None:
            return None
        if self.hidden is None:
            if self.outputs is None or self.bypassed:
                return None
            self.bypassed = True
            return causal_lm(*args, **kwargs, fused_lm_head=True, shift_labels=layout.labels[:, :0])
        hidden, self.hidden = self.hidden, None
        head = causal_lm.get_output_embeddings()
        if self.outputs is None:
            self.outputs = tuple(name for name in OPTIONAL_OUTPUTS if getattr(output, name) is not None)
        transform = logit_transform(causal_lm.config)
        weight, bias = whole(head.weight), whole(head.bias)
        with torch.autocast(hidden.device.type, enabled=False), gathered(weight, bias):
            scores = score_rows(hidden, weight, bias, layout.labels[0], self.outputs, *transform)
        return FusedCausalLMOutput(**{name: values[None] for name, values in scores.items()})


def enable_shared_prompt(model: nn.Module, like: nn.Module | None = None) -> None:
    """
    Prepare a model for [`shared_prompt_scores`]; all its other outputs stay bitwise the same.

    The attention implementation is replaced by one that equals it outside [`shared_prompt_scores`], and forward hooks
    are added. Enabling a model twice changes nothing.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model given TRL's fused head by [`~trl.trainer.utils.add_fused_lm_head`], before it is
            wrapped for distributed training.
        like ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Model of the same architecture, enabled and checked: what is ruled out for it is ruled out here too.

    Raises:
        ValueError: If [`shared_prompt_obstacle`] names an obstacle.
    """
    if (obstacle := shared_prompt_obstacle(model)) is not None:
        name = type(causal_lm_of(model)).__name__
        raise ValueError(
            f"`model` must be able to share prompts exactly, got a `{name}`: {obstacle}. Score the rows separately."
        )
    causal_lm = causal_lm_of(model)
    if any(_hooks_on(causal_lm)):
        return
    base = causal_lm.config._attn_implementation.removeprefix(PREFIX)
    causal_lm.set_attn_implementation(NAMES[base])
    hooks, layers = SharedPromptHooks(), decoder_layers(causal_lm)
    if like is not None:
        hooks.refused |= hooks_of(like).refused
    for layer in layers:
        layer.register_forward_pre_hook(hooks.before_layer, with_kwargs=True)
        layer.register_forward_hook(hooks.after_layer)
        for attention in attentions(layer):
            attention.shared_prompt_hooks = hooks
    for module in causal_lm.base_model.modules():
        if (operation := operation_for(module)) is not None:
            before, after = hooks.before_operations, hooks.after_operations
            module.register_forward_pre_hook(functools.partial(before, operation=operation), with_kwargs=True)
            module.register_forward_hook(functools.partial(after, operation=operation))
    if isinstance(mlp := getattr(layers[-1], "mlp", None), nn.Module):
        mlp.register_forward_pre_hook(hooks.before_mlp)
        mlp.register_forward_hook(hooks.after_mlp)
    causal_lm.base_model.register_forward_pre_hook(hooks.before_backbone)
    causal_lm.base_model.register_forward_hook(hooks.after_backbone, with_kwargs=True)
    causal_lm.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
    causal_lm.register_forward_hook(hooks.after_model, with_kwargs=True)


def _hooks_on(causal_lm: Any) -> list[SharedPromptHooks]:
    owners = (getattr(hook, "__self__", None) for hook in causal_lm._forward_hooks.values())
    return [owner for owner in owners if isinstance(owner, SharedPromptHooks)]


def hooks_of(model: nn.Module) -> SharedPromptHooks:
    """The hooks that [`enable_shared_prompt`] added to a model."""
    return _hooks_on(causal_lm_of(model))[0]


def shared_prompt_scores(model: nn.Module, layout: PairLayout) -> FusedCausalLMOutput:
    """
    Score the completions of a batch of pairs, processing each unique token once.

    Args:
        model (`torch.nn.Module`):
            Model prepared by [`enable_shared_prompt`], also wrapped (DDP, FSDP). It is called once.
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
        shift_labels=layout.labels[:, :0],  # the head's own rows, see `SharedPromptHooks`
        use_cache=False,
        fused_lm_head=True,
        packed_pairs=SealedLayout(layout),
    )
    if output.log_probs.shape != layout.labels.shape:
        raise RuntimeError(
            f"`model` must score the {layout.labels.numel()} rows of the layout, got {output.log_probs.numel()} "
            "scores. Call `enable_shared_prompt` on it, and let its forward hooks run."
        )
    names = ("log_probs", *OPTIONAL_OUTPUTS)
    scores = {name: layout.scatter(getattr(output, name)[0]) for name in names if getattr(output, name) is not None}
    return FusedCausalLMOutput(**scores, label_mask=layout.scatter(layout.labels.new_ones(len(layout.rows)).bool()))
