"""The settings of lambda: accepted values, errors and their messages."""

import dataclasses
import re

import pytest
from transformers import HfArgumentParser
from trl import DPOConfig, TrlParser

from dposhift_trl import DPOShiftConfig
from dposhift_trl.config import SHIFTABLE_LOSS_TYPES
from dposhift_trl.schedules import make_lambda_schedule


ADDED_FIELDS = [
    f.name for f in dataclasses.fields(DPOShiftConfig) if f.name not in {g.name for g in dataclasses.fields(DPOConfig)}
]
ABOVE_ONE = (
    "must not exceed 1, got 1.05. Above 1, rejected answers fall faster than in DPO and generated text degenerates. "
    "To allow it, set `allow_lambda_above_one: true`."
)
AT_ZERO = (
    "At 0, the loss ignores the rejected answers, and below 1e-7 float32 rounds them away; the paper uses 0.5 to 1."
)
PLAIN_DPO = "Set `lambda_schedule: fixed` and `shift_lambda: 1.0` to train with plain DPO."
SCHEDULES = "fixed, linear_increase, linear_decrease, cosine_increase, cosine_decrease, adaptive"


@pytest.fixture
def make(tmp_path):
    def make(**kwargs):
        return DPOShiftConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", **kwargs)

    return make


@pytest.fixture
def flags(tmp_path):
    return ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true", "--report_to", "none"]


def test_the_config_adds_no_other_fields_and_changes_one_default():
    assert [
        *("lambda_schedule", "shift_lambda", "lambda_min", "lambda_max", "lambda_target", "lambda_target_metric"),
        *("allow_lambda_above_one", "shared_prompt", "max_tokens_per_batch", "save_pair_scores"),
        "print_verdict",
    ] == ADDED_FIELDS
    theirs = {f.name: f.default for f in dataclasses.fields(DPOConfig)}
    changed = [f.name for f in dataclasses.fields(DPOShiftConfig) if f.default != theirs.get(f.name, f.default)]
    assert changed == ["precompute_ref_log_probs"]


def test_the_defaults_are_the_paper_s_fixed_lambda(make):
    config = make()
    assert [getattr(config, name) for name in ADDED_FIELDS[:4]] == ["fixed", 0.95, 0.75, 1.0]
    assert config.precompute_ref_log_probs is None  # "auto", which DPOTrainer reads as off
    assert config.lambda_range == (0.95, 0.95)


@pytest.mark.parametrize("name", [*ADDED_FIELDS, "precompute_ref_log_probs"])
def test_the_help_of_a_field_equals_its_docstring(name):
    def plain(text):
        return " ".join(re.sub(r"[`'\"]", "", text).split())

    sentence = re.search(rf"^ {{8}}{name} \(.*\):\n((?: {{12}}.*\n)+)", DPOShiftConfig.__doc__, re.M)[1]
    metadata = {f.name: f.metadata for f in dataclasses.fields(DPOShiftConfig)}[name]
    assert plain(metadata["help"]) == plain(sentence)
    assert plain(sentence).endswith(".")


@pytest.mark.parametrize("name", ["shift_lambda", "lambda_min", "lambda_max"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        pytest.param(0, ValueError, f"must be finite and at least 1e-7, got 0. {AT_ZERO}", id="zero"),
        pytest.param(-0.5, ValueError, f"must be finite and at least 1e-7, got -0.5. {AT_ZERO}", id="negative"),
        pytest.param(1e-300, ValueError, f"must be finite and at least 1e-7, got 1e-300. {AT_ZERO}", id="underflow"),
        pytest.param(float("nan"), ValueError, f"must be finite and at least 1e-7, got nan. {AT_ZERO}", id="nan"),
        pytest.param(float("inf"), ValueError, f"must be finite and at least 1e-7, got inf. {AT_ZERO}", id="inf"),
        pytest.param(1.05, ValueError, ABOVE_ONE, id="above 1"),
        pytest.param(True, TypeError, "must be a number, got True. Write for example `{}: 0.95`.", id="bool"),
        pytest.param("0.9", TypeError, "must be a number, got '0.9'. Write for example `{}: 0.95`.", id="text"),
        pytest.param(None, TypeError, "must be a number, got None. Write for example `{}: 0.95`.", id="null"),
        pytest.param([0.9], TypeError, "must be a number, got [0.9]. Write for example `{}: 0.95`.", id="list"),
    ],
)
def test_an_invalid_lambda_is_an_error_with_field_value_and_remedy(make, name, value, error, message):
    with pytest.raises(error) as raised:
        make(**{name: value})
    assert str(raised.value) == f"`{name}` {message.format(name)}"


