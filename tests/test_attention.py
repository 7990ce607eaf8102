"""The kernels of attention over pairs, each against separate rows, and the choice among them."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from pairs import BATCH, CASES, FAMILIES, Float64Throughout, assert_alike, collate, gradients, make_model, rows_scores
from torch import nn
from torch._dynamo import config as dynamo_config
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from varlen import varlen_attn, varlen_attn_of_torch_2_10, varlen_attn_of_torch_2_11

from dposhift_trl.scoring import PairLayout, enable_shared_prompt, shared_prompt_scores
from dposhift_trl.scoring.attention import (
    KERNELS,
    AttentionCall,
    BranchAttention,
    FlexAttention,
    VarlenAttention,
    choose_kernel,
    compiled,
)
from dposhift_trl.scoring.head import HEADS, chunked_scores
from dposhift_trl.scoring.hooks import hooks_of


ANY_DTYPE = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


@pytest.fixture(autouse=True)
def float64_throughout():
    with Float64Throughout():
        yield


@pytest.fixture
def kernels(monkeypatch):
    """Sets the kernels of a CPU."""
    return lambda *chosen: monkeypatch.setitem(KERNELS, "cpu", chosen)


def sdpa(query, key, value, attention_mask):
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=attention_mask is None and query.shape[2] > 1, enable_gqa=True
    )
    return attended.transpose(1, 2), None


def make_call(layout, window=None, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(layout), 16, dtype=dtype) for heads in (4, 2, 2))
    return AttentionCall(query, key, value, layout, sdpa, causal=True, window=window, **changes)


@pytest.mark.parametrize("function", [varlen_attn, varlen_attn_of_torch_2_11], ids=["torch 2.12", "torch 2.11"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_by_segments_scores_in_float64_as_separate_rows_do(family, function, kernels):
    kernels(VarlenAttention(function, ANY_DTYPE), BranchAttention())
    model = make_model(family, torch.float64)
    theirs = rows_scores(model, BATCH)["log_probs"]
    their_gradients = gradients(model, theirs)
    enable_shared_prompt(model)
    ours = shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs
    hooks = hooks_of(model)
    assert set(hooks.attended) == {"one call per branch" if family in ("gemma2", "gpt_oss") else "varlen_attn"}
    assert_alike({"log_probs": ours}, {"log_probs": theirs}, 1e-10)
    assert_alike(gradients(model, ours), their_gradients, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_attention_by_segments_scores_each_case_as_separate_rows_do(name, kernels):
    kernels(VarlenAttention(varlen_attn, ANY_DTYPE), BranchAttention())
    model = make_model("mistral", torch.float64)
    theirs = rows_scores(model, CASES[name])["log_probs"]
    their_gradients = gradients(model, theirs)
    enable_shared_prompt(model)
    ours = shared_prompt_scores(model, PairLayout.from_batch(CASES[name])).log_probs
    assert_alike({"log_probs": ours}, {"log_probs": theirs}, 1e-10)
    assert_alike(gradients(model, ours), their_gradients, 1e-10)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("function", [varlen_attn, varlen_attn_of_torch_2_11, varlen_attn_of_torch_2_10])
def test_segments_equal_branches_whatever_the_release_takes(function, window, scaling):
    call = make_call(PairLayout.from_batch(BATCH), window, scaling=scaling)
    kernel = VarlenAttention(function, ANY_DTYPE)
    if function is varlen_attn_of_torch_2_10 and window is not None:
        assert kernel.obstacle(call) == "has no sliding window before torch 2.11"
        return
    assert kernel.obstacle(call) is None
    scaled = replace(call, query=call.query * (1 if scaling is None else scaling * 16**0.5))
    assert torch.allclose(kernel(call), BranchAttention()(scaled), rtol=0, atol=1e-12)


# Importing torch's compiler warns, though nothing is compiled
@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_over_the_block_mask_equals_branches(window):
    call = make_call(PairLayout.from_batch(BATCH), window)
    with torch.compiler.set_stance("force_eager"):
        assert torch.allclose(FlexAttention()(call), BranchAttention()(call), rtol=0, atol=1e-6)


def test_the_first_kernel_that_supports_a_call_is_chosen_and_the_others_are_named_with_their_reasons(kernels):
    layout = PairLayout.from_batch(BATCH)
    kernels(VarlenAttention(varlen_attn), FlexAttention(), BranchAttention())
    kernel, description = choose_kernel(make_call(layout, dtype=torch.bfloat16), {})
    assert (kernel.name, description) == ("varlen_attn", "varlen_attn")
    kernel, description = choose_kernel(make_call(layout, dtype=torch.float32), {})
    assert description == "flex attention (varlen_attn does not take float32)"
    kernel, description = choose_kernel(make_call(layout, dtype=torch.bfloat16), {"varlen_attn": "raises an error"})
    assert description == "flex attention (varlen_attn raises an error)"
    kernel, description = choose_kernel(make_call(layout, dtype=torch.bfloat16, dropout=0.1), {})
    assert kernel == BranchAttention()
    assert description == "one call per branch (varlen_attn has no dropout; flex attention has no dropout)"
    with torch.autocast("cpu", torch.bfloat16):  # under which queries may be of float32
        assert choose_kernel(make_call(layout, dtype=torch.float32), {})[0].name == "varlen_attn"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 30.0}, "does not cap scores"),
        ({"sinks": torch.zeros(4)}, "has no attention sinks"),
        ({"dtype": torch.float64}, "does not take float64"),
    ],
)
def test_flash_attention_names_what_it_does_not_support(changes, reason):
    call = make_call(PairLayout.from_batch(BATCH), **{"dtype": torch.bfloat16, **changes})
    assert VarlenAttention(varlen_attn).obstacle(call) == reason
    assert VarlenAttention(None).obstacle(call) == "needs torch 2.10"


def test_flash_attention_takes_heads_of_up_to_256_channels_in_eights():
    layout = PairLayout.from_batch(BATCH)
    for channels, taken in ((8, True), (256, True), (264, False), (60, False)):
        query, key, value = (torch.randn(1, 2, len(layout), channels, dtype=torch.bfloat16) for _ in range(3))
        obstacle = VarlenAttention(varlen_attn).obstacle(AttentionCall(query, key, value, layout, sdpa, causal=True))
        assert (obstacle is None) == taken


def test_on_a_gpu_segments_come_first_and_branches_last():
    assert [kernel.name for kernel in KERNELS["cuda"]] == ["varlen_attn", "flex attention", "one call per branch"]
    assert KERNELS["cpu"] == KERNELS["cuda"][-1:]


@pytest.fixture
def flex_first(monkeypatch, kernels):
    """Flex attention and TRL's head, as on a GPU in float32."""
    kernels(FlexAttention(), BranchAttention())
    monkeypatch.setitem(HEADS, "cpu", chunked_scores)
    # Flex attention has a backward pass on a CPU too, uncompiled or traced, which this refuses
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
# Flex attention has no attention sinks on a CPU
@pytest.mark.parametrize("family", [name for name in FAMILIES if "eager" not in name and name != "gpt_oss"])
def test_flex_attention_and_trls_head_score_as_separate_rows_do(family, flex_first):
    model = make_model(family, torch.float64)
    theirs = rows_scores(model, BATCH)["log_probs"]
    their_gradients = gradients(model, theirs)
    enable_shared_prompt(model)
    layout = PairLayout.from_batch(BATCH)
    with torch.compiler.set_stance("force_eager"):
        ours = shared_prompt_scores(model, layout).log_probs
        our_gradients = gradients(model, ours)
    assert {kind for kind, *_ in layout._masks} == {"block"}  # which attention by branch makes none of
    # TRL's head sums in float32 whatever it is given
    assert_alike({"log_probs": ours}, {"log_probs": theirs}, 1e-5)
    assert_alike(our_gradients, their_gradients, 1e-4)


