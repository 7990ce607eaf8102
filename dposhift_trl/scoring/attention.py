"""
Attention over a run of pairs, by the first kernel that supports what a model asks for.

On a GPU a pair is two segments of `torch.nn.attention.varlen.varlen_attn`: queries `[prefix + chosen, rejected]`, keys
`[prefix + chosen, prefix + rejected]`, causal from the bottom right. Where that kernel cannot be used (float32, capped
scores, sinks), flex attention takes the whole run at once; everywhere else each branch is a call of the model's own
attention.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .layout import PairLayout, SealedLayout


try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_ATTN: Callable[..., Any] | None = varlen_attn
except ImportError:  # before torch 2.10
    VARLEN_ATTN = None

PREFIX = "shared_prompt_"


@dataclass(frozen=True)
class AttentionCall:
    """
    The arguments of one attention layer.

    Args:
        query, key, value (`torch.Tensor`):
            Shape: `(1, heads, tokens, head_dim)`; keys and values may have fewer heads.
        layout ([`PairLayout`]):
            The run of pairs.
        attend (`Callable`):
            The model's own implementation, called with query, key, value and `attention_mask`.
        causal (`bool`):
            Whether `attend` is causal when given no mask.
        window (`int`, *optional*):
            Sliding window, in tokens.
        scaling (`float`, *optional*):
            Factor of the scores; `head_dim**-0.5` by default.
        softcap (`float`, *optional*):
            Bound of the scores.
        sinks (`torch.Tensor`, *optional*):
            Score of each head's attention sink. Shape: `(heads,)`.
        dropout (`float`, *optional*, defaults to `0.0`):
            Share of attention weights that are dropped.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: PairLayout
    attend: Callable[..., Any]
    causal: bool
    window: int | None = None
    scaling: float | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    dropout: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products; with autocast, rotated queries and keys are still float32."""
        device = self.query.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.query.dtype

    @property
    def groups(self) -> int:
        """Query heads for each head of keys and values."""
        return self.query.shape[1] // self.key.shape[1]


class Kernel(Protocol):
    """An attention kernel: whether it supports a call, and the call itself."""

    name: str

    def obstacle(self, call: AttentionCall) -> str | None:
        """Why the kernel does not support the call, as a phrase that follows its name; `None` if it does."""

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """Attend. Shape: `(1, tokens, heads, head_dim)`."""


@dataclass(frozen=True)
class VarlenAttention:
    """
    Two segments per pair, in one call of torch's flash attention for segments of different lengths.

    Args:
        function (`Callable`, *optional*):
            [`~torch.nn.attention.varlen.varlen_attn`] of any release, or one with its arguments, which it is called
            with as far as its signature names them.
        dtypes (`frozenset[torch.dtype]`, *optional*):
            Dtypes that `function` takes.
    """

    function: Callable[..., Any] | None = VARLEN_ATTN
    dtypes: frozenset[torch.dtype] = frozenset((torch.float16, torch.bfloat16))
    name = "varlen_attn"

    def obstacle(self, call: AttentionCall) -> str | None:
        query, value = call.query, call.value
        if self.function is None:
            return "needs torch 2.10"
        if query.is_cuda and _capability(query.device) < (8, 0):
            return "needs a GPU of compute capability 8.0"
        if call.dtype not in self.dtypes:
            return f"does not take {str(call.dtype).removeprefix('torch.')}"
        if query.shape[-1] % 8 or query.shape[-1] > 256 or query.shape[-1] != value.shape[-1]:
            return f"does not take heads of {query.shape[-1]} and {value.shape[-1]} channels"
        if call.softcap is not None:
            return "does not cap scores"
        if call.sinks is not None:
            return "has no attention sinks"
        if call.dropout:
            return "has no dropout"
        if call.window is not None and "window_size" not in _parameters(self.function):
            return "has no sliding window before torch 2.11"
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        assert self.function is not None
        layout, parameters = call.layout, _parameters(self.function)
        # `x[0]` would copy each gradient into zeros
        query, key, value = (x.squeeze(0).transpose(0, 1).to(call.dtype) for x in (call.query, call.key, call.value))
        # Those of the prefix once more, before the keys and values of the second branch
        key, value = (_GatherKeys.apply(x, layout.key_index, layout.key_places) for x in (key, value))
        options: dict[str, Any] = {}
        if "enable_gqa" in parameters:
            options["enable_gqa"] = call.groups > 1
        elif call.groups > 1:
            key, value = (x.repeat_interleave(call.groups, dim=1) for x in (key, value))
        if "window_size" in parameters:
            options["window_size"] = (-1 if call.window is None else call.window - 1, 0)
        else:
            options["is_causal"] = True
        if call.scaling is not None:
            if "scale" in parameters:
                options["scale"] = call.scaling
            else:
                query = query * (call.scaling * math.sqrt(query.shape[-1]))
        offsets = layout.query_offsets, layout.key_offsets
        return self.function(query, key, value, *offsets, layout.most_queries, layout.most_keys, **options)[None]


class _GatherKeys(torch.autograd.Function):
    """
    `states.index_select(0, key_index)`, whose gradient adds the places of each token, two at most, by two gathers.

    The gradient of `index_select` itself is a sum by atomic additions, several times slower in half precision.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, key_index: torch.Tensor, key_places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(key_places)
        return states.index_select(0, key_index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        first, last = ctx.saved_tensors[0]
        twice = (first != last).to(grad.dtype)[:, None, None]
        return torch.addcmul(grad.index_select(0, first), grad.index_select(0, last), twice), None, None


@dataclass(frozen=True)
class FlexAttention:
    """The whole run at once, compiled and padded to blocks of 128 tokens."""

    name = "flex attention"

    def obstacle(self, call: AttentionCall) -> str | None:
        if call.dropout:
            return "has no dropout"
        if call.sinks is not None and not call.query.is_cuda:
            return "has no attention sinks on a CPU"
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        query, key, value = (x.to(call.dtype) for x in (call.query, call.key, call.value))
        if call.groups & (call.groups - 1):  # a power of two is what every release takes
            key, value = (x.repeat_interleave(call.groups, dim=1) for x in (key, value))
        tokens, softcap = len(call.layout), call.softcap or 0.0
        padding = (0, 0, 0, call.layout.padded_length - tokens)
        query, key, value = (nn.functional.pad(x, padding) for x in (query, key, value))

        def capped(score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            return softcap * torch.tanh(score / softcap)

        wants_lse: dict[str, Any] = {}
        if call.sinks is not None:
            newer = hasattr(flex_attention, "AuxRequest")  # since torch 2.9
            wants_lse = {"return_aux": flex_attention.AuxRequest(lse=True)} if newer else {"return_lse": True}
        attended: Any = compiled(flex_attention.flex_attention)(
            query,
            key,
            value,
            score_mod=capped if softcap else None,
            block_mask=call.layout.block_mask(call.window, compiled(flex_attention.create_block_mask)),
            scale=call.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            **wants_lse,
        )
        if call.sinks is not None:
            attended, lse = attended
            lse = getattr(lse, "lse", lse)
            # As if each head had seen one key more, with this score and a value of zero
            attended = attended * torch.sigmoid(lse - call.sinks.view(1, -1, 1)).to(attended.dtype)[..., None]
        return attended[:, :, :tokens].transpose(1, 2)


@dataclass(frozen=True)
class BranchAttention:
    """One call of the model's own implementation per branch; supports everything that the model does."""

    name = "one call per branch"

    def obstacle(self, call: AttentionCall) -> str | None:
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        layout, window = call.layout, call.window

        def branch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            queries, keys = query.shape[2], key.shape[2]
            plain = call.causal and queries in (1, keys) and (window is None or keys <= window)
            mask = None if plain else layout.branch_mask(queries, keys, window, like=query)
            return call.attend(query, key, value, attention_mask=mask)[0]

        outputs: list[torch.Tensor] = []
        sizes = [sum(pair) for pair in layout.lengths]
        split = (states.split(sizes, 2) for states in (call.query, call.key, call.value))
        for (prefix, first, second), query, key, value in zip(layout.lengths, *split, strict=True):
            if second:
                queries = query.split((prefix + first, second), 2)
                (shared_key, *keys), (shared_value, *values) = (
                    x.split((prefix, first, second), 2) for x in (key, value)
                )
                keys = [torch.cat((shared_key, rest), 2) for rest in keys]
                values = [torch.cat((shared_value, rest), 2) for rest in values]
                outputs += map(branch, queries, keys, values)
            elif prefix + first:
                outputs.append(branch(query, key, value))
        return torch.cat(outputs, 1)


# Kernels by device, the preferred one first; devices that are not listed use those of the CPU
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cuda": (VarlenAttention(), FlexAttention(), BranchAttention()),
    "cpu": (BranchAttention(),),
}


def choose_kernel(call: AttentionCall, refused: Mapping[str, str]) -> tuple[Kernel, str]:
    """
    The first kernel of the device that supports a call.

    Args:
        call ([`AttentionCall`]):
            The call.
        refused (`Mapping[str, str]`):
            Kernels that a check has ruled out, by name, with the reason.

    Returns:
        `tuple`: The kernel, and its name with the reasons against those before it.
    """
    kernels = KERNELS.get(call.query.device.type, KERNELS["cpu"])
    reasons = []
    for kernel in kernels[:-1]:
        reason = refused.get(kernel.name) or kernel.obstacle(call)
        if reason is None:
            break
        reasons.append(f"{kernel.name} {reason}")
    else:
        kernel = kernels[-1]
    return kernel, f"{kernel.name} ({'; '.join(reasons)})" if reasons else kernel.name


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    The function, compiled; inside a model that is compiled itself, as it is.

    At the second length torch makes lengths dynamic. `dynamic=True` would make scale and softcap dynamic too, which
    flex attention does not support.
    """
    own = torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if torch.compiler.is_compiling() else own)(*args, **kwargs)

    return call


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def modeling_file(module: nn.Module) -> Any:
    """The file through whose `ALL_ATTENTION_FUNCTIONS` an attention module finds its implementation."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((file for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS")), None)


