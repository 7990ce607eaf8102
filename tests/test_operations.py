"""Modules that one operation takes the place of: the same scores and gradients, in every family and precision."""

import pytest
import torch
from pairs import (
    BATCH,
    FAMILIES,
    RMS_NORM_FAMILIES,
    Float64Throughout,
    assert_alike,
    gradients,
    make_model,
    rows_scores,
)
from torch import nn
from torch.nn.functional import rms_norm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dposhift_trl.scoring import PairLayout, enable_shared_prompt, shared_prompt_scores, verify_shared_prompt
from dposhift_trl.scoring.attention import KERNELS, BranchAttention, VarlenAttention
from dposhift_trl.scoring.hooks import hooks_of
from dposhift_trl.scoring.operations import GELU, RMS_NORM, RMS_NORMS, operation_for


@pytest.fixture
def norms(monkeypatch):
    """Lets a function compute the RMSNorms of a CPU; returns the shapes that it is called with."""

    def use(function=rms_norm):
        shapes = []

        def counted(values, *args):
            shapes.append(tuple(values.shape))
            return function(values, *args)

        monkeypatch.setitem(RMS_NORMS, "cpu", counted)
        return shapes

    return use


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_scores_with_the_operations_in_float64_as_separate_rows_do(family, norms):
    shapes = norms()
    with Float64Throughout():
        model = make_model(family, torch.float64)
        theirs = rows_scores(model, BATCH)["log_probs"]
        their_gradients = gradients(model, theirs)
        enable_shared_prompt(model)
        layout = PairLayout.from_batch(BATCH)
        ours = shared_prompt_scores(model, layout).log_probs
        assert_alike({"log_probs": ours}, {"log_probs": theirs}, 1e-10)
        assert_alike(gradients(model, ours), their_gradients, 1e-10)
    normed, activated = family in RMS_NORM_FAMILIES, family in ("gpt2", "gpt2-eager", "phi")
    expected = {RMS_NORM.name} if normed else {GELU.name} if activated else set()
    assert hooks_of(model).operations == expected
    assert {shape[1] for shape in shapes} == ({len(layout)} if normed else set())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_norms_of_each_layer_and_the_last_are_fused_again_when_a_layer_is_run_again(checkpointing, norms):
    shapes, model = norms(), make_model("llama").train()
    enable_shared_prompt(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scores = shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs
    assert len(shapes) == 5
    gradients(model, scores)
    assert len(shapes) == (9 if checkpointing else 5)
    with torch.no_grad():
        model(input_ids=BATCH["input_ids"])
    assert len(shapes) == (9 if checkpointing else 5)


def test_a_norm_is_known_by_what_it_computes():
    class ScaledRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 1.1 * super().forward(hidden_states)

    class ForgetfulRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return rms_norm(hidden_states, self.weight.shape, self.weight, 1e-12)

    assert operation_for(LlamaRMSNorm(8)) is RMS_NORM
    for module in (
        GemmaRMSNorm(8),
        ScaledRMSNorm(8),
        ForgetfulRMSNorm(8),
        nn.RMSNorm(8),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
    ):
        assert operation_for(module) is None


def test_hidden_states_of_another_dtype_than_the_weight_are_left_to_the_module(norms):
    shapes, model = norms(), make_model("llama")
    enable_shared_prompt(model)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.bfloat16()
    shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    assert not shapes


def test_a_norm_that_is_given_more_than_hidden_states_computes_itself(norms):
    shapes, model = norms(), make_model("llama")
    enable_shared_prompt(model)
    gates = []
    norm = model.model.norm
    norm.register_forward_pre_hook(lambda module, args: (*args, None), prepend=True)
    forward = type(norm).forward
    norm.forward = lambda values, gate: (gates.append(values.shape[1]), forward(norm, values))[1]
    layout = PairLayout.from_batch(BATCH)
    shared_prompt_scores(model, layout)
    assert len(shapes) == 4
    assert gates == [len(layout)]


def wrong(values, shape, weight, epsilon):
    return rms_norm(values, shape, weight, epsilon) * 1.1


def detached(values, shape, weight, epsilon):
    """Right scores, no gradient."""
    return rms_norm(values, shape, weight, epsilon).detach()


def broken(*args):
    raise NotImplementedError("no kernel image")


def not_finite(query, *args, **kwargs):
    return query * torch.nan


@pytest.mark.parametrize("function", [wrong, detached, broken])
def test_a_wrong_norm_is_disabled_and_attention_is_not(function, norms, monkeypatch, caplog):
    shapes, model = norms(function), make_model("llama")
    monkeypatch.setitem(KERNELS, "cpu", (BranchAttention(),))
    enable_shared_prompt(model)
    assert verify_shared_prompt(model) == "one call per branch"
    assert "fused RMSNorm is disabled for shared prompts: " in caplog.text
    shapes.clear()
    shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    assert not shapes
    like = make_model("llama")
    enable_shared_prompt(like, like=model)
    shared_prompt_scores(like, PairLayout.from_batch(BATCH))
    assert not shapes


def test_a_wrong_kernel_leaves_the_norm_and_a_wrong_norm_beside_it_is_found(norms, monkeypatch):
    for function, refused in ((rms_norm, {"varlen_attn"}), (wrong, {"varlen_attn", "fused RMSNorm"})):
        norms(function)
        kernels = (VarlenAttention(not_finite, frozenset((torch.float32,))), BranchAttention())
        monkeypatch.setitem(KERNELS, "cpu", kernels)
        model = make_model("llama")
        enable_shared_prompt(model)
        assert verify_shared_prompt(model).startswith("one call per branch")
        assert set(hooks_of(model).refused) == refused
