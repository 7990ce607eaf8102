"""Recipes: what is accepted, what is refused, and the messages."""

import math
import re
from pathlib import Path

import pytest
from transformers import training_args

from dposhift_trl import DPOShiftConfig
from dposhift_trl.data.config import AUDIT_KINDS
from dposhift_trl.data.tokens import Truncation
from dposhift_trl.recipe import RecipeError, changed_keys, dump_yaml, load_recipe, parse_yaml
from dposhift_trl.recipe.sections import DECIDED_ELSEWHERE, OTHER_NAMES


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
HEAD = "output_dir: runs/x\nmodel: {model_name_or_path: demo}\n"
DATA = "data: {path: demo}\n"
DPO = "dpo: {bf16: false, use_cpu: true}\n"
SFT = "sft: {bf16: false, use_cpu: true}\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a recipe from text, as x.yaml."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        Path("x.yaml").write_text(text, encoding="utf-8")
        return load_recipe("x.yaml", overrides)

    return load


@pytest.fixture
def refuse(load):
    """Error lines for a recipe given as text, without the file name."""

    def refuse(text, *overrides):
        with pytest.raises(RecipeError) as raised:
            load(text, *overrides)
        lines = str(raised.value).splitlines()
        assert all(line.startswith("x.yaml: ") for line in lines), lines
        return [line.removeprefix("x.yaml: ") for line in lines]

    return refuse


def data(text):
    return HEAD + f"data: {{{text}}}\n" + DPO


def dpo(text):
    return HEAD + DATA + f"dpo: {{bf16: false, use_cpu: true, {text}}}\n"


# The recipes of the repository


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_repository_is_sound(path):
    stages = [name for name in ("sft", "dpo") if f"\n{name}:" in path.read_text(encoding="utf-8")]
    recipe = load_recipe(str(path), [f"{name}.bf16=false" for name in stages])  # not supported on every machine
    assert list(recipe.stages) == stages
    assert stages[-1] == "dpo"
    assert recipe.output_dir == Path("runs") / path.stem
    assert recipe.data.has_eval
    assert isinstance(recipe.stages["dpo"], DPOShiftConfig)
    assert parse_yaml(dump_yaml(recipe.resolved)) == recipe.resolved


