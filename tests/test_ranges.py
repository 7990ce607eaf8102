"""The numbers and words that settings may hold: every field is in the table, and what passes it can be built."""

import contextlib
import dataclasses
import io
import math
import re
import typing

import pytest
from conftest import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from trl import DPOConfig

from dposhift_trl import DPOShiftConfig
from dposhift_trl.choices import CHOICES
from dposhift_trl.ranges import RANGES, check_ranges, range_mistake
from dposhift_trl.recipe import SECTIONS, RecipeError, load_recipe
from dposhift_trl.recipe.sections import DECIDED_ELSEWHERE, TopLevel
from dposhift_trl.run import main


HINTS = {section: typing.get_type_hints(cls) for section, cls in SECTIONS.items()}
NUMERIC = [
    (section, field.name)
    for section, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
    if {int, float, list[float]} & {HINTS[section][field.name], *typing.get_args(HINTS[section][field.name])}
]
# Both stages have rows to evaluate on, data may be read by workers, and nothing depends on what the machine has
RECIPE = """\
output_dir: runs/x
model: {model_name_or_path: demo, use_peft: true}
data: {path: demo, eval_split: test}
sft: {bf16: false, use_cpu: true, report_to: none, dataloader_num_workers: 1}
dpo: {bf16: false, use_cpu: true, report_to: none, dataloader_num_workers: 1}
"""
NUMBERS = [
    *(0, 1, -1, 2, 3, -2, 0.5, 1.5, 0.0, -0.0, 1.0, 0.4999, 0.9999999, 1e-7, 1e-300, 5e-324, 1e38, 1e39, 1e308),
    *(-1e308, 2**31 - 1, 2**31, 2**32, 2**63 - 1, math.inf, -math.inf, math.nan),
]


def refusals(path, *overrides):
    """Lines that refuse a recipe; none if it is accepted."""
    try:
        load_recipe(str(path), overrides)
    except RecipeError as error:
        return str(error).splitlines()
    return []


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranges") / "x.yaml"
    path.write_text(RECIPE)
    return path


# The table


def test_every_field_that_takes_a_number_has_a_range():
    assert len(NUMERIC) > 80
    assert {name for _, name in NUMERIC} - set(RANGES) == set()
    known = {name for _, name in NUMERIC} | {field.name for field in dataclasses.fields(TopLevel)}
    assert set(RANGES) - known == set(), "a range of a field that is gone"


@pytest.mark.parametrize(("section", "name"), NUMERIC, ids=lambda value: value)
def test_the_default_of_a_field_is_in_its_range(section, name):
    field = next(field for field in dataclasses.fields(SECTIONS[section]) if field.name == name)
    assert range_mistake(name, field.default) is None


@pytest.mark.parametrize("name", RANGES)
def test_what_a_range_advises_to_write_is_in_it(name):
    example = re.search(r"Write for example (?:`\w+: (.*)`|(\S+) )", RANGES[name].advice)
    if example is not None:
        value = re.sub(r"[\[\]]", "", example[1] or example[2]).split(", ")
        assert (
            range_mistake(name, [float(number) if set(".e") & set(number) else int(number) for number in value])
            is None
        )


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400), 1e300])
def test_no_setting_is_without_bounds(name, value):
    assert range_mistake(name, value) is not None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "learning_rate", -1e-6,
            "must be finite and at least 0, got -1e-06. Write for example `learning_rate: 1e-06`.",
        ),
        (
            "per_device_train_batch_size", 0,
            "must be at least 1, got 0. Write for example `per_device_train_batch_size: 8`.",
        ),
        (
            "gradient_accumulation_steps", 0,
            "must be at least 1, got 0. Write for example `gradient_accumulation_steps: 1`.",
        ),
        ("beta", 0, "must be finite and greater than 0, got 0. Write for example `beta: 0.1`."),
        (
            "beta", 1e-300,
            "must be a number that float32 can hold, 0 or from 1.2e-38 to 3.4e38 in size, got 1e-300. Write for "
            "example `beta: 0.1`.",
        ),
        (
            "label_smoothing", 0.5,
            "must be at least 0 and less than 0.5, got 0.5. It is the share of pairs that are labeled the wrong way "
            "round; from 0.5 on, the rejected answers would be the better ones. Write for example `label_smoothing: "
            "0.1`.",
        ),
        (
            "eval_steps", 2.5,
            "must be a number of steps, or a share of them between 0 and 1, got 2.5. Write for example `eval_steps: "
            "0.1`.",
        ),
        (
            "max_steps", 0,
            "must be at least 1, or -1 to train for `num_train_epochs`, got 0. Write for example `max_steps: 1000`.",
        ),
        (
            "loss_weights", [1.0, -0.1],
            "must be finite and at least 0, got -0.1. Write for example `loss_weights: [1.0, 0.1]`.",
        ),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_told_with_rule_value_and_remedy(name, value, message):
    assert range_mistake(name, value) == message


