"""Which models support shared prompts exactly, decided from their modules."""

import inspect
from typing import Any

from peft import PeftModel
from torch import nn

from .attention import NAMES, PREFIX, modeling_file


_LAYER_TYPES = {"full_attention", "sliding_attention"}


def causal_lm_of(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(causal_lm: Any) -> Any:
    """The decoder layers, or the backbone as the only one if it has no list of layers."""
    number = getattr(causal_lm.config, "num_hidden_layers", None)
    stacks = (m for m in causal_lm.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    return next(stacks, [causal_lm.base_model])


def attentions(layer: nn.Module) -> list[Any]:
    """The attention modules of a layer that transformers dispatches."""
    return [m for m in layer.modules() if hasattr(m, "is_causal") and modeling_file(m) is not None]


def shared_prompt_obstacle(model: nn.Module) -> str | None:
    """
    Why a model does not support shared prompts exactly.

    Decided from the modules of the model: every layer must mix tokens only by causal attention that transformers
    dispatches. No forward pass is run; [`~dposhift_trl.scoring.verify_shared_prompt`] runs one.

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
    causal_lm = causal_lm_of(model)
    config, backbone = causal_lm.config, causal_lm.base_model
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it has cross-attention"
    if getattr(config, "alibi", False) or any("alibi" in name for name in dir(backbone)):
        return "its attention is biased by distance (ALiBi)"
    if config.get_text_config() is not config or config.sub_configs:
        return "it takes more than text as input"
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
    for layer in decoder_layers(causal_lm):
        mixers = attentions(layer)
        if not mixers:
            return f"its `{type(layer).__name__}` has no attention that transformers dispatches"
        if not all(m.is_causal for m in mixers):
            return "its attention is not causal"
    if not causal_lm._supports_attention_backend:
        return "its attention does not support transformers' `AttentionInterface`"
    parameters = inspect.signature(backbone.forward).parameters
    if "position_ids" not in parameters or all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        return "its forward does not accept position ids and further arguments"
    base = config._attn_implementation.removeprefix(PREFIX)
    if base not in NAMES:
        return f"it runs with `attn_implementation={base!r}`; load it with `sdpa`"
    if base == "eager" and getattr(config, "reorder_and_upcast_attn", False):
        return "it runs with `reorder_and_upcast_attn`"
    if getattr(config, "output_router_logits", False):
        return "its load-balancing loss counts every token of every row"
    return None
