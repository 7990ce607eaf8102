"""The seam by itself, with a model and a loss of a few lines; test_trl_seam.py has it with TRL's."""

from dataclasses import dataclass

import pytest
import torch

from dposhift_trl.losses import dpo_shift_loss
from dposhift_trl.training.seam import Shift, ShiftedModel, seam_fault


BETA = 0.3
MASK = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1]])
LOG_PROBS = torch.tensor([[0.0, -1.0, -2.0], [-1.5, -2.5, 0.0], [0.0, -3.0, 0.0], [-1.0, -1.0, -4.0]])
REFERENCES = torch.tensor([-3.5, -3.5]), torch.tensor([-2.5, -6.5])


@dataclass
class Outputs:
    log_probs: torch.Tensor


def scored(shift_lambda=0.6, log_probs=LOG_PROBS, mask=MASK, references=REFERENCES):
    """A batch of two pairs, scored as TRL's loss does it."""
    shift = Shift(shift_lambda, None, lambda: references)
    model = ShiftedModel(lambda **kwargs: Outputs(log_probs), {"completion_mask": mask}, shift)
    model(fused_lm_head=True)
    return model


def trls_loss(model):
    """What the seam takes for granted of TRL: one call, and the references of the inputs."""
    chosen, rejected = model(fused_lm_head=True).log_probs.sum(dim=1).chunk(2)
    inputs = model.inputs
    logratios = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
    return dpo_shift_loss(*logratios, beta=BETA, shift_lambda=1.0).mean()


@pytest.mark.parametrize("shift_lambda", [0.3, 1.0])
def test_trls_loss_over_the_seam_is_the_shifted_loss_with_its_gradient(shift_lambda):
    found, wanted = (LOG_PROBS.double().requires_grad_() for _ in range(2))
    loss = trls_loss(scored(shift_lambda, found))
    chosen, rejected = wanted.sum(dim=1).chunk(2)
    logratios = chosen - REFERENCES[0], rejected - REFERENCES[1]
    expected = dpo_shift_loss(*logratios, beta=BETA, shift_lambda=shift_lambda).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward(), expected.backward()
    assert torch.allclose(found.grad, wanted.grad, rtol=1e-12)


def test_the_scores_of_a_batch_are_those_of_its_halves():
    scores = scored(0.6).scores
    assert (scores.chosen_logps.tolist(), scores.rejected_logps.tolist()) == ([-3.0, -4.0], [-3.0, -6.0])
    assert (scores.chosen_tokens.tolist(), scores.rejected_tokens.tolist()) == ([2, 2], [1, 3])
    assert (scores.ref_chosen_logps.tolist(), scores.ref_rejected_logps.tolist()) == ([-3.5, -3.5], [-2.5, -6.5])
    assert scores.shift_lambda.tolist() == [0.6, 0.6]  # in float64
    assert scores.row_index.tolist() == [-1, -1]


def test_three_pairs_have_three_scores_of_each_kind():
    rows = [0, 1, 0, 2, 3, 2]
    references = tuple(reference[[0, 1, 0]] for reference in REFERENCES)
    scores = scored(0.6, LOG_PROBS[rows], MASK[rows], references).scores
    assert scores.chosen_logps.tolist() == [-3.0, -4.0, -3.0]
    assert scores.rejected_tokens.tolist() == [1, 3, 1]


def test_at_lambda_one_the_loss_gets_the_references_themselves():
    assert all(
        scored(1.0).inputs[f"ref_{side}_logps"] is REFERENCES[i] for i, side in enumerate(("chosen", "rejected"))
    )


def test_a_call_without_the_fused_head_is_the_models_own():
    model = scored()
    assert model(labels=None).log_probs is LOG_PROBS
    assert model.calls == 1


@pytest.mark.parametrize("shift_lambda", [0.3, 1.0])
def test_a_trl_that_fits_has_no_fault_and_the_batch_stays_as_it_was(shift_lambda):
    batch = scored(shift_lambda)
    before = {name: tensor.clone() for name, tensor in batch.inputs.items()}
    assert seam_fault(batch, trls_loss, BETA) is None
    assert all(torch.equal(batch.inputs[name], tensor) for name, tensor in before.items())