@pytest.mark.parametrize("value", [None, "auto", True, [None]])
def test_what_is_no_number_has_no_range(value):
    assert range_mistake("beta", value) is None


# Where it is used


def test_mistakes_of_several_fields_are_told_together_each_with_its_key(recipe):
    overrides = (
        "sft.learning_rate=-1",
        "dpo.beta=0",
        "dpo.lora_r=1",
        "model.lora_r=0",
        "dpo.optim=adamw_torhc",
        "seed=-1",
    )
    lines = refusals(recipe, *overrides)
    keys = ["model.lora_r", "sft.learning_rate", "dpo.lora_r", "dpo.beta", "dpo.optim", "seed"]
    assert [re.search(r"`([\w.]+)`", line)[1] for line in lines] == keys
    assert lines[4].endswith("got 'adamw_torhc'. Did you mean `adamw_torch`?")


def test_the_config_reports_all_its_numbers_out_of_range_at_once(tmp_path):
    with pytest.raises(ValueError, match="beta") as raised:
        DPOShiftConfig(output_dir=str(tmp_path), bf16=False, beta=0.0, learning_rate=-1.0)
    assert [line.split()[0] for line in str(raised.value).splitlines()] == ["`learning_rate`", "`beta`"]
    check_ranges(DPOConfig(output_dir=str(tmp_path), bf16=False))


@pytest.fixture(scope="module")
def whole_recipe(tmp_path_factory, tiny_model):
    """A recipe whose stages could train here."""
    folder = tmp_path_factory.mktemp("ranges")
    make_rows(12).to_json(folder / "rows.jsonl")
    stage = {"bf16": False, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False, "max_length": 64}
    values = {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": tiny_model},
        "data": {"path": str(folder / "rows.jsonl"), "eval_size": 3},
        "sft": stage,
        "dpo": stage,
    }
    YAML(typ="safe").dump(values, folder / "recipe.yaml")
    return str(folder / "recipe.yaml")


def can_be_set(section, name):
    return not (section in ("sft", "dpo") and name in DECIDED_ELSEWHERE)


@settings(derandomize=True, deadline=None, database=None, max_examples=120)
@given(
    field=st.sampled_from([field for field in NUMERIC if can_be_set(*field)]),
    value=st.sampled_from(NUMBERS) | st.integers() | st.floats(width=32),
)
def test_any_number_in_any_field_is_refused_by_name_or_makes_arguments(recipe, field, value):
    key = ".".join(field)
    text = f"{value!r}".replace("inf", ".inf").replace("nan", ".nan")
    lines = refusals(recipe, f"{key}=[{text}]" if field[1] == "loss_weights" else f"{key}={text}")
    assert lines in ([], lines[:1])
    assert all(f"`{key}`" in line or f"`{field[1]}`" in line for line in lines), lines


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(field=st.sampled_from([field for field in NUMERIC if can_be_set(*field)]), value=st.sampled_from(NUMBERS))
def test_any_number_in_any_field_is_refused_in_one_line_or_starts(whole_recipe, field, value):
    key, text = ".".join(field), f"{value!r}".replace("inf", ".inf").replace("nan", ".nan")
    override = f"{key}=[{text}]" if field[1] == "loss_weights" else f"{key}={text}"
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        code = main([whole_recipe, "--dry-run", override])
    lines = errors.getvalue().splitlines()
    assert code in (0, 2)
    assert not any("Traceback" in line for line in lines)
    assert code == 0 or field[1] in lines[-1]


