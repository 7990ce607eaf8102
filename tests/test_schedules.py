"""Lambda as a function of progress, compared with values computed by hand."""

import doctest
from types import SimpleNamespace

import pytest
from reference import shift_schedule

from dposhift_trl import schedules
from dposhift_trl.schedules import (
    LAMBDA_DEFAULTS,
    LAMBDA_SCHEDULE_ALIASES,
    LambdaPlan,
    check_knots,
    make_lambda_schedule,
)


def schedule(name, shift_lambda=0.9, lambda_min=0.75, lambda_max=1.0):
    return make_lambda_schedule(
        SimpleNamespace(lambda_schedule=name, shift_lambda=shift_lambda, lambda_min=lambda_min, lambda_max=lambda_max)
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("fixed", [0.9, 0.9, 0.9, 0.9, 0.9], id="fixed"),
        pytest.param("linear_increase", [0.75, 0.8125, 0.875, 0.9375, 1.0], id="linear_increase"),
        pytest.param("linear_decrease", [1.0, 0.9375, 0.875, 0.8125, 0.75], id="linear_decrease"),
        pytest.param("cosine_increase", [0.75, 0.78661165235, 0.875, 0.96338834765, 1.0], id="cosine_increase"),
        pytest.param("cosine_decrease", [1.0, 0.96338834765, 0.875, 0.78661165235, 0.75], id="cosine_decrease"),
        pytest.param([[0, 1.0], [0.5, 0.6]], [1.0, 0.8, 0.6, 0.6, 0.6], id="knots held after the last"),
        pytest.param([[0.5, 0.6], [1, 1.0]], [0.6, 0.6, 0.6, 0.8, 1.0], id="knots held before the first"),
        pytest.param([[0.3, 0.7]], [0.7, 0.7, 0.7, 0.7, 0.7], id="one knot"),
        pytest.param([[0, 1.0], [0.5, 1.0], [0.5, 0.5]], [1.0, 1.0, 0.5, 0.5, 0.5], id="a step takes the later knot"),
        pytest.param([[0, 1.0], [0, 0.5], [0.5, 0.7]], [0.5, 0.6, 0.7, 0.7, 0.7], id="a step at the start"),
        pytest.param([[0, 0.5], [1, 0.9], [1, 0.6]], [0.5, 0.6, 0.7, 0.8, 0.6], id="a step at the end"),
        pytest.param(((0, 1), (1, 0.5)), [1.0, 0.875, 0.75, 0.625, 0.5], id="tuples and integers"),
    ],
)
def test_lambda_at_each_quarter_is_the_value_computed_by_hand(name, expected):
    values = [schedule(name)(quarter / 4) for quarter in range(5)]
    assert values == pytest.approx(expected, abs=1e-11)
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("linear_increase", 0.75, 1.0),
        ("linear_decrease", 1.0, 0.75),
        ("cosine_increase", 0.75, 1.0),
        ("cosine_decrease", 1.0, 0.75),
    ],
)
def test_a_progress_outside_the_run_is_clipped(name, start, end):
    lambda_at = schedule(name)
    assert [lambda_at(progress) for progress in (-3.0, 0.0)] == [start, start]
    assert [lambda_at(progress) for progress in (1.0, 1.5)] == [end, end]


@pytest.mark.parametrize("name", ["linear_increase", "linear_decrease"])
@pytest.mark.parametrize("lambda_min", [0.75, 0.85, 0.95])
def test_the_linear_schedules_equal_the_papers_formula(name, lambda_min):
    lambda_at = schedule(name, lambda_min=lambda_min)
    for step in range(478):
        assert lambda_at(step / 477) == pytest.approx(shift_schedule(name, step / 477, lambda_min, 1.0), abs=1e-15)


def test_lambda_equals_the_value_in_the_authors_model_card():
    assert round(schedule("linear_decrease", lambda_min=0.95)(450 / 477), 4) == 0.9528


@pytest.mark.parametrize(("alias", "name"), LAMBDA_SCHEDULE_ALIASES.items())
def test_the_authors_names_give_the_same_schedule(alias, name):
    assert [schedule(alias)(step / 10) for step in range(11)] == [schedule(name)(step / 10) for step in range(11)]


def test_both_names_of_the_authors_are_supported():
    assert LAMBDA_SCHEDULE_ALIASES == {"increase_linear": "linear_increase", "decrease_linear": "linear_decrease"}


def test_rounding_never_moves_lambda_past_a_knot():
    # The formula alone gives 0.03999999999999998 and 0.9100000000000001 here
    assert schedule([[0.2, 0.35], [0.9, 0.04]])(0.8999999999999999) == 0.04
    assert schedule([[0.2, 0.07], [0.9, 0.91]])(0.8999999999999999) == 0.91


def test_an_unknown_name_is_an_error():
    with pytest.raises(
        ValueError, match=r"^`lambda_schedule` must be one of fixed, linear_increase, .*, got 'linear'"
    ):
        schedule("linear")


RULE = "`lambda_schedule` must "
NAME = RULE + "be a name or a list of [progress, lambda] knots, got "
PAIR = RULE + "be made of [progress, lambda] pairs of numbers, got the knot "
RANGE = RULE + "have the progress of every knot in [0, 1], got "


