import dataclasses
import itertools
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import bootstrap, norm

from dposhift_trl.artifacts import write_whole
from dposhift_trl.training.metrics import PairScores, evaluation_metrics, pair_metrics


def scores(chosen, rejected, shift_lambda):
    """Scores with reference log-probabilities of -50."""
    count = len(chosen)
    columns = [chosen, rejected, [-50] * count, [-50] * count, [5] * count, [7] * count, shift_lambda, [0] * count]
    return PairScores(*(torch.tensor(column, dtype=torch.float64) for column in [*columns, range(count)]))


def test_every_metric_is_the_mean_over_pairs_worked_out_by_hand():
    metrics = pair_metrics(scores([-48.0, -54.0], [-52.0, -56.0], [0.5, 0.5]), beta=0.1)
    loss = (-math.log(1 / (1 + math.exp(-0.4))) - math.log(1 / (1 + math.exp(-0.2)))) / 2
    expected = {
        "rewards/chosen": -0.1,
        "rewards/rejected": -0.4,
        "rewards/accuracies": 1.0,
        "rewards/margins": 0.3,
        "logps/chosen": -51.0,
        "logps/rejected": -54.0,
        "shift/lambda": 0.5,
        "shift/margins": 0.1 * ((2 + 1) + (-4 + 3)) / 2,
        "shift/accuracies": 0.5,
        "displacement/chosen": -1.0,
        "displacement/rejected": -4.0,
        "displacement/chosen_per_token": (2 / 5 - 4 / 5) / 2,
        "displacement/rejected_per_token": (-2 / 7 - 6 / 7) / 2,
        "displacement/chosen_fell": 0.5,
        "displacement/both_rose": 0.0,
        "displacement/only_chosen_rose": 0.5,
        "displacement/only_rejected_rose": 0.0,
        "displacement/both_fell": 0.5,
        "perplexity/chosen": math.exp((48 + 54) / 10),
        "dpo_loss": loss,
    }
    assert metrics == pytest.approx(expected, rel=1e-12)


def test_a_matrix_keeps_every_field_exactly_and_in_its_column():
    """Lambda and large row numbers too, though policies score in float32."""
    pairs = PairScores(*(torch.tensor([-10.25 * field, 0.1 * field]) for field in range(9)))
    pairs.shift_lambda = torch.tensor([0.95, 0.9], dtype=torch.float64)
    pairs.row_index = torch.tensor([2**24 + 1, 7])
    matrix = pairs.as_matrix()
    assert matrix.shape == (2, 9)
    rows = PairScores.from_matrices([matrix[1:], matrix[:1]])
    for field in dataclasses.fields(pairs):
        assert getattr(rows, field.name).tolist() == getattr(pairs, field.name).flip(0).tolist(), field.name
    assert not PairScores(*[torch.ones(1, requires_grad=True)] * 9).as_matrix().requires_grad


def test_a_tie_counts_as_not_preferred():
    metrics = pair_metrics(scores([-50.0], [-50.0], [1.0]), beta=0.1)
    assert metrics["rewards/accuracies"] == metrics["shift/accuracies"] == metrics["displacement/chosen_fell"] == 0.0


def test_a_pair_with_two_moved_answers_is_in_one_quadrant_and_others_are_in_none():
    quadrants = ("both_rose", "only_chosen_rose", "only_rejected_rose", "both_fell")
    expected = {(0.5, 0.5): "both_rose", (0.5, -0.5): "only_chosen_rose", (-0.5, 0.5): "only_rejected_rose",
                (-0.5, -0.5): "both_fell"}  # fmt: skip
    for chosen, rejected in itertools.product((-0.5, 0.0, 0.5), repeat=2):
        metrics = pair_metrics(scores([chosen - 50], [rejected - 50], [1.0]), beta=0.1)
        found = {name for name in quadrants if metrics[f"displacement/{name}"] == 1.0}
        assert found == ({expected[chosen, rejected]} if chosen and rejected else set())
        assert metrics["displacement/chosen_fell"] == (chosen < 0)


def test_an_answer_of_one_token_or_none_is_divided_by_one():
    for count in (0, 1):
        pairs = scores([-48.0], [-54.0], [1.0])
        pairs.chosen_tokens[:] = pairs.rejected_tokens[:] = count
        metrics = pair_metrics(pairs, beta=0.1)
        assert metrics["displacement/chosen_per_token"] == 2.0
        assert metrics["displacement/rejected_per_token"] == -4.0
        assert metrics["perplexity/chosen"] == pytest.approx(math.exp(48.0), rel=1e-12)


def test_a_tie_counts_as_not_preferred_in_the_interval_too():
    metrics = evaluation_metrics(scores([-50.0] * 3, [-50.0] * 3, [1.0] * 3), beta=0.1)
    assert metrics["rewards/accuracies_low"] == 0.0
    assert metrics["rewards/accuracies_high"] == pytest.approx(1 - 0.025 ** (1 / 3), rel=1e-9)


def test_perplexity_weighs_tokens_not_pairs():
    pairs = scores([-10.0, -30.0], [-50.0, -50.0], [1.0, 1.0])
    pairs.chosen_tokens = torch.tensor([2.0, 18.0], dtype=torch.float64)
    assert pair_metrics(pairs, 0.1)["perplexity/chosen"] == pytest.approx(math.exp(2.0), rel=1e-12)


