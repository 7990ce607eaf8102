"""What the environment sets: it outranks our defaults, and a recipe outranks it."""

import importlib.util
import os
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import wandb
from test_docs import ROOT, names_in_first_column

from dposhift_trl.pipeline.errors import RunError
from dposhift_trl.pipeline.tracking import wandb_run
from dposhift_trl.recipe import RecipeError, load_recipe
from dposhift_trl.reference import cache


TABLE = names_in_first_column((ROOT / "docs" / "environment.md").read_text(encoding="utf-8"))
# Variable, its value, the argument of `wandb.init` and its value then, without the variable, and with a recipe's key
WANDB_ROWS = {
    "WANDB_PROJECT": ("theirs", "project", "theirs", "dposhift_trl", "wandb.project=own", "own"),
    "WANDB_ENTITY": ("theirs", "entity", "theirs", None, "wandb.entity=own", "own"),
    "WANDB_TAGS": ("a, b,", "tags", ["a", "b"], None, "wandb.tags=[own]", ["own"]),
    "WANDB_MODE": ("shared", "mode", "shared", "offline", "wandb.mode=online", "online"),
    "WANDB_DISABLED": ("TRUE", "mode", None, "offline", "wandb.mode=online", "online"),
    "WANDB_NAME": ("theirs", "name", "theirs-dpo", "x-dpo", "run_name=own", "own-dpo"),
    "WANDB_RUN_GROUP": ("theirs", "group", "theirs", "x", None, None),
    "WANDB_JOB_TYPE": ("theirs", "job_type", "theirs", "dpo", None, None),
    "WANDB_QUIET": ("false", "settings", {"quiet": False}, {"quiet": True}, None, None),
    "WANDB_DIR": ("theirs", "dir", "{here}/theirs", "{here}/runs/x", None, None),
}
CACHES = ("HF_HOME", "DPOSHIFT_CACHE")


def test_the_table_has_a_test_for_each_row():
    assert [*WANDB_ROWS, *CACHES] == TABLE


@pytest.fixture
def init(tmp_path, monkeypatch):
    """The arguments of the W&B run of a recipe, or `None` if there is no run."""
    monkeypatch.chdir(tmp_path)
    for variable in (*WANDB_ROWS, "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    Path("x.yaml").write_text(
        "{output_dir: runs/x, model: {model_name_or_path: demo}, data: {path: demo}, "
        "dpo: {bf16: false, use_cpu: true}}"
    )

    class Run:
        url = "https://wandb.example/x"

        def finish(self):
            pass

    calls = []

    def start(**arguments):
        wandb.Settings(mode=os.environ.get("WANDB_MODE", "online"))  # W&B reads the environment too, and is strict
        calls.append(arguments)
        return Run()

    def init(*overrides):
        calls.clear()
        monkeypatch.setattr(wandb, "login", lambda prompt: False)
        monkeypatch.setattr(wandb, "init", start)
        recipe = load_recipe("x.yaml", overrides)
        with wandb_run("dpo", recipe):
            pass
        assert ("wandb" in recipe.stages["dpo"].report_to) == bool(calls)
        return calls[0] if calls else None

    return init


@pytest.mark.parametrize("variable", WANDB_ROWS)
def test_a_variable_of_wandb_outranks_our_default_and_a_recipe_outranks_it(variable, init, tmp_path, monkeypatch):
    value, argument, theirs, default, override, own = WANDB_ROWS[variable]

    def found(*overrides):
        arguments = init(*overrides)
        return None if arguments is None else arguments[argument]

    def here(value):
        return value.format(here=tmp_path) if isinstance(value, str) else value

    assert found() == here(default)
    monkeypatch.setenv(variable, "")
    assert found() == here(default)
    monkeypatch.setenv(variable, value)
    assert found() == here(theirs)
    if override is not None:
        assert found(override) == own


@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true"), ("WANDB_DISABLED", "1")]
)
def test_disabled_leaves_no_run_and_no_file(variable, value, init, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert init() is None
    assert not (tmp_path / "runs").exists()
    assert init("dpo.report_to=[wandb, tensorboard]") is None
    assert init("wandb.mode=offline") is not None


def test_a_recipe_can_disable_wandb(init, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert init("wandb.mode=disabled") is None
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("value", "mode"), [("run", "online"), ("dryrun", "offline"), ("offline", "offline")])
def test_modes_under_their_old_names(value, mode, init, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", value)
    assert init()["mode"] == mode


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WANDB_MODE", "onlin", "`mode` must be one of online, offline, shared, disabled, got 'onlin'. Write for "
         "example `offline`."),
        ("WANDB_PROJECT", "a/b", "`project` must be at most 128 characters without / \\ # ? % :, got 'a/b'. Write for "
         "example `dposhift_trl`."),
        ("WANDB_TAGS", 65 * "x", f"Each of `tags` must have 1 to 64 characters, got {65 * 'x'!r}. Change or remove "
         "it."),
    ],
)  # fmt: skip
def test_a_variable_that_makes_no_sense_is_one_line_unless_nothing_is_logged_to_wandb(
    variable, value, message, init, monkeypatch
):
    monkeypatch.setenv(variable, value)
    message = f"The environment variable {variable} cannot be used: {message}"
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        init()
    assert init("dpo.report_to=none") is None
    assert init("wandb={project: own, mode: offline, tags: [own]}")["mode"] == "offline"


def test_the_environment_is_no_part_of_the_saved_recipe(init, monkeypatch):
    """So that a run folder can be continued in another environment."""
    before = load_recipe("x.yaml").resolved
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert load_recipe("x.yaml").resolved == before


def test_an_error_of_wandb_is_one_line(init, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    init()

    def refuse(**arguments):
        raise wandb.errors.UsageError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", refuse)
    message = "dpo: W&B cannot start: No API key configured. Run `wandb login`, or set `wandb.mode: offline`."
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"), wandb_run("dpo", load_recipe("x.yaml")):
        pass


@pytest.mark.parametrize("variable", CACHES)
def test_the_scores_of_references_are_where_the_environment_says(variable, tmp_path, monkeypatch):
    for name in (*CACHES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def found():
        # huggingface_hub reads the environment when it is imported
        spec = importlib.util.spec_from_file_location("constants", huggingface_hub.constants.__file__)
        constants = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(constants)
        monkeypatch.setattr(cache, "HF_HOME", constants.HF_HOME)
        return cache.default_folder()

    assert found() == tmp_path / ".cache/huggingface/dposhift_trl/reference"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert found() == tmp_path / "hub/dposhift_trl/reference"
    if variable == "DPOSHIFT_CACHE":
        monkeypatch.setenv("DPOSHIFT_CACHE", "~/scores")
        assert found() == tmp_path / "scores"