@pytest.mark.parametrize(
    ("knots", "error", "message"),
    [
        pytest.param(None, TypeError, NAME + "None.", id="null"),
        pytest.param(0.5, TypeError, NAME + "0.5.", id="number"),
        pytest.param({0: 1}, TypeError, NAME + "{0: 1}.", id="mapping"),
        pytest.param([], ValueError, RULE + "contain at least one [progress, lambda] knot, got [].", id="empty"),
        pytest.param([0, 1], TypeError, PAIR + "0.", id="flat list"),
        pytest.param([[0]], TypeError, PAIR + "[0].", id="single"),
        pytest.param([[0, 1, 2]], TypeError, PAIR + "[0, 1, 2].", id="triple"),
        pytest.param([{0: 1, 1: 2}], TypeError, PAIR + "{0: 1, 1: 2}.", id="knot is a mapping"),
        pytest.param(["ab"], TypeError, PAIR + "'ab'.", id="knot is text"),
        pytest.param([[0, "1"]], TypeError, PAIR + "[0, '1'].", id="text lambda"),
        pytest.param([["0", 1]], TypeError, PAIR + "['0', 1].", id="text progress"),
        pytest.param([[0, True]], TypeError, PAIR + "[0, True].", id="bool lambda"),
        pytest.param([[False, 1]], TypeError, PAIR + "[False, 1].", id="bool progress"),
        pytest.param([[0, None]], TypeError, PAIR + "[0, None].", id="null lambda"),
        pytest.param([[0, float("nan")]], TypeError, PAIR + "[0, nan].", id="nan lambda"),
        pytest.param([[float("nan"), 1]], TypeError, PAIR + "[nan, 1].", id="nan progress"),
        pytest.param([[0, float("inf")]], TypeError, PAIR + "[0, inf].", id="infinite lambda"),
        pytest.param([[-0.1, 1]], ValueError, RANGE + "-0.1 in [-0.1, 1].", id="before the start"),
        pytest.param([[0, 1], [1.01, 1]], ValueError, RANGE + "1.01 in [1.01, 1].", id="past the end"),
        pytest.param([[0, 1], [450, 1]], ValueError, RANGE + "450.0 in [450, 1].", id="a step number"),
        pytest.param(
            [[0.5, 1], [0, 1]],
            ValueError,
            RULE + "have its knots in order of progress, got 0.0 after 0.5.",
            id="order",
        ),
    ],
)
def test_invalid_knots_are_an_error_with_the_rule_and_the_value(knots, error, message):
    for check in (check_knots, schedule):
        with pytest.raises(error) as raised:
            check(knots)
        assert str(raised.value).startswith(message)


def test_checked_knots_are_pairs_of_floats():
    checked = check_knots([[0, 1], (0.5, 0.75)])
    assert checked == [(0.0, 1.0), (0.5, 0.75)]
    assert all(type(number) is float for knot in checked for number in knot)


@pytest.mark.parametrize(
    ("settings", "text", "in_force"),
    [
        pytest.param({}, "0.95", {"lambda_schedule": "fixed", "shift_lambda": 0.95}, id="defaults"),
        pytest.param(
            {"lambda_schedule": "decrease_linear", "lambda_min": 0.5},
            "1 -> 0.5",
            {"lambda_schedule": "linear_decrease", "lambda_min": 0.5, "lambda_max": 1.0},
            id="name",
        ),
        pytest.param(
            {"lambda_schedule": [[0, 0.5], [1, 1]]},
            "0.5 -> 1",
            {"lambda_schedule": "linear_increase", "lambda_min": 0.5, "lambda_max": 1.0},
            id="knots of a line",
        ),
        pytest.param(
            {"lambda_schedule": [[0, 1], [0.5, 0.6], [1, 1]]},
            "1 -> 0.6 -> 1",
            {"lambda_schedule": [[0.0, 1.0], [0.5, 0.6], [1.0, 1.0]]},
            id="knots",
        ),
        pytest.param(
            {"lambda_schedule": "cosine_increase", "lambda_min": 0.9, "lambda_max": 0.9},
            "0.9",
            {"lambda_schedule": "fixed", "shift_lambda": 0.9},
            id="constant",
        ),
        pytest.param(
            {"lambda_schedule": "adaptive", "lambda_target": 0.5, "lambda_target_metric": "displacement/chosen_fell"},
            "adaptive 0.75 to 1, target share 0.5",
            {
                "lambda_schedule": "adaptive", "lambda_min": 0.75, "lambda_max": 1.0, "lambda_target": 0.5,
                "lambda_target_metric": "displacement/chosen_fell",
            },
            id="adaptive",
        ),
    ],
)  # fmt: skip
def test_a_plan_is_described_and_reduced_to_the_fields_with_an_effect(settings, text, in_force):
    plan = LambdaPlan.of(settings)
    assert (plan.text, plan.settings) == (text, in_force)
    assert LambdaPlan.of(plan.settings).settings == in_force
    if not plan.adaptive:
        assert [plan.at(0.0), plan.at(1.0)] == [plan.start, plan.end]
        original = make_lambda_schedule(SimpleNamespace(**{**LAMBDA_DEFAULTS, **settings}))
        assert all(plan.at(step / 7) == original(step / 7) for step in range(8))


def test_a_plan_without_settings_is_unknown():
    assert LambdaPlan().text == "unknown"
    assert LambdaPlan(adaptive=True, schedule="adaptive").at(0.5) is None


def test_the_examples_in_the_docstrings_are_correct():
    failed, attempted = doctest.testmod(schedules)
    assert (failed, attempted > 0) == (0, True)
