"""Batches by tokens: budget, order, several processes, and training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from ddp_token_budget import train
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.scoring import PairLayout
from dposhift_trl.training.batching import TokenBudgetSampler, pair_lengths, with_lengths


ROWS = make_rows(24)
TOKENS = Dataset.from_dict(
    {
        "prompt_ids": [[1, 2, 3], [4], [], [5, 6]],
        "chosen_ids": [[7, 8, 9], [7], [8, 9], [7, 7, 7, 7]],
        "rejected_ids": [[7, 8, 1, 2], [9, 9], [8, 9], [1]],
    }
)


@pytest.mark.parametrize(
    ("max_length", "mode", "shared", "expected"),
    [
        # tokens shared, then left in each answer: 5, 1 and 2; 1, 1 and 2; all; 2, 4 and 1
        (None, "keep_start", True, [8, 4, 2, 7]),
        (None, "keep_start", False, [14, 6, 4, 12]),
        (4, "keep_start", True, [4, 4, 2, 5]),
        # the truncated rows of the first pair share no start: 3 7 8 9 and 7 8 1 2
        (4, "keep_end", True, [8, 4, 2, 7]),
        (4, "keep_end", False, [8, 6, 4, 8]),
    ],
)
def test_a_length_counts_the_tokens_that_are_read(max_length, mode, shared, expected):
    assert pair_lengths(TOKENS, max_length, mode, shared) == expected


@pytest.mark.parametrize("shared", [True, False])
def test_a_pair_without_tokens_counts_as_one(shared):
    empty = Dataset.from_dict({name: [[7][:0]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
    assert pair_lengths(empty, None, "keep_start", shared) == [1]


def test_a_layout_is_at_most_as_long_as_its_pairs(tiny_model, settings):
    trainer = make_trainer(tiny_model, settings)
    lengths = pair_lengths(trainer.train_dataset, None, "keep_start", shared=True)
    collator = trainer.data_collator.collator
    for row, length in zip(trainer.train_dataset, lengths, strict=True):
        assert length - 2 <= len(PairLayout.from_batch(collator([row]))) <= length


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=40, max_size=80),
    budget=st.integers(60, 400),
    steps=st.integers(1, 3),
    processes=st.integers(1, 3),
    epochs=st.integers(1, 3),
)
def test_every_pair_is_in_one_batch_within_the_budget_and_processes_get_equally_many(
    lengths, budget, steps, processes, epochs
):
    options = {"gradient_accumulation_steps": steps, "num_processes": processes}
    samplers = [TokenBudgetSampler(lengths, budget, process_index=i, **options) for i in range(processes)]
    for epoch in range(epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(samplers[0])}
        assert len(samplers[0]) % steps == 0
        for together in zip(*shares, strict=True):
            assert len({len(batch) for batch in together}) == 1
        batches = [batch for share in shares for batch in share]
        assert all(batch and sum(lengths[i] for i in batch) <= budget for batch in batches)
        seen = sorted(i for batch in batches for i in batch)
        assert set(seen) == set(range(len(lengths)))
        assert len(seen) == len(lengths) + -len(lengths) % processes


def test_batches_are_filled_evenly():
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(2000, generator=generator) * 0.8 + 4.5).exp().int().clamp(1, 800).tolist()
    sampler = TokenBudgetSampler(lengths, 2000)
    loads = [sum(lengths[i] for i in batch) for batch in sampler]
    assert max(loads) <= 2000
    assert min(loads) > 0.97 * max(loads)
    assert sum(loads) / len(loads) > 0.97 * 2000


def test_the_order_depends_on_seed_and_epoch():
    lengths = list(range(10, 60))
    first, second = TokenBudgetSampler(lengths, 200, seed=1), TokenBudgetSampler(lengths, 200, seed=1)
    assert list(first) == list(first) == list(second)
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) != list(TokenBudgetSampler(lengths, 200, seed=2))


def test_every_pair_may_be_a_batch_of_its_own():
    assert sorted(TokenBudgetSampler([5, 5, 5, 5], 5)) == [[0], [1], [2], [3]]


def test_too_few_pairs_for_an_optimizer_step_are_an_error():
    with pytest.raises(
        ValueError,
        match="must allow at least one pair per batch on 2 processes with `gradient_accumulation_steps=3`, got 100",
    ):
        TokenBudgetSampler([5, 5, 5, 5], 100, gradient_accumulation_steps=3, num_processes=2)


def test_a_budget_below_the_longest_pair_is_an_error():
    with pytest.raises(
        ValueError, match=re.escape("must be at least the length of the longest pair (90 tokens), got 80. Increase it")
    ):
        TokenBudgetSampler([10, 90, 20], 80)


def make_trainer(model, settings, rows=ROWS, **changes):
    return DPOShiftTrainer(model, args=DPOShiftConfig(**{**settings, **changes}), train_dataset=rows)


def test_settings_of_the_dataloader_hold_for_batches_by_tokens_too(tiny_model, settings):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    changes = {"max_tokens_per_batch": 100, "data_seed": 8, "dataloader_pin_memory": False, **workers}
    trainer = make_trainer(tiny_model, settings, **changes)
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (1, True, 3)
    assert not loader.pin_memory
    lengths = pair_lengths(trainer.train_dataset, trainer.args.max_length, "keep_start", shared=True)
    found = [batch["dposhift_row_index"].tolist() for batch in loader]
    assert found == list(TokenBudgetSampler(lengths, 100, seed=8))


def test_lengths_are_added_where_pairs_are_grouped_by_them_and_there_are_none(settings):
    def lengths(strategy, rows=TOKENS, max_length=None):
        args = DPOShiftConfig(**settings, train_sampling_strategy=strategy, max_length=max_length)
        rows = with_lengths(rows, args, shares_prompts=True)
        return rows["length"][:] if "length" in rows.column_names else None

    assert lengths("random") is None
    assert lengths("group_by_length") == [8, 4, 2, 7]
    assert lengths("group_by_length", max_length=4) == [4, 4, 2, 5]
    assert lengths("group_by_length", TOKENS.add_column("length", [9, 9, 9, 9])) == [9, 9, 9, 9]
    assert lengths("group_by_length", TOKENS.to_iterable_dataset()) is None


def test_a_step_with_a_budget_is_the_mean_over_its_pairs(tiny_model, settings):
    """One step over batches of different sizes equals one step over a single batch of all rows."""
    common = {"max_steps": 1, "shift_lambda": 0.6, "optim": "sgd", "logging_steps": 1, "max_grad_norm": 0.0}
    whole = make_trainer(tiny_model, settings, per_device_train_batch_size=24, **common)
    split = make_trainer(tiny_model, settings, max_tokens_per_batch=100, gradient_accumulation_steps=5, **common)
    sizes = [len(batch["dposhift_row_index"]) for batch in split.get_train_dataloader()]
    assert len(sizes) == 5
    assert sum(sizes) == 24
    assert len(set(sizes)) > 1
    whole.train(), split.train()
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert split.state.log_history[0][name] == pytest.approx(whole.state.log_history[0][name], rel=1e-5), name
    for left, right in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-6)


def test_a_step_of_two_processes_on_a_budget_is_the_mean_over_its_pairs_too(tiny_model, tmp_path):
    script = Path(__file__).with_name("ddp_token_budget.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [tiny_model, str(tmp_path / "two")]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-8000:]
    sizes, two, errors = json.loads(done.stdout.splitlines()[-1])
    assert (len(sizes), sum(sizes)) == (3, 11)
    assert len(set(sizes)) > 1
    _, _, one = train(tiny_model, str(tmp_path / "one"), per_device_train_batch_size=22)
    assert len(two) == len(one) == 3
    for left, right in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name
    assert len(errors) == 2
    assert "contains other files" in errors[0]
    assert errors[0] == errors[1]  # rather than waiting for the main process
    assert [path.name for path in (tmp_path / "two" / "pairs" / "tokens").iterdir()] == ["eval-000003.parquet"]
    left, right = (load_file(tmp_path / run / "model.safetensors") for run in ("two", "one"))
    assert all(torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6) for name in right)


def test_the_loss_of_an_evaluation_is_not_scaled_by_the_batches_of_training(tiny_model, settings):
    trainer = make_trainer(tiny_model, settings, max_tokens_per_batch=100, shift_lambda=1.0)
    trainer.train()
    assert trainer._pairs_per_batch not in (None, 4)
    metrics = trainer.evaluate(make_rows(8, seed=1))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_dpo_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "batches", [{"max_tokens_per_batch": 100}, {"train_sampling_strategy": "group_by_length"}], ids=str
)
def test_a_run_batched_by_length_resumes_bit_for_bit(batches, tiny_model, settings, tmp_path):
    common = {**batches, "num_train_epochs": 3, "max_steps": -1, "save_strategy": "steps", "save_steps": 7}
    whole = make_trainer(tiny_model, {**settings, "output_dir": str(tmp_path / "whole")}, **common)
    whole.train()
    steps = len(whole.get_train_dataloader())
    assert steps > 3
    assert whole.state.global_step == 3 * steps
    resumed = make_trainer(tiny_model, {**settings, "output_dir": str(tmp_path / "resumed")}, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("changes", "stream", "reason"),
    [
        ({"shared_prompt": False}, False, "padded rows (`shared_prompt` is off)"),
        ({"train_sampling_strategy": "sequential"}, False, "`train_sampling_strategy='sequential'`, which it"),
        ({"max_steps": 2}, True, "iterable datasets, whose lengths are unknown"),
    ],
)
def test_a_budget_with_an_unsupported_setting_is_an_error(changes, stream, reason, tiny_model, settings):
    rows = ROWS.to_iterable_dataset() if stream else ROWS
    with pytest.raises(ValueError, match=re.escape(f"`max_tokens_per_batch` is not supported with {reason}")):
        make_trainer(tiny_model, settings, rows, max_tokens_per_batch=100, **changes)


@pytest.mark.parametrize("value", [0, -5, True, 1.5, "100"])
def test_a_budget_that_is_not_a_positive_integer_is_an_error(value, settings):
    with pytest.raises(ValueError, match="`max_tokens_per_batch` must be a positive integer, got"):
        DPOShiftConfig(**settings, max_tokens_per_batch=value)


def test_a_budget_of_one_token_is_a_number_of_tokens(settings):
    assert DPOShiftConfig(**settings, max_tokens_per_batch=1).max_tokens_per_batch == 1


@pytest.mark.parametrize("shared", [True, False])
def test_group_by_length_batches_pairs_of_similar_length(shared, tiny_model, settings):
    """DPOTrainer raises an error: its rows have no `input_ids` from which lengths could be inferred."""
    args = DPOConfig(**settings, train_sampling_strategy="group_by_length")
    stock = DPOTrainer(tiny_model, args=args, train_dataset=ROWS)
    with pytest.raises(ValueError, match="Can only automatically infer lengths"):
        stock.train()

    def spread(**changes):
        rows = make_rows(400)
        trainer = make_trainer(tiny_model, settings, rows, shared_prompt=shared, max_steps=2, **changes)
        lengths = pair_lengths(trainer.train_dataset, None, "keep_start", shared)
        batches = [batch["dposhift_row_index"].tolist() for batch in trainer.get_train_dataloader()]
        assert sorted(i for batch in batches for i in batch) == list(range(400))
        trainer.train()
        return sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)

    assert spread(train_sampling_strategy="group_by_length") < 0.3 * spread()


def test_group_by_length_does_not_change_evaluation_metrics(tiny_model, settings):
    metrics = []
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(tiny_model, settings, train_sampling_strategy=strategy, max_steps=2)
        metrics.append(trainer.evaluate(make_rows(10, seed=1)))
    for name in ("eval_logps/chosen", "eval_rewards/margins", "eval_loss"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5, abs=1e-6)


def test_batch_rebalance_is_an_error_that_names_the_alternative(settings):
    with pytest.raises(ValueError, match="To balance the tokens of batches, set `max_tokens_per_batch`"):
        DPOShiftConfig(**settings, train_sampling_strategy="batch_rebalance")


def test_a_budget_that_is_too_small_is_an_error_before_training(tiny_model, settings):
    with pytest.raises(ValueError, match="`max_tokens_per_batch` must be at least the length of the longest pair"):
        make_trainer(tiny_model, settings, max_tokens_per_batch=5)


def test_a_budget_without_any_row_that_is_short_enough_is_an_error(tiny_model, settings):
    with pytest.raises(ValueError, match="No train examples left: every prompt is at least as long as `max_length`"):
        make_trainer(tiny_model, settings, max_tokens_per_batch=100, max_length=1, precompute_ref_log_probs=False)