@pytest.mark.parametrize("name", ["llama3_8b_shift", "qwen2_7b_shift"])
def test_recipes_of_the_paper_train_on_every_row_that_can_be_trained_on(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    data = load_recipe(str(path), ["sft=null", "dpo.bf16=false"]).data
    assert {kind for kind in AUDIT_KINDS if data.policy(kind) != "keep"} == {"missing", "refused"}
    assert "audit: keep # as in the paper, no row is filtered" in path.read_text(encoding="utf-8")


def test_the_repository_has_recipes():
    assert {"gpt2_shift.yaml", "gpt2_shift_lora.yaml", "llama3_8b_shift.yaml", "qwen2_7b_shift.yaml"} <= {
        path.name for path in RECIPES
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_header_of_a_recipe_ends_with_the_command_that_runs_it(path):
    header = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    assert re.search(rf"-m dposhift_trl\.(run|sweep) recipes/{re.escape(path.name)}( |$)", header[-1])


# What a recipe becomes


def test_a_recipe_becomes_typed_sections_with_the_command_s_own_defaults(load, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    recipe = load(HEAD + "data: {path: demo, eval_split: test}\n" + SFT + DPO)
    assert (recipe.source, recipe.output_dir, recipe.seed, recipe.run_name) == ("x.yaml", Path("runs/x"), 42, "x")
    assert recipe.model.model_name_or_path == "demo"
    assert (recipe.data.path, recipe.data.eval_split) == ("demo", "test")
    assert (recipe.wandb.project, recipe.wandb.mode, recipe.wandb.tags) == (None, None, [])
    assert list(recipe.stages) == ["sft", "dpo"]
    for name, stage in recipe.stages.items():
        assert (stage.output_dir, stage.seed, stage.run_name) == (f"runs/x/{name}", 42, f"x-{name}")
        assert (stage.save_steps, stage.save_total_limit, stage.report_to) == (0.1, 2, ["wandb"])
        assert (stage.eval_strategy, stage.eval_steps, stage.eval_on_start) == ("steps", 0.1, True)
        assert stage.metric_for_best_model == {"sft": "loss", "dpo": "dpo_loss"}[name]
        assert stage.greater_is_better is False
    assert recipe.truncations == {"sft": Truncation(1024), "dpo": Truncation(1024)}


def test_without_evaluation_rows_nothing_is_evaluated(load):
    stage = load(HEAD + DATA + DPO).stages["dpo"]
    assert (stage.eval_strategy, stage.eval_on_start, stage.metric_for_best_model) == ("no", False, None)


def test_no_is_text_in_yaml_1_2_and_switches_evaluation_off(load):
    recipe = load(HEAD + "data: {path: demo, eval_split: test}\ndpo: {bf16: false, eval_strategy: no}\n")
    assert (recipe.stages["dpo"].eval_strategy, recipe.stages["dpo"].eval_on_start) == ("no", False)
    assert recipe.resolved["dpo"]["eval_strategy"] == "no"
    assert recipe.data.has_eval


def test_what_a_recipe_says_of_evaluation_is_kept(load):
    given = (
        "eval_strategy: epoch, metric_for_best_model: rewards/margins, greater_is_better: true, eval_on_start: false"
    )
    stage = load(HEAD + f"data: {{path: demo, eval_size: 0.1}}\ndpo: {{bf16: false, {given}}}\n").stages["dpo"]
    kept = (stage.eval_strategy, stage.metric_for_best_model, stage.greater_is_better, stage.eval_on_start)
    assert kept == ("epoch", "rewards/margins", True, False)


@pytest.mark.parametrize("spelling", ["1e-6", "1E-6", "1.0e-6", "0.000001"])
def test_a_small_number_is_a_number_however_it_is_spelt(load, spelling):
    assert load(dpo(f"learning_rate: {spelling}")).stages["dpo"].learning_rate == 1e-6


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("report_to: none", "report_to", []),
        ("report_to: [none]", "report_to", []),
        ("loss_type: hinge", "loss_type", ["hinge"]),
        ("loss_type: [hinge, sft], loss_weights: [1, 0.5]", "loss_weights", [1, 0.5]),
        ("lambda_schedule: [[0, 1], [1, 0.5]]", "lambda_schedule", [[0.0, 1.0], [1.0, 0.5]]),
        ("lambda_schedule: decrease_linear", "lambda_schedule", "linear_decrease"),
        ("shift_lambda: 1", "shift_lambda", 1.0),
    ],
)
def test_a_value_reaches_the_config_in_its_own_form(load, text, key, expected):
    assert getattr(load(dpo(text)).stages["dpo"], key) == expected


def test_one_value_where_a_list_is_wanted_is_a_list_of_one(load):
    recipe = load(HEAD + DATA + DPO + "wandb: {tags: first}\n")
    assert recipe.wandb.tags == ["first"]
    assert recipe.resolved["wandb"] == {"tags": ["first"]}


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["c_attn", "c_proj"]], ids=str)
def test_lora_targets_reach_peft_as_they_are_written(load, targets):
    model = f"model: {{model_name_or_path: demo, use_peft: true, lora_target_modules: {targets}}}\n"
    assert load("output_dir: x\n" + model + DATA + DPO).model.lora_target_modules == targets


@pytest.mark.parametrize("section", ["sft", "wandb"])
def test_a_null_section_is_one_left_out(load, section):
    assert load(HEAD + DATA + DPO + f"{section}:\n").resolved == load(HEAD + DATA + DPO).resolved


def test_an_anchor_shares_settings_between_the_stages(load):
    shared = "sft: &shared {bf16: false, learning_rate: 1e-5}\ndpo:\n  <<: *shared\n  beta: 0.2\n"
    stages = load(HEAD + DATA + shared).stages
    assert (stages["sft"].learning_rate, stages["dpo"].learning_rate, stages["dpo"].beta) == (1e-5, 1e-5, 0.2)


