"""The sweep: its plan, its runs with a stand-in and with the real command, and real signals."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from filelock import FileLock
from ruamel.yaml import YAML
from safetensors.torch import load_file
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

from dposhift_trl import run
from dposhift_trl.data.sources import load_preferences
from dposhift_trl.recipe import load_recipe
from dposhift_trl.report import ReportError
from dposhift_trl.sweep import launch, session
from dposhift_trl.sweep.__main__ import main as main
from dposhift_trl.sweep.launch import last_error
from dposhift_trl.sweep.plan import plan, split_values


ROOT = Path(__file__).parent.parent
WANDB_SWEEP = ROOT / "recipes" / "wandb" / "sweep.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
STAGE = {
    "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "per_device_train_batch_size": 4, "max_steps": 3,
    "logging_steps": 1, "report_to": "none",
}  # fmt: skip
LAMBDAS = "dpo.shift_lambda=1.0,0.5"
LORA = ["model.use_peft=true", "model.lora_target_modules=[c_attn]"]

# Replaces `accelerate launch -m dposhift_trl.run RECIPE` in the processes that a sweep starts
STAND_IN = """
    import json, os, signal, sys, time
    from pathlib import Path
    from ruamel.yaml import YAML

    values = YAML(typ="safe").load(Path(sys.argv[-1]).read_text())
    folder, stage = Path(values["output_dir"]), "sft" if "sft" in values else "dpo"
    with open(folder.parent / "calls", "a") as calls:
        calls.write(json.dumps([folder.name, sys.argv[1:-1], os.environ.get("WANDB_RUN_ID")]) + "\\n")
    (folder / stage).mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(Path(sys.argv[-1]).read_text())
    if "STAND_IN_IGNORES_SIGTERM" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "ready").touch()
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
    if folder.name in os.environ.get("STAND_IN_FAILS", "").split():
        print("`data.path` 'x' cannot be read", file=sys.stderr)
        raise RuntimeError("CalledProcessError: that is the launcher")
    shift_lambda = values.get("dpo", {}).get("shift_lambda", 0.7)
    metrics = {"eval_displacement/chosen": -10 * shift_lambda, "eval_rewards/margins": shift_lambda}
    (folder / stage / "finished.json").write_text(json.dumps({"metrics": metrics, "seconds": 7.2}))
    (folder / stage / "model.safetensors").write_bytes(bytes([2] + 7 * [0]) + b"{}")  # without any tensor
"""


@pytest.fixture
def recipe(tmp_path, tiny_model):
    """A recipe of both stages on a tiny model, one second per stage."""
    make_rows(16).to_json(tmp_path / "rows.jsonl")
    values = {
        "output_dir": str(tmp_path / "sweep"),
        "report": False,
        "model": {"model_name_or_path": tiny_model},
        "data": {"path": str(tmp_path / "rows.jsonl"), "eval_size": 4},
        "sft": {**STAGE},
        "dpo": {**STAGE, "learning_rate": 1e-2, "shift_lambda": 0.75, "lambda_min": 0.5},
    }
    YAML(typ="safe").dump(values, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The folder from which child processes import the stand-in."""
    folder = tmp_path / "stand_in" / "accelerate" / "commands"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "launch.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent.parent))
    return folder.parent.parent


@pytest.fixture
def compared(monkeypatch):
    """The calls of `write_report`, which is replaced."""
    asked = []

    def write_report(folders, destination):
        asked.append(([folder.name for folder in folders], destination))
        return destination / "index.html"

    monkeypatch.setitem(sys.modules, "dposhift_trl.report.page", types.SimpleNamespace(write_report=write_report))
    return asked


def names(path, *overrides):
    return [point.name for point in plan(str(path), overrides).points]


