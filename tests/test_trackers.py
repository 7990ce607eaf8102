"""Trackers other than W&B get lambda and the metrics of this package; those that are not installed are one line."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_rows
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dposhift_trl.pipeline import preflight
from dposhift_trl.recipe import load_recipe
from dposhift_trl.run import main as main


ROOT = Path(__file__).parent.parent
OURS = {"train/shift/lambda", "train/displacement/chosen", "eval/shift/lambda", "eval/displacement/chosen_fell"}
HEAD = "output_dir: run\nmodel: {model_name_or_path: demo}\ndata: {path: demo}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(tiny_model, folder):
    """Write a recipe of stage 2, two steps long, that reports to a tracker."""

    def recipe(tracker):
        make_rows(12).to_json("rows.jsonl")
        (folder / "x.yaml").write_text(
            f"output_dir: run\nreport: false\nmodel: {{model_name_or_path: {tiny_model}}}\n"
            "data: {path: rows.jsonl, eval_size: 4}\n"
            f"dpo: {{bf16: false, use_cpu: true, max_steps: 2, logging_steps: 1, report_to: {tracker}, "
            "shift_lambda: 0.75}\n"
        )
        return "x.yaml"

    return recipe


def run(recipe, **environment):
    """Run a recipe in a process, for trackers with state of their own."""
    command = [sys.executable, "-m", "dposhift_trl.run", recipe]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tensorboard(recipe, here, folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    here(recipe("tensorboard"))
    (events,) = (folder / "run" / "dpo" / "runs").glob("*/events*")
    log = accumulator.EventAccumulator(str(events)).Reload()
    assert set(log.Tags()["scalars"]) >= OURS
    assert [event.value for event in log.Scalars("train/shift/lambda")] == [0.75, 0.75]


def test_mlflow(recipe, folder):
    pytest.importorskip("mlflow")
    run(recipe("mlflow"), MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}")
    with sqlite3.connect(folder / "mlflow.db") as connection:
        metrics = dict(connection.execute("SELECT key, value FROM latest_metrics"))
        settings = dict(connection.execute("SELECT key, value FROM params"))
    # Its own form of the names
    assert {f"train/{name}".replace("train/eval_", "eval/") for name in metrics} >= OURS
    assert metrics["shift/lambda"] == 0.75
    assert settings["shift_lambda"] == "0.75"


def test_trackio(recipe, folder):
    pytest.importorskip("trackio")
    run(recipe("trackio"), TRACKIO_DIR=str(folder / "trackio"))
    (database,) = (folder / "trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    assert {name for metrics in logged for name in metrics} >= OURS
    assert [metrics["train/shift/lambda"] for metrics in logged if "train/shift/lambda" in metrics] == [0.75, 0.75]


@pytest.mark.parametrize("tracker", INTEGRATION_TO_CALLBACK)
def test_a_tracker_that_is_not_installed_is_one_line(tracker, monkeypatch, folder):
    monkeypatch.setattr(preflight, "get_available_reporting_integrations", lambda: [])
    monkeypatch.setattr(preflight, "is_flytekit_available", lambda: False)
    (folder / "x.yaml").write_text(f"{HEAD}dpo: {{bf16: false, use_cpu: true, report_to: {tracker}}}\n")
    with pytest.raises(preflight.RunError) as raised:
        preflight.check_settings(load_recipe("x.yaml", ["wandb.mode=online"]))
    (line,) = str(raised.value).splitlines()
    if tracker == "kubeflow":
        assert line == "`dpo.report_to` must not contain 'kubeflow' outside of a job of Kubeflow Trainer. Remove it."
    else:
        command = f"pip install {preflight.TRACKER_PACKAGES.get(tracker, tracker)}"
        assert line == (
            f"`dpo.report_to` requires the package of {tracker!r}, which is not installed. Run `{command}`, or remove "
            "it."
        )
