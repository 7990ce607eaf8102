"""A run folder that was interrupted, moved or damaged, or a full disk: the same command goes on or says what to do."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from dposhift_trl import artifacts
from dposhift_trl.pipeline import loading
from dposhift_trl.pipeline.errors import RunError
from dposhift_trl.pipeline.run_folder import claimed, recipe_changes
from dposhift_trl.recipe import load_recipe
from dposhift_trl.run import main


LORA = ["model.use_peft=true", "model.lora_target_modules=[c_attn]"]


def write_recipe(folder, model, **sections):
    make_rows(24).to_json(folder / "rows.jsonl")
    stage = {
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "save_steps": 2, "save_total_limit": 9, "max_steps": 6, "logging_steps": 2,
        "eval_strategy": "no",
    }  # fmt: skip
    values = {
        "output_dir": str(folder / "run"),
        "report": False,
        "model": {"model_name_or_path": model},
        "data": {"path": str(folder / "rows.jsonl"), "eval_size": 4},
        "dpo": {**stage, "lambda_schedule": "linear_decrease"},
        **sections,
    }
    YAML(typ="safe").dump(values, folder / "recipe.yaml")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """Recipe and run folder of a finished run of stage 2, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, tiny_model)
    assert main([str(recipe)]) == 0
    return recipe, folder / "run"


@pytest.fixture
def interrupted(finished, tmp_path):
    """Recipe and a copy of the run folder, named as the original, as if the run had been killed after step 4."""
    recipe, original = finished
    folder = shutil.copytree(original, tmp_path / "run")
    for name in ("finished.json", "model.safetensors", "trainer_state.json"):
        (folder / "dpo" / name).unlink()
    shutil.rmtree(folder / "dpo" / "checkpoint-6")
    return recipe, folder


def same_weights(left, right):
    weights, others = (load_file(folder / "dpo" / "model.safetensors") for folder in (left, right))
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def last_line(done):
    return done.err.splitlines()[-1]


# Interrupted


def test_of_damaged_checkpoints_an_older_one_is_taken_and_the_end_is_the_same(finished, interrupted, here):
    recipe, folder = interrupted
    path = folder / "dpo" / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    done = here(recipe, f"output_dir={folder}")
    assert "checkpoint-4 is damaged (optimizer.pt is cut or broken), moved to " in done.out
    assert f"dpo: resuming from {folder / 'dpo' / 'checkpoint-2'}\n" in done.out
    assert same_weights(folder, finished[1])
    assert (folder / "dpo" / "damaged-checkpoint-4" / "optimizer.pt").is_file()


def test_a_checkpoint_that_is_broken_inside_is_one_line(interrupted, here):
    recipe, folder = interrupted
    path = folder / "dpo" / "checkpoint-4" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    place = content.index(b"data.pkl") + 100
    content[place : place + 60] = bytes(60)
    path.write_bytes(content)
    done = here(recipe, f"output_dir={folder}", code=2)
    assert last_line(done).startswith(f"Stage `dpo` cannot load {folder / 'dpo' / 'checkpoint-4'}: ")
    assert last_line(done).endswith("or move the folder away to go on from an older checkpoint.")
    assert "Traceback" not in done.err
    shutil.rmtree(path.parent)
    here(recipe, f"output_dir={folder}")


def test_other_rows_are_refused_and_the_same_rows_elsewhere_are_not(finished, interrupted, tmp_path, here):
    recipe, folder = interrupted
    rows = make_rows(24)
    rows.to_json(tmp_path / "same.jsonl")
    rows.rename_columns({"chosen": "rejected", "rejected": "chosen"}).to_json(tmp_path / "swapped.jsonl")
    swapped = [recipe, f"output_dir={folder}", f"data.path={tmp_path / 'swapped.jsonl'}"]
    for _ in range(2):
        done = here(*swapped, code=2)
        assert last_line(done) == (
            "Stage `dpo` cannot be resumed: train rows, eval rows changed since it started. Restore what it started "
            "from, choose a new `output_dir`, or pass --accept-changes to go on with what is there now."
        )
    here(recipe, f"output_dir={folder}", f"data.path={tmp_path / 'same.jsonl'}")
    assert same_weights(folder, finished[1])
    done = here(*swapped)
    assert "dpo: train rows, eval rows changed since it was trained." in done.out


def test_another_start_is_refused_since_the_reference_comes_from_it(finished, interrupted, tiny_model, tmp_path, here):
    recipe, folder = interrupted
    edited = shutil.copytree(tiny_model, tmp_path / "edited")
    weights = load_file(edited / "model.safetensors")
    weights["transformer.wte.weight"][3, 3] += 1e-3
    save_file(weights, edited / "model.safetensors", metadata={"format": "pt"})
    options = [recipe, f"output_dir={folder}", f"model.model_name_or_path={edited}"]
    assert "`dpo` cannot be resumed: model changed since it started." in last_line(here(*options, code=2))
    assert "dpo: model changed since it started\n" in here(*options, "--accept-changes").out
    assert not same_weights(folder, finished[1])


