"""
Modules of transformers that compute in many small operations what PyTorch has as one.

Each of the small ones reads and writes the hidden states anew: Llama's RMSNorm has six forward and eighteen backward.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import NewGELUActivation


# RMSNorm by device; on all others modules compute it themselves. PyTorch has a kernel of its own since 2.9.
RMS_NORMS: dict[str, Callable[..., torch.Tensor]] = {"cuda": nn.functional.rms_norm}


@dataclass(frozen=True)
class Operation:
    """
    One operation in place of a module's own.

    Args:
        name (`str`):
            Name in messages.
        compute (`Callable`):
            Called with the module and its input; equals the module up to rounding.
        supports (`Callable`):
            Called with the same: whether the operation can take the place.
    """

    name: str
    compute: Callable[[Any, torch.Tensor], torch.Tensor]
    supports: Callable[[Any, torch.Tensor], bool]


def operation_for(module: nn.Module) -> Operation | None:
    """The operation that can take the place of a module's own, if there is one."""
    if isinstance(module, NewGELUActivation):
        return GELU
    return RMS_NORM if _is_rms_norm(module) else None


def _gelu(module: Any, values: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(values, approximate="tanh")


def _always(module: Any, values: torch.Tensor) -> bool:
    return True


def _rms_norm(module: Any, values: torch.Tensor) -> torch.Tensor:
    norm = RMS_NORMS[values.device.type]
    return norm(values, module.weight.shape, module.weight, _epsilon(module)).to(values.dtype)


def _supports_rms_norm(module: Any, values: torch.Tensor) -> bool:
    # Of hidden states, not of the few channels of a head; the kernel takes a single dtype
    return values.device.type in RMS_NORMS and values.dim() == 3 and values.dtype == module.weight.dtype


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_rms_norm(module: Any) -> bool:
    """Whether a module is named RMSNorm and computes what PyTorch's does (Gemma's, for one, adds 1 to the weight)."""
    epsilon = _epsilon(module)
    if "RMSNorm" not in type(module).__name__ or isinstance(module, nn.RMSNorm) or not isinstance(epsilon, float):
        return False
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    draws = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(16, generator=draws), torch.randn(4, 16, generator=draws)
    rows[2:] *= epsilon**0.5  # small enough for epsilon to count
    bare = copy.copy(module)  # whose call needs no whole weight, and none of the hooks that make it whole
    bare._parameters = {"weight": nn.Parameter(weight)}
    with torch.no_grad():
        found = type(module).forward(bare, rows)
        expected = nn.functional.rms_norm(rows, weight.shape, weight, epsilon)
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


GELU = Operation("one operation for GELU", _gelu, _always)
RMS_NORM = Operation("fused RMSNorm", _rms_norm, _supports_rms_norm)
