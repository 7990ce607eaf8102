"""The start-up check that a model scores shared prompts as it scores padded rows, in the precision of the run."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..columns import BATCH_KEYS
from .attention import BranchAttention
from .hooks import hooks_of, shared_prompt_scores
from .layout import PairLayout
from .support import causal_lm_of


logger = logging.getLogger(__name__)

# Scores and gradients may differ by this many times the effect of rounding the embeddings once. Over 12 architectures
# with 2 to 24 layers in float32, float16 and bfloat16, correct kernels stay below 2 and wrong ones start at 13.
TOLERANCE = 5.0


@dataclass(frozen=True)
class Agreement:
    """
    Differences between shared prompts and padded rows, and the effect of rounding the embeddings once.

    Args:
        scores, rounding (`float`):
            Largest difference of two log-probabilities, in nats.
        gradients, gradient_rounding (`float`):
            Largest difference of the gradients of a token's embedding, relative to their size.
    """

    scores: float
    rounding: float
    gradients: float
    gradient_rounding: float

    @property
    def fault(self) -> str | None:
        """What is wrong, as a phrase; `None` if nothing is."""
        # A comparison with NaN is false
        if not self.scores <= TOLERANCE * self.rounding:
            return f"scores differ by {self.scores:.2g} nats, rounding accounts for {self.rounding:.2g}"
        if not self.gradients <= TOLERANCE * self.gradient_rounding:
            return f"gradients differ by {self.gradients:.2g} of their size, rounding: {self.gradient_rounding:.2g}"
        return None


def verify_shared_prompt(
    model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext, batch: Any = None
) -> str:
    """
    Check log-probabilities and a gradient of two small pairs with shared prompts against padded rows.

    Of a model that FSDP2 divides among processes already, a frozen reference, only the log-probabilities are checked.

    Whatever raises or disagrees is disabled for this model. Fused operations are disabled if the check passes without
    them; otherwise the attention kernel is disabled, and the next supported one is tried.

    Args:
        model (`torch.nn.Module`):
            Model prepared by [`enable_shared_prompt`].
        autocast (`Callable`, *optional*):
            Creates the context in which training runs the model, such as [`~accelerate.Accelerator.autocast`].
        batch (`Mapping[str, torch.Tensor]`, *optional*):
            Batch in the format of TRL's `DataCollatorForPreference`. By default, two pairs of a few arbitrary tokens.

    Returns:
        `str`: The attention kernel in use, with the reasons against those before it.

    Raises:
        ValueError: If no kernel agrees, with the reason.
    """
    hooks = hooks_of(model)
    with _unchanged(model):
        check = _Check(model, autocast, batch)
        while (failure := check.failure()) is not None:
            fault, error = failure
            kernel, operations, refused = hooks.kernel, hooks.operations, hooks.refused
            if operations:
                # To blame if the check passes without them, or if it got no further
                hooks.refused = {**refused, **dict.fromkeys(operations, fault)}
                if check.failure() is None or kernel is None:
                    logger.warning(f"{' and '.join(sorted(operations))} disabled for shared prompts: {fault}")
                    continue
                hooks.refused = refused
            if kernel is None:
                raise ValueError(str(error)) from error
            if kernel == BranchAttention.name:
                tried = "".join(f"; {name}: {reason}" for name, reason in refused.items())
                raise ValueError(f"{fault} ({kernel}{tried})") from error
            logger.warning(f"{kernel} is disabled for shared prompts: {fault}")
            refused[kernel] = fault
        return " and ".join(hooks.attended.values())


def measure_shared_prompt(
    model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext, batch: Any = None
) -> Agreement:
    """The differences that [`verify_shared_prompt`] checks, with the kernel in use."""
    with _unchanged(model):
        return _Check(model, autocast, batch).agreement()


class _Check:
    """The scores of padded rows, with exact and with rounded embeddings, to compare shared prompts with."""

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]], batch: Any):
        self.model, self.autocast = model, autocast
        device = next(model.parameters()).device
        batch = two_pairs(causal_lm_of(model).config.vocab_size) if batch is None else batch
        self.tokens = batch["input_ids"].unique().to(device)
        self.layout = PairLayout.from_batch({name: batch[name].cpu() for name in BATCH_KEYS}).to(device)
        ids, real, scored = (batch[name].to(device) for name in BATCH_KEYS)
        labels = ids.masked_fill(scored == 0, -100)
        rows = {"input_ids": ids, "attention_mask": real, "labels": labels, "use_cache": False, "fused_lm_head": True}
        self.rows, self.rounded = (self._run(lambda: model(**rows).log_probs, by) for by in (0.0, 1.0))

    def failure(self) -> tuple[str, Exception | None] | None:
        """What is wrong with shared prompts, as a phrase, and what was raised; `None` if nothing is."""
        hooks = hooks_of(self.model)
        hooks.kernel, hooks.attended, hooks.operations = None, {}, set()
        try:
            fault = self.agreement().fault
        except Exception as raised:  # whatever kernels and compilers raise: RuntimeError is not all of it
            return f"raises {type(raised).__name__}: {next(iter(str(raised).strip().splitlines()), '')}", raised
        return None if fault is None else (fault, None)

    def agreement(self) -> Agreement:
        pairs = self._run(lambda: shared_prompt_scores(self.model, self.layout).log_probs, 0.0)
        scores, gradients = _difference(pairs, self.rows)
        rounding, gradient_rounding = _difference(self.rounded, self.rows)
        return Agreement(scores, rounding, gradients, gradient_rounding)

    def _run(self, scores: Callable[[], torch.Tensor], rounding: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores, and the gradient of a weighted sum of them with respect to the embedding of each token."""
        changes: list[torch.Tensor] = []
        # The hooks of shared prompts come after those that would make weights whole in the backward pass
        differentiates = not isinstance(self.model, FSDPModule)

        def move(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            place = torch.searchsorted(self.tokens, args[0])
            if not changes:
                change = torch.zeros(len(self.tokens), output.shape[-1], device=output.device)
                change[place.flatten()] = output.detach().flatten(0, 1).float()
                draws = torch.rand(change.shape, generator=torch.Generator().manual_seed(0)) - 0.5
                change *= rounding * _epsilon(output) * draws.to(change.device)
                changes.append(change.requires_grad_(differentiates))
            return output + changes[0][place].to(output.dtype)

        hook = causal_lm_of(self.model).get_input_embeddings().register_forward_hook(move)
        try:
            with torch.set_grad_enabled(differentiates), self.autocast():
                values = scores()
                weights = torch.linspace(-1, 2, values.numel(), device=values.device).view(values.shape)
                total = (values.float() * weights).sum()
                (gradient,) = torch.autograd.grad(total, changes) if differentiates else map(torch.zeros_like, changes)
        finally:
            hook.remove()
        return values.detach().float(), gradient


def two_pairs(vocab_size: int) -> dict[str, torch.Tensor]:
    """Two pairs of arbitrary tokens, in the format of TRL's `DataCollatorForPreference`."""
    ids = torch.randint(vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    steps = torch.arange(12)
    ids[2:] = torch.where(steps < torch.tensor([[6], [7]]), ids[:2], ids[2:])
    real = (steps < torch.tensor([[12], [9], [10], [11]])).long()
    return {"input_ids": ids * real, "attention_mask": real, "completion_mask": real * (steps >= 5)}


def _epsilon(output: torch.Tensor) -> float:
    """
    Machine epsilon of the dtype in which matrix products are computed; at least that of TF32, which GPUs may use for
    float32.
    """
    device = output.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps)


def _difference(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Largest difference of scores, and of the gradients of a token, relative to their size."""
    (scores, gradients), (expected, expected_gradients) = left, right
    sizes = expected_gradients.norm(dim=1)
    smallest = (1e-3 * sizes.max()).clamp(min=torch.finfo(sizes.dtype).tiny)
    apart = (gradients - expected_gradients).norm(dim=1) / (sizes + smallest)
    return (scores - expected).abs().max().item(), apart.max().item()


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without parameter gradients, and restore both afterwards."""
    training: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
