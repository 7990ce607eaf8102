"""The command, in a process of its own if signals, launchers or exit codes matter, else in this process."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_rows
from peft import AutoPeftModelForCausalLM
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dposhift_trl import ChosenSFTTrainer, DPOShiftTrainer
from dposhift_trl.recipe import load_recipe
from dposhift_trl.run import last_complete_checkpoint, main


ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
STAGE = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "per_device_train_batch_size": 4}


def command(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "dposhift_trl.run", *map(str, arguments)],
        **{"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 180, **kwargs},
    )


def succeed(*arguments, **kwargs):
    done = command(*arguments, **kwargs)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture
def recipe(tmp_path, tiny_model):
    return write_recipe(tmp_path, tiny_model)


def write_recipe(tmp_path, tiny_model):
    """A recipe with both stages on a tiny model that takes a few seconds."""
    make_rows(24).to_json(tmp_path / "rows.jsonl")
    values = {
        "output_dir": str(tmp_path / "run"),
        "report": False,
        "sample_prompts": 0,
        "model": {"model_name_or_path": tiny_model},
        "data": {"path": str(tmp_path / "rows.jsonl"), "eval_size": 5},
        "sft": {**STAGE, "max_steps": 6, "logging_steps": 1, "save_steps": 2, "eval_steps": 2, "report_to": "none"},
        "dpo": {
            **STAGE, "max_steps": 6, "logging_steps": 1, "save_steps": 2, "eval_steps": 2, "report_to": "none",
            "learning_rate": 1e-2, "lambda_schedule": "linear_decrease",
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    YAML(typ="safe").dump(values, path)
    return path


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_both_stages_run_and_leave_a_model_that_generates(recipe, tmp_path):
    # Without a login, and nothing in the environment that says how to log
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "WANDB_MODE"}
    done = succeed(recipe, "dpo.report_to=wandb", "report=true", env=environment)
    run = tmp_path / "run"
    assert f"W&B project dposhift_trl (offline, no login), {run}/wandb; upload with" in done.stdout
    assert "train: 19 of 19 rows kept" in done.stdout
    for stage in ("sft", "dpo"):
        assert (run / stage / "model.safetensors").is_file()
        assert (run / stage / "checkpoint-6" / "trainer_state.json").is_file()
        assert json.loads((run / stage / "finished.json").read_text())["step"] == 6
    model, tokenizer = (cls.from_pretrained(run / "dpo") for cls in (AutoModelForCausalLM, AutoTokenizer))
    tokens = model.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 2
    card = (run / "dpo" / "README.md").read_text()
    verdict = next(line for line in done.stdout.splitlines() if "chosen answers" in line)
    for words in ("DPO-Shift", "linear_decrease", "rows.jsonl", "eval_rewards/margins", verdict):
        assert words in card
    assert verdict.split(" (")[0] in (run / "report" / "report.html").read_text()
    assert len(list((run / "report" / "figures").glob("*.png"))) >= 8
    rows = pq.read_table(run / "eval_rows.parquet")
    scores = pq.read_table(run / "dpo" / "pairs" / "eval-000006.parquet")
    assert sorted(rows["row_index"].to_pylist()) == scores["row_index"].to_pylist()
    assert rows.column_names[:3] == ["prompt", "chosen", "rejected"]
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert YAML(typ="safe").load(run / "recipe.yaml")["dpo"]["lambda_schedule"] == "linear_decrease"
    assert json.loads((run / "audit.json").read_text())["train"]["kept"] == 19


def test_stage_two_starts_from_stage_one_with_a_loss_of_log_2_and_logs_every_metric(recipe, tmp_path, here):
    here(recipe)
    entries = history(tmp_path / "run" / "dpo")
    start = entries[0]
    assert start["step"] == 0
    assert start["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert start["eval_rewards/chosen"] == start["eval_rewards/rejected"] == 0.0
    names = ["loss", "shift/lambda", "shift/margins", "shift/accuracies", "dpo_loss", "logps/chosen", "logps/rejected"]
    names += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    train = [entry for entry in entries if "loss" in entry]
    evals = [entry for entry in entries if "eval_loss" in entry]
    assert [entry["step"] for entry in train] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in evals] == [0, 2, 4, 6]
    assert all(name in entry for entry in train for name in names)
    assert all(f"eval_{name}" in entry for entry in evals for name in names)
    assert [e["eval_shift/lambda"] for e in evals] == pytest.approx([1.0, 1 - 0.25 / 3, 1 - 0.5 / 3, 0.75])


def test_the_same_command_again_skips_what_is_finished_and_another_recipe_is_refused(recipe, tmp_path, here):
    here(recipe)
    before = (tmp_path / "run" / "dpo" / "model.safetensors").stat().st_mtime_ns
    again = here(recipe)
    assert "sft: finished before, skipped" in again.out
    assert "dpo: finished before, skipped" in again.out
    assert (tmp_path / "run" / "dpo" / "model.safetensors").stat().st_mtime_ns == before
    other = here(recipe, "dpo.beta=0.3", "seed=1", code=2)
    assert "was started with a different recipe: dpo.beta, seed changed" in other.err
    assert len(other.err.strip().splitlines()) == 1
    accepted = here(recipe, "dpo.beta=0.3", "seed=1", "--accept-changes")
    assert "finished before" in accepted.out
    assert (tmp_path / "run" / "recipe.1.yaml").is_file()


def interrupt(recipe, stage, *overrides):
    """Kill the command once a checkpoint is complete."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dposhift_trl.run", str(recipe), *overrides],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = Path(load_recipe(str(recipe), overrides).output_dir) / stage
    deadline = time.monotonic() + 120
    while last_complete_checkpoint(folder).newest is None:
        assert process.poll() is None, "finished before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "finished.json").exists()
    return folder


