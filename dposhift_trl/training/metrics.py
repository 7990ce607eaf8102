"""Scores of pairs, and the metrics computed from them: means, shares, quantiles and confidence intervals."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..columns import SAVED_ROW_INDEX
from ..data.config import ROW_ID
from ..intervals import bootstrap_interval, share_interval
from ..losses import dpo_shift_loss


QUANTILES = (5, 25, 50, 75, 95)
INTEGER_COLUMNS = ("chosen_tokens", "rejected_tokens", SAVED_ROW_INDEX)


def widest_float(device: torch.device) -> torch.dtype:
    """float64 if the device supports it: float32 represents neither every lambda nor row indices above 2 ** 24."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class PairScores:
    """
    Scores of the pairs of a batch, from one forward pass.

    Every field has shape `(num_pairs,)`. Log-probabilities are sums over the tokens of a completion, in nats.

    Args:
        chosen_logps, rejected_logps (`torch.Tensor`):
            Log-probabilities of the completions under the policy.
        ref_chosen_logps, ref_rejected_logps (`torch.Tensor`):
            Log-probabilities of the completions under the reference.
        chosen_tokens, rejected_tokens (`torch.Tensor`):
            Number of scored tokens of each completion.
        shift_lambda (`torch.Tensor`):
            Lambda when the pair was scored.
        batch_loss (`torch.Tensor`):
            Loss of the pair's batch, in nats.
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
        """The fields as columns of one tensor, for a single gather. Shape: `(num_pairs, num_fields)`."""
        dtype = widest_float(self.chosen_logps.device)
        return torch.stack([getattr(self, field.name).detach().to(dtype) for field in fields(self)], dim=1)

    @classmethod
    def from_matrices(cls, matrices: list[torch.Tensor]) -> "PairScores":
        """Concatenate matrices from [`PairScores.as_matrix`], in float64 on the CPU."""
        return cls(*torch.cat(matrices).cpu().double().unbind(dim=1))

    def as_table(self, ids: Mapping[int, Any] | None = None) -> pa.Table:
        """
        One row per pair, sorted by row index, with the log-ratios as additional columns.

        Args:
            ids (`Mapping[int, Any]`, *optional*):
                The data's own ids by row index, for a column of them.
        """
        names = [field.name for field in fields(self) if field.name != "batch_loss"]
        columns = {name: getattr(self, name) for name in [*names, "chosen_logratios", "rejected_logratios"]}
        order = np.argsort(self.row_index.numpy(), kind="stable")
        arrays = {name: column.numpy()[order] for name, column in columns.items()}
        table = pa.table({n: a.astype(np.int64) if n in INTEGER_COLUMNS else a for n, a in arrays.items()})
        if not ids:
            return table
        return table.append_column(ROW_ID, [[ids.get(index) for index in table[SAVED_ROW_INDEX].to_pylist()]])

    @property
    def chosen_logratios(self) -> torch.Tensor:
        """Policy minus reference log-probabilities of the chosen completions, in nats. Shape: `(num_pairs,)`."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> torch.Tensor:
        """Policy minus reference log-probabilities of the rejected completions, in nats. Shape: `(num_pairs,)`."""
        return self.rejected_logps - self.ref_rejected_logps


def pair_metrics(scores: PairScores, beta: float) -> dict[str, float]:
    r"""
    Training metrics as means over pairs, which depend neither on the batch size nor on the number of processes.

    With \\( \Delta = \log\pi_\theta - \log\pi_{\mathrm{ref}} \\):

    - `rewards/*`: \\( \beta\Delta \\), unshifted, as the paper's authors log it.
    - `shift/margins`: \\( \beta(\Delta_w - \lambda\Delta_l) \\). `shift/accuracies`: share of pairs for which it is
      positive.
    - `displacement/chosen`, `displacement/rejected`: \\( \Delta \\), in nats per answer. `*_per_token`: in nats per
      token.
    - `displacement/chosen_fell`: share of pairs with \\( \Delta_w < 0 \\). `both_rose`, `only_chosen_rose`,
      `only_rejected_rose`, `both_fell`: share of pairs whose answers rose above or fell below the reference. A pair
      with an unchanged answer counts in none of these four.
    - `perplexity/chosen`: \\( \exp(-\sum\log\pi_\theta / \sum|y_w|) \\), over all tokens of the chosen answers.
    - `dpo_loss`: the sigmoid loss at lambda = 1 for every loss type, which makes runs comparable.

    Args:
        scores ([`PairScores`]):
            Scores of at least one pair.
        beta (`float`):
            Inverse temperature of the implicit reward, per nat.

    Returns:
        `dict[str, float]`: Metrics by name.
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
    Metrics that an evaluation adds to [`pair_metrics`]: quantiles of the log-ratios, and confidence intervals.

    - `displacement/chosen_p5` ... `displacement/rejected_p95`: quantiles over pairs, in nats.
    - `rewards/margins`, `displacement/chosen`, and `displacement/rejected` with `_low` and `_high`: 95% confidence
      intervals of the means, by the percentile bootstrap with 2000 resamples of the pairs and a fixed seed.
    - `rewards/accuracies` and `displacement/chosen_fell` with `_low` and `_high`: exact 95% confidence intervals of
      the shares. All intervals are omitted for fewer than two pairs.

    Args:
        scores ([`PairScores`]):
            Scores of all pairs of an evaluation.
        beta (`float`):
            Inverse temperature of the implicit reward, per nat.

    Returns:
        `dict[str, float]`: Metrics by name.
    """
    chosen, rejected = scores.chosen_logratios.double().numpy(), scores.rejected_logratios.double().numpy()
    metrics = {
        f"displacement/{name}_p{quantile}": float(value)
        for name, logratios in (("chosen", chosen), ("rejected", rejected))
        for quantile, value in zip(QUANTILES, np.percentile(logratios, QUANTILES), strict=True)
    }
    intervals = {
        "rewards/accuracies": share_interval(chosen > rejected),
        "rewards/margins": bootstrap_interval(beta * (chosen - rejected)),
        "displacement/chosen": bootstrap_interval(chosen),
        "displacement/rejected": bootstrap_interval(rejected),
        "displacement/chosen_fell": share_interval(chosen < 0),
    }
    for name, interval in intervals.items():
        if interval is not None:
            metrics |= {f"{name}_low": interval[0], f"{name}_high": interval[1]}
    return metrics
