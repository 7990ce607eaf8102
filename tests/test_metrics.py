import math

import pytest
import torch

from dposhift_trl.metrics import PairScores, pair_metrics


def scores(chosen, rejected, shift_lambda):
    """Scores whose references are all -50."""
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
        "displacement/chosen_fell": 0.5,
        "dpo_loss": loss,
    }
    assert metrics == pytest.approx(expected, rel=1e-12)


def test_metrics_do_not_depend_on_how_pairs_were_batched():
    generator = torch.Generator().manual_seed(0)
    whole = PairScores(*(-50 * torch.rand(9, generator=generator) for _ in range(9)))
    matrix = whole.as_matrix()
    means = [pair_metrics(PairScores.from_matrices(list(matrix.split(size))), 0.1) for size in (9, 4, 8, 1)]
    assert means[0] == means[1] == means[2] == means[3]


def test_a_tie_counts_as_not_preferred():
    metrics = pair_metrics(scores([-50.0], [-50.0], [1.0]), beta=0.1)
    assert metrics["rewards/accuracies"] == metrics["shift/accuracies"] == metrics["displacement/chosen_fell"] == 0.0
