"""Per-pair scores, and the exact means, shares, quantiles and intervals made of them."""

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch
from scipy.stats import bootstrap

from ..losses import dpo_shift_loss


QUANTILES = (5, 25, 50, 75, 95)
WHOLE_NUMBERS = ("chosen_tokens", "rejected_tokens", "row_index")


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it: float32 holds neither every lambda nor row indices beyond 2 ** 24."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class PairScores:
    """
    What one forward pass says of each pair.

    Every field has shape `(num_pairs,)`; log-probabilities are sums over a completion's tokens, in nats.

    Args:
        chosen_logps, rejected_logps (`torch.Tensor`):
            Log-probabilities under the policy.
        ref_chosen_logps, ref_rejected_logps (`torch.Tensor`):
            Log-probabilities under the reference.
        chosen_tokens, rejected_tokens (`torch.Tensor`):
            Scored tokens of each completion.
        shift_lambda (`torch.Tensor`):
            Lambda in force when the pair was scored.
        batch_loss (`torch.Tensor`):
            Loss of the batch the pair was scored in, in nats.
        row_index (`torch.Tensor`):
            Index of the pair's row in its dataset.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    shift_lambda: torch.Tensor
    batch_loss: torch.Tensor
    row_index: torch.Tensor

    def as_matrix(self) -> torch.Tensor:
        """The fields as columns, so that one gather carries them all. Shape: `(num_pairs, num_fields)`."""
        dtype = widest_float(self.chosen_logps.device)
        return torch.stack([getattr(self, field.name).detach().to(dtype) for field in fields(self)], dim=1)

    @classmethod
    def from_matrices(cls, matrices: list[torch.Tensor]) -> "PairScores":
        """Join matrices of [`PairScores.as_matrix`] into one set of scores, in float64 on the CPU."""
        return cls(*torch.cat(matrices).cpu().double().unbind(dim=1))

    def as_table(self) -> pa.Table:
        """One row a pair, in the order of the rows' indices; the log-ratios are columns too."""
        names = [field.name for field in fields(self) if field.name != "batch_loss"]
        columns = {name: getattr(self, name) for name in [*names, "chosen_logratios", "rejected_logratios"]}
        order = np.argsort(self.row_index.numpy(), kind="stable")
        arrays = {name: column.numpy()[order] for name, column in columns.items()}
        return pa.table({n: a.astype(np.int64) if n in WHOLE_NUMBERS else a for n, a in arrays.items()})

    @property
    def chosen_logratios(self) -> torch.Tensor:
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> torch.Tensor:
        return self.rejected_logps - self.ref_rejected_logps


def pair_metrics(scores: PairScores, beta: float) -> dict[str, float]:
    r"""
    Metrics as means over pairs, so that they depend on neither batch size nor number of processes.

    With \\( \Delta = \log\pi_\theta - \log\pi_{\mathrm{ref}} \\): `rewards/*` are \\( \beta\Delta \\) unshifted, as
    the paper's authors log them; `shift/margins` is \\( \beta(\Delta_w - \lambda\Delta_l) \\) and `shift/accuracies`
    the share of pairs where it is above 0; `displacement/*` is \\( \Delta \\) itself, in nats per answer and per
    token, and the shares of pairs by which of their answers rose above or fell below the reference (a pair of which
    one did not move is in none); `dpo_loss` is the sigmoid loss at lambda = 1 whatever the loss type, by which runs
    compare. Over all tokens of the chosen answers instead of pairs: `perplexity/chosen`,
    \\( \exp(-\sum\log\pi_\theta / \sum|y_w|) \\).

    Args:
        scores ([`PairScores`]):
            At least one pair.
        beta (`float`):
            Factor from log-ratio to reward, per nat.

    Returns:
        `dict[str, float]`: One number per name.
    """
    chosen, rejected = scores.chosen_logratios, scores.rejected_logratios
    shifted_margins = beta * (chosen - scores.shift_lambda * rejected)
    values = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": scores.chosen_logps,
        "logps/rejected": scores.rejected_logps,
        "shift/lambda": scores.shift_lambda,
        "shift/margins": shifted_margins,
        "shift/accuracies": shifted_margins > 0,
        "displacement/chosen": chosen,
        "displacement/rejected": rejected,
        "displacement/chosen_per_token": chosen / scores.chosen_tokens.clamp(min=1),
        "displacement/rejected_per_token": rejected / scores.rejected_tokens.clamp(min=1),
        "displacement/chosen_fell": chosen < 0,
        "displacement/both_rose": (chosen > 0) & (rejected > 0),
        "displacement/only_chosen_rose": (chosen > 0) & (rejected < 0),
        "displacement/only_rejected_rose": (chosen < 0) & (rejected > 0),
        "displacement/both_fell": (chosen < 0) & (rejected < 0),
        "dpo_loss": dpo_shift_loss(chosen, rejected, beta=beta, shift_lambda=1.0),
    }
    means = {name: value.double().mean().item() for name, value in values.items()}
    tokens = scores.chosen_tokens.double().sum().clamp(min=1)
    means["perplexity/chosen"] = (-scores.chosen_logps.double().sum() / tokens).exp().item()
    return means


def evaluation_metrics(scores: PairScores, beta: float) -> dict[str, float]:
    r"""
    What an evaluation adds to [`pair_metrics`]: how the log-ratios spread, and how sure accuracy and margin are.

    `displacement/chosen_p5` ... `displacement/rejected_p95` are quantiles over pairs, in nats.
    `rewards/accuracies_low`, `_high` and `rewards/margins_low`, `_high` are the ends of 95 % percentile-bootstrap
    intervals of the means (2000 resamples of the pairs, seeded, so that a rerun logs the same), left out for fewer
    than two pairs.

    Args:
        scores ([`PairScores`]):
            All pairs of an evaluation.
        beta (`float`):
            Factor from log-ratio to reward, per nat.

    Returns:
        `dict[str, float]`: One number per name.
    """
    chosen, rejected = scores.chosen_logratios.double().numpy(), scores.rejected_logratios.double().numpy()
    metrics = {
        f"displacement/{name}_p{quantile}": float(value)
        for name, logratios in (("chosen", chosen), ("rejected", rejected))
        for quantile, value in zip(QUANTILES, np.percentile(logratios, QUANTILES), strict=True)
    }
    for name, values in (("accuracies", 1.0 * (chosen > rejected)), ("margins", beta * (chosen - rejected))):
        if len(values) > 1:
            interval = bootstrap(
                (values,), np.mean, n_resamples=2000, batch=max(1, 2**20 // len(values)), method="percentile", rng=0
            ).confidence_interval
            metrics |= {f"rewards/{name}_low": float(interval.low), f"rewards/{name}_high": float(interval.high)}
    return metrics