def calls(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


# What is planned


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5", ["0.5"]),
        ("1.0, 0.95,0.5", ["1.0", "0.95", "0.5"]),
        ("fixed,[[0, 1.0], [1, 0.8]]", ["fixed", "[[0, 1.0], [1, 0.8]]"]),
        ("{a: 1, b: [2, 3]},{}", ["{a: 1, b: [2, 3]}", "{}"]),
        ("'a,b',\"c,]\"", ["'a,b'", '"c,]"']),
        ("it's,so", ["it's", "so"]),
        ("['a]', b],c", ["['a]', b]", "c"]),
        ("", [""]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text, values):
    assert split_values(text) == values


def test_points_are_the_combinations_with_different_effects_and_named_by_them(recipe):
    planned = plan(
        str(recipe),
        ["dpo.shift_lambda=1.0,0.95", "dpo.lambda_schedule=fixed,linear_decrease,decrease_linear", "dpo.beta=0.1,0.3"],
    )
    assert [point.name for point in planned.points] == [
        "fixed-1.0_beta-0.1", "fixed-1.0_beta-0.3", "linear_decrease-1.0-0.5_beta-0.1",
        "linear_decrease-1.0-0.5_beta-0.3", "fixed-0.95_beta-0.1", "fixed-0.95_beta-0.3",
    ]  # fmt: skip
    assert planned.duplicates == 6


def test_a_constant_schedule_is_the_fixed_one(recipe):
    overrides = ["dpo.lambda_schedule=fixed,linear_increase,[[0, 1.0], [1, 1.0]]", "dpo.shift_lambda=1.0"]
    assert names(recipe, *overrides, "dpo.lambda_min=1.0") == ["fixed-1.0"]


@pytest.mark.parametrize(
    ("overrides", "points"),
    [
        (["dpo.lambda_target=0,-0.5,-1"], ["fixed-0.75"]),
        (["dpo.lambda_target_metric=displacement/chosen,displacement/chosen_fell"], ["fixed-0.75"]),
        (["dpo.lambda_min=0.5,0.9", "dpo.lambda_max=1.0,0.95"], ["fixed-0.75"]),
        (["dpo.allow_lambda_above_one=true,false"], ["fixed-0.75"]),
        (["dpo.lambda_schedule=linear_increase", "dpo.shift_lambda=1.0,0.5"], ["linear_increase-0.5-1.0"]),
        (["dpo.lambda_schedule=adaptive", "dpo.shift_lambda=1.0,0.5"], ["adaptive-0.5-1.0-chosen-0.0"]),
        (["dpo.lambda_schedule=[[0, 1.0], [1, 0.5]]", "dpo.lambda_min=0.5,0.9"], ["linear_decrease-1.0-0.5"]),
        (["dpo.lambda_schedule=[[0, 1.0], [1, 0.5]],linear_decrease"], ["linear_decrease-1.0-0.5"]),
        (["dpo.lambda_schedule=fixed,adaptive", "dpo.shift_lambda=1", "dpo.lambda_min=1"], ["fixed-1.0"]),
    ],
    ids=["target", "metric", "bounds", "permission", "linear", "adaptive", "knots", "knots-or-name", "no-room"],
)  # fmt: skip
def test_values_without_effect_make_no_point(overrides, points, recipe):
    assert names(recipe, *overrides) == points


def test_adaptive_points_are_told_apart_by_bounds_target_and_metric(recipe):
    targets = ["dpo.lambda_target=0,0.5", "dpo.lambda_target_metric=displacement/chosen,displacement/chosen_fell"]
    planned = plan(str(recipe), ["dpo.lambda_schedule=adaptive", "dpo.lambda_min=0.5,0.25", *targets])
    assert [point.name for point in planned.points] == [
        f"adaptive-{low}-1.0-{metric}-{target}"
        for low in (0.5, 0.25) for target in (0.0, 0.5) for metric in ("chosen", "chosen_fell")
    ]  # fmt: skip
    lambdas = {key for key in planned.points[0].values["dpo"] if "lambda" in key}
    assert lambdas == {"lambda_schedule", "lambda_min", "lambda_max", "lambda_target", "lambda_target_metric"}


def test_a_point_above_one_keeps_the_permission_for_it(recipe):
    above, below = plan(str(recipe), ["dpo.shift_lambda=1.05,0.95", "dpo.allow_lambda_above_one=true"]).points
    assert (above.name, below.name) == ("fixed-1.05", "fixed-0.95")
    assert above.values["dpo"]["allow_lambda_above_one"] is True
    assert "allow_lambda_above_one" not in below.values["dpo"]


def test_one_value_applies_to_every_point_and_no_value_makes_one_point(recipe):
    assert names(recipe) == ["fixed-0.75"]
    assert names(recipe, "dpo.shift_lambda=1") == ["fixed-1.0"]  # as W&B may pass 1.0
    planned = plan(str(recipe), [LAMBDAS, "dpo.beta=0.2", "sft.max_steps=5"])
    assert [point.values["dpo"]["beta"] for point in planned.points] == [0.2, 0.2]
    assert planned.base.values["sft"]["max_steps"] == 5


def test_names_are_short_safe_and_do_not_depend_on_the_other_points(recipe):
    knots = "[[0, 1.0], [0.2, 1.0], [1, 0.8]]"
    one, two = names(recipe, f"dpo.lambda_schedule=fixed,{knots}", "dpo.loss_type=sigmoid,[sigmoid, sft]")[2:]
    assert one == "knots-0.0-1.0-0.2-1.0-1.0-0.8_loss_type-sigmoid"
    assert re.fullmatch(r"knots-0.0-1.0-0.2-1.0-1.0-0.8_loss_type--sigmoid-sft-[0-9a-f]{8}", two)
    assert names(recipe, f"dpo.lambda_schedule={knots}", "dpo.loss_type=[sigmoid, sft]") == [two]
    many = ", ".join(f"[{step / 100}, {1 - step / 1000}]" for step in range(50))
    assert len(names(recipe, f"dpo.lambda_schedule=[{many}]")[0]) < 80


def test_a_point_starts_from_stage_1_and_has_a_recipe_that_runs_alone(recipe, tmp_path):
    planned = plan(str(recipe), ["dpo.lambda_schedule=fixed,linear_decrease", LAMBDAS])
    assert planned.folder == tmp_path / "sweep"
    assert "dpo" not in planned.base.values
    for point in planned.points:
        assert "sft" not in point.values
        assert point.values["model"]["model_name_or_path"] == str(tmp_path / "sweep" / "base" / "sft")
        assert point.values["output_dir"] == str(tmp_path / "sweep" / point.name)
        point.file.parent.mkdir(exist_ok=True, parents=True)
        YAML(typ="safe").dump(point.values, point.file)
        assert load_recipe(str(point.file)).resolved == point.values
    # A point's recipe has no setting of lambda without effect, so its folder fits every sweep that contains it
    fixed, decrease = planned.points[0].values["dpo"], planned.points[-1].values["dpo"]
    assert {key for key in fixed if "lambda" in key} == {"lambda_schedule", "shift_lambda"}
    assert {key for key in decrease if "lambda" in key} == {"lambda_schedule", "lambda_min", "lambda_max"}


def test_without_stage_1_anything_may_vary(recipe, tiny_model):
    planned = plan(str(recipe), ["sft=null", "seed=1,2", "data.eval_size=2,4"])
    assert planned.base is None
    assert [point.name for point in planned.points][::3] == [
        "fixed-0.75_seed-1_data.eval_size-2", "fixed-0.75_seed-2_data.eval_size-4",
    ]  # fmt: skip
    assert planned.points[0].values["model"]["model_name_or_path"] == tiny_model


def test_if_seeds_vary_stage_1_keeps_the_seed_of_the_recipe():
    planned = plan(str(ROOT / "recipes" / "tiny_sweep.yaml"), ["seed=7,8"])
    assert planned.base.values["seed"] == 1
    assert [point.values["seed"] for point in planned.points] == [7, 8]


def test_seeds_run_every_point_from_one_stage_1_and_continue_a_sweep_without(tmp_path):
    demo = str(ROOT / "recipes" / "tiny_sweep.yaml")
    plain, planned = plan(demo, [LAMBDAS]), plan(demo, [LAMBDAS], seeds=3)
    assert [point.name for point in planned.points] == [
        "fixed-1.0", "fixed-1.0_seed-2", "fixed-1.0_seed-3", "fixed-0.5", "fixed-0.5_seed-2", "fixed-0.5_seed-3",
    ]  # fmt: skip
    assert [point.values["seed"] for point in planned.points] == [1, 2, 3] * 2
    assert [load_recipe_of(tmp_path, point).seed for point in planned.points] == [1, 2, 3] * 2
    assert planned.base == plain.base
    assert [planned.points[0], planned.points[3]] == plain.points
    assert [point.name for point in plan(demo, [LAMBDAS, "seed=1,2,3"]).points] == [
        point.name for point in planned.points
    ]


def test_seeds_count_from_the_seed_that_is_given():
    planned = plan(str(ROOT / "recipes" / "tiny_sweep.yaml"), ["seed=5", "dpo.beta=0.2"], seeds=2)
    assert planned.base.values["seed"] == 5
    assert [(point.name, point.values["seed"]) for point in planned.points] == [
        ("fixed-0.95_beta-0.2", 5), ("fixed-0.95_seed-6_beta-0.2", 6),
    ]  # fmt: skip


@pytest.mark.parametrize("overrides", [[], ["sft=null"]], ids=["both stages", "stage 2"])
def test_runs_with_other_seeds_are_evaluated_on_the_rows_that_stage_1_held_out(overrides, recipe, tmp_path):
    def rows(run):
        loaded = load_recipe_of(tmp_path, run)
        return [[row["chosen"] for row in split] for split in load_preferences(loaded.data, loaded.seed)]

    plain, planned = plan(str(recipe), overrides), plan(str(recipe), overrides, seeds=3)
    assert [run.values["seed"] for run in planned.runs[-3:]] == [42, 43, 44]
    assert planned.runs[:-2] == plain.runs
    assert [rows(run) for run in planned.runs] == [rows(plain.runs[0])] * len(planned.runs)
    assert plan(str(recipe), [*overrides, "data.seed=null"], seeds=3).points[1].values["data"]["seed"] == 42
    own = plan(str(recipe), [*overrides, "data.seed=7"], seeds=2)
    assert [run.values["data"]["seed"] for run in own.runs] == [7] * len(own.runs)
    assert rows(own.runs[0]) == rows(own.runs[-1]) != rows(plain.runs[0])


def test_without_a_valid_seed_in_the_recipe_the_first_one_chooses_the_rows(recipe):
    recipe.write_text(recipe.read_text() + "seed: null\n")
    planned = plan(str(recipe), ["sft=null", "seed=7,8"])
    assert [point.values["data"].get("seed") for point in planned.points] == [None, 7]


def load_recipe_of(folder, run):
    YAML(typ="safe").dump(run.values, folder / "of_run.yaml")
    return load_recipe(str(folder / "of_run.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--seeds", "2", "seed=1,2"], "`seed` must have one value with `--seeds`", id="list"),
        pytest.param(["--seeds", "2", "dpo.shift_lambda=7,8"], "`shift_lambda` must not exceed 1, got 8", id="others"),
    ],
)
def test_a_mistake_with_seeds_is_one_line(arguments, message, recipe, here):
    error = here(recipe, *arguments, code=2).err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_the_number_of_seeds_is_a_whole_number_of_at_least_1(count, recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(recipe), f"--seeds={count}"])
    assert stopped.value.code == 2
    assert "must be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpo.shift_lambda=1.0,1.5,0.5"], "`shift_lambda` must not exceed 1, got 1.5."),
        (["dpo.lerning_rate=1,2"], "unknown key `dpo.lerning_rate`. Did you mean `learning_rate`?"),
        (["dpo.beta=0.1,,0.2"], "has an empty value. Remove a comma or write `null`."),
        (["dpo.beta=0.1", "dpo.beta=0.2"], "`dpo.beta` is given twice."),
        (["dpo.beta"], "must have the form key=value"),
        (["sft.max_steps=1,2"], "`sft.max_steps` must have one value in a sweep with an `sft` section"),
        (["output_dir=a,b"], "`output_dir` must have one value in a sweep."),
        (["dpo=null"], "`dpo` is missing."),
        (["dpo.lambda_schedule=[[0, 1.0]"], "is not valid YAML"),
    ],
    ids=["range", "key", "empty", "twice", "form", "stage", "folder", "dpo", "yaml"],
)
def test_a_mistake_in_any_point_is_one_line_and_exit_code_2_before_anything_is_written(
    arguments, message, recipe, tmp_path, here
):
    done = here(recipe, *arguments, code=2)
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_every_mistake_is_one_line(recipe, here):
    done = here(recipe, "dpo.shift_lambda=1.5,0.5,0", "dpo.beta=0.1,0.2", code=2)
    assert len(done.err.strip().splitlines()) == 2


