"""Per-pair scores and the exact means made of them."""

from dataclasses import dataclass, fields

import torch

from .losses import dpo_shift_loss


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
        return cls(*torch.cat(matrices).to("cpu", torch.float64).unbind(dim=1))

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
    the share of pairs where it is above 0; `displacement/*` is \\( \Delta \\) itself, in nats per answer, with the
    share of pairs whose chosen answer fell below the reference; `dpo_loss` is the sigmoid loss at lambda = 1 whatever
    the loss type, by which runs compare.

    Args:
        scores ([`PairScores`]):
            At least one pair.
        beta (`float`):
            Factor from log-ratio to reward, per nat.

    Returns:
        `dict[str, float]`: One mean per name.
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
        "displacement/chosen_fell": chosen < 0,
        "dpo_loss": dpo_shift_loss(chosen, rejected, beta=beta, shift_lambda=1.0),
    }
    return {name: value.double().mean().item() for name, value in values.items()}
