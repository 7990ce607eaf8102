"""The head that scores rows tile by tile."""

from functools import partial

import pytest
import torch
from torch import nn
from trl.kernels import ChunkedLogProbFunction

from dposhift_trl.scoring.head import OPTIONAL_OUTPUTS, token_scores


@pytest.mark.parametrize("outputs", [(), OPTIONAL_OUTPUTS], ids=["log-probabilities", "everything"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("kept", [0, 7 * 700], ids=["made twice", "kept"])
def test_the_tiled_head_agrees_with_trl_and_with_autograd(outputs, bias, softcap, kept, monkeypatch):
    monkeypatch.setattr("dposhift_trl.scoring.head.TILE", 1)
    monkeypatch.setattr("dposhift_trl.scoring.head.KEPT", kept)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8, dtype=torch.float64), torch.randn(700, 8, dtype=torch.float64)
    offset = torch.randn(700, dtype=torch.float64) if bias else None
    targets, grad = torch.tensor([0, 699, 255, 256, 300, 300, 511]), torch.randn(7, dtype=torch.float64)

    def naive(hidden, weight, offset):
        logits = nn.functional.linear(hidden, weight, offset) * 0.5
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    inputs = [x.requires_grad_() for x in (hidden, weight, offset) if x is not None]
    head = partial(token_scores, targets=targets, outputs=outputs, scale=0.5, softcap=softcap)
    ours = head(hidden, weight, offset)
    assert torch.allclose(ours["log_probs"], naive(hidden, weight, offset), rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(naive(hidden, weight, offset), inputs, grad)
    for got, want in zip(torch.autograd.grad(ours["log_probs"], inputs, grad), wanted, strict=True):
        assert torch.allclose(got, want, rtol=0, atol=1e-12)

    single = [None if x is None else x.detach().float() for x in (hidden, weight, offset)]
    theirs = ChunkedLogProbFunction.apply(*single, targets, 1.0, 128, softcap, 0.5, outputs)
    ours = head(*single)
    for name, values in zip(("log_probs", *OPTIONAL_OUTPUTS), theirs, strict=True):
        assert (values is None) == (name not in ours)
        assert values is None or torch.allclose(
            ours[name].to(torch.float64), values.to(torch.float64), rtol=0, atol=1e-5
        )


def test_a_frozen_head_keeps_the_gradient_of_its_rows():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
    token_scores(hidden, weight, None, torch.tensor([1, 2, 3]))["log_probs"].sum().backward()
    assert hidden.grad is not None