def test_under_a_launcher_it_says_where_the_options_go(recipe, here, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "-- OPTIONS" in here(recipe, LAMBDAS, code=2).err


def test_a_dry_run_prints_the_points_and_writes_nothing(recipe, tmp_path, here):
    done = here(recipe, "dpo.lambda_schedule=fixed,cosine_decrease", LAMBDAS, "--dry-run")
    assert "3 points from one stage 1; 1 combination with the same effect left out" in done.out
    assert "cosine_decrease-1.0-0.5: lambda 1, 0.75, 0.5 (start, middle, end), steps: 3" in done.out
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_describes_every_type_of_schedule(recipe, here):
    done = here(recipe, "dpo.lambda_schedule=fixed,adaptive,[[0, 1.0], [0.5, 0.6], [1, 1.0]]", "--dry-run")
    assert [line.split(": ", 1)[1] for line in done.out.splitlines()[1:]] == [
        "lambda 0.75, 0.75, 0.75 (start, middle, end), steps: 3",
        "lambda adaptive 0.5 to 1, target 0, steps: 3",
        "lambda 1, 0.6, 1 (start, middle, end), steps: 3",
    ]


def sweep_commands():
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "recipes").glob("*.yaml")]]
    lines = [line.strip("# ") for text in texts for line in text.splitlines()]
    return sorted({line for line in lines if re.match(r"(python|accelerate) .*-m dposhift_trl\.sweep", line)})


