"""Modules that one operation takes the place of: the same scores and gradients, in every family and precision."""

import pytest
import torch
from pairs import (
    BATCH,
    CASES,
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


def checkpoint(model, use_reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()


def test_both_norms_of_each_layer_and_the_last_are_fused_when_a_layer_is_recomputed_too(norms):
    shapes, model = norms(), make_model("llama").train()
    enable_shared_prompt(model)
    expected = gradients(model, shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs)
    assert len(shapes) == 5
    checkpoint(model)
    scores = shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs
    assert len(shapes) == 10
    found = gradients(model, scores)
    assert len(shapes) == 14
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        model(input_ids=BATCH["input_ids"])
    assert len(shapes) == 14


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("order", [("rows", "pairs"), ("pairs", "rows"), ("pairs", "others")])
def test_each_forward_of_a_backward_is_recomputed_as_it_was(order, use_reentrant, fused, norms):
    if fused:
        norms()
    labels = BATCH["input_ids"].masked_fill(BATCH["completion_mask"] == 0, -100)
    rows = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"], "labels": labels}
    model = make_model("llama").train()
    enable_shared_prompt(model)
    forward = {
        "rows": lambda: model(**rows, use_cache=False, fused_lm_head=True).log_probs,
        "pairs": lambda: shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs,
        "others": lambda: shared_prompt_scores(model, PairLayout.from_batch(CASES["answers of one token"])).log_probs,
    }

    def both():
        return gradients(model, torch.cat([forward[name]().flatten() for name in order]))

    expected = both()
    checkpoint(model, use_reentrant)
    found = both()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_norm_is_known_by_what_it_computes():
    class ScaledRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 1.1 * super().forward(hidden_states)

    class ForgetfulRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return rms_norm(hidden_states, self.weight.shape, self.weight, 1e-12)

    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states) * gate

    class SummingRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states).sum()

    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert operation_for(LlamaRMSNorm(8)) is RMS_NORM
    finally:
        torch.set_default_dtype(default)
    others = (GemmaRMSNorm, ScaledRMSNorm, ForgetfulRMSNorm, GatedRMSNorm, SummingRMSNorm, nn.RMSNorm, nn.LayerNorm)
    for other in others:
        assert operation_for(other(8)) is None


def test_hidden_states_of_another_dtype_than_the_weight_are_left_to_the_module(norms):
    shapes, model = norms(), make_model("llama")
    enable_shared_prompt(model)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.bfloat16()
    shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    assert not shapes


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states) * (1.0 if gate is None else gate)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_norm_that_is_given_more_than_hidden_states_computes_itself(by_name, norms):
    def given(module, args, kwargs):
        return (args, {"gate": 2.0}) if by_name else ((*args, 2.0), kwargs)

    shapes, model, plain = norms(), make_model("llama"), make_model("llama")
    for each in (model, plain):
        norm = GatedRMSNorm(each.config.hidden_size, each.config.rms_norm_eps)
        norm.weight = each.model.norm.weight
        each.model.norm = norm
    enable_shared_prompt(model)
    for each in (model, plain):
        each.model.norm.register_forward_pre_hook(given, with_kwargs=True, prepend=True)
    ours = shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs
    assert len(shapes) == 4
    assert_alike({"log_probs": ours}, {"log_probs": rows_scores(plain, BATCH)["log_probs"]}, 1e-5)


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
    assert "fused RMSNorm disabled for shared prompts: " in caplog.text
    shapes.clear()
    shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    assert not shapes
    like = make_model("llama")
    enable_shared_prompt(like, like=model)
    shared_prompt_scores(like, PairLayout.from_batch(BATCH))
    assert not shapes


@pytest.mark.parametrize("function", [rms_norm, wrong, detached, broken])
def test_a_wrong_kernel_is_found_beside_any_norm(function, norms, monkeypatch):
    norms(function)
    kernels = (VarlenAttention(not_finite, frozenset((torch.float32,))), BranchAttention())
    monkeypatch.setitem(KERNELS, "cpu", kernels)
    model = make_model("llama")
    enable_shared_prompt(model)
    assert verify_shared_prompt(model).startswith("one call per branch (varlen_attn ")
    assert set(hooks_of(model).refused) == {"varlen_attn"} | ({"fused RMSNorm"} if function is not rms_norm else set())
