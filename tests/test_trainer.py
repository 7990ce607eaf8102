import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_rows, make_tokenizer
from datasets import Dataset
from ddp_streams import evaluate
from peft import LoraConfig, get_peft_model
from reference import shift_schedule, shifted_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dposhift_trl import (
    ChosenSFTTrainer,
    DPOShiftConfig,
    DPOShiftTrainer,
    LambdaScheduleCallback,
    make_lambda_schedule,
)
from dposhift_trl.scoring.verify import measure_shared_prompt
from dposhift_trl.training.trainer import TrainingStopped


ROWS, EVAL_ROWS = make_rows(24), make_rows(9, seed=1)
OURS = ("rewards/", "logps/", "shift/", "displacement/", "dpo_loss", "perplexity/")
SHIFTABLE = ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm"]


def train(trainer_class, config_class, model, settings, rows=ROWS, resume=None, options=None, **kwargs):
    trainer = trainer_class(
        model,
        args=config_class(**{**settings, **kwargs}),
        train_dataset=rows,
        eval_dataset=EVAL_ROWS,
        **(options or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def logs(trainer, drop=("runtime", "per_second")):
    return [{k: v for k, v in entry.items() if not any(d in k for d in drop)} for entry in trainer.state.log_history]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": True},
        {"ld_alpha": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"loss_type": ["apo_zero"]},
        {"disable_dropout": False},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=str,
)
def test_at_lambda_one_losses_and_weights_equal_dpo_trainers_bit_for_bit(change, tiny_model, settings):
    stock = train(DPOTrainer, DPOConfig, tiny_model, settings, **change)
    ours = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shift_lambda=1.0, shared_prompt=False, **change
    )
    assert same(weights(stock), weights(ours))
    # Ours are means over pairs in float64, TRL's means of batch means in float32
    exact, rounded = logs(stock, ("runtime", "per_second", *OURS)), logs(stock)
    assert exact == logs(ours, ("runtime", "per_second", *OURS))
    for theirs, mine in zip(rounded, logs(ours), strict=True):
        if "eval_loss" not in theirs:
            assert {k: mine[k] for k in theirs} == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "change", [{}, {"gradient_accumulation_steps": 2}, {"precompute_ref_log_probs": True}], ids=str
)
def test_with_the_shared_prompt_the_same_run_agrees_to_rounding(change, tiny_model, settings):
    common = {"shift_lambda": 0.7, "optim": "sgd", **change}
    rows = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shared_prompt=False, **common)
    shared = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shared_prompt=True, **common)
    assert (rows.shares_prompts, shared.shares_prompts) == (False, True)
    for left, right in zip(logs(rows), logs(shared), strict=True):
        assert right == pytest.approx(left, rel=1e-5, abs=1e-5)
    for left, right in zip(weights(rows), weights(shared), strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-6)


def test_neftune_scales_its_noise_by_rows_and_trains_as_in_dpo_trainer(tiny_model, settings, caplog):
    settings |= {"neftune_noise_alpha": 5.0, "learning_rate": 1e-3}
    ours = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shift_lambda=1.0)
    assert "shared_prompt is off: NEFTune scales its noise by the length of a row" in caplog.text
    stock = train(DPOTrainer, DPOConfig, tiny_model, settings)
    found = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, stock)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] != pytest.approx(0.693147, abs=1e-4)