@pytest.mark.parametrize("line", sweep_commands())
def test_every_sweep_command_that_is_printed_is_valid(line, here, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "dposhift_trl.sweep"]
    assert " points from one stage 1" in here("--dry-run", *words[3:]).out


# What is run, with the stand-in


def test_stage_1_runs_once_then_every_point_and_again_nothing(recipe, tmp_path, here, stand_in, compared):
    done = here(recipe, LAMBDAS, "dpo.lambda_schedule=fixed,linear_increase", "--", "--num_processes", "1")
    folder, points = tmp_path / "sweep", ["fixed-1.0", "linear_increase-0.5-1.0", "fixed-0.5"]
    assert [name for name, _, _ in calls(folder)] == ["base", *points]
    assert all(words == ["--num_processes", "1", "-m", "dposhift_trl.run"] for _, words, _ in calls(folder))
    assert re.search(r"\[stage 1\] base: done in \d+ s\n", done.out)
    assert re.search(r"\[2/3\] linear_increase-0.5-1.0: done in \d+ s, about \d+ s left\n", done.out)
    assert re.search(r"\[3/3\] fixed-0.5: done in \d+ s\n", done.out)
    table = done.out[done.out.index("point ") :].splitlines()
    assert [line.split()[0] for line in table[:4]] == ["point", *reversed(points)]
    assert table[1].split() == ["fixed-0.5", "0.5", "-5", "0.5", "-", "-", "7"]
    assert "linear_increase-0.5-1.0  0.5 -> 1  " in table[2]
    assert compared == [(sorted(points), folder / "comparison")]
    again = here(recipe, LAMBDAS)
    assert len(calls(folder)) == 4
    assert again.out.count("finished before, skipped") == 3


