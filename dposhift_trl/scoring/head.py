"""The LM head in tiles of the vocabulary: from hidden states to log-probabilities of tokens."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction

from .sharded import gathered


# Logits in one tile, rows times vocabulary: enough for the matrix product, few enough for the cache
TILE = 2**20
# Logits up to which their exponentials stay in memory until the gradient of the weight has been taken, 256 MiB
KEPT = 2**26
# Columns of a tile of TRL's head, as TRL calls it
CHUNK = 2**15
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def token_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    outputs: tuple[str, ...] = (),
    scale: float = 1.0,
    softcap: float | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    Log-probability of one token per row, and statistics of its distribution.

    The logits, `scale * (hidden @ weight.T + bias)`, capped by `softcap * tanh(logits / softcap)`, are made in tiles
    and folded into running sums: no more than `KEPT` of them stay in memory. The gradient of a log-probability
    with respect to its row,

    $$ \nabla_h \log p_t = w_t - \sum_v p_v w_v, $$

    is folded in the same pass, so that a frozen head (LoRA) needs no second one; a trained one needs a second where
    there are more than `KEPT` logits. Sums are kept in float32, those of float64 rows in float64. Gradients flow
    through the log-probabilities alone.

    Args:
        hidden (`torch.Tensor`):
            Hidden states, in the dtype the matrix products are to have. Shape: `(rows, hidden_size)`.
        weight (`torch.Tensor`):
            Weight of the head. Shape: `(vocab_size, hidden_size)`.
        bias (`torch.Tensor` or `None`):
            Bias of the head. Shape: `(vocab_size,)`.
        targets (`torch.Tensor`):
            The token each row predicts. Shape: `(rows,)`.
        outputs (`tuple[str, ...]`, *optional*, defaults to `()`):
            What else to compute: any of `"entropy"` and `"log_sum_sq_probs"` (in nats), `"mean_logits"`, `"is_top1"`.
        scale (`float`, *optional*, defaults to `1.0`):
            Scale of the logits.
        softcap (`float`, *optional*):
            Softcap of the logits.

    Returns:
        `dict[str, torch.Tensor]`: `log_probs`, in nats, and each of `outputs`. Shape: `(rows,)` each.
    """
    if not torch.is_grad_enabled():  # `needs_input_grad` does not know
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    values = _TokenScores.apply(hidden, weight, bias, targets, outputs, scale, softcap)
    return dict(zip(("log_probs", *outputs), values, strict=True))


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        outputs: tuple[str, ...],
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, ...]:
        sums: dict[str, Any] = {"dtype": torch.promote_types(hidden.dtype, torch.float32), "device": hidden.device}
        peak = torch.full((len(hidden),), -torch.inf, **sums)
        total, total_logits, total_squares, logits_sum, target = torch.zeros(5, len(hidden), **sums)
        top = torch.zeros_like(targets)
        mean_weight = torch.zeros(hidden.shape, **sums) if ctx.needs_input_grad[0] else None
        keep = any(ctx.needs_input_grad[1:3]) and len(hidden) * len(weight) <= KEPT
        ctx.kept = []

        for start, tile, logits in vocabulary_tiles(hidden, weight, bias, sums["dtype"], scale, softcap):
            inside = ((targets >= start) & (targets < start + len(tile))).nonzero()[:, 0]
            target[inside] = logits[inside, targets[inside] - start]
            if "mean_logits" in outputs:
                logits_sum += logits.sum(-1)
            if "is_top1" in outputs:
                highest, where = logits.max(-1)
                top = torch.where(highest > peak, where + start, top)
            else:
                highest = logits.amax(-1)
            highest = torch.maximum(peak, highest)
            shrink = torch.exp(peak - highest)
            peak = highest
            exps = (logits - peak[:, None]).exp_()
            total.mul_(shrink).add_(exps.sum(-1))
            if "entropy" in outputs:
                total_logits.mul_(shrink).add_(torch.linalg.vecdot(exps, logits))
            if "log_sum_sq_probs" in outputs:
                total_squares.mul_(shrink**2).add_(torch.linalg.vecdot(exps, exps))
            if mean_weight is not None or keep:
                exps = through_transform(exps, logits, scale, softcap)
            if mean_weight is not None:
                mean_weight.mul_(shrink[:, None]).addmm_(exps, tile.to(exps.dtype))
            if keep:
                ctx.kept.append((start, exps, peak))

        log_total = peak + total.log()
        if mean_weight is not None:
            mean_weight /= total[:, None]
        ctx.save_for_backward(hidden, weight, bias, targets, target, log_total, mean_weight)
        ctx.transform = scale, softcap
        ctx.set_materialize_grads(False)
        statistics = {
            "entropy": log_total - total_logits / total,
            "log_sum_sq_probs": total_squares.log() - 2 * total.log(),
            "mean_logits": logits_sum / len(weight),
            "is_top1": top == targets,
        }
        extras = [statistics[name] for name in outputs]
        ctx.mark_non_differentiable(*extras)
        return target - log_total, *extras

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        _, weight, bias, *_ = ctx.saved_tensors
        with gathered(weight, bias):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, targets, target, log_total, mean_weight = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_hidden = grad_weight = grad_bias = None
    at_target = through_transform(grad, target, *ctx.transform)[:, None]
    if needs_hidden:
        grad_hidden = at_target * weight[targets].to(grad.dtype) - grad[:, None] * mean_weight
        grad_hidden = grad_hidden.to(hidden.dtype)
    if needs_weight or needs_bias:
        # The bias is the weight of a constant
        rows = hidden.to(grad.dtype)
        grad_weight = torch.empty(weight.shape, dtype=grad.dtype, device=weight.device)
        grad_bias = torch.empty(len(weight), 1, dtype=grad.dtype, device=weight.device) if needs_bias else None
        for start, exps, peak in ctx.kept or _exps(hidden, weight, bias, log_total, ctx.transform):
            end, factor = start + exps.shape[1], -grad * torch.exp(peak - log_total)
            torch.mm(exps.t(), rows * factor[:, None], out=grad_weight[start:end])
            if grad_bias is not None:
                torch.mm(exps.t(), factor[:, None], out=grad_bias[start:end])
        grad_weight = grad_weight.index_add_(0, targets, at_target * rows).to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.index_add_(0, targets, at_target)[:, 0].to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _exps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    log_total: torch.Tensor,
    transform: tuple[float, float | None],
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Recompute what `_TokenScores` keeps of each tile if it fits, relative to the total instead of a peak."""
    for start, _, logits in vocabulary_tiles(hidden, weight, bias, log_total.dtype, *transform):
        yield start, through_transform((logits - log_total[:, None]).exp_(), logits, *transform), log_total


def vocabulary_tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each tile of the vocabulary: its first token, its weight, and the logits of all rows in `dtype`."""
    width = max(256, TILE // max(1, len(hidden)))
    for start in range(0, len(weight), width):
        tile = weight[start : start + width].to(hidden.dtype)
        logits = hidden @ tile.t()
        if bias is not None:
            logits += bias[start : start + width].to(hidden.dtype)
        logits = logits.to(dtype)
        if scale != 1.0:
            logits *= scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        yield start, tile, logits


def through_transform(grad: torch.Tensor, logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Backpropagate a gradient of the logits through softcap and scale."""
    if softcap is not None:
        grad = grad * (1 - (logits / softcap) ** 2)
    return grad if scale == 1.0 else grad * scale


def chunked_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    outputs: tuple[str, ...] = (),
    scale: float = 1.0,
    softcap: float | None = None,
) -> dict[str, torch.Tensor]:
    """[`token_scores`] with the kernel of TRL's fused head, whose Triton code is faster on a GPU."""
    values = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, CHUNK, softcap, scale, outputs)
    names = ("log_probs", *OPTIONAL_OUTPUTS)
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


# Head by device; `token_scores` on all others
HEADS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {"cuda": chunked_scores}


def score_rows(hidden: torch.Tensor, *args: Any) -> dict[str, torch.Tensor]:
    """[`token_scores`], or the faster function with the same arguments for the device of `hidden`."""
    return HEADS.get(hidden.device.type, token_scores)(hidden, *args)


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and softcap of a model's logits, from the config fields that TRL's fused head reads."""
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    scale, name = next(((x, name) for name in names if (x := getattr(config, name, None)) is not None), (1.0, None))
    if name == "logits_scaling" and config.model_type != "hyperclovax":
        scale = 1 / scale
    return scale, getattr(config, "final_logit_softcapping", None)
