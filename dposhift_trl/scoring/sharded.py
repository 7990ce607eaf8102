"""Parameters that FSDP2 or ZeRO-3 divides among processes, made whole for functions outside their module."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial
from trl.trainer.utils import maybe_gather_lm_head_ctx


def whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """
    A parameter of which FSDP2 may keep a part on each process, as a tensor with all of it.

    Its gradient is the mean over processes, as of the parameters that FSDP2 gathers itself.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def gathered(*parameters: torch.Tensor | None) -> AbstractContextManager[Any]:
    """Inside this context, parameters that ZeRO-3 divides among processes are whole; in the backward pass too."""
    context: AbstractContextManager[Any] = maybe_gather_lm_head_ctx(*parameters)
    return context
