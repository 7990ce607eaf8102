"""Scores of shared prompts against those of separate rows: layouts, model families, ways to run a model."""

import copy
import os
import pickle
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import send_to_device
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch._dynamo import config as dynamo_config
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.integrations.flex_attention import WrappedFlexAttention
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, use_adapter

from dposhift_trl.scoring.head import OPTIONAL_OUTPUTS, token_scores
from dposhift_trl.scoring.shared_prompt import (
    PairLayout,
    SharedPromptCollator,
    _attend_by_branch,
    _compiled,
    enable_shared_prompt,
    shared_prompt_obstacle,
    shared_prompt_scores,
    verify_shared_prompt,
)


VOCAB = 89
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "experts_implementation": "eager",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FAMILIES = {
    "gpt2": {},
    "gpt2-eager": {"attn_implementation": "eager"},
    "llama": {},
    "llama-eager": {"attn_implementation": "eager"},
    "qwen2": SLIDING,
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "mistral-eager": {"sliding_window": 5, "attn_implementation": "eager"},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 5},
    "gpt_neox": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 5},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "starcoder2": {"sliding_window": 5},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, **SLIDING, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5},
}


class Float64Throughout(TorchFunctionMode):
    """Keeps in float64 what the models would compute in float32 whatever their dtype: norms, rotations, softmax."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return args[0]
            if function is torch.Tensor.matmul:  # transformers before 5.20 turn positions to float32 by themselves
                return function(args[0], args[1].double())
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def float64_throughout():
    with Float64Throughout():
        yield


def make_model(family="llama", dtype=torch.float32, outputs=("log_probs",), **overrides):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family.partition("-")[0], **{**SIZES, **FAMILIES.get(family, {}), **overrides}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    for parameter in model.parameters():  # large enough for attention to matter
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    add_fused_lm_head(model, outputs=outputs)
    return model.to(dtype).eval()


def collate(*pairs, **kwargs):
    examples = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    return DataCollatorForPreference(pad_token_id=0, **kwargs)(examples)


BATCH = collate(
    ([3, 4, 5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 2], [20, 21, 30, 31, 2]),
    ([11, 12, 13], [40, 41, 2], [50, 51, 52, 53, 54, 55, 56, 57, 2]),
    ([14], [60, 61, 62, 2], [60, 61, 62, 2]),
)
CASES = {
    "answers that part at once": collate(([3, 4, 5], [6, 7, 2], [8, 9, 10, 2])),
    "answers that part late": collate(([3, 4, 5], [6, 7, 8, 2], [6, 7, 9, 10, 2])),
    "answers that part at the last token": collate(([3, 4], [6, 7, 2], [6, 7, 9])),
    "identical answers": collate(([3, 4], [6, 7, 2], [6, 7, 2])),
    "chosen a prefix of rejected": collate(([3, 4], [6, 7], [6, 7, 8, 2])),
    "rejected a prefix of chosen": collate(([3, 4], [6, 7, 8, 2], [6, 7])),
    "empty chosen": collate(([3, 4, 5], [], [8, 9, 2])),
    "empty rejected": collate(([3, 4, 5], [6, 7, 2], [])),
    "both answers empty": collate(([3, 4, 5], [], [])),
    "an empty pair beside a full one": collate(([3, 4, 5], [], []), ([3, 4], [5, 2], [6, 2])),
    "no prompt": collate(([], [3, 4, 5], [6, 7])),
    "no prompt, answers that agree": collate(([], [3, 4, 5], [3, 4, 6])),
    "one token in all": collate(([3], [], [])),
    "answers of one token": collate(([3], [4], [5])),
    "completions cut off": collate(([3, 4, 5, 6], [7, 8], [9, 10]), max_length=4),
    "completions cut short": collate(([3, 4, 5, 6], [7, 8, 9], [7, 10, 11, 12]), max_length=6),
    "ends kept, prompts of unlike length": collate(
        ([3, 4, 5, 6], [7, 8], [9, 10, 11, 12]), max_length=5, truncation_mode="keep_end"
    ),
    "ends kept, prompts gone": collate(([3], [4, 5, 6, 7], [8, 9, 10]), max_length=3, truncation_mode="keep_end"),
    "padded to a multiple": collate(([3, 4], [5, 2], [6, 7, 2]), ([3], [5], [6]), pad_to_multiple_of=8),
    "several pairs": BATCH,
}


def mask_out(batch, row, stop):
    batch = {key: value.clone() for key, value in batch.items()}
    batch["completion_mask"][row, :stop] = 0
    return batch


CASES["completion starts among agreed tokens"] = mask_out(CASES["answers that part late"], slice(None), 5)
CASES["masks that differ among agreed tokens"] = mask_out(CASES["answers that part late"], 0, 5)
CASES["one row without completion"] = mask_out(CASES["answers that part late"], 1, 9)


def random_batch(seed):
    chance = random.Random(seed)

    def tokens(most):
        return [chance.choice((3, 4, 5)) for _ in range(chance.randint(0, most))]

    pairs = [(tokens(6), tokens(5), tokens(5)) for _ in range(chance.randint(1, 4))]
    pairs[0] = ([3], *pairs[0][1:])
    batch = collate(
        *pairs, max_length=chance.choice((None, 3, 7)), truncation_mode=chance.choice(("keep_start", "keep_end"))
    )
    if chance.random() < 0.3:
        batch = mask_out(batch, chance.randrange(len(batch["input_ids"])), chance.randint(0, 6))
    return batch


def oracle(batch):
    """For every packed token the history it sees, and every completion token's (history, label), row by row."""
    wanted, needed = {}, set()
    for row, (ids, real, scored) in enumerate(zip(*(batch[k].tolist() for k in batch), strict=True)):
        pair = row % (len(batch["input_ids"]) // 2)
        for step in range(1, sum(real)):
            if scored[step]:
                wanted[row, step - 1] = (tuple(ids[:step]), ids[step])
                needed |= {(pair, tuple(ids[: i + 1])) for i in range(step)}
    return wanted, needed


def histories(layout, window=None):
    """What the layout's lengths and spans let every packed token see, as tokens in the order of their positions."""
    ids, positions = layout.input_ids[0].tolist(), layout.position_ids[0].tolist()
    start, shared_end, branch = layout.spans.tolist()
    for i in range(len(ids)):
        seen = [j for j in range(i + 1) if start[i] <= j < shared_end[i] or j >= branch[i]]
        assert [positions[j] for j in seen] == list(range(len(seen)))
        yield tuple(ids[j] for j in seen)


def check_layout(batch):
    layout = PairLayout.from_batch(batch)
    wanted, needed = oracle(batch)
    seen = list(histories(layout))
    assert layout.rows.tolist() == sorted(set(layout.rows.tolist()))
    cells = {}
    for cell, source in zip(layout.cells.tolist(), layout.sources.tolist(), strict=True):
        cells[divmod(cell, layout.shape[1])] = (seen[layout.rows[source]], layout.labels[0, source].item())
    assert cells == wanted
    assert sum(map(sum, layout.lengths)) == len(layout) == len(seen)
    if wanted:  # nothing is read twice but the last shared token of a pair whose answers part
        pairs = len(layout.lengths)
        owner = [pair for pair, lengths in enumerate(layout.lengths) for _ in range(sum(lengths))]
        copies = len(seen) - len(set(zip(owner, seen, strict=True)))
        assert set(zip(owner, seen, strict=True)) == needed
        assert copies <= sum(second > 0 for _, _, second in layout.lengths) <= pairs


@pytest.mark.parametrize("name", CASES)
def test_a_layout_hands_every_completion_token_its_own_history(name):
    check_layout(CASES[name])


def test_random_layouts_hand_every_completion_token_its_own_history():
    for seed in range(200):
        check_layout(random_batch(seed))


def test_a_layout_shares_the_prompt_and_the_tokens_on_which_answers_agree():
    layout = PairLayout.from_batch(collate(([3, 4, 5], [6, 7, 2], [6, 8, 9, 2])))
    assert layout.input_ids.tolist() == [[3, 4, 5, 6, 7, 6, 8, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert layout.lengths == ((3, 2, 3),)
    assert layout.rows.tolist() == [2, 3, 4, 5, 6, 7]
    assert layout.labels.tolist() == [[6, 7, 2, 8, 9, 2]]


def test_a_layout_refuses_rows_that_are_not_pairs():
    with pytest.raises(ValueError, match="as many rejected rows, got 3 rows"):
        PairLayout.from_batch({key: value[:3] for key, value in BATCH.items()})


def test_a_layout_refuses_left_padding():
    with pytest.raises(ValueError, match="padded on the right"):
        PairLayout.from_batch({key: value.flip(1) for key, value in BATCH.items()})


def test_the_block_mask_lets_each_token_see_its_own_row():
    layout = PairLayout.from_batch(BATCH)
    for window in (None, 4):
        dense = flex_attention.create_mask(
            layout.block_mask(window).mask_mod, None, None, len(layout), len(layout), device="cpu"
        )[0, 0]
        for seen, row in zip(histories(layout), dense, strict=True):
            assert tuple(layout.input_ids[0][row].tolist()) == (seen if window is None else seen[-window:])
        assert layout.block_mask(window) is layout.block_mask(window)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_over_the_block_mask_equals_attention_branch_by_branch(window):
    layout = PairLayout.from_batch(BATCH)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(layout), 16, dtype=torch.float64) for heads in (4, 2, 2))

    def sdpa(query, key, value, attention_mask):
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=attention_mask is None and query.shape[2] > 1, enable_gqa=True
        )
        return attended.transpose(1, 2), None

    ours = _attend_by_branch(sdpa, query, key, value, layout, window, causal=True)
    flex = flex_attention.flex_attention(query, key, value, block_mask=layout.block_mask(window), enable_gqa=True)
    assert torch.allclose(ours, flex.transpose(1, 2), rtol=0, atol=1e-6)