def test_outputs_of_another_shape_are_a_fault():
    one_pair = {"mask": MASK[[0, 3]], "references": (REFERENCES[0][:1], REFERENCES[1][:1])}
    for log_probs, shape in ((LOG_PROBS, "(4, 3)"), (LOG_PROBS[[0, 3], 1:], "(2, 2)")):
        batch = scored(1.0, log_probs, **one_pair)
        assert seam_fault(batch, trls_loss, BETA) == f"log-probabilities have the shape {shape}"
    # Prompt learning prepends columns
    wider = torch.cat((torch.full((4, 2), -9.0), LOG_PROBS), dim=1)
    loss_of_last_columns = lambda model: trls_loss(_Narrow(model))  # noqa: E731
    assert seam_fault(scored(0.6, wider), loss_of_last_columns, BETA) is None


class _Narrow:
    """Hands on the last three columns of a model's outputs."""

    def __init__(self, model):
        self.model, self.inputs = model, model.inputs

    def __call__(self, **kwargs):
        return Outputs(self.model(**kwargs).log_probs[:, -3:])


@pytest.mark.parametrize("cell", [(0, 0), (1, 2), (2, 2)], ids=["before", "after", "rejected"])
def test_a_score_outside_the_answers_is_a_fault(cell):
    log_probs = LOG_PROBS.clone()
    log_probs[cell] = -0.1
    fault = seam_fault(scored(0.6, log_probs), trls_loss, BETA)
    assert fault == "log-probabilities are not zero outside the answers"


@pytest.mark.parametrize(("factor", "fits"), [(1.0005, True), (1.002, False), (0.998, False)])
def test_the_loss_may_differ_by_a_thousandth(factor, fits):
    fault = seam_fault(scored(), lambda model: factor * trls_loss(model), BETA)
    assert fits == (fault is None)
    assert fits or fault.startswith("the loss of a batch is 0.")


class _Bent(torch.autograd.Function):
    """The identity, whose gradient is scaled row by row."""

    @staticmethod
    def forward(ctx, x, factors):
        ctx.save_for_backward(factors)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0][:, None], None


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize(("bend", "fits"), [(0.009, True), (-0.009, True), (0.02, False), (-0.02, False)])
def test_the_gradient_of_each_answer_may_differ_by_a_hundredth(row, bend, fits):
    factors = torch.ones(4)
    # Lambda is 0.5 in the check: the reference that a rejected answer gets takes half of its gradient, unbent
    factors[row] += bend if row < 2 else bend / 2

    class Bent(_Narrow):
        def __call__(self, **kwargs):
            return Outputs(_Bent.apply(self.model(**kwargs).log_probs, factors))

    fault = seam_fault(scored(), lambda model: trls_loss(Bent(model)), BETA)
    assert fault == (None if fits else "the gradient of a batch's loss is not that of the closed form")


def test_the_gradient_of_an_answer_that_hardly_counts_may_differ():
    """A thousandth of the norm over the batch, per answer, is allowed where the gradient is next to nothing."""
    log_probs = LOG_PROBS.clone()
    log_probs[0, 1:], log_probs[2, 1] = torch.tensor([10.0, 20.0]), -10.0  # far on the right side of the reference

    class Bent(_Narrow):
        def __call__(self, **kwargs):
            return Outputs(_Bent.apply(self.model(**kwargs).log_probs, torch.tensor([1.5, 1.0, 1.0, 1.0])))

    assert seam_fault(scored(0.6, log_probs), lambda model: trls_loss(Bent(model)), BETA) is None


@pytest.mark.parametrize("calls", [0, 2])
def test_a_loss_that_calls_the_model_otherwise_is_a_fault(calls):
    def loss_of(model):
        for _ in range(calls):
            loss = trls_loss(model)
        return loss if calls else torch.tensor(0.7, requires_grad=True)

    assert seam_fault(scored(), loss_of, BETA) == f"its loss calls the model {calls} times"
