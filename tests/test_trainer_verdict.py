"""What a trainer says of its evaluations: once, on the main process, and in the order in which notebooks show them."""

import importlib
import sys
import types

import pytest
from conftest import make_rows

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.artifacts import read_mapping
from dposhift_trl.pipeline.trainers import RunDPOShiftTrainer
from dposhift_trl.report import ReportError
from dposhift_trl.report.verdict import verdict_of
from dposhift_trl.training.verdicts import in_order


@pytest.fixture(scope="module")
def rows():
    return make_rows(16)


@pytest.fixture
def make(tiny_model, settings, rows):
    def make(cls=DPOShiftTrainer, config=DPOShiftConfig, eval_dataset=rows, **changes):
        args = config(**{**settings, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, **changes})
        return cls(tiny_model, args=args, train_dataset=rows, eval_dataset=eval_dataset)

    return make


def test_the_verdict_is_that_of_the_log(make, capsys):
    trainer = make(lambda_schedule="linear_decrease")
    assert trainer.verdict() is None
    trainer.train()
    found = trainer.verdict()
    assert found == verdict_of(trainer.state.log_history, trainer.args.lambda_plan)
    printed = capsys.readouterr().out
    assert printed.count(found.headline) == 1
    assert " ".join(printed.split()).endswith(" ".join(str(found).split()))


def test_the_verdict_is_printed_once_for_each_evaluation_of_one_s_own(make, capsys):
    trainer = make()
    trainer.train()
    headline = trainer.verdict().headline
    capsys.readouterr()
    trainer.evaluate()
    assert capsys.readouterr().out.count(headline) == 1
    trainer.evaluate(metric_key_prefix="test")
    assert headline not in capsys.readouterr().out


@pytest.mark.parametrize("where", ["setting", "command", "other process"])
def test_nothing_is_printed_where_it_is_not_wanted(make, capsys, monkeypatch, where):
    trainer = make(RunDPOShiftTrainer if where == "command" else DPOShiftTrainer, print_verdict=where != "setting")
    if where == "other process":
        monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.evaluate()
    assert trainer.verdict() is not None
    assert "policy" not in capsys.readouterr().out


def test_the_report_is_written_from_the_log_in_memory(make, tmp_path):
    trainer = make()
    with pytest.raises(ReportError, match="contains no run"):
        trainer.report()
    trainer.evaluate()
    page = trainer.report()
    assert page == tmp_path / "out" / "report" / "report.html"
    assert trainer.verdict().headline in page.read_text(encoding="utf-8")
    assert trainer.report(tmp_path / "other") == tmp_path / "other" / "report.html"
    assert read_mapping(tmp_path / "out" / "trainer_state.json")["log_history"] == trainer.state.log_history


def test_the_report_replaces_no_log_of_another_training(make, tmp_path):
    earlier = make()
    earlier.train()
    earlier.report()
    before = (tmp_path / "out" / "trainer_state.json").read_bytes()
    trainer = make()
    trainer.evaluate()
    with pytest.raises(ValueError, match="must not hold the log of another training"):
        trainer.report()
    assert (tmp_path / "out" / "trainer_state.json").read_bytes() == before


def test_a_log_with_a_value_that_is_not_a_number_is_its_own(make):
    trainer = make()
    trainer.evaluate()
    trainer.state.log_history.append({"step": 0, "grad_norm": float("nan")})
    assert trainer.report() == trainer.report()


def test_the_best_model_s_evaluation_after_training_is_the_last_one(make, rows, capsys):
    trainer = make(
        load_best_model_at_end=True, save_strategy="steps", save_steps=1, learning_rate=1e-2,
        metric_for_best_model="displacement/chosen_fell", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("-1")
    during = verdict_of(trainer.state.log_history[:2], trainer.args.lambda_plan)
    assert trainer.verdict() == during
    capsys.readouterr()
    trainer.evaluate(make_rows(30, seed=5))
    after = verdict_of(trainer.state.log_history[-1:], trainer.args.lambda_plan)
    assert trainer.verdict() == after != during
    assert after.headline in capsys.readouterr().out


def test_notebooks_show_the_columns_that_matter_first(make, monkeypatch):
    display = types.ModuleType("IPython.display")
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    notebook, tables = importlib.import_module("transformers.utils.notebook"), []
    monkeypatch.setattr(notebook.NotebookTrainingTracker, "display", lambda bar: tables.append(bar.inner_table))
    monkeypatch.setattr(notebook.NotebookProgressBar, "display", lambda bar: None)
    trainer = make(disable_tqdm=False)
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if "Progress" not in type(callback).__name__
    ]
    trainer.add_callback(notebook.NotebookProgressCallback)
    trainer.train()
    columns = tables[-1][0]
    assert columns[:8] == [
        *("Step", "Training Loss", "Validation Loss", "Displacement/chosen", "Displacement/chosen Fell"),
        *("Displacement/rejected", "Rewards/margins", "Rewards/accuracies"),
    ]
    assert not [column for column in columns if "Runtime" in column or "Per Second" in column]


def test_the_order_loses_no_metric():
    logs = {"eval_b_loss": 1, "eval_b_dpo_loss": 2, "eval_b_runtime": 3, "eval_b_rewards/margins": 4, "x": 5}
    ordered = in_order(logs)
    assert ordered == logs
    assert list(ordered) == ["eval_b_rewards/margins", "eval_b_dpo_loss", "eval_b_runtime", "x", "eval_b_loss"]
