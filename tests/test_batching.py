"""Batches by tokens: budgets, order, processes, and training on them."""

import re

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.scoring import PairLayout
from dposhift_trl.training.batching import TokenBudgetSampler, pair_lengths


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
        # unique tokens: 5 shared, 1 and 2 left; 1 shared, 1 and 2; all shared; 2 shared, 4 and 1
        (None, "keep_start", True, [8, 4, 2, 7]),
        (None, "keep_start", False, [14, 6, 4, 12]),
        (4, "keep_start", True, [4, 4, 2, 5]),
        # the kept ends no longer start alike: 3789 and 3712... of lengths 6 and 7
        (4, "keep_end", True, [8, 4, 2, 7]),
        (4, "keep_end", False, [8, 6, 4, 8]),
    ],
)
def test_a_pairs_length_counts_what_is_read(max_length, mode, shared, expected):
    assert pair_lengths(TOKENS, max_length, mode, shared) == expected


def test_a_layout_is_never_longer_than_the_lengths_of_its_pairs(tiny_model, settings):
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
def test_every_pair_is_read_once_within_the_budget_and_evenly_on_every_process(
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


def test_the_order_follows_seed_and_epoch():
    lengths = list(range(10, 60))
    first, second = TokenBudgetSampler(lengths, 200, seed=1), TokenBudgetSampler(lengths, 200, seed=1)
    assert list(first) == list(first) == list(second)
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) != list(TokenBudgetSampler(lengths, 200, seed=2))


def test_too_few_pairs_for_a_step_are_refused():
    with pytest.raises(
        ValueError, match="must leave a pair for each of 2 processes and 3 `gradient_accumulation_step"
    ):
        TokenBudgetSampler([5, 5, 5, 5], 100, gradient_accumulation_steps=3, num_processes=2)


def test_a_budget_below_the_longest_pair_is_refused():
    with pytest.raises(
        ValueError, match=re.escape("`max_tokens_per_batch` must hold the longest pair, 90 tokens, got 80. Raise")
    ):
        TokenBudgetSampler([10, 90, 20], 80)


def make_trainer(model, settings, rows=ROWS, **changes):
    return DPOShiftTrainer(model, args=DPOShiftConfig(**{**settings, **changes}), train_dataset=rows)


def test_a_step_on_a_budget_is_the_mean_over_its_pairs(tiny_model, settings):
    """One step over all rows, in batches of unlike size, is the step that one batch of all rows makes."""
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


@pytest.mark.parametrize(
    "batches", [{"max_tokens_per_batch": 100}, {"train_sampling_strategy": "group_by_length"}], ids=str
)
def test_a_run_whose_batches_go_by_length_resumes_bit_for_bit(batches, tiny_model, settings, tmp_path):
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
def test_a_budget_that_cannot_be_kept_is_refused(changes, stream, reason, tiny_model, settings):
    rows = ROWS.to_iterable_dataset() if stream else ROWS
    with pytest.raises(ValueError, match=re.escape(f"`max_tokens_per_batch` is not supported with {reason}")):
        make_trainer(tiny_model, settings, rows, max_tokens_per_batch=100, **changes)


@pytest.mark.parametrize("value", [0, -5, True, 1.5, "100"])
def test_a_budget_that_is_no_number_of_tokens_is_refused(value, settings):
    with pytest.raises(ValueError, match="`max_tokens_per_batch` must be a whole number above 0"):
        DPOShiftConfig(**settings, max_tokens_per_batch=value)


@pytest.mark.parametrize("shared", [True, False])
def test_pairs_of_like_length_share_a_batch(shared, tiny_model, settings):
    """Stock TRL cannot: its rows have no `input_ids`, and none looks at prompt and answers together."""
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


def test_evaluation_is_grouped_too_and_says_the_same(tiny_model, settings):
    metrics = []
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(tiny_model, settings, train_sampling_strategy=strategy, max_steps=2)
        metrics.append(trainer.evaluate(make_rows(10, seed=1)))
    for name in ("eval_logps/chosen", "eval_rewards/margins", "eval_loss"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5, abs=1e-6)


def test_batch_rebalance_is_refused_with_what_serves_instead(settings):
    with pytest.raises(ValueError, match="For batches of even cost set `max_tokens_per_batch`"):
        DPOShiftConfig(**settings, train_sampling_strategy="batch_rebalance")


def test_a_budget_that_is_too_small_is_refused_before_training(tiny_model, settings):
    with pytest.raises(ValueError, match="`max_tokens_per_batch` must hold the longest pair"):
        make_trainer(tiny_model, settings, max_tokens_per_batch=5)


def test_a_budget_for_rows_of_which_none_is_short_enough_says_so(tiny_model, settings):
    with pytest.raises(ValueError, match="No train examples left: every prompt is at least as long as `max_length`"):
        make_trainer(tiny_model, settings, max_tokens_per_batch=100, max_length=1, precompute_ref_log_probs=False)
