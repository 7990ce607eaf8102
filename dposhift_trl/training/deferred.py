"""What a trainer makes of gathered values, without waiting for them: one gather a step, no value read before a log."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from .metrics import widest_float


class Deferred:
    """A number that [`~trl.DPOTrainer`] derives from gathered values, known once [`GatherLater.resolve`] is called."""

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
        # Python's numbers are of 64 bits
        return self._then(lambda x: x.to(widest_float(x.device)) if x.is_floating_point() else x.long())

    def __truediv__(self, other: Any) -> "Deferred":
        # Whoever divides asks first whether the divisor is above 0 and takes 0 where it is not; see `__gt__`
        return self._then(lambda x, y: torch.where(y > 0, x / y, 0.0), other)

    def __floordiv__(self, other: int) -> "Deferred":
        return self._then(lambda x: x // other)

    def __radd__(self, other: Any) -> "Deferred":
        return self._then(lambda x: other + x)

    def __gt__(self, other: float) -> bool:
        if other != 0:
            raise NotImplementedError("only a divisor is compared, and only with 0")
        return True


class GatherLater:
    """
    Stands in for an accelerator whose gathers are to be one.

    Each `gather` and `gather_for_metrics` notes its tensor and returns a [`Deferred`]; `resolve` gathers all of them
    at once, and nothing is read from the device.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The one it stands in for; everything but the two gathers is its own.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._tensors: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: torch.Tensor) -> Deferred:
        place = len(self._tensors)
        self._tensors.append(tensor.detach())
        return Deferred(lambda gathered: gathered[place])

    def gather_for_metrics(self, tensor: torch.Tensor) -> Deferred:
        return self.gather(tensor)

    def resolve(self, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[Any], Any]]:
        """
        Gather everything noted, and further tensors, in one call.

        Args:
            tensors (`torch.Tensor`):
                Further tensors, each of the same shape on every process.

        Returns:
            `tuple`: The further tensors, those of all processes along the first dimension, and a function that makes a
            [`Deferred`] a tensor on the device and leaves any other value as it is.
        """
        everything = [*self._tensors, *tensors]
        dtype = widest_float(everything[0].device)
        flat = torch.cat([x.detach().reshape(-1).to(dtype) for x in everything])
        rows = self._accelerator.gather(flat).view(-1, len(flat))
        pieces = rows.split([x.numel() for x in everything], dim=1)
        gathered = [piece.to(x.dtype).reshape(-1, *x.shape[1:]) for piece, x in zip(pieces, everything, strict=True)]
        noted = gathered[: len(self._tensors)]
        return gathered[len(self._tensors) :], lambda x: x.evaluate(noted) if isinstance(x, Deferred) else x


def read_from_device(metrics: dict[str, list[Any]]) -> None:
    """Replace the tensors among the values by numbers, in one transfer."""
    places = [(values, i) for values in metrics.values() for i, x in enumerate(values) if torch.is_tensor(x)]
    if places:
        dtype = widest_float(places[0][0][places[0][1]].device)
        numbers = torch.stack([values[i].to(dtype) for values, i in places]).tolist()
        for (values, i), number in zip(places, numbers, strict=True):
            values[i] = number