def test_an_override_of_one_stage_leaves_its_alias_alone(load):
    recipe = load(HEAD + DATA + "sft: &s {bf16: false, learning_rate: 1e-5}\ndpo: *s\n", "dpo.learning_rate=1e-7")
    assert [stage.learning_rate for stage in recipe.stages.values()] == [1e-5, 1e-7]


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_files_of_other_systems_are_read(load, change):
    assert load(change(HEAD + DATA + DPO)).resolved == load(HEAD + DATA + DPO).resolved


def test_a_mixture_becomes_sources(load):
    recipe = load(data("mixture: [{path: demo, weight: 3, eval_split: test}, {path: rows.jsonl}]"))
    assert [(source.path, source.weight) for source in recipe.data.sources] == [("demo", 3), ("rows.jsonl", 1.0)]
    assert recipe.data.has_eval
    assert recipe.stages["dpo"].eval_strategy == "steps"


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_each_stage_truncates_by_its_own_length_and_mode(load):
    lengths = "sft: {bf16: false, max_length: 64, truncation_mode: keep_end}\ndpo: {bf16: false, max_length: 32}\n"
    truncations = load(HEAD + DATA + lengths).truncations
    assert truncations == {"sft": Truncation(64, "keep_end"), "dpo": Truncation(32)}
    assert load(HEAD + DATA + lengths, "dpo.max_length=null").truncations["dpo"] == Truncation(None)


# Mistakes


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        pytest.param("sed: 1\n", ["unknown key `sed`. Did you mean `seed`?"], id="top level"),
        pytest.param("zzz: 1\n", ["unknown key `zzz`."], id="nothing near"),
        pytest.param("beta: 0.1\n", ["unknown key `beta`. Write `dpo.beta`."], id="key of a section"),
        pytest.param(
            "max_length: 64\n",
            ["unknown key `max_length`. Write `sft.max_length` or `dpo.max_length`."],
            id="key of both stages",
        ),
        pytest.param("1: 1\n", ["unknown key `1`."], id="number as key"),
        pytest.param("~: 1\n", ["unknown key `None`."], id="null as key"),
        pytest.param("wandb: {projct: x}\n", ["unknown key `wandb.projct`. Did you mean `project`?"], id="wandb"),
        pytest.param("sft: {2: x}\n", ["unknown key `sft.2`."], id="number in a section"),
        pytest.param(
            "sft: {lerning_rate: 0.5, lambda_min: 0.5, evaluation_strategy: no}\n",
            [
                "unknown key `sft.lerning_rate`. Did you mean `learning_rate`?",
                "unknown key `sft.lambda_min`.",
                "unknown key `sft.evaluation_strategy`. Use `eval_strategy`.",
            ],
            id="every one of them",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(refuse, text, lines):
    assert refuse(HEAD + DATA + DPO + text) == lines


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("pth: demo", "unknown key `data.pth`. Did you mean `path`?"),
        ("mixture: [{path: a}, {wieght: 1}]", "unknown key `data.mixture[1].wieght`. Did you mean `weight`?"),
        ("mixture: [{eval_size: 1}]", "unknown key `data.mixture[0].eval_size`. Did you mean `eval_split`?"),
    ],
)
def test_an_unknown_key_of_the_data_is_refused_with_the_nearest_one(refuse, text, line):
    assert refuse(data(text)) == [line]


def test_bfloat16_is_refused_where_no_gpu_has_it(refuse, monkeypatch):
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: False)
    assert refuse(HEAD + DATA + "dpo: {}\n") == [
        "section `dpo`: `bf16`, true unless set, requires a GPU with bfloat16. Write `bf16: false`, or "
        "`use_cpu: true` to train in bfloat16 on the CPU."
    ]


def test_an_unknown_key_of_the_model_is_refused_with_the_nearest_one(refuse):
    assert refuse("output_dir: x\nmodel: {model_name_or_path: demo, usepeft: true}\n" + DATA + DPO) == [
        "unknown key `model.usepeft`. Did you mean `use_peft`?"
    ]


