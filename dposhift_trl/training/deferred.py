"""One gather per training step for all of TRL's metrics, none of which is read from the device before a log."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from .metrics import widest_float


class Deferred:
    """
    A number that [`~trl.DPOTrainer`] computes from gathered values, evaluated after [`GatherLater.resolve`].

    Args:
        evaluate (`Callable`):
            Takes the gathered tensors and returns the number as a tensor.
    """

    def __init__(self, evaluate: Callable[[list[torch.Tensor]], torch.Tensor]):
        self.evaluate = evaluate

    def _then(self, function: Callable[..., torch.Tensor], *others: Any) -> "Deferred":
        def evaluate(gathered: list[torch.Tensor]) -> torch.Tensor:
            values = [x.evaluate(gathered) if isinstance(x, Deferred) else x for x in (self, *others)]
            return function(*values)

        return Deferred(evaluate)

    def sum(self) -> "Deferred":
        return self._then(torch.sum)

    def mean(self) -> "Deferred":
        return self._then(torch.mean)

    def item(self) -> "Deferred":
        # Python's numbers have 64 bits
        return self._then(lambda x: x.to(widest_float(x.device)) if x.is_floating_point() else x.long())

    def __truediv__(self, other: Any) -> "Deferred":
        # DPOTrainer computes `x / n if n > 0 else 0.0`; `n > 0` is always true here, so the 0 comes from this division
        return self._then(lambda x, y: torch.where(y > 0, x / y, 0.0), other)

    def __floordiv__(self, other: int) -> "Deferred":
        return self._then(lambda x: x // other)

    def __radd__(self, other: Any) -> "Deferred":
        return self._then(lambda x: other + x)

    def __gt__(self, other: float) -> bool:
        if other != 0:
            raise NotImplementedError(f"A deferred number can only be compared with 0, got a comparison with {other}.")
        return True


class GatherLater:
    """
    An accelerator that postpones its gathers and combines them into one.

    Each `gather` and `gather_for_metrics` records its tensor and returns a [`Deferred`]; `resolve` gathers all of them
    at once. Nothing is read from the device. Every other attribute is the wrapped accelerator's.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator to wrap.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._tensors: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: torch.Tensor) -> Deferred:
        index = len(self._tensors)
        self._tensors.append(tensor.detach())
        return Deferred(lambda gathered: gathered[index])

    def gather_for_metrics(self, tensor: torch.Tensor) -> Deferred:
        return self.gather(tensor)

    def resolve(self, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[Any], Any]]:
        """
        Gather all recorded tensors, and further ones, in one call.

        Args:
            tensors (`torch.Tensor`):
                Further tensors, each with the same shape on every process.

        Returns:
            `tuple`: The further tensors, with those of all processes along the first dimension, and a function that
            turns a [`Deferred`] into a tensor on the device and returns any other value unchanged.
        """
        everything = [*self._tensors, *tensors]
        dtype = widest_float(everything[0].device)
        flat = torch.cat([x.detach().reshape(-1).to(dtype) for x in everything])
        rows = self._accelerator.gather(flat).view(-1, len(flat))
        pieces = rows.split([x.numel() for x in everything], dim=1)
        gathered = [piece.to(x.dtype).reshape(-1, *x.shape[1:]) for piece, x in zip(pieces, everything, strict=True)]
        recorded = gathered[: len(self._tensors)]
        return gathered[len(self._tensors) :], lambda x: x.evaluate(recorded) if isinstance(x, Deferred) else x


def read_from_device(metrics: dict[str, list[Any]]) -> None:
    """Replace every tensor among the values with a number, in one transfer."""
    places = [(values, i) for values in metrics.values() for i, x in enumerate(values) if torch.is_tensor(x)]
    if places:
        dtype = widest_float(places[0][0][places[0][1]].device)
        numbers = torch.stack([values[i].to(dtype) for values, i in places]).tolist()
        for (values, i), number in zip(places, numbers, strict=True):
            values[i] = number
