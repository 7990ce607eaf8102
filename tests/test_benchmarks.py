"""The step's benchmark measures the shapes that it prints, and losses that agree."""

import argparse
import importlib.util
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