def test_dropout_that_disable_dropout_does_not_reach_keeps_rows_apart(tmp_path, tiny_model, settings, caplog):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, attention_dropout=0.5,
    )  # fmt: skip
    models = [LlamaForCausalLM(config) for _ in range(2)]
    trainer = DPOShiftTrainer(
        models[0],
        ref_model=models[1],
        args=DPOShiftConfig(**settings),
        train_dataset=ROWS,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    assert not trainer.shares_prompts
    assert "shared_prompt is off: with dropout, each row draws its own mask" in caplog.text


def test_the_log_says_that_the_shared_prompt_is_on(tiny_model, settings, caplog):
    with caplog.at_level("INFO", logger="dposhift_trl.training.sharing"):
        DPOShiftTrainer(tiny_model, args=DPOShiftConfig(**settings), train_dataset=ROWS)
        assert "shared_prompt is on: scores agree with those of padded rows to rounding" in caplog.text
        caplog.clear()
        DPOShiftTrainer(tiny_model, args=DPOShiftConfig(**settings, shared_prompt=False), train_dataset=ROWS)
        assert "shared_prompt is off, as asked: rows are scored as DPOTrainer scores them" in caplog.text


def test_bf16_rounding_is_no_obstacle_to_the_shared_prompt(tiny_model, settings):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in reference.parameters():  # so that bf16 rounds its scores by more than float32 may
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    options = {"ref_model": reference}
    shared = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, options=options, bf16=True)
    assert shared.shares_prompts
    reference = shared.accelerator.unwrap_model(shared.ref_model)
    assert 1e-2 < measure_shared_prompt(reference, shared.accelerator.autocast).scores < 1
    rows = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, options=options, bf16=True, shared_prompt=False
    )
    left, right = ([entry["loss"] for entry in logs(trainer) if "loss" in entry] for trainer in (rows, shared))
    assert right == pytest.approx(left, abs=0.02)


def test_the_shared_prompt_is_off_where_dropout_is_on(tiny_model, settings, caplog):
    args = DPOShiftConfig(**settings, disable_dropout=False)
    assert not DPOShiftTrainer(tiny_model, args=args, train_dataset=ROWS).shares_prompts
    assert "shared_prompt is off: with dropout, each row draws its own mask" in caplog.text
    args = DPOShiftConfig(**settings, disable_dropout=False, shared_prompt=True)
    with pytest.raises(ValueError, match="`shared_prompt` must be auto or false for this model, got True"):
        DPOShiftTrainer(tiny_model, args=args, train_dataset=ROWS)


def test_with_trls_own_config_the_trainer_is_dpo_trainer(tiny_model, settings):
    stock = train(DPOTrainer, DPOConfig, tiny_model, settings, eval_strategy="steps", eval_steps=2)
    ours = train(DPOShiftTrainer, DPOConfig, tiny_model, settings, eval_strategy="steps", eval_steps=2)
    assert same(weights(stock), weights(ours))
    assert logs(stock) == logs(ours)
    cards = []
    for trainer in (stock, ours):
        trainer.create_model_card("model")
        cards.append((Path(settings["output_dir"]) / "README.md").read_text())
        assert set(trainer.model.model_tags) == {"trl", "dpo"}
    assert sorted(cards[0].splitlines()) == sorted(cards[1].splitlines())  # a card lists its tags in any order
    assert "shift" not in cards[1].lower()


def test_lambda_below_one_changes_the_weights(tiny_model, settings):
    dpo = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shift_lambda=1.0)
    shift = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shift_lambda=0.5)
    assert not same(weights(dpo), weights(shift))


