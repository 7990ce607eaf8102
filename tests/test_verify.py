"""The check at the start of a run: right kernels pass in every precision, wrong and broken ones do not."""

import functools
from contextlib import nullcontext

import pytest
import torch
import transformers
from conftest import make_rows
from pairs import CASES, FAMILIES, make_model
from trl.trainer.utils import add_fused_lm_head
from varlen import varlen_attn

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.scoring import enable_shared_prompt, shared_prompt_scores, verify, verify_shared_prompt
from dposhift_trl.scoring.attention import KERNELS, BranchAttention, VarlenAttention
from dposhift_trl.scoring.hooks import hooks_of
from dposhift_trl.scoring.layout import PairLayout
from dposhift_trl.scoring.verify import measure_shared_prompt


ANY_DTYPE = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
PRECISIONS = {
    "float32": (torch.float32, nullcontext),
    "bfloat16": (torch.bfloat16, nullcontext),
    "bfloat16 autocast": (torch.float32, functools.partial(torch.autocast, "cpu", torch.bfloat16)),
    "float16 autocast": (torch.float32, functools.partial(torch.autocast, "cpu", torch.float16)),
}


@pytest.fixture
def by_segments(monkeypatch):
    """Lets pairs attend by segments through a function with the arguments of `varlen_attn`, or else by branch."""

    def use(function):
        monkeypatch.setitem(KERNELS, "cpu", (VarlenAttention(function, ANY_DTYPE), BranchAttention()))

    return use


def deep_model(dtype, std):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=std,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model)
    return model.to(dtype).eval()


MODELS = {
    **{name: functools.partial(make_model, name) for name in FAMILIES},
    "as initialized, 24 layers": functools.partial(deep_model, std=0.02),
    "steep, 24 layers": functools.partial(deep_model, std=0.06),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_agrees_to_rounding_in_every_precision(name, precision, by_segments):
    dtype, autocast = PRECISIONS[precision]
    by_segments(varlen_attn)
    model = MODELS[name](dtype=dtype)
    enable_shared_prompt(model)
    agreement = measure_shared_prompt(model, autocast)
    assert agreement.fault is None
    assert agreement.scores <= 3 * agreement.rounding
    assert agreement.gradients <= 3 * agreement.gradient_rounding


def causal_from_the_top_left(query, key, value, offsets, key_offsets, most, most_keys, *, window_size, enable_gqa):
    """The other alignment, in which the second branch sees too little of the prefix, and nothing of itself."""
    queries, keys = (x.tolist() for x in (offsets, key_offsets))
    outputs = []
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
        size = torch.tensor([0, b - a], dtype=torch.int32)
        kept = slice(c, c + b - a)
        options = {"window_size": window_size, "enable_gqa": enable_gqa}
        outputs.append(varlen_attn(query[a:b], key[kept], value[kept], size, size, b - a, d - c, **options))
    return torch.cat(outputs)


def keys_off_by_one(query, key, value, *args, window_size, enable_gqa):
    shifted = (x.roll(1, 0) for x in (key, value))
    return varlen_attn(query, *shifted, *args, window_size=window_size, enable_gqa=enable_gqa)


def forgets_keys_in_backward(query, key, value, *args, window_size, enable_gqa):
    """Scores are right, gradients are not."""
    return varlen_attn(query, key.detach(), value.detach(), *args, window_size=window_size, enable_gqa=enable_gqa)


def not_finite(query, *args, window_size, enable_gqa):
    return query * torch.nan


WRONG = [causal_from_the_top_left, keys_off_by_one, forgets_keys_in_backward, not_finite]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["llama", "qwen3", "as initialized, 24 layers"])
def test_a_wrong_kernel_is_left_out_with_its_reason(name, wrong, precision, by_segments, caplog):
    dtype, autocast = PRECISIONS[precision]
    by_segments(wrong)
    model = MODELS[name](dtype=dtype)
    enable_shared_prompt(model)
    agreement = measure_shared_prompt(model, autocast)
    assert not (agreement.scores <= 8 * agreement.rounding and agreement.gradients <= 8 * agreement.gradient_rounding)
    attention = verify_shared_prompt(model, autocast)
    assert attention.startswith("one call per branch (varlen_attn ")
    assert "differ by" in attention
    assert "varlen_attn is disabled for shared prompts: " in caplog.text
    with autocast():
        shared_prompt_scores(model, PairLayout.from_batch(CASES["several pairs"]))
    assert set(hooks_of(model).attended) == {"one call per branch"}  # in the steps that follow, too