@pytest.mark.parametrize(("key", "advice"), OTHER_NAMES.items())
def test_a_name_from_elsewhere_is_refused_with_the_one_to_use(refuse, key, advice):
    assert refuse(dpo(f"{key}: 1")) == [f"unknown key `dpo.{key}`. {advice}"]


@pytest.mark.parametrize(("key", "place"), DECIDED_ELSEWHERE.items())
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_key_that_is_decided_elsewhere_is_refused_with_the_place(refuse, stage, key, place):
    assert refuse(HEAD + DATA + f"{stage}: {{bf16: false, {key}: x}}\n") == [
        f"`{stage}.{key}` cannot be set here: {place}."
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("learning_rate: fast", "`dpo.learning_rate` must be a number, got 'fast'."),
        ("learning_rate: '1e-6'", "`dpo.learning_rate` must be a number, got '1e-6'."),
        ("learning_rate: .nan", "`dpo.learning_rate` must be a number, got nan."),
        ("learning_rate: 1e400", "`dpo.learning_rate` must be a number, got inf."),
        ("learning_rate: [1e-6]", "`dpo.learning_rate` must be a number, got [1e-06]."),
        ("beta: true", "`dpo.beta` must be a number, got True."),
        ("beta: ", "`dpo.beta` must be a number, got null. Write a value, or remove the key."),
        ("max_steps: 1.5", "`dpo.max_steps` must be an integer, got 1.5."),
        ("max_steps: 1e3", "`dpo.max_steps` must be an integer, got 1000.0."),
        ("max_length: long", "`dpo.max_length` must be an integer or null, got 'long'."),
        ("gradient_checkpointing: yes", "`dpo.gradient_checkpointing` must be true or false, got 'yes'."),
        ("eval_strategy: false", "`dpo.eval_strategy` must be a string, got False."),
        ("shift_lambda: '0.9'", "`dpo.shift_lambda` must be a number, got '0.9'."),
        ("lambda_schedule: 0.5", "`dpo.lambda_schedule` must be a string or a list of lists of numbers, got 0.5."),
        (
            "lambda_schedule: [0, 1]",
            "`dpo.lambda_schedule` must be a string or a list of lists of numbers, got [0, 1].",
        ),
        (
            "lambda_schedule: [[x]]",
            "`dpo.lambda_schedule` must be a string or a list of lists of numbers, got [['x']].",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_the_key_takes(refuse, text, line):
    assert refuse(dpo(text)) == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: '1'", "`seed` must be an integer, got '1'."),
        ("seed: true", "`seed` must be an integer, got True."),
        ("seed:", "`seed` must be an integer, got null. Write a value, or remove the key."),
        ("seed: -1", "`seed` must be at least 0 and less than 2**32, got -1. Write for example `seed: 42`."),
        (
            "seed: 4294967296",
            "`seed` must be at least 0 and less than 2**32, got 4294967296. Write for example `seed: 42`.",
        ),
        ("run_name: 7", "`run_name` must be a string or null, got 7."),
        ("run_name: 2026-01-01", "`run_name` must be a string or null, got datetime.date(2026, 1, 1)."),
        ("wandb: {mode: onlin}", "`wandb.mode` must be one of online, offline, disabled or null, got 'onlin'."),
        ("wandb: {tags: [1]}", "`wandb.tags` must be a list of strings, got [1]."),
        ("wandb: [a]", "section `wandb` must be a mapping, got ['a']."),
        ("wandb: offline", "section `wandb` must be a mapping, got 'offline'."),
        ("wandb: false", "section `wandb` must be a mapping, got False."),
    ],
)
def test_a_wrong_type_at_the_top_level_is_refused(refuse, text, line):
    assert refuse(HEAD + DATA + DPO + text + "\n") == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("path: 7", "`data.path` must be a string or null, got 7."),
        (
            "path: demo, columns: {chosen: 1}",
            "`data.columns` must be a mapping to strings or null, got {'chosen': 1}.",
        ),
        ("path: demo, eval_size: true", "`data.eval_size` must be an integer or a number or null, got True."),
        ("path: demo, eval_size: .nan", "`data.eval_size` must be an integer or a number or null, got nan."),
        ("path: demo, streaming: 'yes'", "`data.streaming` must be true or false, got 'yes'."),
        ("path: demo, audit: 3", "`data.audit` must be a string or a mapping to strings, got 3."),
        ("mixture: [demo]", "`data.mixture` must be a list of mappings or null, got ['demo']."),
        ("mixture: {path: demo}", "`data.mixture` must be a list of mappings or null, got {'path': 'demo'}."),
        ("mixture: [{path: 7}]", "`data.mixture[0].path` must be a string or null, got 7."),
        ("mixture: [{path: demo, weight: much}]", "`data.mixture[0].weight` must be a number, got 'much'."),
        (
            "mixture: [{path: demo, weight: 0}]",
            "`data.mixture[0].weight` must be finite and greater than 0, got 0. To exclude the source, remove it.",
        ),
        (
            "mixture: [{path: demo}, {weight: 2}]",
            "section `data`: `path` must be set in every source of a `mixture`, got none in source 1. Add it.",
        ),
        (
            "mixture: [{path: demo}], eval_split: test",
            "section `data`: `eval_split` is not supported next to `mixture`, got 'test'. Set it in each source of "
            "the mixture.",
        ),
        (
            "path: demo, audit: {cut: kep}",
            "section `data`: `audit` must be one of drop, keep, error, got 'kep' for cut. Write for example `audit: "
            "drop`.",
        ),
    ],
)
def test_data_that_cannot_be_meant_is_refused(refuse, text, line):
    assert refuse(data(text)) == [line]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        pytest.param(DATA + DPO, ["output_dir", "model"], id="no head"),
        pytest.param(HEAD + DPO, ["data"], id="no data"),
        pytest.param("output_dir: ''\nmodel: {}\ndata:\n" + DPO, ["output_dir", "model", "data"], id="empty ones"),
    ],
)
def test_a_missing_part_is_named(refuse, text, lines):
    assert refuse(text) == [
        f"`{name}` is missing. Every recipe needs `output_dir`, `model` and `data`." for name in lines
    ]