def test_quantiles_and_intervals_of_known_samples():
    generator = torch.Generator().manual_seed(0)
    count = 4000
    chosen = -50 + torch.randn(count, generator=generator, dtype=torch.float64)
    rejected = -50 - 0.5 + torch.randn(count, generator=generator, dtype=torch.float64)
    pairs = scores(chosen.tolist(), rejected.tolist(), [1.0] * count)
    metrics = evaluation_metrics(pairs, beta=0.1)
    # Standard normal quantiles, within four standard errors
    for quantile, expected in ((5, -1.645), (25, -0.674), (50, 0.0), (75, 0.674), (95, 1.645)):
        assert metrics[f"displacement/chosen_p{quantile}"] == pytest.approx(expected, abs=0.14)
        assert metrics[f"displacement/rejected_p{quantile}"] == pytest.approx(expected - 0.5, abs=0.14)
    # With 4000 pairs the bootstrap interval agrees with the normal approximation
    means = pair_metrics(pairs, beta=0.1)
    accuracy = means["rewards/accuracies"]
    fell = means["displacement/chosen_fell"]
    for name, deviation in (
        ("rewards/accuracies", math.sqrt(accuracy * (1 - accuracy))),
        ("rewards/margins", 0.1 * math.sqrt(2)),
        ("displacement/chosen", 1.0),
        ("displacement/rejected", 1.0),
        ("displacement/chosen_fell", math.sqrt(fell * (1 - fell))),
    ):
        error = 1.96 * deviation / math.sqrt(count)
        assert metrics[f"{name}_low"] == pytest.approx(means[name] - error, abs=0.1 * error)
        assert metrics[f"{name}_high"] == pytest.approx(means[name] + error, abs=0.1 * error)
    assert metrics == evaluation_metrics(pairs, beta=0.1)


def test_each_interval_is_drawn_from_a_stream_of_its_own():
    pairs = scores([-48.0, -54.0, -49.0, -50.5], [-52.0, -53.0, -50.0, -58.0], [1.0] * 4)
    metrics = evaluation_metrics(pairs, beta=0.1)
    margins = 0.1 * (pairs.chosen_logratios - pairs.rejected_logratios).numpy()
    for name, values in (
        ("rewards/margins", margins),
        ("displacement/chosen", pairs.chosen_logratios.numpy()),
        ("displacement/rejected", pairs.rejected_logratios.numpy()),
    ):
        alone = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
        assert (metrics[f"{name}_low"], metrics[f"{name}_high"]) == (alone.low, alone.high), name


def test_one_pair_gives_quantiles_but_no_interval():
    metrics = evaluation_metrics(scores([-48.0], [-52.0], [1.0]), beta=0.1)
    assert metrics["displacement/chosen_p5"] == metrics["displacement/chosen_p95"] == 2.0
    assert not any(name.endswith(("_low", "_high")) for name in metrics)


def test_a_table_has_one_row_per_pair_sorted_by_row_index(tmp_path):
    pairs = scores([-48.0, -54.0, -50.0], [-52.0, -56.0, -50.0], [0.5] * 3)
    pairs.row_index = torch.tensor([7.0, 2.0, 5.0], dtype=torch.float64)
    write_whole(tmp_path / "pairs" / "eval-000003.parquet", pairs.as_table())
    table = pq.read_table(tmp_path / "pairs" / "eval-000003.parquet")
    assert table["row_index"].to_pylist() == [2, 5, 7]
    assert table["chosen_logratios"].to_pylist() == [-4.0, 0.0, 2.0]
    assert table["rejected_logratios"].to_pylist() == [-6.0, 0.0, -2.0]
    assert table["chosen_tokens"].type == "int64"
    assert np.array_equal(table["shift_lambda"], [0.5] * 3)
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["eval-000003.parquet"]


def test_a_table_holds_every_field_but_the_loss_and_keeps_the_order_of_rows_with_one_number():
    pairs = scores([-50.0 - place for place in range(40)], [-50.0] * 40, [0.5] * 40)
    pairs.row_index = torch.tensor([0.0, -1.0] * 20, dtype=torch.float64)
    table = pairs.as_table()
    fields = {field.name for field in dataclasses.fields(pairs)}
    assert set(table.column_names) == fields - {"batch_loss"} | {"chosen_logratios", "rejected_logratios"}
    logps = pairs.chosen_logps.tolist()
    assert table["chosen_logps"].to_pylist() == logps[1::2] + logps[::2]


def test_the_ends_of_an_interval_are_as_exact_as_2000_resamples_make_them():
    # The margins of each sample are quantiles of a normal distribution, so the bootstrap distribution of their mean is
    # normal. An end from R resamples deviates by 2.67 / sqrt(R) standard errors: 0.06 for 2000, 0.19 for 200.
    deviations = []
    for count in range(40, 60):
        margins = norm.ppf((np.arange(count) + 0.5) / count)
        metrics = evaluation_metrics(scores(-50 + margins, [-50.0] * count, [1.0] * count), beta=1.0)
        error = margins.std() / math.sqrt(count)
        deviations += [metrics["rewards/margins_low"] / error + 1.96, metrics["rewards/margins_high"] / error - 1.96]
    assert math.sqrt(np.mean(np.square(deviations))) < 0.1
