"""Where lambda meets TRL: the policy as its loss calls it, and the check that this still fits."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model

from ..losses import dpo_shift_loss, sequence_logps
from ..scoring import PairLayout, shared_prompt_scores
from .metrics import PairScores, widest_float


if TYPE_CHECKING:
    from .trainer import DPOShiftTrainer


class TrainingStopped(ValueError):
    """Training stopped on purpose, for a reason that the message explains to the user."""


class ShiftedModel:
    r"""
    The policy as [`~trl.DPOTrainer`] calls it, which also lays the references into the inputs, shifted.

    With \\( r' = \log\pi_l - \lambda(\log\pi_l - \log\pi_{\mathrm{ref},l}) \\) in place of the rejected
    reference, TRL's own \\( \log\pi_l - r' \\) is \\( \lambda\Delta_l \\), gradient included, whatever the loss
    type then makes of it.
    """

    def __init__(
        self,
        trainer: "DPOShiftTrainer",
        model: torch.nn.Module,
        inputs: dict[str, Any],
        layout: PairLayout | None = None,
    ):
        self.trainer = trainer
        self.model = model
        self.inputs = inputs
        self.layout = layout
        self.precomputed = trainer.precompute_ref_logps
        self.calls = 0

    def __call__(self, **kwargs):
        if not kwargs.get("fused_lm_head"):
            return self.model(**kwargs)
        self.calls += 1
        if self.layout is None:
            self.outputs = self.model(**kwargs)
        else:
            self.outputs = shared_prompt_scores(self.model, self.layout)
        self.scores = self._score(self.outputs.log_probs)
        return self.outputs

    def _references(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.precomputed and "ref_chosen_logps" in self.inputs:
            return self.inputs["ref_chosen_logps"], self.inputs["ref_rejected_logps"]
        reference = self.trainer.model if self.trainer.ref_model is None else self.trainer.ref_model
        if self.precomputed and self.trainer.ref_model is None and not is_peft_model(self.trainer.model):
            raise TrainingStopped(
                "The batch holds no `ref_chosen_logps` and `ref_rejected_logps`, although the reference was scored "
                "beforehand and is gone. Let the data collator keep them, or set `precompute_ref_log_probs=False`."
            )
        return self.trainer.compute_ref_log_probs(reference, {**self.inputs, "shared_prompt": self.layout})

    def _lambda(self) -> float:
        return self.trainer.shift_lambda

    def _score(self, log_probs: torch.Tensor) -> PairScores:
        inputs, shift_lambda = self.inputs, self._lambda()
        mask = inputs["completion_mask"][:, 1:]
        # Prompt-learning PEFT prepends virtual tokens to the outputs
        logps = sequence_logps(log_probs[:, -mask.size(1) :], mask, self.trainer.ld_alpha)
        chosen_logps, rejected_logps = logps.chunk(2)
        ref_chosen_logps, ref_rejected_logps = self._references()
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_chosen_logps, ref_rejected_logps
        if shift_lambda != 1.0:
            inputs["ref_rejected_logps"] = rejected_logps - shift_lambda * (rejected_logps - ref_rejected_logps)
        chosen_tokens, rejected_tokens = mask.sum(dim=1).chunk(2)
        unknown = torch.full_like(chosen_tokens, -1)
        return PairScores(
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            shift_lambda=torch.as_tensor(
                shift_lambda, dtype=widest_float(chosen_logps.device), device=chosen_logps.device
            ).expand_as(chosen_logps),
            batch_loss=unknown,
            row_index=unknown,
        )


class Replay(ShiftedModel):
    """The outputs of a batch once more, off the reference, for [`DPOShiftTrainer._check_seam`]."""

    def __init__(self, trainer: "DPOShiftTrainer", scored: ShiftedModel):
        super().__init__(trainer, scored.model, dict(scored.inputs))
        self.precomputed = True
        scores, log_probs = scored.scores, scored.outputs.log_probs.detach()
        self.inputs["ref_chosen_logps"] = scores.ref_chosen_logps.detach()
        self.inputs["ref_rejected_logps"] = scores.ref_rejected_logps.detach()
        factors = torch.linspace(1.05, 0.95, len(log_probs), device=log_probs.device, dtype=log_probs.dtype)
        self.log_probs = (log_probs * factors[:, None]).requires_grad_()
        self.real = scored.outputs

    def __call__(self, **kwargs):
        if not kwargs.get("fused_lm_head"):
            return self.model(**kwargs)
        self.calls += 1
        self.scores = self._score(self.log_probs)
        return dataclasses.replace(self.real, log_probs=self.log_probs)

    def _lambda(self) -> float:
        return 0.5

    def fault(self, loss: torch.Tensor) -> str | None:
        """What does not hold, in a few words, or None."""
        args, scores, mask = self.trainer.args, self.scores, self.inputs["completion_mask"][:, 1:]
        if self.calls != 1:
            return f"its loss calls the model {self.calls} times"
        if self.log_probs.shape[0] != mask.shape[0] or self.log_probs.shape[1] < mask.shape[1]:
            return f"log-probabilities have the shape {tuple(self.log_probs.shape)}"
        if (self.log_probs[:, -mask.shape[1] :] * (mask == 0)).any():
            return "log-probabilities are not zero outside the answers"
        expected = dpo_shift_loss(
            scores.chosen_logps - scores.ref_chosen_logps,
            scores.rejected_logps - scores.ref_rejected_logps,
            beta=args.beta,
            shift_lambda=self._lambda(),
        ).mean()
        if not torch.allclose(loss, expected, rtol=1e-3, atol=1e-5):
            return f"the loss of a batch is {loss.item():.6f} where the closed form gives {expected.item():.6f}"
        # By answer, so that the tolerance does not depend on their lengths
        found, wanted = (
            torch.autograd.grad(x, self.log_probs, retain_graph=True)[0].sum(dim=1) for x in (loss, expected)
        )
        if not torch.allclose(found, wanted, rtol=1e-2, atol=1e-3 * wanted.norm().item() / len(wanted)):
            return "the gradient of a batch's loss is not that of the closed form"
        return None