@pytest.mark.parametrize("text", ["", "dpo:\n", "sft: ~\ndpo: ~\n"])
def test_a_recipe_without_a_stage_is_refused(refuse, text):
    assert refuse(HEAD + DATA + text) == [
        "`sft` and `dpo` are missing. Add one or both; `dpo: {}` uses the default settings."
    ]


def test_mistakes_of_several_sections_are_told_at_once(refuse):
    text = "sed: 1\nmodel: {dtype: 3}\ndata: {path: 1}\nsft: {lerning_rate: 1}\ndpo: {beta: x}\n"
    assert refuse(text) == [
        "unknown key `sed`. Did you mean `seed`?",
        "`model.dtype` must be a string or null, got 3.",
        "`data.path` must be a string or null, got 1.",
        "unknown key `sft.lerning_rate`. Did you mean `learning_rate`?",
        "`dpo.beta` must be a number, got 'x'.",
        "`output_dir` is missing. Every recipe needs `output_dir`, `model` and `data`.",
    ]


def test_mistakes_of_both_stages_are_told_at_once(refuse):
    text = "sft: {bf16: false, load_best_model_at_end: true}\ndpo: {bf16: false, shift_lambda: 2}\n"
    first, second = refuse(HEAD + DATA + text)
    assert first.startswith("section `sft`: --load_best_model_at_end requires the save and eval strategy to match")
    assert second.startswith("section `dpo`: `shift_lambda` must not exceed 1, got 2.")


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("dtype: float32", "`model_name_or_path` must be set. Write a Hub name, a local folder, or `demo`."),
        (
            "model_name_or_path: demo, merge_adapter: true",
            "`merge_adapter` requires LoRA, got True with `use_peft: false`. Set `use_peft: true`.",
        ),
        (
            "model_name_or_path: demo, load_in_4bit: true",
            "`load_in_4bit` requires LoRA, got True with `use_peft: false`. Set `use_peft: true`.",
        ),
    ],
)
def test_a_model_that_cannot_be_meant_is_refused(refuse, model, line):
    assert refuse(f"output_dir: x\nmodel: {{{model}}}\n" + DATA + DPO) == [f"section `model`: {line}"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        pytest.param(
            HEAD + "data: {path: demo, streaming: true}\n" + SFT + DPO,
            [
                f"`{name}.max_steps` must be set with `data.streaming`, since the number of rows is unknown. Write "
                f"for example `{name}.max_steps: 1000`."
                for name in ("sft", "dpo")
            ],
            id="stream without steps",
        ),
        pytest.param(
            dpo("eval_strategy: epoch"),
            [
                "evaluation in stage `dpo` requires evaluation rows, got none. Set `data.eval_split` or "
                "`data.eval_size`, or remove `dpo.eval_strategy` and `dpo.eval_on_start`."
            ],
            id="evaluation without rows",
        ),
        pytest.param(
            HEAD + "data: {path: demo, streaming: true}\n"
            "dpo: {bf16: false, max_steps: 3, precompute_ref_log_probs: true}\n",
            ["`dpo.precompute_ref_log_probs: true` is not supported with `data.streaming`. Remove one of them."],
            id="stream with precomputed references",
        ),
    ],
)
def test_sections_that_do_not_go_together_are_refused(refuse, text, lines):
    assert refuse(text) == lines