def test_a_model_enabled_like_another_does_without_the_same_kernels(by_segments):
    by_segments(not_finite)
    first, second = make_model("llama"), make_model("llama")
    enable_shared_prompt(first)
    verify_shared_prompt(first)
    enable_shared_prompt(second, like=first)
    assert shared_prompt_scores(second, PairLayout.from_batch(CASES["several pairs"])).log_probs.isfinite().all()


def test_only_the_tolerance_keeps_a_wrong_kernel_out(by_segments, monkeypatch):
    by_segments(causal_from_the_top_left)
    model = make_model("llama")
    enable_shared_prompt(model)
    monkeypatch.setattr(verify, "TOLERANCE", 1e9)
    assert verify_shared_prompt(model) == "varlen_attn"


class KernelError(Exception):
    """As of a compiler, which is no RuntimeError."""


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), NotImplementedError(), KernelError("a\nb")])
def test_an_error_of_a_kernel_is_a_reason(error, by_segments, caplog):
    def broken(*args, window_size, enable_gqa):
        raise error

    by_segments(broken)
    model = make_model("llama")
    enable_shared_prompt(model)
    attention = verify_shared_prompt(model)
    first = str(error).partition("\n")[0]
    assert attention == f"one call per branch (varlen_attn raises {type(error).__name__}: {first})"


def test_where_no_kernel_agrees_every_reason_is_given(by_segments):
    by_segments(not_finite)
    model = make_model("llama")
    enable_shared_prompt(model)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output.cumsum(1))
    reasons = (
        r"scores differ by .* nats, rounding accounts for .* \(one call per branch; varlen_attn: scores differ by nan"
    )
    with pytest.raises(ValueError, match=reasons):
        verify_shared_prompt(model)


def test_a_model_that_withholds_the_layout_from_its_attention_is_refused_at_the_first_call():
    model = make_model("nemotron")
    enable_shared_prompt(model)
    with pytest.raises(ValueError, match="the model drops the one"):
        verify_shared_prompt(model)


def test_the_check_leaves_the_model_as_it_was():
    model = make_model()
    enable_shared_prompt(model)
    model.train()
    model.model.norm.eval()
    model.model.embed_tokens.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    verify_shared_prompt(model)
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.model.embed_tokens._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_verification_measures_the_difference():
    model = make_model()
    enable_shared_prompt(model)
    assert measure_shared_prompt(model).scores < 1e-4
    assert measure_shared_prompt(model, batch=CASES["answers that part late"]).scores < 1e-4
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output.cumsum(1))
    assert measure_shared_prompt(model).scores > 1e-2


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_trainer_attends_by_segments_and_learns_what_branches_learn(bf16, tiny_model, settings, by_segments, caplog):
    losses = []
    settings |= {"bf16": bf16}
    for function, attention in (
        (varlen_attn, "varlen_attn"),
        (None, "one call per branch (varlen_attn needs torch 2.10)"),
    ):
        by_segments(function)
        with caplog.at_level("INFO", logger="dposhift_trl"):
            trainer = DPOShiftTrainer(tiny_model, args=DPOShiftConfig(**settings), train_dataset=make_rows(16))
        assert f"not bit for bit; attention: {attention}\n" in caplog.text
        caplog.clear()
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=2e-2 if bf16 else 1e-5)


def test_a_wrong_kernel_turns_sharing_off_where_branches_fail_too(tiny_model, settings, monkeypatch, caplog):
    class Broken(BranchAttention):
        def __call__(self, call):
            raise RuntimeError("out of order")

    monkeypatch.setitem(KERNELS, "cpu", (Broken(),))
    trainer = DPOShiftTrainer(tiny_model, args=DPOShiftConfig(**settings), train_dataset=make_rows(16))
    assert not trainer.shares_prompts
    assert "shared_prompt is off: raises RuntimeError: out of order (one call per branch)" in caplog.text