LORA = ["model.use_peft=true", "model.merge_adapter=true", "model.lora_target_modules=[c_attn]"]


LONG = ["sft.max_steps=30", "dpo.max_steps=30"]


@pytest.fixture(scope="module", params=[[], LORA], ids=["full", "lora"])
def whole(request, tmp_path_factory, tiny_model):
    """Recipe, overrides and folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    recipe, extra = write_recipe(folder, tiny_model), [*LONG, *request.param]
    succeed(recipe, *extra)
    return recipe, extra, folder / "run"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights_bit_for_bit(stage, whole, tmp_path):
    recipe, extra, expected = whole
    extra = [*extra, f"output_dir={tmp_path / 'run'}"]
    interrupt(recipe, stage, *extra)
    resumed = succeed(recipe, *extra)
    assert f"{stage}: resuming from" in resumed.stdout
    for name in ("sft", "dpo"):
        (weights,) = (expected / name).glob("*model.safetensors")
        left, right = load_file(tmp_path / "run" / name / weights.name), load_file(weights)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
        assert [e["step"] for e in history(tmp_path / "run" / name)] == [e["step"] for e in history(expected / name)]


def test_sigterm_saves_and_the_same_command_goes_on(recipe, tmp_path):
    options = ["dpo.max_steps=60", "dpo.save_steps=50", "dpo.eval_strategy=no", "dpo.logging_steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dposhift_trl.run", str(recipe), "sft=null", *options],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM, saved at step" in stderr
    assert "Traceback" not in stderr
    resumed = succeed(recipe, "sft=null", *options)
    assert "resuming from" in resumed.stdout
    assert [e["step"] for e in history(tmp_path / "run" / "dpo") if "loss" in e] == list(range(1, 61))
    succeed(recipe, f"output_dir={tmp_path / 'whole'}", "sft=null", *options)
    left, right = (load_file(tmp_path / run / "dpo" / "model.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def sigterm_in_last_step(monkeypatch):
    """Send SIGTERM to this process in the forward pass of the last optimizer step of a stage."""

    def arm(trainer_class):
        step = trainer_class.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == self.state.max_steps - 1:
                signal.raise_signal(signal.SIGTERM)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(trainer_class, "training_step", training_step)

    return arm


def test_sigterm_in_the_very_last_step_lets_the_run_finish(recipe, tmp_path, here, sigterm_in_last_step):
    sigterm_in_last_step(DPOShiftTrainer)
    done = here(recipe, "sft=null")
    assert "SIGTERM" not in done.err
    assert f"The model is in {tmp_path / 'run' / 'dpo'}" in done.out
    assert json.loads((tmp_path / "run" / "dpo" / "finished.json").read_text())["step"] == 6
    assert (tmp_path / "run" / "dpo" / "model.safetensors").is_file()


def test_sigterm_in_the_last_step_of_stage_1_finishes_the_stage_and_stops_before_the_next(
    recipe, tmp_path, here, sigterm_in_last_step
):
    sigterm_in_last_step(ChosenSFTTrainer)
    done = here(recipe, code=128 + signal.SIGTERM)
    assert done.err.splitlines()[-1] == (
        "sft: finished, then stopped by SIGTERM. Run the same command again to continue."
    )
    assert json.loads((tmp_path / "run" / "sft" / "finished.json").read_text())["step"] == 6
    assert not (tmp_path / "run" / "dpo").exists()
    assert "sft: finished before, skipped" in here(recipe).out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["sft=null", "dpo.max_steps=1"], 0),
        (["data.path=nowhere.jsonl"], 2),
        (["sft=null", "dpo.learning_rate=1e30"], 1),
        (["sft=null", "dpo.learning_rate=0.25"], 128 + signal.SIGTERM),
    ],
    ids=["finished", "refused", "stopped", "terminated"],
)
def test_the_previous_sigterm_handler_is_restored_after_the_run(options, code, recipe, here, monkeypatch):
    step = DPOShiftTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.args.learning_rate == 0.25:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DPOShiftTrainer, "training_step", training_step)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    ours = signal.getsignal(signal.SIGTERM)
    try:
        here(recipe, *options, code=code)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_while_the_audit_reads_a_row_is_no_mistake_of_the_data(recipe, tmp_path):
    script = (
        "import signal, sys; from dposhift_trl import run; from dposhift_trl.data import tokenization; "
        "tokenization.split_pair = lambda *ids: signal.raise_signal(signal.SIGTERM); "
        "sys.exit(run.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(recipe)], env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "Stopped by SIGTERM outside of training. Run the same command again to continue."
    )
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(recipe, tmp_path):
    """A limit on file sizes stands in for a full disk: the model still fits, the optimizer state does not."""
    succeed(recipe, "dpo=null")
    weights = (tmp_path / "run" / "sft" / "model.safetensors").stat().st_size
    options = ["--accept-changes", "sft=null", f"model.model_name_or_path={tmp_path / 'run' / 'sft'}"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(weights * 1.5), int(weights * 1.5)))

    done = command(recipe, *options, f"output_dir={tmp_path / 'full'}", preexec_fn=limit)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "dpo: cannot write to" in done.stderr
    assert "No checkpoint is saved yet. Free some space and run the same command again." in done.stderr
    succeed(recipe, *options, f"output_dir={tmp_path / 'full'}")


def test_a_folder_that_cannot_be_made_is_one_line(recipe, tmp_path, here):
    (tmp_path / "file").write_text("")
    done = here(recipe, f"output_dir={tmp_path / 'file' / 'run'}", code=2)
    assert "cannot be written" in done.err


def test_a_run_killed_between_the_last_checkpoint_and_the_end_only_saves(recipe, tmp_path, here):
    """`max_steps` ends within an epoch, so `Trainer.train` would take one more step."""
    here(recipe)
    folder = tmp_path / "run" / "dpo"
    expected = load_file(folder / "model.safetensors")
    steps = [entry["step"] for entry in history(folder)]
    (folder / "finished.json").unlink()
    (folder / "model.safetensors").unlink()
    here(recipe)
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [entry["step"] for entry in history(folder)] in (steps, steps[:-1])


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_each_stage_trains_on_the_rows_that_its_own_truncation_leaves(recipe, tmp_path, here):
    """Prompts have 1 to 20 words, answers one word and the EOS token that TRL adds."""
    prompts = ["w1 " * (n - 1) + f"w{n + 10}" for n in range(1, 21)]  # of which no two end alike
    rows = [{"prompt": prompt, "chosen": " w2", "rejected": " w3"} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["data.eval_size=null", "dpo.max_length=10", "data.min_rows_kept=0.1"]
    options += [f"{stage}.{key}" for stage in ("sft", "dpo") for key in ("eval_strategy=no", "max_steps=-1")]
    cases = [
        (["sft.max_length=10"], (8, 8)),
        (["sft.max_length=15"], (13, 8)),
        (["sft.max_length=10", "sft.truncation_mode=keep_end"], (20, 8)),
    ]
    for number, (truncation, kept) in enumerate(cases):
        folder = tmp_path / f"run-{number}"
        done = here(recipe, *options, *truncation, f"output_dir={folder}")
        audits = json.loads((folder / "audit.json").read_text())
        assert audits["train"]["kept"] == kept[1]
        assert ("sft train" in audits) is (kept[0] != kept[1])
        assert f"sft train: {kept[0]} of 20 rows kept" in done.out or kept[0] == kept[1]
        steps = [json.loads((folder / stage / "finished.json").read_text())["step"] for stage in ("sft", "dpo")]
        assert steps == [3 * -(-count // 4) for count in kept]  # three epochs, four rows per step


# Lambda decreases from evaluation to evaluation
BEST_IS_FIRST = [
    "sft.max_steps=2", "dpo.max_steps=4", "dpo.load_best_model_at_end=true", "dpo.metric_for_best_model=shift/lambda",
    "dpo.greater_is_better=true",
]  # fmt: skip


@pytest.mark.parametrize(
    "extra", [["sft=null"], ["sft=null", *LORA], LORA], ids=["full", "lora", "lora of stage 1 and its frozen copy"]
)
def test_a_run_killed_after_its_last_checkpoint_ends_with_the_best_weights_as_one_left_alone(
    extra, recipe, tmp_path, here
):
    options = [*BEST_IS_FIRST, *extra]
    here(recipe, *options)
    folder = tmp_path / "run" / "dpo"
    (weights,) = (path.name for path in folder.glob("*model.safetensors"))
    expected, last = load_file(folder / weights), load_file(folder / "checkpoint-4" / weights)
    card = (folder / "README.md").read_text()
    best = json.loads((folder / "finished.json").read_text())["best_checkpoint"]
    assert Path(best).name == "checkpoint-2"
    trained = [key for key in expected if "mlp.c_fc.weight" in key or "lora" in key]
    assert trained
    assert not any(torch.equal(expected[key], last[key]) for key in trained)
    for name in ("finished.json", weights, "README.md"):
        (folder / name).unlink()
    here(recipe, *options)
    found = load_file(folder / weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert json.loads((folder / "finished.json").read_text())["best_checkpoint"] == best
    assert (folder / "README.md").read_text() == card


def test_the_best_checkpoint_is_found_in_a_run_folder_that_was_moved(recipe, tmp_path, here):
    options = [*BEST_IS_FIRST, "sft=null"]
    here(recipe, *options)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere" / "run")
    expected = load_file(moved / "dpo" / "model.safetensors")
    for name in ("finished.json", "model.safetensors"):
        (moved / "dpo" / name).unlink()
    here(recipe, *options, f"output_dir={moved}")
    found = load_file(moved / "dpo" / "model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_best_checkpoint_that_is_gone_is_one_line(recipe, tmp_path, here):
    options = [*BEST_IS_FIRST, "sft=null"]
    here(recipe, *options)
    folder = tmp_path / "run" / "dpo"
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "checkpoint-2")
    done = here(recipe, *options, code=2)
    assert "`load_best_model_at_end` requires the best checkpoint, got no folder" in done.err.splitlines()[-1]


def test_lora_loads_with_peft_and_merged(recipe, tmp_path, here):
    here(recipe, *LORA)
    folder = tmp_path / "run" / "dpo"
    tokens = AutoTokenizer.from_pretrained(folder)("w1 w2 w3", return_tensors="pt")
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    through_transformers = AutoModelForCausalLM.from_pretrained(folder)
    assert set(adapted.peft_config) == {"default"}
    assert torch.allclose(adapted(**tokens).logits, merged(**tokens).logits, atol=1e-5)
    assert torch.equal(adapted(**tokens).logits, through_transformers(**tokens).logits)
    assert history(folder)[0]["eval_rewards/chosen"] == 0.0


def test_one_stage_alone(recipe, tmp_path, here):
    here(recipe, "dpo=null", f"output_dir={tmp_path / 'sft-only'}")
    assert not (tmp_path / "sft-only" / "dpo").exists()
    start = tmp_path / "sft-only" / "sft"
    here(recipe, "sft=null", f"output_dir={tmp_path / 'dpo-only'}", f"model.model_name_or_path={start}")
    assert not (tmp_path / "dpo-only" / "sft").exists()
    here(
        recipe, "sft=null", f"output_dir={tmp_path / 'lora-only'}", f"model.model_name_or_path={start}",
        "model.use_peft=true", "model.lora_target_modules=[c_attn]",
    )  # fmt: skip
    assert history(tmp_path / "lora-only" / "dpo")[0]["eval_rewards/chosen"] == 0.0


def test_a_dry_run_prints_steps_and_lambda_and_writes_nothing(recipe, tmp_path, here):
    done = here(recipe, "--dry-run", "sft.max_steps=-1", "sft.num_train_epochs=3")
    assert "sft: 15 optimizer steps" in done.out  # 19 rows, 4 per step, 3 epochs
    assert "dpo: 6 optimizer steps" in done.out
    assert "lambda: 1 at the start, 0.875 in the middle, 0.75 at the end" in done.out
    assert "lambda_schedule: linear_decrease" in done.out
    assert "lambda: 0.5 throughout\n" in here(recipe, "--dry-run", "dpo={bf16: false, shift_lambda: 0.5}").out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["dpo.max_tokens_per_batch=60"],
        ["dpo.max_tokens_per_batch=60", "dpo.gradient_accumulation_steps=2"],
        ["dpo.max_tokens_per_batch=20", "dpo.max_length=8", "data.audit=keep"],
        ["dpo.max_length=6", "data.audit=keep"],
        ["dpo.dataloader_drop_last=true", "dpo.gradient_accumulation_steps=3"],
    ],
    ids=" ".join,
)
def test_a_dry_run_prints_the_steps_that_training_takes(options, recipe, tmp_path, here):
    options = [*options, "sft=null", "dpo.max_steps=-1", "dpo.num_train_epochs=2", "dpo.eval_strategy=no"]
    done = here(recipe, "--dry-run", *options)
    here(recipe, *options)
    steps = json.loads((tmp_path / "run" / "dpo" / "finished.json").read_text())["step"]
    assert f"dpo: {steps} optimizer steps" in done.out


def test_a_dry_run_refuses_a_token_budget_that_the_longest_pair_exceeds(recipe, here):
    done = here(recipe, "--dry-run", "sft=null", "dpo.max_steps=-1", "dpo.max_tokens_per_batch=4", code=2)
    assert done.err.startswith(
        "Stage `dpo` cannot start: `max_tokens_per_batch` must be at least the length of the longest pair"
    )


def test_a_dry_run_refuses_a_stage_without_training_examples(recipe, here):
    options = ["sft=null", "dpo.max_steps=-1", "dpo.max_length=2", "data.audit=keep"]
    done = here(recipe, "--dry-run", *options, code=2)
    assert done.err.startswith("Stage `dpo` cannot start: No train examples left: every prompt")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "the file does not exist"), ("{{{", "JSON parse error")], ids=["none", "broken"]
)
def test_a_dry_run_refuses_data_that_cannot_be_read(content, reason, recipe, tmp_path, here):
    path = tmp_path / "unreadable.jsonl"
    if content is not None:
        path.write_text(content)
    done = here(recipe, "--dry-run", f"data.path={path}", "data.eval_split=null", "data.eval_size=1", code=2)
    assert done.err.count("\n") == 1
    assert done.err.startswith(f"`data.path` '{path}', split 'train', cannot be read: ")
    assert reason in done.err


def test_a_dry_run_does_not_guess_the_steps_of_packed_rows(recipe, here):
    done = here(recipe, "--dry-run", "sft.packing=true", "sft.max_steps=-1", "sft.eval_packing=false")
    assert "sft: unknown number of optimizer steps" in done.out


def test_letters_that_a_terminal_lacks_are_escaped(recipe):
    done = command(recipe, "run_name=é", "--dry-run", env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "run_name: \\xe9" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpo.lerning_rate=0.5"], "unknown key `dpo.lerning_rate`. Did you mean `learning_rate`?"),
        (["dpo.learning_rate=fast"], "`dpo.learning_rate` must be a number, got 'fast'."),
        (["dpo.shift_lambda=1.05"], "section `dpo`: `shift_lambda` must not exceed 1, got 1.05."),
        (["model.model_name_or_path=no/where"], "`model.model_name_or_path` 'no/where' cannot be loaded"),
        (["model.model_name_or_path=."], "`model.model_name_or_path` must be a Hub name or a folder with a `config"),
        (["data.path=nowhere.jsonl"], "`data.path` 'nowhere.jsonl', split 'train', cannot be read"),
        (
            ["model.use_peft=true", "model.lora_target_modules=[nope]"],
            "`model.lora_target_modules` {'nope'} do not fit the model: Target modules",
        ),
    ],
    ids=["key", "type", "range", "model", "folder", "data", "lora"],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, recipe, here):
    done = here(recipe, *arguments, code=2)
    assert message in done.err
    lines = [line for line in done.err.splitlines() if line.strip() and "it/s" not in line]
    assert len(lines) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["dpo=null"],
        ["sft=null"],
        ["sft=null", "dpo.precompute_ref_log_probs=false"],
        ["sft=null", "data.streaming=true"],
    ],
    ids=["sft", "dpo", "online", "streaming"],
)
def test_rows_that_are_kept_without_any_answer_left_are_one_line(options, recipe, here):
    stage = "sft" if options == ["dpo=null"] else "dpo"
    done = here(recipe, "data.audit={lost: keep}", "sft.max_length=2", "dpo.max_length=2", *options, code=2)
    assert done.err.splitlines()[-1] == (
        f"Stage `{stage}` cannot start: No train examples left: every prompt is at least as long as `max_length` (2). "
        "Raise `max_length`."
    )


@pytest.mark.parametrize("override", ["dpo.lerning_rate=0.5", "data.path=nowhere.jsonl"], ids=["key", "data"])
def test_a_mistake_leaves_a_process_without_a_traceback(override, recipe):
    done = command(recipe, override)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip() and "it/s" not in line]) == 1


def test_a_folder_with_other_files_is_left_alone(recipe, tmp_path, here):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    done = here(recipe, code=2)
    assert "must be empty or a run folder, got" in done.err
    assert "with thesis.txt. Choose a new folder." in done.err
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir() if entry.name != ".lock") == ["thesis.txt"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_model):
    """Recipe and folder of a finished run of stage 2."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, tiny_model)
    assert main([str(recipe), "sft=null", "dpo.max_steps=1"]) == 0
    return recipe, folder / "run"


