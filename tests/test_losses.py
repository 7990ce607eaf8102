"""The closed form of the loss and the log-probabilities of completions, compared with the paper in float64."""

import doctest
import math
import random

import pytest
import torch
from reference import shifted_loss, sigmoid

from dposhift_trl import dpo_shift_loss, losses
from dposhift_trl.losses import sequence_logps


PAIRS = [(0.0, 0.0), (1.5, -2.0), (-31.0, -57.25), (400.0, -400.0), (-400.0, 400.0)]


@pytest.mark.parametrize("shift_lambda", [1.0, 0.95, 0.5])
def test_the_loss_is_equation_3(shift_lambda):
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) for side in zip(*PAIRS, strict=True))
    losses = dpo_shift_loss(chosen, rejected, beta=0.1, shift_lambda=shift_lambda)
    expected = [shifted_loss("sigmoid", c, r, shift_lambda, beta=0.1) for c, r in PAIRS]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shift_lambda", [1.0, 0.75, 0.01])
def test_at_the_reference_every_lambda_gives_log_2(shift_lambda):
    zero = torch.zeros(3, dtype=torch.float64)
    assert dpo_shift_loss(zero, zero, beta=0.1, shift_lambda=shift_lambda).tolist() == [math.log(2)] * 3


def test_the_rejected_gradient_is_minus_lambda_times_the_chosen_one():
    rng = random.Random(0)
    chosen = torch.tensor([rng.gauss(0, 20) for _ in range(8)], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([rng.gauss(0, 20) for _ in range(8)], dtype=torch.float64, requires_grad=True)
    dpo_shift_loss(chosen, rejected, beta=0.3, shift_lambda=0.6).sum().backward()
    assert torch.allclose(rejected.grad, -0.6 * chosen.grad, rtol=1e-12, atol=0)
    expected = [-0.3 * sigmoid(-0.3 * (c - 0.6 * r)) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert chosen.grad.tolist() == pytest.approx(expected, rel=1e-12)


def test_lambda_can_differ_between_pairs():
    chosen, rejected = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    both = dpo_shift_loss(chosen, rejected, beta=0.1, shift_lambda=torch.tensor([0.5, 1.0]))
    alone = [dpo_shift_loss(chosen[:1], rejected[:1], beta=0.1, shift_lambda=x).item() for x in (0.5, 1.0)]
    assert both.tolist() == alone


def test_different_shapes_are_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(3,\)"):
        dpo_shift_loss(torch.zeros(2), torch.zeros(3), beta=0.1, shift_lambda=1.0)


def test_sequence_logps_without_ld_alpha_is_the_sum():
    logps = torch.tensor([[-1.0, -2.0, 0.0], [0.0, -4.0, -8.0]])
    assert sequence_logps(logps, (logps != 0).long()).tolist() == [-3.0, -12.0]


def test_ld_alpha_weights_the_tokens_beyond_the_shorter_answer():
    # Answers of 3 and 1, 1 and 2, 0 and 1 tokens: what the other one lacks counts a quarter
    chosen = [[0.0, -1.0, -2.0, -4.0], [-3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    rejected = [[0.0, -8.0, 0.0, 0.0], [0.0, -5.0, -6.0, 0.0], [0.0, 0.0, 0.0, -7.0]]
    logps = torch.tensor(chosen + rejected)
    mask = (logps != 0).long()
    found = sequence_logps(logps, mask, ld_alpha=0.25).tolist()
    assert found == [-1 + 0.25 * (-2 - 4), -3.0, 0.0, -8.0, -5 + 0.25 * -6, 0.25 * -7]
    assert sequence_logps(logps, mask, ld_alpha=1.0).tolist() == logps.sum(dim=1).tolist()


def test_the_examples_in_the_docstrings_are_correct():
    failed, attempted = doctest.testmod(losses)
    assert (failed, attempted > 0) == (0, True)