# Moved


def test_a_run_that_was_moved_and_renamed_goes_on_from_anywhere(finished, interrupted, tmp_path, here, monkeypatch):
    recipe, folder = interrupted
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "named-otherwise")
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = here(recipe, "output_dir=named-otherwise")
    assert "resuming from named-otherwise/dpo/checkpoint-4" in done.out
    assert same_weights(moved, finished[1])
    assert not list(moved.glob("recipe.*.yaml"))
    assert YAML(typ="safe").load(moved / "recipe.yaml")["run_name"] == "named-otherwise"
    assert (
        "was started with a different recipe: run_name changed"
        in here(recipe, f"output_dir={moved}", "run_name=mine", code=2).err
    )


def test_a_lora_run_that_was_moved_finds_its_base(tmp_path, here):
    (tmp_path / "before").mkdir()
    recipe = write_recipe(tmp_path / "before", "demo", sft={
        "bf16": False, "use_cpu": True, "report_to": "none", "max_steps": 1, "eval_strategy": "no",
    })  # fmt: skip
    options = [recipe, *LORA, "dpo.max_steps=2", "dpo.save_steps=1"]
    here(*options)
    original = tmp_path / "before" / "run"
    folder = original.rename(tmp_path / "after")
    for name in ("finished.json", "adapter_model.safetensors"):
        (folder / "dpo" / name).rename(tmp_path / name)
    shutil.rmtree(folder / "dpo" / "checkpoint-2")
    done = here(*options, f"output_dir={folder}")
    config = folder / "sft" / "adapter_config.json"
    assert f"{config}: the base model was moved from {original / 'base'} to {folder / 'base'}\n" in done.out
    assert "dpo: resuming from" in done.out
    left, right = (load_file(path / "adapter_model.safetensors") for path in (folder / "dpo", tmp_path))
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert json.loads((folder / "dpo" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / "base"
    )


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        ({}, []),
        ({"output_dir": "/b/run"}, []),
        ({"output_dir": "/b/new", "run_name": "new"}, []),
        ({"output_dir": "/b/new"}, []),
        ({"run_name": "new"}, ["run_name"]),
        ({"output_dir": "/b/new", "run_name": "mine"}, ["run_name"]),
        ({"output_dir": "/b/run", "model": {"model_name_or_path": "/b/base"}}, []),
        ({"output_dir": "/b/run", "model": {"model_name_or_path": "/c/base"}}, ["model.model_name_or_path"]),
        ({"model": {"model_name_or_path": "gpt2"}}, ["model.model_name_or_path"]),
        ({"output_dir": "/b/run", "seed": 1}, ["seed"]),
    ],
    ids=str,
)
def test_a_moved_folder_has_the_same_recipe(now, changes):
    earlier = {"output_dir": "/a/run", "run_name": "run", "seed": 0, "model": {"model_name_or_path": "/a/base"}}
    assert recipe_changes(earlier, {**earlier, **now}) == changes


def test_a_moved_point_of_a_sweep_has_the_same_recipe():
    earlier = {"output_dir": "/a/sweep/fixed-1.0", "run_name": "sweep-fixed-1.0"}
    moved = {"output_dir": "/b/other/fixed-1.0", "run_name": "other-fixed-1.0"}
    assert recipe_changes(earlier, moved) == []
    assert recipe_changes(earlier, {**moved, "run_name": "other-fixed-0.5"}) == ["run_name"]


# Without its model