# YAML


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("dpo: {beta: [\n", ["not valid YAML: ", "line 5, column 1"], id="unclosed"),
        pytest.param("dpo:\n\tbeta: 1\n", ["not valid YAML: ", "'\\t'"], id="tab"),
        pytest.param("dpo: {beta: 1}\ndpo: {beta: 2}\n", ['found duplicate key "dpo"'], id="duplicate section"),
        pytest.param("dpo: {beta: 1, beta: 2}\n", ['found duplicate key "beta"'], id="duplicate key"),
        pytest.param("{a: 1}: 1\n", ["found unhashable key"], id="mapping as key"),
        pytest.param("dpo: *absent\n", ["found undefined alias 'absent'"], id="undefined alias"),
        pytest.param("dpo: {}\n---\na: 1\n", ["expected a single document"], id="two documents"),
        pytest.param("dpo: \x01\n", ["special characters are not allowed"], id="control character"),
        pytest.param("run_name: 2026-13-45\n", ["cannot be read: month must be in 1..12"], id="date that is none"),
    ],
)
def test_broken_yaml_is_refused_with_the_place(refuse, text, parts):
    (line,) = refuse(HEAD + DATA + text)
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir ['made']",
        "!!python/object/new:os.mkdir ['made']",
        "!!python/name:os.mkdir",
        "!x {}",
    ],
)
def test_a_tag_is_refused_and_builds_nothing(refuse, tag):
    for text, overrides in ((f"dpo: {tag}\n", []), (DPO, [f"dpo.beta={tag}"])):
        (line,) = refuse(HEAD + DATA + text, *overrides)
        assert "not valid YAML: could not determine a constructor for the tag" in line
    assert not Path("made").exists()


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_is_refused(refuse, text):
    assert refuse(text) == ["must contain a mapping of sections, got an empty file."]


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "list"), ("a\n", "str"), ("3\n", "int")])
def test_a_file_that_is_no_mapping_is_refused(refuse, text, kind):
    assert refuse(text) == [f"must contain a mapping of sections, got a {kind}."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"chosen": "a"}\n', "must be a YAML file, got a file of rows."),
        ("rows.json", b'[{"chosen": "a"}]', "must contain a mapping of sections, got a list."),
        ("rows.parquet", b"PAR1\xff", "must be a YAML file, got a file of rows."),
        ("rows.csv.gz", b"chosen,rejected\na,b\n", "must be a YAML file, got a file of rows."),
    ],
)
def test_rows_in_place_of_a_recipe_are_refused_with_where_they_go(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(path))
    assert str(raised.value) == f"{path}: {message} For rows, write `data.path: {path}` in a recipe."


