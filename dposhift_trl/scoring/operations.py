"""
Single PyTorch operations that replace the forward of modules in transformers.

Each of a module's own operations reads and writes the hidden states anew: in float32, Llama's RMSNorm has 6 forward
and 14 backward.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import NewGELUActivation


# RMSNorm by device; on others, modules use their own forward. PyTorch has a kernel of its own since 2.9.
RMS_NORMS: dict[str, Callable[..., torch.Tensor]] = {"cuda": nn.functional.rms_norm}


@dataclass(frozen=True)
class Operation:
    """
    An operation that equals a module's forward up to rounding.

    Args:
        name (`str`):
            Name in messages.
        compute (`Callable`):
            Called with the module and its input.
        supports (`Callable`):
            Called with the module and its input: whether `compute` supports them.
    """

    name: str
    compute: Callable[[Any, torch.Tensor], torch.Tensor]
    supports: Callable[[Any, torch.Tensor], bool]


def operation_for(module: nn.Module) -> Operation | None:
    """The operation that can replace a module's forward, if there is one."""
    if isinstance(module, NewGELUActivation):
        return GELU
    return RMS_NORM if _is_rms_norm(module) else None


def _gelu(module: Any, values: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(values, approximate="tanh")


def _always(module: Any, values: torch.Tensor) -> bool:
    return True


def _rms_norm(module: Any, values: torch.Tensor) -> torch.Tensor:
    device = values.device.type
    # Newer releases of PyTorch autocast it to float32, where it computes anyway
    with torch.autocast(device, enabled=False):
        return RMS_NORMS[device](values, module.weight.shape, module.weight, _epsilon(module))


def _supports_rms_norm(module: Any, values: torch.Tensor) -> bool:
    # Not in the heads of attention, whose rows are too short to gain; the kernel supports a single dtype
    if values.dim() != 3 or values.device.type not in RMS_NORMS:
        return False
    return (values.dtype, values.device) == (module.weight.dtype, module.weight.device)


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_rms_norm(module: Any) -> bool:
    """Whether a module is named RMSNorm and computes what PyTorch's does (Gemma's, for one, adds 1 to the weight)."""
    epsilon = _epsilon(module)
    if "RMSNorm" not in type(module).__name__ or isinstance(module, nn.RMSNorm) or not isinstance(epsilon, float):
        return False
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    draws = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(16, generator=draws, **plain), torch.randn(1, 4, 16, generator=draws, **plain)
    rows[:, 2:] *= epsilon**0.5  # small enough for epsilon to count
    # A copy with a small weight: the real one may be sharded, and its hooks would gather it
    bare = copy.copy(module)
    bare._parameters = {"weight": nn.Parameter(weight)}
    try:
        with torch.no_grad():
            found = type(module).forward(bare, rows)
    except Exception:  # whatever a forward raises that needs more, or something else
        return False
    expected = nn.functional.rms_norm(rows, weight.shape, weight.detach(), epsilon)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


GELU = Operation("fused GELU", _gelu, _always)
RMS_NORM = Operation("fused RMSNorm", _rms_norm, _supports_rms_norm)