@pytest.mark.parametrize("damage", ["deleted", "cut", "tokenizer"])
def test_a_finished_stage_without_its_model_saves_it_again(damage, finished, tmp_path, here):
    recipe, original = finished
    folder = shutil.copytree(original, tmp_path / "run")
    path = folder / "dpo" / ("tokenizer.json" if damage == "tokenizer" else "model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1]) if damage == "cut" else path.unlink()
    done = here(recipe, f"output_dir={folder}")
    assert f"dpo: finished before, but {path.name} is " in done.out
    assert path.read_bytes() == content
    assert "dpo: finished before, skipped" in here(recipe, f"output_dir={folder}").out


def test_a_finished_stage_without_model_and_checkpoint_is_one_line_at_once(finished, tmp_path, here):
    recipe, original = finished
    folder = shutil.copytree(original, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    (folder / "dpo" / "model.safetensors").unlink()
    before = sorted(folder.rglob("*"))
    done = here(recipe, f"output_dir={folder}", code=2)
    assert done.err == (
        f"{folder / 'dpo' / 'finished.json'} is there, but model.safetensors is missing. Restore the model, or delete "
        "finished.json to train the stage again.\n"
    )
    assert sorted(folder.rglob("*")) == before


# Recipes that are replaced, and what a kill leaves


def test_no_earlier_recipe_is_lost(finished, tmp_path):
    recipe, original = finished
    folder = shutil.copytree(original, tmp_path / "run")
    (folder / "recipe.2.yaml").write_text("mine")
    first = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml.tmp").write_text("half")
    for number, beta in enumerate((0.2, 0.3, 0.4)):
        with (
            pytest.raises(RunError, match=r"different recipe: dpo.beta changed"),
            claimed(load_recipe(str(recipe), [f"output_dir={folder}", f"dpo.beta={beta}"]), False),
        ):
            pass
        with claimed(load_recipe(str(recipe), [f"output_dir={folder}", f"dpo.beta={beta}"]), True):
            pass
        assert len(list(folder.glob("recipe.*.yaml"))) == number + 2
    assert (folder / "recipe.1.yaml").read_text() == first
    assert (folder / "recipe.2.yaml").read_text() == "mine"
    assert "beta: 0.3" in (folder / "recipe.4.yaml").read_text()
    assert not list(folder.glob("*.tmp"))


# The disk is full


@pytest.fixture
def full_disk(monkeypatch):
    """No file with this name can be written."""

    def fill(name):
        write = artifacts._write

        def refuse(file, content):
            if Path(file.name).name.startswith(name):
                raise OSError(errno.ENOSPC, "No space left on device", file.name)
            write(file, content)

        monkeypatch.setattr(artifacts, "_write", refuse)

    return fill


@pytest.mark.parametrize("name", ["audit.json", "eval_rows.parquet", "start.json", "finished.json", "README.md"])
def test_a_full_disk_is_one_line_whatever_is_written(name, finished, tmp_path, here, full_disk):
    recipe, original = finished
    folder = shutil.copytree(original, tmp_path / "run")
    (folder / "dpo" / "finished.json").unlink()
    if name == "start.json":
        for path in folder.glob("dpo/checkpoint-*"):
            shutil.rmtree(path)
    full_disk(name)
    done = here(recipe, f"output_dir={folder}", code=1)
    assert "No space left on device" in last_line(done)
    assert last_line(done).endswith("Free some space and run the same command again.")
    assert "Traceback" not in done.err


def test_a_full_disk_while_the_demo_model_is_saved_is_one_line(tmp_path, here, monkeypatch):
    def save(folder):
        Path(folder).mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device", folder)

    recipe = write_recipe(tmp_path, "demo")
    monkeypatch.setattr(loading, "save_demo_model", save)
    done = here(recipe, code=1)
    assert done.err == (
        f"The run: cannot write to {tmp_path / 'run'}: [Errno 28] No space left on device: "
        f"'{tmp_path / 'run' / 'base.tmp'}'. Free some space and run the same command again.\n"
    )


def test_what_a_run_shows_may_change_before_it_goes_on(interrupted, finished, here):
    recipe, folder = interrupted
    shown = ["wandb.mode=offline", "dpo.logging_steps=1", "dpo.disable_tqdm=true", f"output_dir={folder}"]
    assert f"dpo: resuming from {folder}/dpo/checkpoint-4" in here(recipe, *shown).out
    assert same_weights(folder, finished[1])


@pytest.mark.parametrize(
    ("change", "changes"),
    [({"path": "../rows.jsonl"}, ["data.mixture.path"]), ({"weight": 2.0}, ["data.mixture"])],
)
def test_places_of_a_mixture_are_told_apart_from_what_is_drawn(change, changes):
    earlier = {"output_dir": "run", "data": {"mixture": [{"path": "rows.jsonl", "weight": 1.0}, {"path": "other"}]}}
    first, second = earlier["data"]["mixture"]
    now = {**earlier, "data": {"mixture": [{**first, **change}, second]}}
    assert recipe_changes(earlier, now) == changes


@pytest.mark.parametrize(("steps", "last"), [(2, 4), (12, 6)])
def test_steps_that_a_checkpoint_does_not_fit_are_refused(steps, last, finished, interrupted, here):
    recipe, folder = interrupted
    if last == 6:
        shutil.copytree(finished[1] / "dpo" / "checkpoint-6", folder / "dpo" / "checkpoint-6")
    options = recipe, f"output_dir={folder}", f"dpo.max_steps={steps}", "--accept-changes"
    error = last_line(here(*options, code=2))
    assert f"cannot be resumed: `max_steps` is {steps} now, and {folder}/dpo/checkpoint-{last} is of step" in error