def bomb():
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        levels.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(levels)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        pytest.param(bomb(), [], id="bomb"),
        pytest.param(HEAD + DATA + "dpo: &a {bf16: false, inner: *a}\n", [], id="mapping within itself"),
        pytest.param(HEAD + DATA + "dpo: {bf16: false, report_to: &a [*a]}\n", [], id="list within itself"),
        pytest.param(HEAD + DATA + DPO, ["dpo.report_to=&a [*a]"], id="override within itself"),
    ],
)
def test_aliases_that_grow_beyond_any_recipe_are_refused(refuse, text, overrides):
    assert refuse(text, *overrides) == ["must not contain more than 20000 values with aliases expanded."]


def test_nesting_without_end_is_refused(refuse):
    assert refuse("a: " + "[" * 2000) == ["nested too deeply."]
    (line,) = refuse(HEAD + DATA + DPO, "dpo.beta=" + "[" * 2000)
    assert "is not valid YAML: maximum recursion depth exceeded" in line


def test_a_file_that_is_not_there_is_named_with_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as raised:
        load_recipe("gpt2_shift.yaml")
    assert str(raised.value) == "gpt2_shift.yaml: file not found."
    Path("gpt2_shft.yml").write_text("")
    with pytest.raises(RecipeError) as raised:
        load_recipe("gpt2_shift.yaml")
    assert str(raised.value) == "gpt2_shift.yaml: file not found. Did you mean `gpt2_shft.yml`?"


def test_what_cannot_be_read_as_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_bytes(b"\xff\xfe\x00a: 1")
    with pytest.raises(RecipeError, match=r"^x\.yaml: cannot be read: 'utf-8' codec can't decode byte 0xff"):
        load_recipe("x.yaml")
    Path("folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"^folder\.yaml: cannot be read: \[Errno"):
        load_recipe("folder.yaml")


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("dpo.beta=0.3", "dpo", "beta", 0.3),
        (" dpo.beta = 0.3", "dpo", "beta", 0.3),
        ("dpo.learning_rate=1e-6", "dpo", "learning_rate", 1e-6),
        ("dpo.eval_strategy=no", "dpo", "eval_strategy", "no"),
        ("dpo.bf16=False", "dpo", "bf16", False),
        ("dpo.max_length=null", "dpo", "max_length", None),
        ("dpo.max_length=", "dpo", "max_length", None),
        ("dpo.lambda_schedule=[[0, 1], [1, 0.5]]", "dpo", "lambda_schedule", [[0, 1], [1, 0.5]]),
        ("data.columns.chosen=good", "data", "columns", {"chosen": "good"}),
        ("data.audit={cut: keep}", "data", "audit", {"cut": "keep"}),
        ("data.path=C:\\rows.jsonl", "data", "path", "C:\\rows.jsonl"),
        ("data.path=a=b", "data", "path", "a=b"),
        ("wandb.tags=[a, b]", "wandb", "tags", ["a", "b"]),
        ("sft.bf16=false", "sft", "bf16", False),
    ],
)
def test_an_override_is_read_as_yaml_and_makes_what_it_needs(load, override, section, key, expected):
    assert load(HEAD + DATA + DPO, override).resolved[section][key] == expected


def test_overrides_of_the_top_level_and_of_whole_sections(load):
    recipe = load(
        HEAD + DATA + SFT + DPO,
        "seed=7",
        "run_name='8'",
        "output_dir=runs/y",
        "sft=null",
        "dpo={bf16: false, beta: 1}",
    )
    assert (recipe.seed, recipe.run_name, recipe.output_dir) == (7, "8", Path("runs/y"))
    assert list(recipe.stages) == ["dpo"]
    assert (recipe.stages["dpo"].beta, recipe.stages["dpo"].run_name) == (1, "8-dpo")


def test_the_last_override_of_a_key_holds(load):
    assert load(HEAD + DATA + DPO, "dpo.beta=1", "dpo.beta=2").stages["dpo"].beta == 2


