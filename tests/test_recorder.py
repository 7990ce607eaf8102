"""The recorder of pair scores: means over pairs, by mode, and the first value that is not finite."""

import pyarrow.parquet as pq
import pytest
import torch

from dposhift_trl.training.metrics import PairScores
from dposhift_trl.training.recorder import PairRecorder, table_path


def scores(chosen, rejected=-52.0, row=0):
    """Scores of pairs whose references are all -50, as a matrix."""
    count = len(chosen)
    constants = [-50.0, -50.0, 5.0, 7.0, 0.5, 0.7]
    columns = [chosen, [rejected] * count, *([value] * count for value in constants), range(row, row + count)]
    return PairScores(*(torch.tensor(list(column), dtype=torch.float64) for column in columns)).as_matrix()


@pytest.mark.parametrize("size", [9, 4, 8, 1])
def test_metrics_are_means_over_pairs_and_not_over_batches(size):
    """The ninth pair weighs as much as any, also where it is a batch of its own."""
    matrix = scores([-48.0] * 4 + [-54.0] * 4 + [-40.0])
    recorder = PairRecorder(beta=0.1)
    for part in matrix.split(size):
        recorder.add("eval", 3, part)
    metrics = recorder.take_metrics("eval")
    assert metrics["rewards/accuracies"] == pytest.approx(5 / 9, rel=1e-12)
    assert metrics["rewards/chosen"] == pytest.approx(0.1 * (4 * 2 - 4 * 4 + 10) / 9, rel=1e-12)
    assert metrics["displacement/chosen_fell"] == pytest.approx(4 / 9, rel=1e-12)
    assert metrics["shift/margins"] == pytest.approx(0.1 * ((4 * 2 - 4 * 4 + 10) / 9 + 0.5 * 2), rel=1e-12)


def test_pairs_are_counted_once_and_each_mode_by_itself():
    recorder = PairRecorder(beta=0.1)
    assert recorder.take_metrics("train") == {}
    recorder.add("train", 1, scores([-48.0]))
    recorder.add("eval", 1, scores([-53.0]))
    recorder.add("train", 2, scores([-46.0]))
    assert recorder.take_metrics("train")["displacement/chosen"] == 3.0
    assert recorder.take_metrics("train") == {}
    recorder.clear("eval")
    assert recorder.take_metrics("eval") == {}
    recorder.add("eval", 2, scores([-47.0]))
    assert recorder.take_metrics("eval")["displacement/chosen"] == 3.0


def test_quantiles_and_intervals_belong_to_an_evaluation():
    recorder = PairRecorder(beta=0.1)
    for mode in ("train", "eval"):
        recorder.add(mode, 1, scores([-48.0, -46.0]))
    train, evaluation = recorder.take_metrics("train"), recorder.take_metrics("eval")
    assert train.keys() < evaluation.keys()
    added = {"displacement/chosen_p50", "rewards/accuracies_low", "rewards/margins_high"}
    assert added <= evaluation.keys() - train.keys()
    assert {name: evaluation[name] for name in train} == train


def test_a_table_is_saved_where_it_is_asked_for(tmp_path):
    recorder = PairRecorder(beta=0.1)
    recorder.add("eval", 7, scores([-48.0], row=1))
    recorder.add("eval", 7, scores([-46.0], row=0))
    path = table_path(str(tmp_path), "eval_a/b", 7)
    assert path == tmp_path / "pairs" / "eval_a_b-000007.parquet"
    recorder.take_metrics("eval", path)
    assert pq.read_table(path)["chosen_logps"].to_pylist() == [-46.0, -48.0]
    recorder.add("eval", 8, scores([-48.0]))
    recorder.take_metrics("eval")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_first_batch_that_is_not_finite_is_found_with_its_step():
    recorder = PairRecorder(beta=0.1)
    assert recorder.first_non_finite("train") is None
    recorder.add("train", 3, scores([-48.0, -46.0]))
    assert recorder.first_non_finite("train") is None
    recorder.add("train", 4, scores([-48.0, float("nan")], row=10))
    recorder.add("train", 5, scores([float("inf")], row=20))
    step, found = recorder.first_non_finite("train")
    assert (step, found.row_index.tolist()) == (4, [10.0, 11.0])
    step, found = recorder.first_non_finite("train", newest=True)
    assert (step, found.row_index.tolist()) == (5, [20.0])
    recorder.add("train", 6, scores([-48.0]))
    assert recorder.first_non_finite("train", newest=True) is None
    assert recorder.first_non_finite("eval") is None