def _window(module: Any, **kwargs: Any) -> int | None:
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
    """Register an attention that equals `base` unless it is called with a layout; return its name."""

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_pairs: SealedLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        layout = None if packed_pairs is None else packed_pairs.layout
        hooks = getattr(module, "shared_prompt_hooks", None)
        modeling = modeling_file(module)
        attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            base, getattr(modeling, "eager_attention_forward", None)
        )
        untouched = attention_mask is not None and attention_mask.numel() == 1 and kwargs.get("position_bias") is None
        if layout is None and not (untouched and key.shape[2] > 1):
            return attend(module, query, key, value, attention_mask, **kwargs)
        if layout is None or not untouched or hooks is None:
            raise ValueError(
                f"`{type(module).__name__}` must get the layout and an unchanged mask for shared prompts, but the "
                "model drops the one or changes the other. Score the rows separately."
            )
        call = AttentionCall(
            query,
            key,
            value,
            layout,
            functools.partial(attend, module, **kwargs),
            causal=base == "sdpa",
            window=_window(module, **kwargs),
            scaling=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            dropout=kwargs.get("dropout") or 0.0,
        )
        kernel, description = choose_kernel(call, hooks.refused)
        hooks.kernel, hooks.attended[kernel.name] = kernel.name, description
        return kernel(call), None

    name = PREFIX + base
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


NAMES = {base: _register(base) for base in ("sdpa", "eager")}
