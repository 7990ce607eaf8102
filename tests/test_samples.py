"""Answers of policy and reference to a few evaluation prompts: when they are written, and what they leave alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_report import make_run
from test_report import undrawn as undrawn
from test_run import LORA, history, write_recipe

from dposhift_trl.artifacts import set_earlier_aside
from dposhift_trl.pipeline import samples
from dposhift_trl.report.page import write_report
from dposhift_trl.report.samples import read_samples
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
    extra = [*extra, "dpo.max_steps=4"]
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


def test_each_evaluation_writes_the_answers_and_the_first_one_those_of_the_reference(
    recipe, tmp_path, here, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = here(recipe, *TWO, "dpo.learning_rate=0.3", "dpo.report_to=wandb")
    assert "  samples  answers to 2 prompts at each evaluation, in dpo/samples.jsonl\n" in done.out
    lines = written(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert all(list(line) == list(samples.COLUMNS) for line in lines)
    rows = {line["row"] for line in lines}
    assert len(rows) == 2
    for row in rows:
        of_row = [line for line in lines if line["row"] == row]
        assert len({(line["prompt"], line["chosen"], line["reference"]) for line in of_row}) == 1
        assert of_row[0]["policy"] == of_row[0]["reference"]
        assert of_row[-1]["policy"] != of_row[0]["reference"]
    place = f"{tmp_path}/run/wandb"
    assert f"  metrics  W&B project dposhift_trl (offline), {place}; upload with `wandb sync`\n" in done.out
    assert "wandb:" not in done.err
    tables = [json.loads(path.read_text()) for path in Path(place).glob("*run-*/files/media/table/*.json")]
    assert sorted(len(table["data"]) for table in tables) == [2, 4, 6, 8]
    assert all(table["columns"] == list(samples.COLUMNS) for table in tables)


def test_a_resumed_stage_writes_nothing_twice_and_keeps_the_reference(recipe, tmp_path, here, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    here(recipe, *TWO, f"output_dir={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        patch.setattr(samples.SampleAnswers, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            main([str(recipe), *TWO])
    before = written(tmp_path / "run")
    assert [line["step"] for line in before] == [0, 0, 2, 2, 4, 4]
    here(recipe, *TWO)
    assert written(tmp_path / "run") == written(tmp_path / "whole")
    assert written(tmp_path / "run")[:6] == before

    folder = tmp_path / "run" / "dpo"
    for name in ("finished.json", "samples.jsonl"):
        (folder / name).unlink()
    (folder / "checkpoint-6").rename(tmp_path / "aside")
    done = here(recipe, *TWO)
    assert done.out.count("No more sample answers: ") == 1
    assert "does not hold the answers of the reference to these prompts" in done.out
    assert not (folder / "samples.jsonl").exists()


def test_an_error_ends_the_samples_and_not_the_training(recipe, tmp_path, here, monkeypatch):
    answers = samples.answer_questions
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("no memory\nleft")
        return answers(*arguments)

    monkeypatch.setattr(samples, "answer_questions", fail)
    done = here(recipe, *TWO, "dpo.max_steps=4")
    assert done.out.count("No more sample answers: no memory left\n") == 1
    assert len(calls) == 2
    assert [line["step"] for line in written(tmp_path / "run")] == [0, 0]


@pytest.mark.parametrize(
    ("count", "changes", "reason"),
    [
        (2, {}, None),
        (0, {}, "as set"),
        (2, {"args": SimpleNamespace(eval_strategy="no", eval_on_start=False)}, "nothing is evaluated"),
        (2, {"args": SimpleNamespace(eval_strategy="no", eval_on_start=True)}, None),
        (2, {"is_fsdp_enabled": True}, "the model is sharded"),
        (2, {"is_deepspeed_enabled": True}, "the model is sharded"),
    ],
    ids=["on", "off", "no evaluations", "one evaluation", "fsdp", "deepspeed"],
)
def test_where_there_are_none_the_reason_is_known(count, changes, reason):
    usual = {
        "args": SimpleNamespace(eval_strategy="steps", eval_on_start=True),
        "is_fsdp_enabled": False,
        "is_deepspeed_enabled": False,
        "_is_vision_dataset": False,
    }
    assert samples.why_no_samples(SimpleNamespace(**usual | changes), count) == reason


def test_a_stage_that_starts_anew_sets_earlier_answers_aside(tmp_path):
    for name in ("trainer_state.json", "samples.jsonl"):
        (tmp_path / name).write_text(name)
    place = set_earlier_aside(tmp_path)
    assert (place / "samples.jsonl").read_text() == "samples.jsonl"
    assert not (tmp_path / "samples.jsonl").exists()


def line(step, policy, row=0, chosen="yes"):
    return {"step": step, "row": row, "prompt": "<b>why?", "chosen": chosen, "reference": "a", "policy": policy}


def test_the_report_shows_how_each_answer_changed(tmp_path, undrawn):
    folder = make_run(tmp_path / "run")
    lines = [*(line(step, answer) for step, answer in ((0, "a"), (5, "a"), (10, "<i>b"))), line(10, "a", row=3)]
    (folder / "dpo" / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    notes = []
    first, second = read_samples(folder / "dpo", notes)
    assert first.answers == [("steps 0 to 5", "a"), ("step 10", "<i>b")]
    assert (first.changed, second.changed, notes) == (True, False, [])
    page = write_report([folder], tmp_path / "report").read_text()
    assert "1 of 2 differ from the reference" in page
    assert "&lt;b&gt;why?" in page
    assert "<b>why?" not in page


def test_the_report_shows_the_start_of_texts_that_are_very_long(tmp_path, undrawn):
    folder = make_run(tmp_path / "run")
    long = {**line(0, "a", chosen="c" * 1_000_000), "prompt": "p" * 1_000_000}
    (folder / "dpo" / "samples.jsonl").write_text(json.dumps(long) + "\n")
    page = write_report([folder], tmp_path / "report").read_text()
    assert page.count("996000 more characters are not shown") == 2
    assert len(page) < 500_000


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 1}', "\0"])
def test_broken_answers_are_noted(content, tmp_path):
    (tmp_path / "samples.jsonl").write_text(content)
    notes = []
    assert read_samples(tmp_path, notes) == []
    assert len(notes) == 1
