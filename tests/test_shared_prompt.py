"""Scores of shared prompts against those of separate rows: model families, ways to run a model."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from pairs import (
    BATCH,
    CASES,
    FAMILIES,
    NO_DROPOUT,
    SIZES,
    VOCAB,
    Float64Throughout,
    assert_alike,
    gradients,
    make_model,
    random_batch,
    rows_scores,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from trl.trainer.utils import use_adapter

from dposhift_trl.scoring import (
    PairLayout,
    enable_shared_prompt,
    shared_prompt_obstacle,
    shared_prompt_scores,
    verify_shared_prompt,
)
from dposhift_trl.scoring.head import OPTIONAL_OUTPUTS
from dposhift_trl.scoring.verify import measure_shared_prompt


@pytest.fixture(autouse=True)
def float64_throughout():
    with Float64Throughout():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_scores_in_float64_as_separate_rows_do(family):
    model = make_model(family, torch.float64, ("log_probs", *OPTIONAL_OUTPUTS))
    theirs = rows_scores(model, BATCH)
    their_gradients = gradients(model, theirs["log_probs"])
    enable_shared_prompt(model)
    output = shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    ours = {name: getattr(output, name) for name in theirs}
    assert torch.equal(ours.pop("is_top1"), theirs.pop("is_top1"))
    assert_alike(ours, theirs, 1e-10)
    assert_alike(gradients(model, output.log_probs), their_gradients, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_scores_in_float32_as_trl_scores_padded_rows(family):
    model = make_model(family, outputs=("log_probs", *OPTIONAL_OUTPUTS))
    labels = BATCH["input_ids"].masked_fill(BATCH["completion_mask"] == 0, -100)
    rows = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    theirs = model(**rows, labels=labels, use_cache=False, fused_lm_head=True)
    enable_shared_prompt(model)
    ours = shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    assert torch.equal(ours.is_top1, theirs.is_top1)
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits")
    assert_alike({n: getattr(ours, n) for n in names}, {n: getattr(theirs, n) for n in names}, 1e-5)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert_alike(gradients(model, ours.log_probs), gradients(model, theirs.log_probs), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_each_case_scores_as_separate_rows_do(name):
    for family in ("gpt2", "mistral"):
        model = make_model(family, torch.float64)
        theirs = rows_scores(model, CASES[name])["log_probs"]
        their_gradients = gradients(model, theirs)
        enable_shared_prompt(model)
        ours = shared_prompt_scores(model, PairLayout.from_batch(CASES[name])).log_probs
        assert_alike({"log_probs": ours}, {"log_probs": theirs}, 1e-10)
        assert_alike(gradients(model, ours), their_gradients, 1e-10)


def test_random_batches_score_as_separate_rows_do():
    model, rows = make_model("qwen2", torch.float64), make_model("qwen2", torch.float64)
    enable_shared_prompt(model)
    for seed in range(10):
        batch = random_batch(seed)
        ours = shared_prompt_scores(model, PairLayout.from_batch(batch)).log_probs
        assert_alike({"log_probs": ours}, {"log_probs": rows_scores(rows, batch)["log_probs"]}, 1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama-eager", "mistral", "gemma2"])
def test_everything_else_about_an_enabled_model_is_bitwise_unchanged(family):
    plain, model = make_model(family), make_model(family)
    enable_shared_prompt(model)
    rows = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    assert torch.equal(plain(**rows).logits, model(**rows).logits)
    labels = BATCH["input_ids"].masked_fill(BATCH["completion_mask"] == 0, -100)
    theirs, ours = (m(**rows, labels=labels, fused_lm_head=True).log_probs for m in (plain, model))
    assert torch.equal(theirs, ours)
    theirs, ours = gradients(plain, theirs), gradients(model, ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    left = {
        "input_ids": torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    }
    greedy = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    theirs, ours = plain.generate(**left, **greedy), model.generate(**left, **greedy)
    assert torch.equal(theirs.sequences, ours.sequences)
    assert all(torch.equal(a, b) for a, b in zip(theirs.logits, ours.logits, strict=True))


def test_an_enabled_model_saves_the_configuration_it_had(tmp_path):
    plain, model = make_model(), make_model()
    enable_shared_prompt(model)
    plain.config.save_pretrained(tmp_path / "plain")
    model.config.save_pretrained(tmp_path / "model")
    assert (tmp_path / "plain/config.json").read_text() == (tmp_path / "model/config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_scores_alike_and_trls_head_is_called_by_the_first_alone(family):
    model = make_model(family, outputs=("log_probs", "entropy", "is_top1"))
    enable_shared_prompt(model)
    rows = []  # TRL's head uses the weight, not the module
    model.get_output_embeddings().register_forward_pre_hook(lambda head, args: rows.append(args[0].shape[1]))
    first, *rest = (shared_prompt_scores(model, PairLayout.from_batch(BATCH)) for _ in range(3))
    for output in rest:
        for name in ("log_probs", "entropy", "is_top1"):
            assert torch.equal(output[name], first[name])
        assert output.mean_logits is None
    assert len(rows) == (1 if family == "opt" else 2)  # OPT's own forward passes the backbone by, which is found once
    if family != "opt":
        assert rows == [0, 0]


def test_enabling_twice_changes_nothing():
    model = make_model(dtype=torch.float64)
    enable_shared_prompt(model)
    once = shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs
    enable_shared_prompt(model)
    assert torch.equal(once, shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "gpt_oss", "mixtral"])
def test_the_last_feed_forward_is_given_the_scored_rows_alone(family):
    model = make_model(family)
    enable_shared_prompt(model)
    shapes, layers = [], next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, args: shapes.append(args[0].shape[1]))
    layout = PairLayout.from_batch(BATCH)
    shared_prompt_scores(model, layout)
    assert shapes == [len(layout), len(layout.rows)]
    # Whatever runs next is not mistaken for the same rows, with another attention either
    model.set_attn_implementation("eager")
    shapes.clear()
    with torch.no_grad():
        model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"], use_cache=False)
    assert shapes == [BATCH["input_ids"].shape[1]] * 2


def test_the_activation_of_gpt2_is_one_operation():
    model = make_model("gpt2")
    enable_shared_prompt(model)
    sizes = []
    for layer in model.transformer.h:  # what its own eight operations are given
        layer.mlp.act.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    with torch.profiler.profile() as profile:
        shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    assert sizes == [0, 0]
    assert {event.key: event.count for event in profile.key_averages()}["aten::gelu"] == 2


def test_a_module_alone_and_a_copy_of_one_know_nothing_of_the_last_layout(tmp_path):
    plain, model = make_model("gpt2"), make_model("gpt2")
    enable_shared_prompt(model)
    shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    hidden = torch.randn(1, 40, SIZES["hidden_size"])
    assert torch.equal(plain.transformer.h[-1].mlp(hidden), model.transformer.h[-1].mlp(hidden))
    rows = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    gradients(model, shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    tuned = get_peft_model(model, LoraConfig(target_modules=["c_attn"], modules_to_save=["mlp"]))
    for enabled in (loaded, tuned):
        assert torch.equal(plain(**rows).logits, enabled(**rows).logits)


def test_a_copy_of_an_enabled_model_is_enabled_on_its_own():
    model = make_model()
    enable_shared_prompt(model)
    before = shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs
    twin = copy.deepcopy(model)
    enable_shared_prompt(twin)
    with torch.no_grad():
        twin.get_output_embeddings().weight.mul_(2)
    assert measure_shared_prompt(twin).scores < 1e-4
    assert not torch.equal(before, shared_prompt_scores(twin, PairLayout.from_batch(BATCH)).log_probs)
    assert torch.equal(before, shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs)


OBSTACLES = {
    "mamba": ("linear_attention", {}),
    "rwkv": ("has no attention that transformers dispatches", {}),
    "bloom": ("ALiBi", {}),
    "mpt": ("ALiBi", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "jamba": ("linear_attention", {"use_mamba_kernels": False}),
    "falcon_h1": ("hybrid", {}),
    "lfm2": ("conv", {"layer_types": ["conv", "full_attention"]}),
    "llama4_text": ("chunked_attention", {}),
    "mixtral": ("load-balancing loss", {"output_router_logits": True, "num_local_experts": 4}),
    "llama": ("dynamic", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "gpt2": ("reorder_and_upcast_attn", {"attn_implementation": "eager", "reorder_and_upcast_attn": True}),
    "qwen2": ("cross-attention", {"add_cross_attention": True}),
}


@pytest.mark.parametrize("family", OBSTACLES)
def test_a_model_that_cannot_share_prompts_names_the_obstacle(family):
    reason, overrides = OBSTACLES[family]
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    assert reason in shared_prompt_obstacle(model)
    with pytest.raises(ValueError, match=r"`model` must be able to share prompts exactly, got a `\w+`: .*"):
        enable_shared_prompt(model)


def test_an_encoder_decoder_names_the_obstacle():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    assert shared_prompt_obstacle(AutoModelForSeq2SeqLM.from_config(config)) == "it has cross-attention"


def test_an_adapter_that_a_row_invokes_is_an_obstacle():
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    assert "aLoRA" in shared_prompt_obstacle(get_peft_model(make_model(), adapter))


def test_a_learned_prompt_is_an_obstacle():
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert shared_prompt_obstacle(get_peft_model(make_model(), tuning)) == "its adapter learns a prompt"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_known_exact_names_no_obstacle(family):
    assert shared_prompt_obstacle(make_model(family)) is None


def test_a_model_that_withholds_the_layout_from_its_attention_is_refused_at_the_first_call():
    model = make_model("nemotron")
    enable_shared_prompt(model)
    with pytest.raises(ValueError, match="the model drops the one"):
        verify_shared_prompt(model)


def lora(model, **kwargs):
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", **kwargs))


@pytest.mark.parametrize("reference", ["policy", "adapters disabled", "another adapter"])
def test_lora_scores_as_separate_rows_do(reference):
    model = lora(make_model(dtype=torch.float64)).eval()
    if reference == "another adapter":
        model.add_adapter("ref", LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    model.double()
    enable_shared_prompt(model)
    layout = PairLayout.from_batch(BATCH)
    if reference == "policy":
        theirs, ours = rows_scores(model, BATCH)["log_probs"], shared_prompt_scores(model, layout).log_probs
        assert_alike(gradients(model, ours), gradients(model, theirs), 1e-10)
    else:
        name = "ref" if reference == "another adapter" else None
        with torch.no_grad(), use_adapter(model, adapter_name=name):
            theirs, ours = rows_scores(model, BATCH)["log_probs"], shared_prompt_scores(model, layout).log_probs
        policy = shared_prompt_scores(model, layout).log_probs
        assert not torch.allclose(policy, ours)
    assert_alike({"log_probs": ours}, {"log_probs": theirs}, 1e-10)


def test_a_model_enabled_before_peft_wraps_it_scores_as_well():
    model = make_model()
    enable_shared_prompt(model)
    assert measure_shared_prompt(lora(model).eval()).scores < 1e-4


def test_a_model_whose_hooks_do_not_run_is_refused():
    model = make_model()
    enable_shared_prompt(model)
    with pytest.raises(RuntimeError, match="let its forward hooks run"):
        shared_prompt_scores(model.forward, PairLayout.from_batch(BATCH))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    model = make_model(family, **(NO_DROPOUT if family == "gpt2" else {}))
    enable_shared_prompt(model)
    layout = PairLayout.from_batch(BATCH)
    plain = gradients(model, shared_prompt_scores(model, layout).log_probs)
    model.train()
    # The name before transformers 5.20
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    log_probs = shared_prompt_scores(model, layout).log_probs
    model.eval()
    with torch.no_grad():  # a reference scored in between
        shared_prompt_scores(model, PairLayout.from_batch(CASES["answers that part late"]))
    model.train()
    checkpointed = gradients(model, log_probs)
    assert_alike(checkpointed, plain, 1e-6)


def test_bf16_autocast_agrees_with_trl_to_its_rounding():
    model = make_model(outputs=("log_probs", *OPTIONAL_OUTPUTS))
    enable_shared_prompt(model)
    exact = shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs
    labels = BATCH["input_ids"].masked_fill(BATCH["completion_mask"] == 0, -100)
    with torch.autocast("cpu", torch.bfloat16):
        rows = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
        theirs = model(**rows, labels=labels, fused_lm_head=True).log_probs
        ours = shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert all(g.isfinite().all() for g in gradients(model, ours).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2"])
def test_a_compiled_model_scores_as_it_does_uncompiled(family):
    model = make_model(family)
    enable_shared_prompt(model)
    layouts = [PairLayout.from_batch(batch) for batch in (BATCH, CASES["answers that part late"])]
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    for layout in layouts:  # of other sizes, so that what was compiled for one does not do for the next
        plain, ours = (shared_prompt_scores(each, layout).log_probs for each in (model, compiled))
        assert_alike({"log_probs": ours}, {"log_probs": plain}, 1e-6)
        got = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled, ours).items()}
        assert_alike(got, gradients(model, plain), 1e-5)


def test_no_gradient_is_kept_without_grad():
    model = make_model()
    enable_shared_prompt(model)
    with torch.no_grad():
        assert not shared_prompt_scores(model, PairLayout.from_batch(BATCH)).log_probs.requires_grad


def test_a_batch_without_any_completion_still_reaches_every_parameter():
    model = make_model()
    enable_shared_prompt(model)
    grads = gradients(model, shared_prompt_scores(model, PairLayout.from_batch(CASES["both answers empty"])).log_probs)
    assert len(grads) == len(list(model.parameters()))
    assert all((gradient == 0).all() for gradient in grads.values())


def test_a_layout_in_the_inputs_of_padded_rows_does_no_harm():
    model = make_model()
    enable_shared_prompt(model)
    rows = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    with_layout = model(**rows, shared_prompt=PairLayout.from_batch(BATCH)).logits
    assert torch.equal(with_layout, model(**rows).logits)


def test_two_processes_with_uneven_runs_reach_the_gradients_of_one():
    script = Path(__file__).with_name("ddp_shared_prompt.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-8000:]
    assert "agrees" in result.stdout