def test_every_type_of_schedule_is_in_the_table(recipe, here, stand_in, compared):
    done = here(recipe, "sft=null", "dpo.lambda_schedule=fixed,adaptive,[[0, 1.0], [0.5, 0.6], [1, 1.0]]")
    table = done.out[done.out.index("point ") :].splitlines()
    lambdas = dict(re.split(r"  +", line)[:2] for line in table[1:4])
    assert lambdas == {
        "fixed-0.75": "0.75",
        "adaptive-0.5-1.0-chosen-0.0": "adaptive 0.5 to 1, target 0",
        "knots-0.0-1.0-0.5-0.6-1.0-1.0": "1 -> 0.6 -> 1",
    }


def test_a_saved_recipe_without_the_lambda_fields_has_their_defaults_in_the_table(
    recipe, tmp_path, here, stand_in, compared
):
    here(recipe, LAMBDAS, "sft=null")
    path = tmp_path / "sweep" / "fixed-1.0" / "recipe.yaml"
    values = YAML(typ="safe").load(path)
    path.write_text(json.dumps({**values, "dpo": {}}))
    table = here(recipe, "dpo.shift_lambda=0.5", "sft=null").out
    assert re.search(r"^fixed-1.0 +0.95 ", table, re.MULTILINE)
    assert re.search(r"^fixed-0.5 +0.5 ", table, re.MULTILINE)


def test_a_point_that_fails_does_not_stop_the_rest_and_is_tried_again(
    recipe, tmp_path, here, stand_in, compared, monkeypatch
):
    monkeypatch.setenv("STAND_IN_FAILS", "fixed-1.0")
    done = here(recipe, LAMBDAS, code=1)
    log = tmp_path / "sweep" / "fixed-1.0.log"
    assert re.search(rf"\[1/2\] fixed-1.0: failed after \d+ s: `data.path` 'x' cannot be read \({log}\)\n", done.err)
    assert "Failed: fixed-1.0. Run the same command again to retry." in done.err
    assert "Traceback" not in done.err
    assert "[2/2] fixed-0.5: done" in done.out
    assert compared[-1][0] == ["fixed-0.5"]
    monkeypatch.delenv("STAND_IN_FAILS")
    here(recipe, LAMBDAS)
    assert [name for name, _, _ in calls(tmp_path / "sweep")] == ["base", "fixed-1.0", "fixed-0.5", "fixed-1.0"]
    assert compared[-1][0] == ["fixed-0.5", "fixed-1.0"]


BROKEN = {
    "empty": b"", "list": b"[1]", "binary": b"\0\1\xfe", "not UTF-8": b"\xe4", "cut": b'{"metrics": {',
    "text": b"done", "other": b'{"dpo": 3, "metrics": 3}', "directory": None,
}  # fmt: skip