@pytest.mark.parametrize("name", ["shift_lambda", "lambda_max"])
def test_a_lambda_above_one_is_valid_if_allowed(make, name):
    assert getattr(make(**{name: 1.05, "allow_lambda_above_one": True}), name) == 1.05


def test_a_knot_above_one_is_valid_only_if_allowed(make):
    assert make(lambda_schedule=[[0, 1.05]], allow_lambda_above_one=True).lambda_range == (1.05, 1.05)
    with pytest.raises(ValueError, match="must not exceed 1") as raised:
        make(lambda_schedule=[[0, 1], [1, 1.05]])
    assert str(raised.value) == f"`lambda_schedule` {ABOVE_ONE}"


def test_allow_lambda_above_one_must_be_a_bool(make):
    with pytest.raises(TypeError) as raised:
        make(shift_lambda=1.05, allow_lambda_above_one="false")
    assert str(raised.value) == (
        "`allow_lambda_above_one` must be true or false, got 'false'. Remove it to keep lambda in (0, 1]."
    )


def test_an_integer_becomes_a_float(make):
    config = make(shift_lambda=1, lambda_min=1, lambda_max=1)
    values = [config.shift_lambda, config.lambda_min, config.lambda_max]
    assert values == [1.0, 1.0, 1.0]
    assert {type(value) for value in values} == {float}


def test_a_minimum_above_the_maximum_is_an_error_that_names_linear_decrease(make):
    with pytest.raises(ValueError, match="must not exceed") as raised:
        make(lambda_min=1.0, lambda_max=0.75)
    assert str(raised.value) == (
        "`lambda_min` must not exceed `lambda_max`, got 1.0 and 0.75. To decrease lambda over training, keep min <= "
        "max and set `lambda_schedule: linear_decrease`."
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("fixed", "fixed"),
        ("cosine_decrease", "cosine_decrease"),
        ("increase_linear", "linear_increase"),
        ("decrease_linear", "linear_decrease"),
        ([[0, 1], [1, 0.5]], [[0.0, 1.0], [1.0, 0.5]]),
        (((0, 1), (1, 0.5)), [[0.0, 1.0], [1.0, 0.5]]),
        ("[[0, 1], [1, 0.5]]", [[0.0, 1.0], [1.0, 0.5]]),
        (" [[0, 0.9]]", [[0.0, 0.9]]),
    ],
    ids=repr,
)
def test_a_schedule_is_stored_under_its_canonical_name_or_as_lists(make, given, kept):
    assert make(lambda_schedule=given).lambda_schedule == kept


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        pytest.param(
            "linear_decrase",
            ValueError,
            f"`lambda_schedule` must be one of {SCHEDULES} or a list of [progress, lambda] knots, got "
            "'linear_decrase'. Did you mean `linear_decrease`?",
            id="misspelled",
        ),
        pytest.param(
            "increase_linera",
            ValueError,
            f"`lambda_schedule` must be one of {SCHEDULES} or a list of [progress, lambda] knots, got "
            "'increase_linera'. Did you mean `linear_increase`?",
            id="misspelled alias",
        ),
        pytest.param(
            "0.5",
            ValueError,
            f"`lambda_schedule` must be one of {SCHEDULES} or a list of [progress, lambda] knots, got '0.5'.",
            id="similar to no name",
        ),
        pytest.param(
            "[[0, 1],",
            ValueError,
            "`lambda_schedule` must be a name or a list of knots, got '[[0, 1],', which is not valid JSON (Expecting "
            "value: line 1 column 9 (char 8)). Write for example '[[0, 1.0], [1, 0.75]]'.",
            id="broken JSON",
        ),
        pytest.param(
            "[[0, NaN]]",
            TypeError,
            "`lambda_schedule` must be made of [progress, lambda] pairs of numbers, got the knot [0, nan]. Write for "
            "example [[0, 1.0], [0.5, 0.75]] to decrease lambda in the first half of training.",
            id="nan in JSON",
        ),
        pytest.param(
            0.5,
            TypeError,
            "`lambda_schedule` must be a name or a list of [progress, lambda] knots, got 0.5. Write for example [[0, "
            "1.0], [0.5, 0.75]] to decrease lambda in the first half of training.",
            id="number",
        ),
        pytest.param(
            [[0, 1], [1, 0]],
            ValueError,
            f"`lambda_schedule` must be finite and at least 1e-7, got 0.0. {AT_ZERO}",
            id="knot at 0",
        ),
    ],
)
def test_an_invalid_schedule_is_an_error_with_value_and_remedy(make, given, error, message):
    with pytest.raises(error) as raised:
        make(lambda_schedule=given)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shift_lambda": 0.5}, (0.5, 0.5)),
        ({"shift_lambda": 0.5, "lambda_schedule": "linear_increase"}, (0.75, 1.0)),
        ({"lambda_schedule": "cosine_decrease", "lambda_min": 0.6, "lambda_max": 0.9}, (0.6, 0.9)),
        ({"lambda_schedule": [[0, 0.9], [0.5, 0.6], [1, 1.0]]}, (0.6, 1.0)),
        ({"lambda_schedule": [[0, 0.9], [0.5, 0.7]]}, (0.7, 0.9)),
        ({"lambda_schedule": [[0, 1.0], [1, 0.8]]}, (0.8, 1.0)),
        ({"lambda_schedule": [[0.2, 0.7]]}, (0.7, 0.7)),
        ({"lambda_schedule": "linear_increase", "lambda_min": 0.8, "lambda_max": 0.8}, (0.8, 0.8)),
    ],
    ids=str,
)
def test_the_range_holds_the_smallest_and_largest_lambda_of_a_run(make, settings, expected):
    config = make(**settings)
    lambda_at = make_lambda_schedule(config)
    values = [lambda_at(step / 100) for step in range(101)]
    assert config.lambda_range == expected
    assert (min(values), max(values)) == expected