def rows_scores(model, batch):
    """Separate rows, each token scored from the model's own logits, in the dtype of the model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    log_probs = logits[:, :-1].log_softmax(-1)
    scored = batch["completion_mask"][:, 1:].bool()
    return {
        "log_probs": log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0].where(scored, 0),
        "entropy": -(log_probs.exp() * log_probs).sum(-1).where(scored, 0),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1).where(scored, 0),
        "mean_logits": logits[:, :-1].mean(-1).where(scored, 0),
        "is_top1": (logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]) & scored,
    }


def gradients(model, log_probs):
    """Gradients of a sum in which every completion token has a weight of its own."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, log_probs.numel(), dtype=log_probs.dtype).view(log_probs.shape)
    (log_probs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours, theirs, tolerance):
    """Equal to `tolerance`, relative to the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        largest = max(expected.abs().flatten().tolist(), default=0)
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance * (1 + largest), check_dtype=False)


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
    for layer in model.transformer.h:  # what the eight operations are left with
        layer.mlp.act.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    with torch.profiler.profile() as profile:
        shared_prompt_scores(model, PairLayout.from_batch(BATCH))
    assert sizes == [1, 1]
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
    assert verify_shared_prompt(twin) < 1e-4
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
    with pytest.raises(ValueError, match="withholds"):
        verify_shared_prompt(model)


def test_verification_measures_the_difference():
    model = make_model()
    enable_shared_prompt(model)
    assert verify_shared_prompt(model) < 1e-4
    assert verify_shared_prompt(model, CASES["answers that part late"]) < 1e-4
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output.cumsum(1))
    assert verify_shared_prompt(model) > 1e-2


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
    assert verify_shared_prompt(lora(model).eval()) < 1e-4


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


def test_a_collator_adds_the_layout_and_leaves_the_rest():
    examples = [{"prompt_ids": [3, 4], "chosen_ids": [5, 6, 2], "rejected_ids": [5, 7, 2], "ref_chosen_logps": -1.0}]
    plain = DataCollatorForPreference(pad_token_id=0)
    batch = SharedPromptCollator(plain)(examples)
    assert batch.pop("shared_prompt").lengths == ((2, 2, 2),)
    expected = plain(examples)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_a_layout_travels_through_workers_and_the_prepared_loader():
    examples = [{"prompt_ids": [3] * n, "chosen_ids": [5, 6], "rejected_ids": [5]} for n in range(1, 5)]
    collator = SharedPromptCollator(DataCollatorForPreference(pad_token_id=0))
    loader = Accelerator(cpu=True).prepare(DataLoader(examples, batch_size=2, collate_fn=collator, num_workers=1))
    for batch, n in zip(loader, (1, 3), strict=True):
        assert batch["shared_prompt"].lengths == ((n, 1, 0), (n + 1, 1, 0))
    layout = send_to_device({"shared_prompt": PairLayout.from_batch(BATCH)}, torch.device("meta"))["shared_prompt"]
    assert layout.rows.device.type == "meta"
    assert layout.lengths == PairLayout.from_batch(BATCH).lengths
    assert torch.equal(
        pickle.loads(pickle.dumps(PairLayout.from_batch(BATCH))).rows, PairLayout.from_batch(BATCH).rows
    )


def test_a_layout_in_the_inputs_of_padded_rows_does_no_harm():
    model = make_model()
    enable_shared_prompt(model)
    rows = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    with_layout = model(**rows, shared_prompt=PairLayout.from_batch(BATCH)).logits
    assert torch.equal(with_layout, model(**rows).logits)


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


def test_two_processes_with_uneven_runs_reach_the_gradients_of_one():
    script = Path(__file__).with_name("ddp_shared_prompt.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "agrees" in result.stdout


@pytest.fixture
def gpu_way(monkeypatch):
    monkeypatch.setattr("dposhift_trl.scoring.shared_prompt._on_gpu", lambda tensor: True)
    # Flex attention has a backward pass on a CPU too, uncompiled or traced, which this refuses
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


# Importing torch's compiler warns, though nothing is compiled
@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
# Flex attention has no attention sinks on a CPU
@pytest.mark.parametrize("family", [name for name in FAMILIES if "eager" not in name and name != "gpt_oss"])
def test_the_way_of_a_gpu_scores_as_separate_rows_do(family, gpu_way):
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
        _compiled.cache_clear()
        WrappedFlexAttention._instance = None

    forget()
    with dynamo_config.patch(fail_on_recompile_limit_hit=True):
        yield use
    forget()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("trains", [True, False], ids=["traced, both passes", "to machine code, forward"])
def test_flex_attention_is_compiled_for_every_length_and_window(trains, compiled_with, gpu_way):
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_flex_attention_scores_as_separate_rows_do(family):
    model = make_model(family, hidden_size=64, head_dim=16, outputs=("log_probs", "entropy")).cuda()
    batch = {key: value.cuda() for key, value in BATCH.items()}
    theirs = rows_scores(model, batch)["log_probs"]
    their_gradients = gradients(model, theirs)
    enable_shared_prompt(model)
    ours = shared_prompt_scores(model, PairLayout.from_batch(BATCH).to("cuda")).log_probs
    assert_alike({"log_probs": ours}, {"log_probs": theirs}, 1e-3)
    assert_alike(gradients(model, ours), their_gradients, 1e-2)
