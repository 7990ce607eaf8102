r"""
Losses that `displacement.py` compares with DPO-Shift: other people's, and candidates of our own.

A loss is a function of the scores of a batch and returns the loss per pair, in nats, of shape `(num_pairs,)`. A gate
returns factors of the gradients of the rejected answers' tokens. In the formulas \\( r = \beta\Delta \\) with the
log-ratio \\( \Delta \\), lengths are in tokens, and [.] has no gradient.
"""

import dataclasses
from collections.abc import Callable
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F

from dposhift_trl.training.metrics import PairScores


Loss = Callable[[PairScores], torch.Tensor]
# From the log-probabilities of the rejected answers' tokens, zero elsewhere, and the tokens of the chosen and of the
# rejected rows, -1 outside the answers, all of shape `(num_pairs, length)`
Gate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dpo(beta: float) -> Loss:
    r"""DPO, https://huggingface.co/papers/2305.18290."""
    return lambda p: -F.logsigmoid(beta * (p.chosen_logratios - p.rejected_logratios))


def dpo_positive(beta: float, weight: float) -> Loss:
    r"""DPO-Positive, https://huggingface.co/papers/2402.13228: a penalty on chosen answers below the reference."""
    return lambda p: (
        -F.logsigmoid(beta * (p.chosen_logratios - p.rejected_logratios - weight * (-p.chosen_logratios).clamp(min=0)))
    )


def cal_dpo(beta: float) -> Loss:
    r"""Cal-DPO, https://huggingface.co/papers/2412.14516: log-ratios drawn to \\( \pm 1 / (2\beta) \\)."""
    return lambda p: (
        -F.logsigmoid(p.chosen_logratios - p.rejected_logratios)
        + (p.chosen_logratios - 0.5 / beta) ** 2
        + (p.rejected_logratios + 0.5 / beta) ** 2
    )


def simpo(beta: float, margin: float) -> Loss:
    r"""SimPO, https://huggingface.co/papers/2405.14734: means per token, without a reference."""
    return lambda p: (
        -F.logsigmoid(beta * (p.chosen_logps / p.chosen_tokens - p.rejected_logps / p.rejected_tokens) - margin)
    )


def acpo(beta: float, delta: float) -> Loss:
    r"""
    ACPO, https://huggingface.co/papers/2603.22165: \\( \lambda^* = [(r_w - \tau) / r_l] \\) clipped to (0, 1] for each
    pair, with \\( \tau = \delta(|y_w| + |y_l|) \\). Where \\( r_l = 0 \\), lambda is 1.
    """

    def loss(pairs: PairScores) -> torch.Tensor:
        up, down = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
        target = delta * (pairs.chosen_tokens + pairs.rejected_tokens)
        ratio = torch.where(down == 0, 1.0, (up - target) / torch.where(down == 0, 1.0, down))
        shift_lambda = ratio.clamp(torch.finfo(ratio.dtype).tiny, 1.0).detach()
        return -F.logsigmoid(up - shift_lambda * down)

    return loss


def gate_dpo(beta: float, slope: float, threshold: float) -> Loss:
    r"""
    Gate-DPO, https://huggingface.co/papers/2605.02626: the gradient of the rejected answer, not its value, times
    \\( [\sigma(a(p_l - \tau))] \\). Here \\( p_l \\) is the log-probability per token, in nats; the paper's own
    values of a and tau were not to be had.
    """

    def loss(pairs: PairScores) -> torch.Tensor:
        gate = torch.sigmoid(slope * (pairs.rejected_logps / pairs.rejected_tokens - threshold)).detach()
        down = gate * pairs.rejected_logratios + (1 - gate) * pairs.rejected_logratios.detach()
        return -F.logsigmoid(beta * (pairs.chosen_logratios - down))

    return loss


def beta_dpo(beta: float, weight: float = 0.6, momentum: float = 0.9) -> Loss:
    r"""
    Beta-DPO, https://huggingface.co/papers/2407.08639, without its filter of pairs:
    \\( \beta_t = \beta(1 + [\alpha(\bar M - M_0)]) \\) with the mean margin of the batch and its moving average.
    """
    average = 0.0

    def loss(pairs: PairScores) -> torch.Tensor:
        nonlocal average
        margins = pairs.chosen_logratios - pairs.rejected_logratios
        mean = beta * margins.detach().mean().item()
        dynamic = max(beta * (1 + weight * (mean - average)), 1e-3)
        average = momentum * average + (1 - momentum) * mean
        return -F.logsigmoid(dynamic * margins)

    return loss