@pytest.mark.parametrize("lambda_max", [0.6, 0.9])
def test_the_range_of_the_adaptive_schedule_is_its_bounds(make, lambda_max):
    assert make(lambda_schedule="adaptive", lambda_min=0.6, lambda_max=lambda_max).lambda_range == (0.6, lambda_max)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shift_lambda": 1}, True),
        ({"shift_lambda": 0.99}, False),
        ({"lambda_schedule": "linear_increase", "lambda_min": 1.0}, True),
        ({"lambda_schedule": "linear_increase", "shift_lambda": 1.0}, False),
        ({"lambda_schedule": [[0, 1], [1, 1]]}, True),
        ({"lambda_schedule": [[0, 1], [1, 0.9]]}, False),
    ],
    ids=str,
)
def test_training_is_always_dpo_only_if_lambda_stays_at_one(make, settings, expected):
    assert make(**settings).always_dpo is expected


UNSUPPORTED = {
    "unsupported loss": (
        {"loss_type": ["apo_zero"]},
        "`loss_type` must be based on the difference of log-ratios if lambda differs from 1, got ['apo_zero']. Use "
        "discopop, exo_pair, hinge, ipo, robust, sigmoid, sigmoid_norm, alone or combined with `sft`.",
    ),
    "unsupported loss in a mixture": (
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 1.0]},
        "`loss_type` must be based on the difference of log-ratios if lambda differs from 1, got ['sigmoid', "
        "'bco_pair']. Use discopop, exo_pair, hinge, ipo, robust, sigmoid, sigmoid_norm, alone or combined with "
        "`sft`.",
    ),
    "nothing to shift": (
        {"loss_type": ["sft"]},
        "`loss_type` must be based on the difference of log-ratios if lambda differs from 1, got ['sft']. Use "
        "discopop, exo_pair, hinge, ipo, robust, sigmoid, sigmoid_norm, alone or combined with `sft`.",
    ),
    "f-divergence": (
        {"f_divergence_type": "js_divergence"},
        "`f_divergence_type` must be `reverse_kl` if lambda differs from 1, got 'js_divergence'. The shift is defined "
        "for log-ratios, not for the scores of other divergences.",
    ),
    "weighting": (
        {"use_weighting": True},
        "`use_weighting` must be false if lambda differs from 1, got True. WPO's weights and lambda both rescale the "
        "pair, and no published loss combines them.",
    ),
}