@pytest.mark.parametrize("override", ["", "dpo", "dpo.beta", "=1", ".=1", "dpo.=1", ".beta=1", "dpo..beta=1"])
def test_an_override_without_key_or_value_is_refused(refuse, override):
    assert refuse(HEAD + DATA + DPO, override) == [
        f"overrides must have the form key=value, got {override!r}. Write for example `dpo.shift_lambda=0.9`."
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("dpo.lerning_rate=1", "unknown key `dpo.lerning_rate`. Did you mean `learning_rate`?"),
        ('dpo.beta="0.1"', "`dpo.beta` must be a number, got '0.1'."),
        ("dpo.beta=", "`dpo.beta` must be a number, got null. Write a value, or remove the key."),
        ("dpo.seed=1", "`dpo.seed` cannot be set here: set it at the top level; it applies to both stages."),
        ("output_dir.x=1", "the override 'output_dir.x=1' sets a key in `output_dir`, which is not a mapping."),
        ("dpo.use_cpu.x=1", "the override 'dpo.use_cpu.x=1' sets a key in `use_cpu`, which is not a mapping."),
        ("run_name=a: b", "`run_name` must be a string or null, got {'a': 'b'}."),
    ],
)
def test_an_override_is_checked_as_the_file_is(refuse, override, line):
    assert refuse(HEAD + DATA + DPO, override) == [line]


@pytest.mark.parametrize("value", ["[", "*absent", "@a", "a: b: c", "2026-13-45"])
def test_an_override_that_is_no_yaml_is_refused(refuse, value):
    (line,) = refuse(HEAD + DATA + DPO, f"run_name={value}")
    assert line.startswith(f"the value of the override 'run_name={value}' is not valid YAML: ")
    assert line.endswith(". Put it in quotes, so that the shell passes it whole.") == (value == "[")


# Plain values out and in again


VALUES = {
    "numbers": [1e-6, 5e-7, 1e22, -0.0, 1.0, 0, -3, math.inf],
    "texts": ["no", "1e-6", "true", "null", "~", "", "2026-01-01", "0x1", "é\n x: y", "#a", " a", "a: b", "&a", "<<"],
    "nothing": [None, {}, [], True, False],
    "nested": {"a": {"b": [[0, 1.0], [1, 0.5]]}},
}


def test_what_is_dumped_is_parsed_to_the_same_values_of_the_same_types():
    again = parse_yaml(dump_yaml(VALUES))
    assert again == VALUES
    for name in ("numbers", "texts", "nothing"):
        assert list(map(type, again[name])) == list(map(type, VALUES[name]))
    assert list(again) == list(VALUES)


def test_a_resolved_recipe_is_a_recipe_that_resolves_to_itself(load):
    text = HEAD + "data: {path: demo, eval_size: 5, audit: {cut: keep}}\nwandb: {tags: a}\n" + SFT
    first = load(text + "dpo: {bf16: false, learning_rate: 5e-7, lambda_schedule: [[0, 1], [1, 0.5]]}\n")
    second = load(dump_yaml(first.resolved))
    assert second.resolved == first.resolved
    assert changed_keys(first.resolved, second.resolved) == []


def test_aliases_do_not_outlive_the_reading(load):
    recipe = load(HEAD + DATA + "sft: &s {bf16: false}\ndpo: *s\n")
    assert "&" not in dump_yaml(recipe.resolved)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1}, {"a": 2}, ["a"]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 4}}, ["a.c", "a.d"]),
        ({"a": [1, 2]}, {"a": [2, 1]}, ["a"]),
        ({"a": None}, {}, ["a"]),
        ({}, {"a": {"b": 1}}, ["a"]),
        ({"a": {"b": 1}}, {"a": 1}, ["a"]),
        ({"b": 1, "a": {"z": 1, "y": 1}}, {"b": 2, "a": {"z": 2, "y": 2}}, ["a.y", "a.z", "b"]),
    ],
    ids=str,
)
def test_the_keys_in_which_two_recipes_differ_are_dotted_and_in_order(old, new, expected):
    assert changed_keys(old, new) == expected
    assert changed_keys(new, old) == expected