@pytest.fixture
def compiled_with(monkeypatch):
    """Lets flex attention be compiled anew, by a backend, and no more often than torch allows."""

    def use(backend):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    def forget():
        torch.compiler.reset()
        compiled.cache_clear()

    forget()
    with dynamo_config.patch(fail_on_recompile_limit_hit=True):
        yield use
    forget()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("trains", [True, False], ids=["traced, both passes", "to machine code, forward"])
def test_flex_attention_is_compiled_for_every_length_and_window(trains, compiled_with, flex_first):
    if not trains and shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    compiled_with("aot_eager" if trains else "inductor")
    model, separate = make_model("gemma2"), make_model("gemma2")  # with a window in every other layer
    enable_shared_prompt(model)
    pair = ([3, 4, 5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 2], [20, 21, 30, 31, 2])
    for batch in (BATCH, CASES["no prompt"], collate(*[pair] * 12), BATCH, collate(*[pair] * 24)):
        for grad in (True, False) if trains else (False,):
            with torch.set_grad_enabled(grad):
                theirs = rows_scores(separate, batch)["log_probs"]
                ours = shared_prompt_scores(model, PairLayout.from_batch(batch)).log_probs
            assert_alike({"log_probs": ours}, {"log_probs": theirs}, 1e-5)
            if grad:
                assert_alike(gradients(model, ours), gradients(separate, theirs), 1e-4)


class Waits(TorchDispatchMode):
    """Counts operations for whose result the host would wait for a GPU, and the largest result that is no view."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        by_mask = name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += by_mask or name in {"aten::_local_scalar_dense", "aten::nonzero"}
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.numel())
        return result


def test_scores_on_a_gpu_wait_for_nothing_and_make_nothing_dense(kernels, monkeypatch):
    def attends_to_itself(query, key, value, *args, window_size, enable_gqa):
        return query * 1

    monkeypatch.setitem(HEADS, "cpu", chunked_scores)
    kernels(VarlenAttention(attends_to_itself, ANY_DTYPE), BranchAttention())
    model = make_model("llama", vocab_size=20_000)
    enable_shared_prompt(model)
    layout = PairLayout.from_batch(collate(*[([3] * 1200, [4, 5, 2], [6, 7, 2])] * 2))
    shared_prompt_scores(model, layout)  # which learns what TRL's head returns
    with Waits() as waits:
        shared_prompt_scores(model, layout)
    assert waits.count == 0
    assert waits.largest < len(layout) ** 2 / 4  # no mask of all tokens by all
    assert waits.largest < len(layout) * 20_000 / 100  # no logits but those of scored rows