def break_file(path: Path, content: bytes | None) -> None:
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["recipe.yaml", "dpo/finished.json"])
def test_a_point_whose_files_are_broken_hides_no_other(name, content, recipe, tmp_path, here, stand_in, compared):
    here(recipe, "sft=null", "dpo.shift_lambda=1.0,0.75,0.5")
    break_file(tmp_path / "sweep" / "fixed-0.75" / name, content)
    done = here(recipe, "sft=null", LAMBDAS, code=0 if (name, content) == ("dpo/finished.json", None) else 1)
    assert re.search(r"^fixed-0.5 +0.5 .*\nfixed-1.0 +1 ", done.out, re.MULTILINE)
    assert "fixed-0.5" in compared[-1][0]
    assert "Traceback" not in done.err
    if done.err:
        (line,) = done.err.strip().splitlines()
        assert line.startswith(f"fixed-0.75 is not in the table: {tmp_path / 'sweep' / 'fixed-0.75' / name} ")


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_recipe_in_the_folder_of_a_point_is_left_to_its_run(
    content, recipe, tmp_path, here, stand_in, compared
):
    here(recipe, "sft=null", LAMBDAS)
    break_file(tmp_path / "sweep" / "fixed-1.0" / "recipe.yaml", content)
    done = here(recipe, "sft=null", LAMBDAS, code=0 if content is not None else 1)
    ran = [name for name, _, _ in calls(tmp_path / "sweep")]
    assert ran == ["fixed-1.0", "fixed-0.5", "fixed-1.0"]  # the stand-in replaces it where the run would refuse
    assert "[2/2] fixed-0.5: finished before, skipped" in done.out


@pytest.mark.parametrize("name", ["log", "folder"])
def test_a_point_whose_files_cannot_be_used_does_not_end_the_sweep(name, recipe, tmp_path, here, stand_in, compared):
    place = tmp_path / "sweep" / ("fixed-1.0.log" if name == "log" else "fixed-1.0")
    place.parent.mkdir()
    place.mkdir() if name == "log" else place.write_text("mine")
    done = here(recipe, "sft=null", LAMBDAS, code=1)
    assert "[1/2] fixed-1.0: failed" in done.err
    assert "Failed: fixed-1.0. Run the same command again to retry." in done.err
    assert "Traceback" not in done.err
    assert "[2/2] fixed-0.5: done" in done.out
    assert compared[-1][0] == ["fixed-0.5"]


def test_a_sweep_that_was_moved_has_its_points(recipe, tmp_path, here, stand_in, compared):
    here(recipe, LAMBDAS)
    moved = (tmp_path / "sweep").rename(tmp_path / "moved")
    done = here(recipe, LAMBDAS, f"output_dir={moved}")
    assert done.out.count("finished before, skipped") == 3
    assert len(calls(moved)) == 3


def test_a_point_whose_model_is_gone_runs_again(recipe, tmp_path, here, stand_in, compared):
    here(recipe, LAMBDAS)
    (tmp_path / "sweep" / "fixed-1.0" / "dpo" / "model.safetensors").unlink()
    done = here(recipe, LAMBDAS)
    assert done.out.count("finished before, skipped") == 2
    assert [name for name, _, _ in calls(tmp_path / "sweep")][3:] == ["fixed-1.0"]


def test_without_stage_1_no_point_runs(recipe, tmp_path, here, stand_in, monkeypatch):
    monkeypatch.setenv("STAND_IN_FAILS", "base")
    assert "no point could run" in here(recipe, LAMBDAS, code=1).err
    assert [name for name, _, _ in calls(tmp_path / "sweep")] == ["base"]


def test_a_folder_of_another_recipe_is_left_to_the_run_which_refuses_it(recipe, tmp_path, here, stand_in, compared):
    here(recipe, LAMBDAS)
    here(recipe, LAMBDAS, "sft.max_steps=9")
    assert [name for name, _, _ in calls(tmp_path / "sweep")] == ["base", "fixed-1.0", "fixed-0.5", "base"]


def test_a_report_that_cannot_be_written_is_one_line(recipe, here, stand_in, monkeypatch):
    def write_report(folders, destination):
        raise ReportError("nothing to compare")

    monkeypatch.setitem(sys.modules, "dposhift_trl.report.page", types.SimpleNamespace(write_report=write_report))
    assert here(recipe, LAMBDAS, code=1).err.strip() == "The comparison was not written: nothing to compare"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_current_run_and_the_same_command_continues(
    number, recipe, tmp_path, here, stand_in, compared, monkeypatch
):
    monkeypatch.setenv("STAND_IN_SECONDS", "30")
    began = time.monotonic()

    def stop():
        while not (tmp_path / "sweep" / "calls").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    done = here(recipe, "sft=null", LAMBDAS, code=128 + number)
    assert time.monotonic() - began < 20
    assert f"Stopped by {number.name} during fixed-1.0. Run the same command again to continue." in done.err
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    here(recipe, "sft=null", LAMBDAS)
    assert [name for name, _, _ in calls(tmp_path / "sweep")] == ["fixed-1.0", "fixed-1.0", "fixed-0.5"]


