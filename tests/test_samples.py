"""Answers of policy and reference to a few evaluation prompts: what is written, when, and that training is the same."""

import json

import pytest
import torch
import wandb
from safetensors.torch import load_file
from test_run import LORA, history, write_recipe

from dposhift_trl.pipeline import samples
from dposhift_trl.run import main as main


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 6)


@pytest.fixture
def recipe(tmp_path, tiny_model):
    return write_recipe(tmp_path, tiny_model)


TWO = ["sft=null", "sample_prompts=2"]


def written(folder):
    return [json.loads(line) for line in (folder / "dpo" / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("extra", [["dpo.disable_dropout=false"], LORA], ids=["dropout", "lora"])
def test_training_is_the_same_bit_for_bit(extra, recipe, tmp_path, here):
    without = here(recipe, "sft=null", *extra)
    here(recipe, *TWO, *extra, f"output_dir={tmp_path / 'sampled'}")
    assert "  samples  none (as set)\n" in without.out
    ours, theirs = (next((tmp_path / run / "dpo").glob("*model.safetensors")) for run in ("run", "sampled"))
    left, right = load_file(ours), load_file(theirs)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    clocks = ("runtime", "per_second")
    logs = [
        [{name: value for name, value in entry.items() if not name.endswith(clocks)} for entry in history(run / "dpo")]
        for run in (tmp_path / "run", tmp_path / "sampled")
    ]
    assert logs[0] == logs[1]


def test_each_evaluation_writes_the_answers_and_the_first_one_those_of_the_reference(recipe, tmp_path, here):
    done = here(recipe, *TWO, "dpo.learning_rate=0.3")
    assert "  samples  answers to 2 prompts at each evaluation, in dpo/samples.jsonl\n" in done.out
    lines = written(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert all(list(line) == list(samples.COLUMNS) for line in lines)
    for row in (0, 1):
        of_row = [line for line in lines if line["row"] == row]
        assert len({(line["prompt"], line["chosen"], line["reference"]) for line in of_row}) == 1
        assert of_row[0]["policy"] == of_row[0]["reference"]
        assert of_row[-1]["policy"] != of_row[0]["reference"]


def test_a_resumed_stage_writes_nothing_twice_and_keeps_the_reference(recipe, tmp_path, here, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    here(recipe, *TWO, f"output_dir={tmp_path / 'whole'}")
    monkeypatch.setattr(samples.SampleAnswers, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        main([str(recipe), *TWO])
    before = written(tmp_path / "run")
    assert [line["step"] for line in before] == [0, 0, 2, 2, 4, 4]
    monkeypatch.undo()
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 6)
    here(recipe, *TWO)
    assert written(tmp_path / "run") == written(tmp_path / "whole")
    assert written(tmp_path / "run")[:6] == before


def test_a_resumed_stage_without_the_answers_of_its_reference_goes_on_without_samples(recipe, tmp_path, here):
    here(recipe, *TWO)
    for name in ("finished.json", "samples.jsonl"):
        (tmp_path / "run" / "dpo" / name).unlink()
    (tmp_path / "run" / "dpo" / "checkpoint-6").rename(tmp_path / "aside")
    done = here(recipe, *TWO)
    assert done.out.count("No more sample answers: ") == 1
    assert "does not hold the answers of the reference to these prompts" in done.out
    assert not (tmp_path / "run" / "dpo" / "samples.jsonl").exists()


def test_an_error_ends_the_samples_and_not_the_training(recipe, tmp_path, here, monkeypatch):
    answers = samples.answer_questions
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("no memory\nleft")
        return answers(*arguments)

    monkeypatch.setattr(samples, "answer_questions", fail)
    done = here(recipe, *TWO)
    assert done.out.count("No more sample answers: no memory left\n") == 1
    assert len(calls) == 2
    assert [line["step"] for line in written(tmp_path / "run")] == [0, 0]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["sample_prompts=0"], "as set"),
        (["data.eval_size=null"], "no evaluation rows"),
        (["dpo.eval_strategy=no"], "no evaluation rows"),
    ],
    ids=["off", "no rows", "no evaluations"],
)
def test_why_there_are_none_is_in_the_header(overrides, reason, recipe, tmp_path, here):
    done = here(recipe, "sft=null", "sample_prompts=2", "dpo.max_steps=1", *overrides)
    assert f"  samples  none ({reason})\n" in done.out
    assert not (tmp_path / "run" / "dpo" / "samples.jsonl").exists()


def test_a_stage_that_starts_anew_sets_earlier_answers_aside(recipe, tmp_path, here):
    here(recipe, *TWO)
    folder = tmp_path / "run" / "dpo"
    before = (folder / "samples.jsonl").read_text()
    for checkpoint in folder.glob("checkpoint-*"):
        for path in checkpoint.iterdir():
            path.unlink()
        checkpoint.rmdir()
    (folder / "finished.json").unlink()
    here(recipe, *TWO, "dpo.learning_rate=0.3", "--accept-changes")
    assert (folder / "earlier" / "1" / "samples.jsonl").read_text() == before


def test_wandb_gets_a_table(recipe, tmp_path, here, monkeypatch):
    logged = []
    table = wandb.Table
    monkeypatch.setattr(
        wandb, "Table", lambda columns, rows: logged.append((columns, len(rows))) or table(columns, rows)
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = here(recipe, *TWO, "dpo.report_to=wandb")
    assert logged == [(list(samples.COLUMNS), count) for count in (2, 4, 6, 8)]
    assert (
        f"  metrics  W&B project dposhift_trl (offline), {tmp_path}/run/wandb; upload with `wandb sync`\n" in done.out
    )
    assert "wandb:" not in done.err
