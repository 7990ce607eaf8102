"""The benchmarks measure the shapes that they print, and losses that agree."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


STEP = Path(__file__).parent.parent / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def step():
    spec = importlib.util.spec_from_file_location("step", STEP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["stock", "DPOShiftTrainer"])
@pytest.mark.parametrize(("name", "prompt", "answer"), [("long", 256, 64), ("short", 64, 128)])
def test_the_rows_of_a_batch_have_the_tokens_of_their_shape(kind, name, prompt, answer, step):
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    args = parser.parse_args(["--steps", "1", "--batch-size", "2", "--threads", "1"])
    with step.quiet(args):
        steps = step.Steps([kind], args, step.MODELS["tiny"], step.SHAPES[name])
    for batch in map(steps.trainer.data_collator, steps.batches):
        assert batch["attention_mask"].sum(1).tolist() == [prompt + answer] * 4
        assert batch["completion_mask"].sum(1).tolist() == [answer] * 4


def test_every_kind_of_step_is_timed_beside_stock():
    command = [sys.executable, STEP, "--model", "tiny", "--shape", "ragged", "--steps", "1", "--threads", "1"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-2000:]
    rows = [line.split("|")[1:-1] for line in output.stdout.splitlines() if line.startswith("| tiny")]
    assert [row[2].strip() for row in rows][:2] == ["stock", "memory"]
    assert len(rows) == 7
    assert all(float(value) > 0 for row in rows for value in row[3:6])


def test_the_bytes_of_a_layer_are_counted_beside_stock():
    kinds = ["TRL", "cached", "cached, own RMSNorm"]
    command = [sys.executable, STEP.parent / "traffic.py", "--model", "tiny", "--threads", "1", "--kind", *kinds]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-2000:]
    rows = [line.split("|")[1:-1] for line in output.stdout.splitlines() if line.startswith("| ")][2:]
    ratios = {row[0].strip(): float(row[4]) for row in rows}
    assert ratios["TRL"] == 1.0
    assert ratios["cached"] > ratios["cached, own RMSNorm"] > 1.5


def test_the_run_for_a_gpu_goes_through_all_its_parts_on_a_cpu(tmp_path):
    command = ["bash", STEP.parent / "gpu.sh", "--smoke", "--out", tmp_path]
    output = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHON": sys.executable}
    )
    assert output.returncode == 0, output.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.json", "table.md"]
    assert (tmp_path / "table.md").read_text().strip() in output.stdout
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record for record in records if "error" in record] == []
    ended = {record["part"]: record["rc"] for record in records if "rc" in record and "took" in record}
    assert ended == dict.fromkeys(("device", "check", "training", "tests", "steps", "grid"), 0)
    checks = [record for record in records if "family" in record and record["part"] == "check"]
    assert {record["way"] for record in checks if "varlen_attn" in record["attended"]} == {"varlen"}
    assert all(record["fault"] is None for record in checks)
    runs = {record["dtype"]: record for record in records if record["part"] == "training" and "loss" in record}
    assert runs["bf16"]["attended"] == ["varlen_attn"]
    assert any("fused RMSNorm" in record["operations"] for record in checks)
    assert runs["float32"]["loss_difference"] < 1e-5
    kinds = {record["kind"] for record in records if record["part"] == "steps" and "seconds" in record}
    assert kinds == {"TRL", "TRL, best", "TRL, again", "cached", "own RMSNorm", "by tokens", "best", "scored"}
    grid = {record["shift_lambda"]: record["metrics"] for record in records if "shift_lambda" in record}
    assert list(grid) == [1.0, 0.95, 0.75, 0.5]
    assert all("displacement/chosen" in metrics for metrics in grid.values())
    losses = [record["loss"] for record in records if record["part"] == "steps" and "loss" in record]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)


def test_a_part_that_fails_is_named_and_stops_no_other(tmp_path):
    command = ["bash", STEP.parent / "gpu.sh", "--smoke", "--out", tmp_path, "--parts", "grid"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    command += ["--model", tmp_path / "model"]
    output = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHON": sys.executable}
    )
    assert output.returncode == 0, output.stderr[-2000:]
    errors = [record["error"] for record in json.loads((tmp_path / "results.json").read_text()) if "error" in record]
    assert errors
    assert "Traceback" in (tmp_path / "log.txt").read_text()
    assert errors[0].split(":")[0] in output.stdout