def scored_alone(folder, row):
    """Log-probability of a row's two answers, each by itself, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    sums = []
    for answer in ("chosen", "rejected"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row[answer])["input_ids"]
        logps = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        sums.append((sum(logps[i - 1, ids[i]] for i in range(len(prompt), len(ids))), len(ids) - len(prompt)))
    return sums


@pytest.mark.parametrize("loss_type", SHIFTABLE)
def test_the_loss_is_the_papers_for_every_loss_type_built_on_the_difference(loss_type, tiny_model, settings, tmp_path):
    policy = str(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(policy)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(policy)
    rows = ROWS.select(range(4))
    smoothing = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    args = DPOShiftConfig(
        **{**settings, "loss_type": [loss_type], "shift_lambda": 0.6, "beta": 0.3, "label_smoothing": smoothing}
    )
    trainer = DPOShiftTrainer(
        policy, AutoModelForCausalLM.from_pretrained(tiny_model), args, train_dataset=rows, eval_dataset=rows
    )
    metrics = trainer.evaluate()
    losses, margins = [], []
    for row in rows:
        (chosen, chosen_length), (rejected, rejected_length) = scored_alone(policy, row)
        (ref_chosen, _), (ref_rejected, _) = scored_alone(tiny_model, row)
        logratios = (chosen - ref_chosen).item(), (rejected - ref_rejected).item()
        losses.append(
            shifted_loss(
                loss_type,
                *logratios,
                0.6,
                beta=0.3,
                label_smoothing=0.1,
                chosen_length=chosen_length,
                rejected_length=rejected_length,
            )
        )
        margins.append(0.3 * (logratios[0] - 0.6 * logratios[1]))
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert metrics["eval_shift/margins"] == pytest.approx(sum(margins) / 4, rel=1e-4, abs=1e-5)


def gradients(trainer):
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def test_the_gradient_is_that_of_the_chosen_minus_lambda_times_the_rejected(tiny_model, settings):
    """At the reference: grad L = -(beta / 2) mean(grad logp_w - lambda grad logp_l), from three values of lambda."""
    by_lambda = {}
    for shift_lambda in (1.0, 0.5, 0.25):
        args = DPOShiftConfig(**{**settings, "shift_lambda": shift_lambda, "beta": 0.2})
        by_lambda[shift_lambda] = gradients(DPOShiftTrainer(tiny_model, args=args, train_dataset=ROWS))
    # Linear in lambda, so any two determine the third
    expected = by_lambda[0.5] - (by_lambda[1.0] - by_lambda[0.5]) / 2
    assert torch.allclose(by_lambda[0.25], expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(by_lambda[0.25], by_lambda[1.0], rtol=1e-2, atol=1e-4)


def test_theorem_2_1_to_first_order(tiny_model, settings):
    """One SGD step of size eta: dlogp_w(shift) - dlogp_w(dpo) = eta (1 - lambda)(beta / 2) <grad l, grad w>."""
    row, eta, beta, shift_lambda = ROWS.select([0]), 1e-4, 0.1, 0.5

    def logps(model):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        for answer in ("chosen", "rejected"):
            prompt = tokenizer(row[0]["prompt"])["input_ids"]
            ids = tokenizer(row[0]["prompt"] + row[0][answer])["input_ids"]
            logits = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            yield sum(logits[i - 1, ids[i]] for i in range(len(prompt), len(ids)))

    def flat_gradient(value, model):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    reference = AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    before = next(logps(reference)).item()
    chosen_gradient, rejected_gradient = (flat_gradient(value, reference) for value in logps(reference))
    rise = {}
    for value in (shift_lambda, 1.0):
        changes = {"shift_lambda": value, "beta": beta, "per_device_train_batch_size": 1}
        args = DPOShiftConfig(**{**settings, **changes}, precompute_ref_log_probs=False)
        trainer = DPOShiftTrainer(tiny_model, args=args, train_dataset=row)
        trainer.model.double(), trainer.ref_model.double()
        gradient = gradients(trainer)
        with torch.no_grad():
            offset = 0
            for parameter in trainer.model.parameters():
                size = parameter.numel()
                parameter.sub_(eta * gradient[offset : offset + size].view_as(parameter))
                offset += size
        rise[value] = next(logps(trainer.model.eval())).item() - before
    expected = eta * (1 - shift_lambda) * beta / 2 * (chosen_gradient @ rejected_gradient).item()
    assert rise[shift_lambda] - rise[1.0] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", ["linear_increase", "linear_decrease"])
def test_lambda_follows_the_completed_steps_in_training_and_evaluation(name, tiny_model, settings):
    trainer = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, lambda_schedule=name, lambda_min=0.5,
        eval_strategy="steps", eval_steps=2, eval_on_start=True,
    )  # fmt: skip
    steps = {e["step"]: e["shift/lambda"] for e in trainer.state.log_history if "shift/lambda" in e}
    evals = {e["step"]: e["eval_shift/lambda"] for e in trainer.state.log_history if "eval_shift/lambda" in e}
    assert steps == {step: shift_schedule(name, (step - 1) / 4, 0.5, 1.0) for step in (1, 2, 3, 4)}
    assert evals == {step: shift_schedule(name, step / 4, 0.5, 1.0) for step in (0, 2, 4)}


def test_lambda_is_constant_inside_an_accumulation_window_and_right_across_epochs(tiny_model, settings):
    seen = []

    class Spy(DPOShiftTrainer):
        def compute_loss(self, *args, **kwargs):
            seen.append(self.shift_lambda)
            return super().compute_loss(*args, **kwargs)

    train(
        Spy, DPOShiftConfig, tiny_model, settings, rows=ROWS.select(range(16)), lambda_schedule="linear_decrease",
        lambda_min=0.5, gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1,
    )  # fmt: skip
    assert seen == [1.0, 1.0, 0.875, 0.875, 0.75, 0.75, 0.625, 0.625]


def test_the_authors_golden_value_of_lambda():
    """Their model card: 1.0 falling to 0.95 over 477 steps, evaluated after step 450."""
    args = DPOShiftConfig("out", use_cpu=True, lambda_schedule="decrease_linear", lambda_min=0.95)
    assert round(make_lambda_schedule(args)(450 / 477), 4) == 0.9528


def test_four_pairs_at_once_and_two_by_two_accumulated_give_the_same_weights(tiny_model, settings):
    # SGD, since Adam turns rounding of tiny gradients into whole steps
    common = {"lambda_schedule": "linear_increase", "optim": "sgd", "max_grad_norm": 0.0}
    once = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, **common)
    twice = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, **common,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    for left, right in zip(weights(once), weights(twice), strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-6)


def test_cached_references_give_the_same_training_as_online_ones(tiny_model, settings):
    online = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shift_lambda=0.7)
    cached = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shift_lambda=0.7, precompute_ref_log_probs=True
    )
    for left, right in zip(weights(online), weights(cached), strict=True):
        assert torch.allclose(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(lora, tiny_model, settings):
    common = {
        "lambda_schedule": "linear_decrease", "save_strategy": "steps", "save_steps": 2, "max_steps": 8,
        "options": {"peft_config": LoraConfig(task_type="CAUSAL_LM")} if lora else None,
    }  # fmt: skip
    whole = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, **common)
    shutil.rmtree(f"{settings['output_dir']}/checkpoint-8")
    resumed = train(
        DPOShiftTrainer,
        DPOShiftConfig,
        tiny_model,
        settings,
        resume=f"{settings['output_dir']}/checkpoint-4",
        **common,
    )
    assert same(weights(whole), weights(resumed))
    timing = ("train_", "runtime", "flos")
    assert logs(whole, timing) == logs(resumed, timing)


def test_a_row_stream_trains_like_the_same_rows_in_a_table(tiny_model, settings):
    common = {"shift_lambda": 0.7, "train_sampling_strategy": "sequential"}
    table = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, **common)
    stream = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, rows=ROWS.to_iterable_dataset(), **common)
    assert same(weights(table), weights(stream))


def test_lora_by_peft_config_takes_the_base_as_reference_and_trains_the_adapter_only(tiny_model, settings):
    trainer = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shift_lambda=0.8,
        options={"peft_config": LoraConfig(task_type="CAUSAL_LM")},
    )  # fmt: skip
    assert trainer.ref_model is None
    first = trainer.state.log_history[0]
    assert (first["rewards/chosen"], first["rewards/rejected"]) == (0.0, 0.0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    trained = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in trainer.model.state_dict().items()
    }
    assert all(torch.equal(trained[name], value) for name, value in base.items() if name in trained)


def test_a_policy_that_is_not_its_reference_stops_training_with_the_reason(tiny_model, settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.5)  # as if fine-tuned in memory
    with pytest.raises(TrainingStopped, match=r"The reference is not the policy.*loaded from .*gpt2"):
        train(
            DPOShiftTrainer, DPOShiftConfig, model, settings,
            options={"processing_class": AutoTokenizer.from_pretrained(tiny_model)},
        )  # fmt: skip


@pytest.mark.parametrize("adapter", [None, LoraConfig(task_type="CAUSAL_LM")], ids=["full", "lora"])
def test_dropout_that_is_no_module_is_named_as_the_reason_and_both_remedies_help(adapter, tmp_path, settings):
    config = LlamaConfig(
        vocab_size=42, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, attention_dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    options = {"processing_class": make_tokenizer(), "peft_config": adapter}
    with pytest.raises(TrainingStopped) as stopped:
        train(DPOShiftTrainer, DPOShiftConfig, str(tmp_path), settings, options=options)
    assert str(stopped.value).endswith(
        "would not start at log 2. `disable_dropout` does not reach `LlamaAttention.attention_dropout=0.5`. Set it to "
        "0 in the model's config, or set `disable_dropout=False` to train with dropout."
    )
    for remedy in ({"model_init_kwargs": {"attention_dropout": 0.0}}, {"disable_dropout": False}):
        trainer = train(DPOShiftTrainer, DPOShiftConfig, str(tmp_path), settings, options=options, **remedy)
        assert trainer.shares_prompts == ("disable_dropout" not in remedy)  # where rows draw masks of their own


@pytest.mark.parametrize("start", ["pissa", False], ids=str)
def test_an_adapter_that_does_not_start_at_zero_is_named_as_the_reason_and_both_remedies_help(
    start, tiny_model, settings
):
    def options(start):
        return {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=start)}

    with pytest.raises(TrainingStopped) as stopped:
        train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, options=options(start))
    assert str(stopped.value).endswith(
        "would not start at log 2. Without `ref_model`, the reference is the model without its adapter, which does "
        f"not start at zero (`init_lora_weights={start!r}`). Set `init_lora_weights=True`, or pass the model that the "
        "adapter was put on, loaded once more, as `ref_model`."
    )
    train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, options=options(True))
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, options={**options(start), "ref_model": reference}
    )
    assert start is False or trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)


def test_an_adapter_of_which_trl_copies_a_part_is_named_as_the_reason_and_the_remedy_helps(tiny_model, settings):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["wpe"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    merged = copy.deepcopy(model).merge_and_unload()
    options = {"processing_class": AutoTokenizer.from_pretrained(tiny_model)}
    with pytest.raises(TrainingStopped) as stopped:
        train(DPOShiftTrainer, DPOShiftConfig, copy.deepcopy(model), settings, options=options)
    assert str(stopped.value).endswith(
        "would not start at log 2. Without `ref_model`, the reference is the copy of the adapter that TRL makes under "
        "the name `ref`, which does not hold 'base_model.model.transformer.wpe.lora_embedding_A.default'. Pass the "
        "model with the adapter merged into it (`merge_and_unload()`) as `ref_model`."
    )
    trainer = train(DPOShiftTrainer, DPOShiftConfig, model, settings, options={**options, "ref_model": merged})
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)


def test_a_reference_given_by_the_user_may_differ_from_the_policy(tiny_model, settings):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        reference.transformer.wte.weight.mul_(1.5)
    trainer = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, options={"ref_model": reference})
    assert trainer.state.log_history[0]["rewards/chosen"] != 0.0


@pytest.mark.parametrize("reference", ["gpt2", Path("gpt2"), True], ids=repr)
def test_a_reference_that_is_no_model_is_refused_before_a_model_is_loaded(reference, settings):
    with pytest.raises(TypeError, match=r"`ref_model` must be a model, got .*\. Pass `AutoModelForCausalLM.from_pret"):
        DPOShiftTrainer("no/model", reference, DPOShiftConfig(**settings), train_dataset=ROWS)


@pytest.mark.parametrize("indices", [[3, 4], {"wte": [3, 4]}], ids=str)
def test_single_trainable_tokens_in_tied_embeddings_are_refused_and_the_remedy_helps(indices, tiny_model, settings):
    def options(**adapter):
        return {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], **adapter)}

    message = (
        "`trainable_token_indices` is not supported with embeddings that are tied to the LM head, got "
        f"{indices}. Train all tokens with `modules_to_save` instead, or remove it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, options=options(trainable_token_indices=indices))
    train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, max_steps=1, options=options(modules_to_save=["wte"]))


def shout(batch):
    return {name: [f"{text} w1" for text in texts] for name, texts in batch.items()}


FORMATS = {
    **{name: lambda rows, name=name: rows.with_format(name) for name in ("torch", "numpy", "pandas", "arrow")},
    "columns": lambda rows: rows.with_format("torch", columns=["prompt", "chosen", "rejected"]),
    "stream": lambda rows: rows.to_iterable_dataset().with_format("torch"),
    "transform": lambda rows: rows.with_transform(shout),
}


@pytest.mark.parametrize("formatted", FORMATS.values(), ids=FORMATS)
def test_rows_in_another_format_train_as_the_rows_that_they_show(formatted, tiny_model, settings):
    common = {"shift_lambda": 0.7, "train_sampling_strategy": "sequential", "max_steps": 2}
    plain = ROWS.map(shout, batched=True) if formatted is FORMATS["transform"] else ROWS
    expected = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, rows=plain, **common)
    found = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, rows=formatted(ROWS), **common)
    assert same(weights(expected), weights(found))
    assert found.evaluate(found.eval_dataset.with_format("torch"))["eval_loss"] > 0


def test_stage_1_trains_on_rows_in_another_format(tiny_model, settings):
    found = []
    for rows in (ROWS, ROWS.with_format("torch")):
        trainer = ChosenSFTTrainer(tiny_model, SFTConfig(**settings), train_dataset=rows)
        trainer.train()
        found.append(weights(trainer))
    assert same(*found)


@pytest.mark.parametrize("by_launcher", [False, True], ids=["torch_compile", "accelerate launch"])
def test_the_shared_prompt_is_off_where_the_model_is_compiled(by_launcher, tiny_model, settings, caplog, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager" if by_launcher else "no")  # which `torch_compile` sets too
    compiled = {} if by_launcher else {"torch_compile": True, "torch_compile_backend": "eager"}
    args = DPOShiftConfig(**settings, **compiled)
    assert not DPOShiftTrainer(tiny_model, args=args, train_dataset=ROWS).shares_prompts
    assert "shared_prompt is off: `torch_compile` would compile it anew for every batch" in caplog.text
    args = DPOShiftConfig(**settings, **compiled, shared_prompt=True)
    with pytest.raises(
        ValueError, match="`shared_prompt` must be auto or false for this model, got True: `torch_comp"
    ):
        DPOShiftTrainer(tiny_model, args=args, train_dataset=ROWS)


def test_a_callback_of_the_users_own_moves_lambda(tiny_model, settings):
    trainer = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings,
        options={"callbacks": [LambdaScheduleCallback(lambda progress: 1 - 0.5 * progress**2)]},
    )  # fmt: skip
    seen = [e["shift/lambda"] for e in trainer.state.log_history if "shift/lambda" in e]
    assert seen == [1.0, 1 - 0.5 / 16, 1 - 0.5 / 4, 1 - 0.5 * 9 / 16]


def test_a_callback_of_the_users_own_is_refused_where_lambda_has_no_meaning(tiny_model, settings):
    args = DPOShiftConfig(**{**settings, "shift_lambda": 1.0, "loss_type": ["apo_zero"]})
    with pytest.raises(ValueError, match="`loss_type` must be based on the difference"):
        DPOShiftTrainer(
            tiny_model, args=args, train_dataset=ROWS, callbacks=[LambdaScheduleCallback(lambda progress: 0.9)]
        )


def test_without_arguments_the_trainer_makes_its_own_config(tiny_model, monkeypatch, tmp_path):
    class OnCPU(DPOShiftConfig):
        def __init__(self, output_dir):
            super().__init__(output_dir, use_cpu=True, bf16=False)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dposhift_trl.training.trainer.DPOShiftConfig", OnCPU)
    trainer = DPOShiftTrainer(tiny_model, train_dataset=ROWS)
    assert trainer.args.output_dir == "gpt2-DPO-Shift"
    assert trainer.shift_lambda == 0.95


def test_evaluation_metrics_do_not_depend_on_the_batch_size(tiny_model, settings):
    seen = []
    for size in (9, 4, 8):
        reference = AutoModelForCausalLM.from_pretrained(tiny_model)
        torch.manual_seed(0)
        with torch.no_grad():
            reference.transformer.wte.weight.add_(0.05 * torch.randn_like(reference.transformer.wte.weight))
        args = DPOShiftConfig(**{**settings, "per_device_eval_batch_size": size, "shift_lambda": 0.8})
        trainer = DPOShiftTrainer(tiny_model, reference, args, train_dataset=ROWS, eval_dataset=EVAL_ROWS)
        metrics = trainer.evaluate()
        seen.append({k: v for k, v in metrics.items() if any(k.startswith(f"eval_{o}") for o in OURS)})
    assert seen[0]["eval_rewards/accuracies"] * 9 == pytest.approx(round(seen[0]["eval_rewards/accuracies"] * 9))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5, abs=1e-6)
    assert seen[2] == pytest.approx(seen[0], rel=1e-5, abs=1e-6)


def test_each_of_several_evaluation_sets_has_its_own_loss_though_workers_persist(tiny_model, settings):
    sets = {"first": EVAL_ROWS, "second": make_rows(7, seed=2)}

    def losses(trainer_class, config_class, **changes):
        args = config_class(**{**settings, "eval_strategy": "steps", "eval_steps": 2, **changes})
        trainer = trainer_class(tiny_model, args=args, train_dataset=ROWS, eval_dataset=sets)
        trainer.train()
        return [{k: v for k, v in e.items() if k.endswith("_loss") and k.count("_") == 2} for e in logs(trainer)]

    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    exact = {"shift_lambda": 1.0, "shared_prompt": False}
    persistent = losses(DPOShiftTrainer, DPOShiftConfig, **exact, **workers)
    assert persistent == losses(DPOShiftTrainer, DPOShiftConfig, **exact)
    assert persistent == losses(DPOTrainer, DPOConfig, **workers)
    found = {name: value for entry in persistent for name, value in entry.items()}
    assert found.keys() == {"eval_first_loss", "eval_second_loss"}
    assert found["eval_first_loss"] != pytest.approx(found["eval_second_loss"], rel=1e-4)


def test_train_metrics_weigh_each_pair_once_over_an_uneven_accumulation_window(tiny_model, settings):
    """10 pairs at 4 a batch, 2 batches a step: the second step holds one batch of 2."""
    rows = ROWS.select(range(10))
    seen = []

    class Spy(DPOShiftTrainer):
        def log(self, logs, *args):
            seen.extend(value for _, matrix in self._recorder._batches["train"] for value in matrix[:, 0].tolist())
            super().log(logs, *args)

    trainer = train(
        Spy, DPOShiftConfig, tiny_model, settings, rows=rows, logging_steps=2, gradient_accumulation_steps=2,
        max_steps=2,
    )  # fmt: skip
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == 10
    assert entry["logps/chosen"] == pytest.approx(sum(seen) / 10, rel=1e-6)


def test_the_dpo_loss_stands_beside_the_loss_at_lambda(tiny_model, settings):
    trainer = train(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, shift_lambda=0.5, eval_strategy="epoch")
    metrics = trainer.evaluate()
    assert metrics["eval_dpo_loss"] != pytest.approx(metrics["eval_loss"], rel=1e-4)
    trainer.lambda_callback.shift_lambda = 1.0
    metrics = trainer.evaluate()
    assert metrics["eval_dpo_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_the_model_card_names_the_method_the_schedule_and_the_metrics(tiny_model, settings):
    trainer = train(
        DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, lambda_schedule="linear_decrease",
        eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    for words in (
        "DPO-Shift",
        "| lambda schedule | linear_decrease |",
        "2502.07599",
        "`eval_rewards/margins`",
        "dpo-shift",
    ):
        assert words in card


def test_the_best_checkpoint_is_chosen_by_the_lambda_free_loss(settings):
    args = DPOShiftConfig(
        **{**settings, "load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    )
    assert (args.metric_for_best_model, args.greater_is_better) == ("dpo_loss", False)


def test_chosen_sft_trains_on_the_chosen_answers_alone(tiny_model, settings):
    completions = ROWS.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
    stock = SFTTrainer(tiny_model, SFTConfig(**settings), train_dataset=completions)
    stock.train()
    trainer = ChosenSFTTrainer(
        tiny_model, SFTConfig(**settings), train_dataset=ROWS, eval_dataset={"a": EVAL_ROWS, "b": EVAL_ROWS}
    )
    trainer.train()
    assert same(weights(stock), weights(trainer))
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any()  # the prompt is not learnt
    assert {"eval_a_loss", "eval_b_loss"} <= set(trainer.evaluate())
    assert "eval_loss" in trainer.evaluate(EVAL_ROWS)


def test_two_processes_evaluate_a_stream_as_one_does(tiny_model, tmp_path):
    script = Path(__file__).with_name("ddp_streams.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [tiny_model, str(tmp_path / "two")]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-8000:]
    two = json.loads(done.stdout.splitlines()[-1])
    one = evaluate(tiny_model, str(tmp_path / "one"), per_device_train_batch_size=8, per_device_eval_batch_size=8)
    assert one["eval_displacement/chosen"] != 0.0
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    pairs = [pq.read_table(tmp_path / run / "pairs" / "eval-000002.parquet").to_pydict() for run in ("one", "two")]
    assert pairs[0]["row_index"] == pairs[1]["row_index"] == list(range(16))
    assert pairs[1]["chosen_logps"] == pytest.approx(pairs[0]["chosen_logps"], rel=1e-5)


def test_chosen_sft_with_a_formatting_function_is_sft_trainer(tiny_model, settings):
    def implicit(rows):
        answers = ("chosen", "rejected")
        return Dataset.from_list([{answer: row["prompt"] + row[answer] for answer in answers} for row in rows])

    def both(row):
        return f"{row['rejected']} {row['chosen']}"

    found = []
    for trainer_class in (SFTTrainer, ChosenSFTTrainer):
        trainer = trainer_class(
            tiny_model,
            SFTConfig(**settings),
            train_dataset=implicit(ROWS),
            eval_dataset=implicit(EVAL_ROWS),
            formatting_func=both,
        )
        trainer.train()
        losses = [entry["loss"] for entry in logs(trainer) if "loss" in entry]
        found.append((losses, trainer.evaluate()["eval_loss"], weights(trainer)))
    assert len(found[0][0]) == 4
    assert found[0][:2] == found[1][:2]
    assert same(found[0][2], found[1][2])


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
def test_chosen_sft_finds_a_prompt_that_is_implicit_in_both_answers(stream, tiny_model, settings):
    implicit = Dataset.from_list(
        [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in ROWS]
    )
    rows = implicit.to_iterable_dataset() if stream else implicit
    trainer = ChosenSFTTrainer(tiny_model, SFTConfig(**settings), train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any()
    assert (batch["labels"] != -100).any()


def test_chosen_sft_leaves_rows_of_other_kinds_alone(tiny_model, settings):
    texts = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in ROWS])
    trainer = ChosenSFTTrainer(tiny_model, SFTConfig(**settings), train_dataset=texts)
    assert "input_ids" in trainer.train_dataset.column_names
