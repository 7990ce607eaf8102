"""The list of all keys of a recipe, as `--keys` prints it and as a schema for editors."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import json_schema
import pytest

from dposhift_trl.ranges import RANGES
from dposhift_trl.recipe import SECTIONS, RecipeError, dump_yaml, load_recipe, parse_yaml, recipe_keys
from dposhift_trl.recipe.checks import check_keys_and_types
from dposhift_trl.recipe.keys import REQUIRED, TOP_LEVEL
from dposhift_trl.recipe.listing import LISTED, key_lines
from dposhift_trl.recipe.schema import NARROWER, recipe_schema, schema_text
from dposhift_trl.recipe.sections import DECIDED_ELSEWHERE, STAGES
from dposhift_trl.run import main


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FILE = ROOT / "recipes" / "recipe.schema.json"
KEYS = recipe_keys()
SCHEMA = recipe_schema()
SOUND = parse_yaml((ROOT / "recipes" / "tiny_shift.yaml").read_text(encoding="utf-8"))


def by_name(section):
    return {key.name: key for key in recipe_keys(section)}


# The list


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_of_a_section_is_a_key_unless_it_is_set_elsewhere(section):
    fields = {field.name for field in dataclasses.fields(SECTIONS[section]) if field.init}
    assert set(by_name(section)) == fields - (set(DECIDED_ELSEWHERE) if section in STAGES else set())


def test_every_key_has_a_type_a_default_and_a_sentence():
    assert len({key.dotted for key in KEYS}) == len(KEYS) > 300
    for key in KEYS:
        assert key.type, key.dotted
        assert key.default_text, key.dotted
        assert "<" not in key.default_text, key.dotted
        assert 3 <= len(key.sentence) <= len(key.help), key.dotted
        assert "%%" not in key.help, key.dotted


def test_ours_come_first_in_dpo():
    ours = [key.is_ours for key in recipe_keys("dpo")]
    assert ours == sorted(ours, reverse=True)
    names = [key.name for key in recipe_keys("dpo") if key.is_ours]
    assert {"lambda_schedule", "shift_lambda", "precompute_ref_log_probs", "save_pair_scores"} <= set(names)
    assert "beta" not in names


@pytest.mark.parametrize(
    ("dotted", "type_", "default", "sentence"),
    [
        ("output_dir", "a string", "none, required", "Run folder, in which each stage has a folder."),
        (
            "dpo.shift_lambda",
            "a number, finite and at least 1e-7",
            "0.95",
            "Lambda of the `'fixed'` schedule, in (0, 1].",
        ),
        (
            "dpo.f_divergence_type",
            "one of reverse_kl, forward_kl, js_divergence, alpha_divergence",
            "reverse_kl",
            None,
        ),
        ("sft.eval_strategy", "one of no, steps, epoch", "steps, or no without evaluation rows", None),
        ("dpo.metric_for_best_model", "a string or null", "dpo_loss, or null without evaluation rows", None),
        ("sft.trackio_static_space_id", "a string or null or false", "null", None),
        ("data.eval_split", "a string or null", "null", "Split to evaluate on."),
        ("model.merge_adapter", "true or false", "false", None),
        ("wandb.mode", "one of online, offline, disabled or null", "null", None),
    ],
)
def test_a_key_is_described(dotted, type_, default, sentence):
    (key,) = (key for key in KEYS if key.dotted == dotted)
    assert (key.type, key.default_text) == (type_, default)
    assert sentence in (None, key.sentence)


@pytest.mark.parametrize("evaluates", [True, False], ids=["evaluation rows", "none"])
def test_the_defaults_are_those_of_a_recipe_without_the_keys(tmp_path, evaluates):
    recipe = {
        "output_dir": "runs/x",
        "model": {"model_name_or_path": "demo"},
        "data": {"path": "demo", **({"eval_split": "test"} if evaluates else {})},
        **{name: {"bf16": False} for name in STAGES},
    }
    spelled_out = copy.deepcopy(recipe)
    for key in KEYS:
        place = spelled_out if key.section == TOP_LEVEL else spelled_out.setdefault(key.section, {})
        default = key.default if evaluates else key.default_without_eval
        if default is not REQUIRED:
            place.setdefault(key.name, default)
    loaded = []
    for name, values in (("short", recipe), ("long", spelled_out)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_yaml(values), encoding="utf-8")
        loaded.append(load_recipe(str(path)))
    short, long = loaded
    assert (short.seed, short.run_name, short.report) == (long.seed, long.run_name, long.report)
    assert (short.model, short.data, short.wandb) == (long.model, long.data, long.wandb)
    for name in STAGES:
        assert short.stages[name].to_dict() == long.stages[name].to_dict()


# As text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal(width):
    lines = key_lines(width=width)
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line and not line.startswith(" ")] == list(LISTED)
    assert "  beta (a number, finite and greater than 0; default 0.1)" in lines


def test_without_a_terminal_each_key_is_one_line_to_search_in():
    lines = key_lines()
    assert len(lines) == len(KEYS)
    assert [line.partition(":")[0] for line in lines] == [key.dotted for key in KEYS]
    assert "data.eval_split: a string or null; default null. Split to evaluate on." in lines
    (files,) = (line for line in lines if line.startswith("data.data_files: "))
    assert files.endswith(" as in `datasets.load_dataset`: names, which are read as they are, and patterns.")


def test_keys_of_a_section_are_listed(capsys):
    assert main(["--keys", "wandb"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"wandb.{name}" for name in ("project", "entity", "mode", "tags")
    ]
    assert main(["--keys"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KEYS)


def test_a_section_that_does_not_exist_is_one_line(capsys):
    assert main(["--keys", "dop"]) == 2
    assert capsys.readouterr().err == (
        "`--keys` must be one of top-level, model, data, sft, dpo, wandb, or without a section list all, got 'dop'. "
        "Did you mean `dpo`?\n"
    )


def test_without_a_recipe_there_is_nothing_to_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--dry-run"])
    assert stopped.value.code == 2
    assert "the following arguments are required: recipe" in capsys.readouterr().err


# The schema


def test_the_command_prints_the_schema_and_nothing_else(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # of which transformers prints a line
    command = [sys.executable, "-m", "dposhift_trl.run", "--schema"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(result.stdout) == SCHEMA


def test_the_file_beside_the_recipes_is_the_schema():
    again = "python -m dposhift_trl.run --schema > recipes/recipe.schema.json"
    saved = json.loads(FILE.read_text(encoding="utf-8"))
    if saved["$comment"] == SCHEMA["$comment"]:
        assert FILE.read_text(encoding="utf-8") == schema_text() + "\n", again
    for key in KEYS:
        if key.is_ours:  # the others are of the versions of TRL and transformers that `$comment` names
            old, new = (
                schema["properties"] if key.section == TOP_LEVEL else schema["properties"][key.section]["properties"]
                for schema in (saved, SCHEMA)
            )
            assert old[key.name] == new[key.name], again


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_names_the_schema_and_is_valid(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# yaml-language-server: $schema={FILE.name}\n")
    assert json_schema.mistakes(SCHEMA, parse_yaml(text)) == []


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ({"dpo": {"lerning_rate": 1e-6}}, ".dpo.lerning_rate is not known"),
        ({"dpo": {"seed": 1}}, ".dpo.seed is not known"),
        ({"dpo": {"shift_lambda": 0}}, "shift_lambda"),
        ({"dpo": {"beta": "0.1"}}, "beta"),
        ({"dpo": {"lambda_schedule": "linear"}}, "lambda_schedule"),
        ({"dpo": {"lambda_schedule": [[0, 1], [1]]}}, "lambda_schedule"),
        ({"dpo": {"loss_type": "sigmoyd"}}, "loss_type"),
        ({"dpo": {"report_to": ["wandb", "wndb"]}}, "report_to"),
        ({"dpo": {"save_steps": 1.5}}, "save_steps"),
        ({"data": {"path": "demo", "audit": {"cut": "kep"}}}, "audit"),
        ({"data": {"path": "demo", "columns": {"choosen": "good"}}}, "choosen"),
        ({"data": {"mixture": [{"path": "demo", "eval_size": 3}]}}, "mixture"),
        ({"model": {"dtype": "float32"}}, "model_name_or_path"),
        ({"wandb": {"mode": "onlin"}}, "mode"),
        ({"seed": True}, "seed"),
        ({"sed": 1}, ".sed is not known"),
    ],
    ids=str,
)
def test_a_broken_recipe_is_marked(change, mistake):
    found = json_schema.mistakes(SCHEMA, {**SOUND, **change})
    assert len(found) == 1
    assert mistake in found[0]


@pytest.mark.parametrize("missing", ["output_dir", "model", "data"])
def test_a_recipe_without_a_part_is_marked(missing):
    assert json_schema.mistakes(SCHEMA, {key: value for key, value in SOUND.items() if key != missing})


def test_a_recipe_without_a_stage_is_marked():
    assert json_schema.mistakes(SCHEMA, {key: value for key, value in SOUND.items() if key not in STAGES})


def accepted(key, value):
    recipe = {"output_dir": "x", "model": {"model_name_or_path": "demo"}, "data": {"path": "demo"}, "dpo": {}}
    place = recipe if key.section == TOP_LEVEL else recipe.setdefault(key.section, {})
    place[key.name] = value
    by_schema = not json_schema.mistakes(SCHEMA, recipe)
    try:
        check_keys_and_types(copy.deepcopy(recipe), "x.yaml")
    except RecipeError:
        return by_schema, False
    return by_schema, True


VALUES = [None, True, "no such word", "", 0, 1, 7, -1, 0.5, -0.5, 1.5, [], ["x"], [0.5], [[0, 1.0]], {}, {"a": "b"}]
# The schema says more of these than the checks of types; and 0 is `False` to pydantic
NOT_COMPARED = {*NARROWER, "output_dir", "model.model_name_or_path", "sft.trackio_static_space_id"}


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_the_schema_accepts_what_the_checks_accept(section):
    for key in recipe_keys(section):
        for value in [*VALUES, *key.words[:2], list(key.words[:2])]:
            if key.dotted.replace("dpo.trackio", "sft.trackio") not in NOT_COMPARED:
                by_schema, by_checks = accepted(key, value)
                assert by_schema == by_checks, (key.dotted, value)


@pytest.mark.parametrize("name", RANGES)
def test_the_schema_of_a_range_is_its_rule(name):
    rule = RANGES[name].rule
    for number in (-2, -1, -0.5, 0, 1e-8, 0.25, 0.5, 0.75, 1, 1.5, 2, 65_536, 65_537, 2**32 - 1, 2**32):
        if isinstance(number, float) or number < 2**31 or name in ("seed", "data_seed"):
            assert (not json_schema.mistakes(rule.schema, number)) == bool(rule.holds(number)), number
