"""Where lambda meets TRL: the policy as its loss calls it, and the check that TRL still works as assumed."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..columns import REFERENCE_LOGPS
from ..losses import dpo_shift_loss, sequence_logps
from ..scoring import PairLayout, shared_prompt_scores
from .metrics import PairScores, widest_float


@dataclass(frozen=True)
class Shift:
    """
    What the seam needs to know of a batch.

    Args:
        shift_lambda (`float`):
            Lambda in force.
        ld_alpha (`float`, *optional*):
            Weight of the tokens past the shorter answer's length; see [`~losses.sequence_logps`].
        references (`Callable`):
            Returns the reference's log-probabilities of the chosen and of the rejected answers, in nats, each of
            shape `(batch_size,)`. Called once the policy has scored the batch, the order in which TRL scores.
    """

    shift_lambda: float
    ld_alpha: float | None
    references: Callable[[], tuple[torch.Tensor, torch.Tensor]]


class ShiftedModel:
    r"""
    The policy as [`~trl.DPOTrainer`] calls it, which also puts the references into the inputs, shifted.

    With \\( r' = \log\pi_l - \lambda(\log\pi_l - \log\pi_{\mathrm{ref},l}) \\) in place of the rejected
    reference, TRL's own \\( \log\pi_l - r' \\) is \\( \lambda\Delta_l \\), gradient included, for every loss type
    that is built on it. At \\( \lambda = 1 \\) the references are put in as they are.

    Args:
        model (`torch.nn.Module`):
            The policy, as the trainer calls it.
        inputs (`dict[str, Any]`):
            The batch, in which TRL finds `ref_chosen_logps` and `ref_rejected_logps` after the call.
        shift ([`Shift`]):
            Lambda and the references.
        layout ([`~scoring.PairLayout`], *optional*):
            The batch laid out so that shared tokens are read once; by default both rows of a pair are read, padded.
    """

    outputs: Any
    scores: PairScores

    def __init__(self, model: torch.nn.Module, inputs: dict[str, Any], shift: Shift, layout: PairLayout | None = None):
        self.model = model
        self.inputs = inputs
        self.shift = shift
        self.layout = layout
        self.calls = 0

    def __call__(self, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return self.model(**kwargs)
        self.calls += 1
        self.outputs = self._outputs(**kwargs)
        self.scores = self._score(self.outputs.log_probs)
        return self.outputs

    def _outputs(self, **kwargs: Any) -> Any:
        return self.model(**kwargs) if self.layout is None else shared_prompt_scores(self.model, self.layout)

    def _score(self, log_probs: torch.Tensor) -> PairScores:
        inputs, shift_lambda = self.inputs, self.shift.shift_lambda
        mask = inputs["completion_mask"][:, 1:]
        # Prompt-learning PEFT prepends virtual tokens to the outputs
        logps = sequence_logps(log_probs[:, -mask.size(1) :], mask, self.shift.ld_alpha)
        chosen_logps, rejected_logps = logps.chunk(2)
        ref_chosen_logps, ref_rejected_logps = self.shift.references()
        shifted = ref_rejected_logps
        if shift_lambda != 1.0:
            shifted = rejected_logps - shift_lambda * (rejected_logps - ref_rejected_logps)
        inputs.update(zip(REFERENCE_LOGPS, (ref_chosen_logps, shifted), strict=True))
        chosen_tokens, rejected_tokens = mask.sum(dim=1).chunk(2)
        unknown = torch.full_like(chosen_tokens, -1)
        return PairScores(
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            # Filled on the device, where a copy from the host would wait
            shift_lambda=torch.full_like(chosen_tokens, shift_lambda, dtype=widest_float(chosen_logps.device)),
            batch_loss=unknown,
            row_index=unknown,
        )


class _Replay(ShiftedModel):
    """
    The outputs of a batch once more, at lambda 0.5, with each row's log-probabilities scaled by a factor of its own,
    so that the policy is off the reference and a mix-up of halves, references or lambda changes loss and gradient.
    """

    def __init__(self, scored: ShiftedModel):
        scores = scored.scores
        references = _unrounded(scores.ref_chosen_logps), _unrounded(scores.ref_rejected_logps)
        shift = Shift(0.5, scored.shift.ld_alpha, lambda: references)
        super().__init__(scored.model, dict(scored.inputs), shift)
        log_probs = _unrounded(scored.outputs.log_probs)
        factors = torch.linspace(1.05, 0.95, len(log_probs), device=log_probs.device, dtype=log_probs.dtype)
        self.log_probs = (log_probs * factors[:, None]).requires_grad_()
        self.replayed = dataclasses.replace(scored.outputs, log_probs=self.log_probs)

    def _outputs(self, **kwargs: Any) -> Any:
        return self.replayed


def _unrounded(values: torch.Tensor) -> torch.Tensor:
    """Values without gradient in float32 at least, in which the closed form can be told from its neighbors."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def seam_fault(scored: ShiftedModel, loss_of: Callable[[ShiftedModel], torch.Tensor], beta: float) -> str | None:
    """
    Check on a batch what this package takes for granted of [`~trl.DPOTrainer`], which no version promises.

    Args:
        scored ([`ShiftedModel`]):
            A batch that TRL's loss has been taken of.
        loss_of (`Callable`):
            TRL's sigmoid loss of the batch that a [`ShiftedModel`] scores, without further terms.
        beta (`float`):
            Its inverse temperature, per nat.

    Returns:
        `str` or `None`: What does not hold, in a few words.
    """
    with torch.enable_grad():
        replay = _Replay(scored)
        return _fault(scored, replay, loss_of(replay), beta)


def _fault(scored: ShiftedModel, replay: _Replay, loss: torch.Tensor, beta: float) -> str | None:
    for calls in (scored.calls, replay.calls):
        if calls != 1:
            return f"its loss calls the model {calls} times"
    log_probs, scores, mask = replay.log_probs, replay.scores, replay.inputs["completion_mask"][:, 1:]
    if log_probs.shape[0] != mask.shape[0] or log_probs.shape[1] < mask.shape[1]:
        return f"log-probabilities have the shape {tuple(log_probs.shape)}"
    if (log_probs[:, -mask.shape[1] :] * (mask == 0)).any():
        return "log-probabilities are not zero outside the answers"
    expected = dpo_shift_loss(
        scores.chosen_logratios, scores.rejected_logratios, beta=beta, shift_lambda=replay.shift.shift_lambda
    ).mean()
    if not torch.allclose(loss, expected, rtol=1e-3, atol=1e-5):
        return f"the loss of a batch is {loss.item():.6f} where the closed form gives {expected.item():.6f}"
    # By answer, so that the tolerance does not depend on their lengths
    found, wanted = (torch.autograd.grad(x, log_probs, retain_graph=True)[0].sum(dim=1) for x in (loss, expected))
    if not torch.allclose(found, wanted, rtol=1e-2, atol=1e-3 * wanted.norm().item() / len(wanted)):
        return "the gradient of a batch's loss is not that of the closed form"
    return None