def gated_by_ratio(beta: float, threshold: float, slope: float = 1.0) -> Loss:
    r"""
    Candidate: like Gate-DPO, with a gate on the rejected log-ratio, so that an answer is no longer pushed once it is
    `threshold` nats below the reference.
    """

    def loss(pairs: PairScores) -> torch.Tensor:
        gate = torch.sigmoid(slope * (pairs.rejected_logratios - threshold)).detach()
        down = gate * pairs.rejected_logratios + (1 - gate) * pairs.rejected_logratios.detach()
        return -F.logsigmoid(beta * (pairs.chosen_logratios - down))

    return loss


def saturated(beta: float, bound: float) -> Loss:
    r"""
    Candidate: \\( c \tanh(\Delta_l / c) \\) in place of a rejected log-ratio below 0, gradient and value. A pair's
    lambda falls from 1 to 0 as its rejected answer falls, and its margin can then only grow by the chosen answer.
    """

    def loss(pairs: PairScores) -> torch.Tensor:
        down = torch.where(
            pairs.rejected_logratios < 0,
            bound * torch.tanh(pairs.rejected_logratios / bound),
            pairs.rejected_logratios,
        )
        return -F.logsigmoid(beta * (pairs.chosen_logratios - down))

    return loss


def shifted_per_token(beta: float, shift_lambda: float) -> Loss:
    r"""
    Candidate: \\( \lambda \\) times the ratio of the lengths, so that a long rejected answer does not outweigh a short
    chosen one; \\( \lambda |y_w| / |y_l| \\), at most 1.
    """

    def loss(pairs: PairScores) -> torch.Tensor:
        ratio = (shift_lambda * pairs.chosen_tokens / pairs.rejected_tokens).clamp(max=1.0)
        return -F.logsigmoid(beta * (pairs.chosen_logratios - ratio * pairs.rejected_logratios))

    return loss


def by_own_fall(beta: float) -> Loss:
    r"""
    Candidate: \\( \lambda = [1 - \Delta_w / \Delta_l] \\) for a pair whose answers both fell, clipped to [0, 1], else
    1. A pair's lambda is lower the more its chosen answer falls with its rejected one.
    """

    def loss(pairs: PairScores) -> torch.Tensor:
        up, down = pairs.chosen_logratios, pairs.rejected_logratios
        fell = (up < 0) & (down < 0)
        shift_lambda = torch.where(fell, 1 - up / torch.where(fell, down, 1.0), 1.0).clamp(0.0, 1.0).detach()
        return -F.logsigmoid(beta * (up - shift_lambda * down))

    return loss


def gate_tokens(scores: PairScores, gate: Gate, log_probs: torch.Tensor, tokens: torch.Tensor) -> PairScores:
    """
    The same scores, with gradients of the rejected answers' tokens times a gate.

    Args:
        scores (`PairScores`):
            Scores of the batch.
        gate (`Callable`):
            Factor of each token of a rejected answer.
        log_probs (`torch.Tensor`):
            Log-probabilities of the answers' tokens, chosen rows first, zero elsewhere, of shape
            `(2 * num_pairs, length)`.
        tokens (`torch.Tensor`):
            The answers' tokens, -1 elsewhere, of the same shape.
    """
    rejected = log_probs.chunk(2)[1]
    gated = (gate(rejected.detach(), *tokens.chunk(2)) * rejected).sum(dim=1)
    return dataclasses.replace(scores, rejected_logps=scores.rejected_logps.detach() + gated - gated.detach())


def by_probability(log_probs: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    r"""Candidate: \\( [\pi_\theta(y_t)] \\), so that tokens that the model would not write are not pushed further."""
    return log_probs.exp()


def on_tokens(shared: float, own: float) -> Gate:
    """Candidate: one lambda for the tokens that a rejected answer shares with its chosen one, another for its own."""

    def gate(log_probs: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return torch.where(shared_tokens(chosen, rejected), shared, own)

    return gate


def shared_tokens(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Where the rejected rows' tokens are aligned with equal ones of the chosen rows. Shape: `(num_pairs, length)`."""
    found = torch.zeros_like(rejected, dtype=torch.bool)
    for pair, rows in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        (answer, _), (other, places) = (
            ([token for token in row if token >= 0], [place for place, token in enumerate(row) if token >= 0])
            for row in rows
        )
        for block in SequenceMatcher(None, answer, other, autojunk=False).get_matching_blocks():
            found[pair, places[block.b : block.b + block.size]] = True
    return found