@pytest.mark.parametrize(("settings", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
@pytest.mark.parametrize("lambda_schedule", ["fixed", "linear_increase", [[0, 1], [1, 0.9]]], ids=str)
def test_an_unsupported_loss_is_an_error_unless_lambda_is_one(make, settings, message, lambda_schedule):
    with pytest.raises(ValueError, match="lambda differs from 1") as raised:
        make(lambda_schedule=lambda_schedule, **settings)
    assert str(raised.value) == f"{message} {PLAIN_DPO}"
    assert make(shift_lambda=1.0, **settings).always_dpo


@pytest.mark.parametrize("loss_type", sorted(SHIFTABLE_LOSS_TYPES))
def test_a_loss_on_the_difference_supports_a_shift_alone_and_with_sft(make, loss_type):
    assert make(loss_type=loss_type, label_smoothing=0.1).loss_type == [loss_type]
    mixed = make(loss_type=[loss_type, "sft"], loss_weights=[1.0, 0.1], label_smoothing=0.1)
    assert mixed.loss_type == [loss_type, "sft"]


def test_the_best_checkpoint_is_that_with_the_lowest_loss_at_lambda_one_unless_a_metric_is_set(make):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    config = make(**best)
    assert (config.metric_for_best_model, config.greater_is_better) == ("dpo_loss", False)
    assert make(**best, metric_for_best_model="rewards/margins").metric_for_best_model == "rewards/margins"
    assert make().metric_for_best_model is None


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("loss", False), ("dpo_loss", False), ("eval_loss", False), ("entropy", False), ("runtime", False),
        ("perplexity/chosen", False), ("displacement/chosen_fell", False), ("displacement/both_fell", False),
        ("rewards/rejected", False), ("logps/rejected", False), ("displacement/rejected", False),
        ("displacement/rejected_per_token", False), ("rewards/chosen", True), ("rewards/margins", True),
        ("rewards/accuracies", True), ("displacement/chosen", True), ("logps/chosen", True),
    ],
)  # fmt: skip
def test_the_direction_of_a_metric_follows_from_its_name(make, metric, greater):
    assert make(metric_for_best_model=metric).greater_is_better is greater
    assert make(metric_for_best_model=metric, greater_is_better=not greater).greater_is_better is not greater


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param([], ("fixed", 0.95, False), id="none"),
        pytest.param(["--shift_lambda", "0.5"], ("fixed", 0.5, False), id="number"),
        pytest.param(["--shift-lambda", "0.5"], ("fixed", 0.5, False), id="hyphen"),
        pytest.param(["--lambda_schedule", "decrease_linear"], ("linear_decrease", 0.95, False), id="alias"),
        pytest.param(
            ["--lambda_schedule", "[[0, 1], [1, 0.5]]"], ([[0.0, 1.0], [1.0, 0.5]], 0.95, False), id="knots in JSON"
        ),
        pytest.param(["--allow_lambda_above_one", "--shift_lambda", "1.05"], ("fixed", 1.05, True), id="above one"),
    ],
)
@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_both_argument_parsers_accept_the_lambda_fields(flags, parser, arguments, expected):
    (config,) = parser(DPOShiftConfig).parse_args_into_dataclasses([*flags, *arguments])
    assert (config.lambda_schedule, config.shift_lambda, config.allow_lambda_above_one) == expected


def test_a_flag_that_is_not_a_number_is_an_error(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        HfArgumentParser(DPOShiftConfig).parse_args_into_dataclasses([*flags, "--shift_lambda", "much"])
    assert "--shift_lambda/--shift-lambda: invalid float value: 'much'" in capsys.readouterr().err


def test_the_help_of_the_flags_prints_every_lambda_field():
    text = HfArgumentParser(DPOShiftConfig).format_help()
    assert [name for name in ADDED_FIELDS if f"--{name}" not in text] == []


def test_a_trl_yaml_file_accepts_knots_and_a_flag_overrides_it(tmp_path, flags):
    file = tmp_path / "config.yaml"
    file.write_text("lambda_schedule: [[0, 1], [1, 0.5]]\nshift_lambda: 0.9\n")
    parser = TrlParser(DPOShiftConfig)
    (config,) = parser.parse_args_and_config([*flags, "--config", str(file)])
    assert config.lambda_schedule == [[0.0, 1.0], [1.0, 0.5]]
    (config,) = parser.parse_args_and_config([*flags, "--config", str(file), "--lambda_schedule", "fixed"])
    assert config.lambda_range == (0.9, 0.9)


def test_a_config_is_unchanged_after_writing_and_reading(make):
    config = make(lambda_schedule="[[0, 1], [1, 0.5]]", shift_lambda=0.9)
    values = config.to_dict()
    again = make(**{name: values[name] for name in ADDED_FIELDS})
    assert [getattr(again, name) for name in ADDED_FIELDS] == [getattr(config, name) for name in ADDED_FIELDS]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--precompute_ref_log_probs"], True),
        (["--precompute_ref_log_probs", "false"], False),
        (["--precompute_ref_log_probs", "auto"], None),
        (["--precompute_ref_log_probs", "none"], None),
    ],
)
def test_the_flag_for_precomputed_references_needs_no_value_as_in_trl(words, expected, flags):
    (config,) = HfArgumentParser(DPOShiftConfig).parse_args_into_dataclasses([*flags, *words])
    assert config.precompute_ref_log_probs == expected


def test_a_truncation_mode_that_trl_does_not_have_is_refused_before_any_model_is_loaded(make):
    with pytest.raises(ValueError, match="`truncation_mode` must be `keep_start` or `keep_end`, got 'keep_midle'"):
        make(truncation_mode="keep_midle")