def test_a_second_signal_kills_a_run_that_does_not_stop(recipe, tmp_path, here, stand_in, monkeypatch):
    monkeypatch.setenv("STAND_IN_SECONDS", "30")
    monkeypatch.setenv("STAND_IN_IGNORES_SIGTERM", "1")
    monkeypatch.setattr(launch, "ECHO", 0.5)
    began = time.monotonic()

    def stop():
        while not (tmp_path / "sweep" / "fixed-1.0" / "ready").exists():
            time.sleep(0.01)
        for pause in (0.2, 1.0, 0):  # the first two are one Ctrl-C, heard twice
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(pause)

    thread = threading.Thread(target=stop)
    thread.start()
    here(recipe, "sft=null", LAMBDAS, code=128 + signal.SIGINT)
    thread.join()
    assert 1.0 < time.monotonic() - began < 20


def test_a_point_that_another_command_is_running_comes_last(recipe, tmp_path, here, stand_in, compared):
    locks = tmp_path / "sweep" / ".locks"
    locks.mkdir(parents=True)
    lock = FileLock(locks / "fixed-1.0", thread_local=False)
    lock.acquire()

    def release():
        while not (tmp_path / "sweep" / "fixed-0.5" / "dpo" / "finished.json").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        lock.release()

    threading.Thread(target=release).start()
    done = here(recipe, LAMBDAS)
    assert "[1/2] fixed-1.0: running in another command, postponed" in done.out
    assert "[1/2] fixed-1.0: waiting for another command that is running it" in done.out
    assert [name for name, _, _ in calls(tmp_path / "sweep")] == ["base", "fixed-0.5", "fixed-1.0"]


def test_the_reason_of_a_failure_is_found_in_a_log():
    launcher = "Traceback (most recent call last):\n  File x\nsubprocess.CalledProcessError: Command '[..]' {}\n"
    status = launcher.format("returned non-zero exit status 2.")
    assert last_error(f"train: 3 rows\nsft: cannot start\n{status}") == "sft: cannot start"
    assert last_error(f"Traceback\n  File y\ntorch.OutOfMemoryError: CUDA\n{status}") == "torch.OutOfMemoryError: CUDA"
    assert last_error(f"dpo: starting\r 5/9 [00:01\n{launcher.format('died with <Signals.SIGKILL: 9>.')}") == (
        "killed by SIGKILL"
    )
    assert last_error(f"`x` must\nE1122 10:00:00 torch/distributed failed\n{status}") == "`x` must"
    assert last_error("") == "no output"


# W&B's agents


def trial(run_id, **parameters):
    """The command of a trial as W&B's agent builds it from the file."""
    config = YAML(typ="safe").load(WANDB_SWEEP.read_text(encoding="utf-8"))
    given = {"run_id": run_id, "args": {key: {"value": value} for key, value in parameters.items()}}
    macros = wandb_sweeps.create_sweep_command_args(given)
    macros |= {"env": [], "interpreter": [sys.executable], "program": [config["program"]]}
    words = [macros.get(word[2:-1], [word]) for word in wandb_sweeps.create_sweep_command(config["command"])]
    return [word for part in words for word in part]


def test_the_wandb_sweep_file_is_in_wandb_s_format():
    config = wandb_sweeps.load_sweep_config(str(WANDB_SWEEP))
    # W&B's schema (https://github.com/wandb/sweeps, config/schema.json) needs `method` and allows its own keys only,
    # of which these are used; a parameter's name has this pattern, a fixed or listed one these keys alone
    assert set(config) == {"name", "program", "method", "metric", "parameters", "command"}
    assert config["method"] == "grid"
    for key, parameter in config["parameters"].items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", key)
        assert set(parameter) in ({"value"}, {"values"})
    used = {word for word in config["command"] if word.startswith("$")}
    assert used == {"${env}", "${interpreter}", "${program}", "${args_no_hyphens}"}


def test_every_trial_of_the_wandb_sweep_is_one_point_of_one_sweep_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    parameters = YAML(typ="safe").load(WANDB_SWEEP.read_text(encoding="utf-8"))["parameters"]
    fixed = {key: options.get("value", options.get("values", [None])[0]) for key, options in parameters.items()}
    for shift_lambda in parameters["dpo.shift_lambda"]["values"]:
        words = trial("r", **{**fixed, "dpo.shift_lambda": shift_lambda})
        assert words[:3] == [sys.executable, "-m", "dposhift_trl.sweep"]
        planned = plan(words[3], words[4:])
        assert planned.folder == ROOT / "runs" / "wandb_sweep"
        assert [point.name for point in planned.points] == [f"fixed-{shift_lambda}_beta-{fixed['dpo.beta']}"]