FOLDER = None  # a folder in place of the file


@pytest.mark.parametrize(
    ("name", "content", "problem", "remedy"),
    [
        ("recipe.yaml", b"", "must contain a mapping of sections, got an empty file", "pass --accept-changes"),
        ("recipe.yaml", b"- a\n", "must contain a mapping of sections, got a list", "pass --accept-changes"),
        ("recipe.yaml", b"dpo: {beta: [\n", "not valid YAML: ", "pass --accept-changes"),
        ("recipe.yaml", b"\x80\x00\xff", "cannot be read: 'utf-8' codec can't decode", "pass --accept-changes"),
        ("recipe.yaml", FOLDER, "must be a file, got a folder", "Move it away."),
        ("audit.json", FOLDER, "must be a file, got a folder", "Move it away."),
        ("eval_rows.parquet", FOLDER, "must be a file, got a folder", "Move it away."),
        ("dpo/finished.json", b"", "is empty", "Delete it to finish the stage from checkpoint-1"),
        ("dpo/finished.json", b'{"step": ', "is not valid JSON: Expecting value", "Delete it to finish the stage"),
        ("dpo/finished.json", b"[]", "must contain a mapping, got list", "Delete it to finish the stage"),
        ("dpo/finished.json", b"[" * 100_000, "is not valid JSON: ", "Delete it to finish the stage"),
        ("dpo/finished.json", b"\xff", "is not UTF-8 text", "Delete it to finish the stage"),
        ("dpo/start.json", b"", "is empty", "Delete it to resume the stage without comparing its rows and model."),
        ("dpo/start.json", FOLDER, "must be a file, got a folder", "Move it away."),
        ("dpo/trainer_state.json", FOLDER, "must be a file, got a folder", "Move it away."),
        ("dpo/finished.json", FOLDER, "must be a file, got a folder", "Move it away."),
        ("dpo/wandb_id", b"", "cannot be used: not the id of a W&B run, ''", "Delete it to start a new W&B run"),
        ("dpo/wandb_id", b"a/b", "cannot be used: not the id of a W&B run, 'a/b'", "Delete it to start a new W&B run"),
        ("dpo/wandb_id", b"\xff", "cannot be used: 'utf-8' codec", "Delete it to start a new W&B run"),
        ("dpo/wandb_id", FOLDER, "must be a file, got a folder", "Move it away."),
    ],
    ids=str,
)
def test_a_broken_file_in_a_run_folder_is_one_line_that_names_it(
    name, content, problem, remedy, finished_run, tmp_path, here
):
    recipe, finished = finished_run
    run = shutil.copytree(finished, tmp_path / "run")
    options = ["sft=null", "dpo.max_steps=1", f"output_dir={run}"]
    (run / name).unlink(missing_ok=True)
    if content is FOLDER:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    before = sorted(run.rglob("*"))
    (line,) = here(recipe, *options, code=2).err.splitlines()
    assert line.startswith(str(run / name))
    assert problem in line
    assert remedy in line
    assert sorted(run.rglob("*")) == before, "nothing was changed"
    if "--accept-changes" in remedy:
        options.append("--accept-changes")
    elif content is FOLDER:
        (run / name).rmdir()
        if name == "recipe.yaml":
            shutil.copy(finished / name, run / name)
    else:
        (run / name).unlink()
    here(recipe, *options)