# Words


def test_the_loss_types_and_divergences_are_trl_s():
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(DPOConfig) if field.name in CHOICES}
    values = re.search(r"Possible values are: (.*?)\. ", helps["loss_type"])[1]
    assert re.findall(r"`'(\w+)'`", values) == list(CHOICES["loss_type"])
    values = re.search(r"Possible values are: (.*?)\. ", helps["f_divergence_type"])[1]
    assert re.findall(r"`(\w+)`", values) == list(CHOICES["f_divergence_type"])


@pytest.mark.parametrize(
    ("key", "word", "end"),
    [
        ("dpo.loss_type", "sigmod", "got 'sigmod'. Did you mean `sigmoid`?"),
        ("dpo.loss_type", "[sigmoid, sftt]", "got 'sftt'. Did you mean `sft`?"),
        ("dpo.f_divergence_type", "reverse", "got 'reverse'. Did you mean `reverse_kl`?"),
        ("sft.loss_type", "sigmoid", "must be one of nll, dft, chunked_nll, got 'sigmoid'."),
        ("sft.packing_strategy", "bdf", "must be one of bfd, bfd_split, wrapped, got 'bdf'. Did you mean `bfd`?"),
        ("dpo.lr_scheduler_type", "cosin", "got 'cosin'. Did you mean `cosine`?"),
        ("dpo.save_strategy", "never", "must be one of no, steps, epoch, best, got 'never'."),
        ("dpo.report_to", "wand", "got 'wand'. Did you mean `wandb`?"),
        ("dpo.report_to", "[wandb, tensorbord]", "got 'tensorbord'. Did you mean `tensorboard`?"),
        ("dpo.truncation_mode", "keep_ends", "one of keep_end, keep_start, got 'keep_ends'. Did you mean `keep_end`?"),
        ("dpo.ddp_backend", "glo", "got 'glo'. Did you mean `gloo`?"),
        ("dpo.log_level", "warn", "got 'warn'. Did you mean `warning`?"),
        ("dpo.train_sampling_strategy", "rand", "got 'rand'. Did you mean `random`?"),
        ("model.dtype", "bf16", "got 'bf16'. Did you mean `bfloat16`?"),
        ("model.bnb_4bit_quant_type", "nf5", "must be one of fp4, nf4, got 'nf5'. Did you mean `nf4`?"),
        ("model.lora_task_type", "SEQ_CLS", "must be one of CAUSAL_LM, got 'SEQ_CLS'."),
    ],
)  # fmt: skip
def test_a_word_that_a_field_does_not_know_is_refused_with_the_nearest(recipe, key, word, end):
    (line,) = refusals(recipe, f"{key}={word}")
    assert f": `{key}` must be one of " in line
    assert line.endswith(end)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dpo.loss_type=exo_pair"], "`label_smoothing` must be greater than 0 with `loss_type: exo_pair`, got 0.0."),
        (
            ["dpo.loss_type=bco_pair", "dpo.shift_lambda=1.0", "dpo.f_divergence_type=forward_kl"],
            "`f_divergence_type` must be `reverse_kl` with `loss_type: ['bco_pair']`, got 'forward_kl'.",
        ),
        (
            ["dpo.loss_type=aot", "dpo.shift_lambda=1.0", "dpo.use_weighting=true"],
            "`use_weighting` is not supported with `loss_type: ['aot']`, got True.",
        ),
        (["dpo.loss_weights=[0]"], "`loss_weights` must have a weight greater than 0, got [0]."),
        (
            ["dpo.sync_ref_model=true", "dpo.precompute_ref_log_probs=true", "model.use_peft=false"],
            "`sync_ref_model` is not supported with `precompute_ref_log_probs: true`",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_losses_that_trl_refuses_only_once_it_trains_are_refused_in_the_recipe(recipe, overrides, message):
    (line,) = refusals(recipe, *overrides)
    assert f"section `dpo`: {message}" in line