def test_two_agents_share_one_stage_1_which_is_not_a_trial(recipe, tmp_path, stand_in):
    def agent(run_id, shift_lambda):
        words = trial(run_id, **{"dpo.shift_lambda": shift_lambda})
        words[3:5] = [str(recipe)]
        # The stand-in is for the processes that the sweep starts, not for the sweep
        code = (
            "import os, sys; from dposhift_trl.sweep.__main__ import main; "
            "os.environ['PYTHONPATH'] = sys.argv.pop(1); sys.exit(main())"
        )
        environment = {
            **ENVIRONMENT, "PYTHONPATH": str(ROOT), "STAND_IN_SECONDS": "2", "WANDB_RUN_ID": run_id,
            "WANDB_SWEEP_ID": "s",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", code, str(stand_in), *words[3:]],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    agents = [agent("one", 1.0), agent("two", 0.5)]
    printed = [process.communicate(timeout=120)[0] for process in agents]
    assert all("failed" not in text and "Traceback" not in text for text in printed), printed
    assert any("[stage 1] base: waiting for another command that is running it" in text for text in printed)
    ran = calls(tmp_path / "sweep")
    assert ran[0][0] == "base"
    assert ran[0][2] is None
    assert sorted((name, run_id) for name, _, run_id in ran[1:]) == [("fixed-0.5", "two"), ("fixed-1.0", "one")]


# What is run, with the real command


def run_here(each, *_):
    """Run the real command in this process."""
    each.log.touch()
    return run.main([str(each.file)])


@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_a_point_ends_with_the_weights_of_the_ordinary_run_of_both_stages(
    extra, recipe, tmp_path, here, monkeypatch, compared
):
    monkeypatch.setattr(session, "launch", run_here)
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path / "cache"))
    assert run.main([str(recipe), *extra, f"output_dir={tmp_path / 'whole'}", "dpo.shift_lambda=0.5"]) == 0
    scored = {file: file.stat().st_ino for file in (tmp_path / "cache").glob("*.parquet")}
    here(recipe, *extra, LAMBDAS)
    # The reference was scored once for all, on the rows for training and on those for evaluation
    assert len(scored) == 2
    assert {file: file.stat().st_ino for file in (tmp_path / "cache").glob("*.parquet")} == scored
    (weights,) = (tmp_path / "whole" / "dpo").glob("*model.safetensors")
    expected, found = load_file(weights), load_file(tmp_path / "sweep" / "fixed-0.5" / "dpo" / weights.name)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    other = load_file(tmp_path / "sweep" / "fixed-1.0" / "dpo" / weights.name)
    assert not all(torch.equal(other[key], expected[key]) for key in expected)
    start = json.loads((tmp_path / "sweep" / "fixed-0.5" / "dpo" / "trainer_state.json").read_text())["log_history"][0]
    assert start["eval_rewards/chosen"] == 0.0
    assert here(recipe, *extra, LAMBDAS).out.count("finished before, skipped") == 3


def test_the_built_in_demo_and_its_comparison(tmp_path, here, monkeypatch):
    monkeypatch.setattr(session, "launch", run_here)
    small = [
        "data.max_train_rows=32",
        "data.max_eval_rows=8",
        "sft.max_steps=2",
        "dpo.max_steps=2",
        "sft.report_to=none",
    ]
    here(
        ROOT / "recipes" / "tiny_sweep.yaml", f"output_dir={tmp_path / 'demo'}", LAMBDAS, *small, "dpo.report_to=none"
    )  # fmt: skip
    assert [*(tmp_path / "demo" / "comparison").iterdir()]


def test_ctrl_c_saves_the_current_run_and_the_same_command_finishes_it(recipe, tmp_path, here, monkeypatch, compared):
    values = YAML(typ="safe").load(recipe)
    del values["sft"], values["data"]["eval_size"]
    values["dpo"] |= {"max_steps": 150, "save_steps": 1000}
    YAML(typ="safe").dump(values, recipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "dposhift_trl.sweep", str(recipe), LAMBDAS],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    folder, log = tmp_path / "sweep" / "fixed-1.0" / "dpo", tmp_path / "sweep" / "fixed-1.0.log"
    while not (log.is_file() and re.search(r"^step +\d+/150 ", log.read_text(), re.MULTILINE)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Stopped by SIGINT during fixed-1.0. Run the same command again to continue." in stderr
    assert "Traceback" not in stderr
    assert "SIGTERM, saved at step" in log.read_text()
    assert not (folder / "finished.json").exists()
    monkeypatch.setattr(session, "launch", run_here)
    done = here(recipe, LAMBDAS)
    assert f"dpo: resuming from {folder / 'checkpoint-'}" in done.out
    assert "[2/2] fixed-0.5: done in " in done.out
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [*range(1, 151)]