def test_a_half_written_audit_is_written_again(finished_run, tmp_path, here):
    recipe, finished = finished_run
    run = shutil.copytree(finished, tmp_path / "run")
    whole = (run / "audit.json").read_text()
    (run / "audit.json").write_text(whole[:20])
    here(recipe, "sft=null", "dpo.max_steps=1", f"output_dir={run}")
    assert (run / "audit.json").read_text() == whole


def test_a_command_killed_while_it_saved_the_recipe_can_be_run_again(recipe, tmp_path, here):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml.tmp").write_text("output_d")
    here(recipe, "sft=null", "dpo.max_steps=1")


@pytest.mark.parametrize("name", ["gpt2_shift", "gpt2_shift_lora"])
def test_the_gpt2_recipes_run_unchanged_on_folders_named_as_on_the_hub(name, tmp_path, here, monkeypatch):
    """GPT-2 with one layer and random weights, and a tokenizer of the same type."""
    from dposhift_trl.data.demo import save_demo_model

    save_demo_model(str(tmp_path / "gpt2"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    config = GPT2Config(n_layer=1, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    data = tmp_path / "trl-lib" / "ultrafeedback_binarized"
    data.mkdir(parents=True)
    rows = [
        {
            side: [{"role": "user", "content": f"Count {i}."}, {"role": "assistant", "content": f"{answer} {i}."}]
            for side, answer in (("chosen", "It is"), ("rejected", "No,"))
        }
        for i in range(10)
    ]
    for split, part in (("train", rows[:8]), ("test", rows[8:])):
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    monkeypatch.chdir(tmp_path)
    here(ROOT / "recipes" / f"{name}.yaml", "sft.use_cpu=true", "dpo.use_cpu=true", "report=false")
    run = tmp_path / "runs" / name
    assert (run / "dpo" / "finished.json").is_file()
    # The plain chat template that GPT-2 lacks is saved with the model
    saved = AutoTokenizer.from_pretrained(run / "dpo")
    text = saved.apply_chat_template(rows[0]["chosen"], tokenize=False)
    assert text == "User: Count 0.\nAssistant: It is 0.<|endoftext|>"


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ONE = [sys.executable]


def test_two_processes_look_at_one_demo_model_in_a_dry_run(recipe):
    command = [*TWO, "-m", "dposhift_trl.run", str(recipe), "model.model_name_or_path=demo", "--dry-run"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("dpo: ") == 1


@pytest.mark.parametrize(("first", "second"), [(TWO, ONE), (ONE, TWO)], ids=["two-then-one", "one-then-two"])
def test_a_run_goes_on_with_another_number_of_processes(first, second, recipe, tmp_path):
    # The batch size of a step stays 4 pairs; SGD, since Adam amplifies rounding differences to whole steps
    common = ["sft=null", "dpo.max_steps=4", "dpo.optim=sgd", "dpo.report_to=none", "--accept-changes"]
    size = {len(TWO): "dpo.per_device_train_batch_size=2", len(ONE): "dpo.per_device_train_batch_size=4"}

    def run(launcher, *overrides):
        done = subprocess.run(
            [*launcher, "-m", "dposhift_trl.run", str(recipe), *common, size[len(launcher)], *overrides],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    run(first)
    folder = tmp_path / "run" / "dpo"
    whole, steps = load_file(folder / "model.safetensors"), history(folder)
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    assert "resuming from" in run(second)
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.allclose(whole[key], resumed[key], rtol=1e-5, atol=1e-6) for key in whole)
    assert [e["step"] for e in history(folder)] == [e["step"] for e in steps]
    assert [e.get("shift/lambda") for e in history(folder)] == [e.get("shift/lambda") for e in steps]


def test_two_processes_see_the_same_lambda_and_the_same_metrics_as_one(recipe, tmp_path):
    # SGD, since Adam amplifies rounding differences from the order of summation to whole steps
    common = ["sft=null", "dpo.max_steps=4", "dpo.optim=sgd"]
    options = [*common, "dpo.per_device_train_batch_size=2"]
    done = subprocess.run(
        [*TWO, "-m", "dposhift_trl.run", str(recipe), *options],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(", 2 processes, float32\n") == done.stdout.count("step 4/4 ") == 1
    succeed(recipe, f"output_dir={tmp_path / 'one'}", *common)
    two, one = history(tmp_path / "run" / "dpo"), history(tmp_path / "one" / "dpo")
    assert [entry.get("shift/lambda") for entry in two] == [entry.get("shift/lambda") for entry in one]
    metrics = ("rewards/margins", "rewards/accuracies", "logps/chosen", "shift/margins", "dpo_loss")
    for left, right in zip(two, one, strict=True):
        for name in [n for n in right if n.removeprefix("eval_") in metrics]:
            assert left[name] == pytest.approx(right[name], rel=1e-6, abs=1e-6)


def test_two_processes_fill_batches_by_tokens_and_share_one_measurement(recipe, tmp_path):
    """Lambda is the same on both ranks, since the adaptive controller sees the pairs of both."""
    options = [
        "sft=null", "dpo.num_train_epochs=2", "dpo.max_steps=-1", "dpo.max_tokens_per_batch=60", "dpo.report_to=none",
        "dpo.gradient_accumulation_steps=2", "dpo.lambda_schedule=adaptive",
    ]  # fmt: skip
    code = (
        "import json, os, sys; from dposhift_trl import run; from dposhift_trl.training import callbacks\n"
        "observed = []\n"
        "observe = callbacks.AdaptiveLambdaCallback.observe\n"
        "def spy(self, matrix):\n"
        "    observed.append((self.shift_lambda, matrix[:, 8].tolist()))\n"
        "    observe(self, matrix)\n"
        "callbacks.AdaptiveLambdaCallback.observe = spy\n"
        "code = run.main(sys.argv[1:])\n"
        "json.dump(observed, open(f'seen-{os.environ[\"RANK\"]}.json', 'w'))\n"
        "sys.exit(code)\n"
    )
    (tmp_path / "spy.py").write_text(code)
    done = subprocess.run(
        [*TWO, str(tmp_path / "spy.py"), str(recipe), *options],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    steps = json.loads((tmp_path / "run" / "dpo" / "finished.json").read_text())["step"]
    assert len(ranks[0]) == 2 * steps
    for epoch in (ranks[0][:steps], ranks[0][steps:]):
        rows = sorted(int(row) for _, rows in epoch for row in rows)
        assert len(rows) == 20
        assert len(set(rows)) == 19  # one row appears twice, so that both processes have the same number
