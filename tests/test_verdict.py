"""The verdict says what the metrics show, and gives no advice that they do not support."""

import dataclasses
import math

import pytest

from dposhift_trl import DPOShiftConfig
from dposhift_trl.report.answers import degeneration
from dposhift_trl.report.findings import perplexity_growth
from dposhift_trl.report.recommendation import Outcome, recommend_lambda
from dposhift_trl.report.verdict import Tile, verdict, verdict_of
from dposhift_trl.schedules import LAMBDA_DEFAULTS, LambdaPlan
from dposhift_trl.training.callbacks import configured_schedule
from dposhift_trl.training.model_card import append_shift_section
from dposhift_trl.training.settings import LambdaInForce


def metrics(chosen=-10.0, rejected=-40.0, growth=2.0, shift_lambda=1.0, **others):
    """A last evaluation, by default of a run that learned the preference; names have `__` in place of the slash."""
    tokens = -chosen / math.log(growth) if chosen and growth != 1 else 10.0
    values = {
        "displacement/chosen": chosen,
        "displacement/rejected": rejected,
        "displacement/chosen_per_token": -math.log(growth),
        "displacement/chosen_fell": 0.9 if chosen < 0 else 0.2,
        "logps/chosen": -30.0 + chosen,
        "logps/rejected": -32.0 + rejected,
        "perplexity/chosen": math.exp(min((30.0 - chosen) / tokens, 700)),
        "rewards/margins": 3.0,
        "rewards/margins_low": 2.5,
        "rewards/margins_high": 3.5,
        "rewards/accuracies": 0.8,
        "rewards/accuracies_low": 0.75,
        "rewards/accuracies_high": 0.85,
        "shift/lambda": shift_lambda,
    }
    return values | {name.replace("__", "/"): value for name, value in others.items()}


def said(last, plan=None, lambdas=()):
    """The paragraph of a verdict."""
    return str(verdict(last, plan, lambdas))


def test_it_says_how_far_and_how_often_chosen_fell_and_what_rejected_did():
    text = said(metrics())
    assert "chosen answers fell by 10.00 nats per answer (from -30.00 to -40.00)" in text
    assert "multiplies their perplexity by 2; 90% of them became less likely" in text
    assert "rejected answers fell by 40.00 nats per answer (from -32.00 to -72.00)" in text
    assert "margin 3 (95% interval 2.5 to 3.5), accuracy 0.800 (95% interval 0.750 to 0.850)" in text


def test_a_perplexity_that_did_not_change_is_not_multiplied_by_1():
    text = said(metrics(growth=1.001))
    assert "at the same perplexity; 90% of them" in text
    assert "multiplies" not in text


@pytest.mark.parametrize(
    ("growth", "says"),
    [
        pytest.param(1.05, "slight fall", id="slight"),
        pytest.param(1.3, "clear fall", id="clear"),
        pytest.param(1.5, "likelihood displacement", id="large"),
        pytest.param(9.5, "likelihood displacement", id="huge"),
    ],
)
def test_a_fall_is_measured_by_perplexity_and_not_by_nats_per_answer(growth, says):
    for nats in (-0.5, -500.0):
        assert says in said(metrics(chosen=nats, growth=growth))


@pytest.mark.parametrize(
    ("start", "end", "says"),
    [
        pytest.param(1.0, 1.0, "With lambda 1 this is DPO. Try `shift_lambda: 0.95`", id="dpo"),
        pytest.param(1.05, 1.05, "Lambda 1.05 is above 1, the lambda of DPO. Try", id="above"),
        pytest.param(0.95, 0.95, "Lambda was 0.95. Try a lower one", id="below-1"),
        pytest.param(0.75, 0.75, "0.75, is already low", id="low"),
        pytest.param(0.5, 0.5, "Try a smaller learning rate", id="lowest"),
        pytest.param(1.0, 0.85, "from 1 to 0.85. Try a fixed lambda of 0.85", id="decrease"),
        pytest.param(0.75, 1.0, "from 0.75 to 1. Try a fixed lambda of 0.75", id="increase-ends-at-1-and-is-not-dpo"),
        pytest.param(1.0, 0.5, "already low in part", id="decrease-to-low"),
    ],
)
def test_the_advice_depends_on_lambda(start, end, says):
    assert says in said(metrics(shift_lambda=end), lambdas=[start, end])


@pytest.mark.parametrize("shift_lambda", [1.0, 0.95, 0.5])
def test_a_slight_fall_or_a_rise_needs_no_change(shift_lambda):
    slight = said(metrics(chosen=-1.0, growth=1.02, shift_lambda=shift_lambda))
    risen = said(metrics(chosen=4.0, growth=0.8, shift_lambda=shift_lambda))
    assert "no reason to change lambda" in slight
    assert "DPO-Shift reduces it but does not prevent it" in slight
    assert "rose by 4.00 nats" in risen
    assert "no reason to change lambda" in risen
    assert "Try" not in slight + risen


def test_chosen_answers_that_stay_on_average_neither_rose_nor_fell():
    for chosen in (0.0, -0.0004):
        text = said(metrics(chosen=chosen, growth=1.0))
        assert "did not move measurably: +0.00 nats per answer (from -30.00 to -30.00)" in text
        assert "Try" not in text


def test_rejected_answers_that_rose_are_called_unusual_unless_lambda_raises_both():
    both = said(metrics(chosen=3.0, growth=0.9, rejected=3.0, shift_lambda=0.5))
    crossed = said(metrics(rejected=3.0, shift_lambda=0.5))
    dpo = said(metrics(chosen=3.0, growth=0.9, rejected=3.0))
    for text in (both, crossed, dpo):
        assert "rejected answers rose by 3.00 nats per answer" in text
    assert "unusual" not in both
    assert "closer to 1" in both
    for text in (crossed, dpo):
        assert "unusual" in text
        assert "Read the pairs" in text
        assert "lambda" not in text


def test_the_share_of_pairs_in_which_both_fell_is_reported_if_known():
    assert "; in 42% of the pairs both answers fell." in said(metrics(displacement__both_fell=0.42))
    assert "both answers" not in said(metrics())


@pytest.mark.parametrize(
    ("others", "says"),
    [
        pytest.param({"rewards__margins": -0.2, "rewards__margins_low": -0.3}, "did not grow", id="margin-fell"),
        pytest.param({"rewards__margins_low": -0.1}, "is not significantly above 0", id="margin-interval"),
        pytest.param({"rewards__accuracies_low": 0.5}, "is not significantly above chance", id="accuracy-interval"),
        pytest.param({"rewards__accuracies": 0.2, "rewards__accuracies_high": 0.3}, "not swapped", id="wrong-way"),
        pytest.param({"rewards__accuracies_low": None}, "no advice without an interval of both", id="no-interval"),
        pytest.param({"rewards__margins_low": None}, "no advice without an interval of both", id="no-margin-interval"),
        pytest.param({"rewards__margins": math.nan}, "there is no advice", id="nan-margin"),
    ],
)
def test_if_nothing_was_learned_there_is_no_advice_about_lambda(others, says):
    text = said(metrics(**others))
    assert says in text
    assert "shift_lambda" not in text
    assert "was learned" not in text


@pytest.mark.parametrize(("shift_lambda", "asks"), [(math.nan, True), (0.75, False)], ids=["elsewhere", "run"])
def test_models_that_may_be_swapped_are_asked_about_only_if_they_were_trained_elsewhere(shift_lambda, asks):
    last = metrics(shift_lambda=shift_lambda, rewards__accuracies=0.2, rewards__accuracies_high=0.3)
    assert (", nor, in a diagnosis, policy and reference;" in said(last)) == asks


@pytest.mark.parametrize(
    "last",
    [
        pytest.param({}, id="nothing"),
        pytest.param(metrics(chosen=math.nan), id="nan"),
        pytest.param(metrics(rejected=math.inf), id="infinite"),
    ],
)
def test_without_metrics_there_is_no_verdict(last):
    assert "There is no verdict" in said(last)
    assert verdict(last).headline.startswith("No verdict")


def test_a_policy_that_is_still_the_reference_is_recognized():
    assert "still the reference" in said(metrics(chosen=0.0, rejected=0.0))


@pytest.mark.parametrize("growth", [1.04, 2.0, 0.7])
def test_perplexity_is_compared_with_the_reference_whose_log_probabilities_the_log_ratio_gives(growth):
    last = metrics(chosen=-10.0 if growth > 1 else 10.0, growth=growth)
    tokens = -last["logps/chosen"] / math.log(last["perplexity/chosen"])
    before = math.exp(30.0 / tokens)  # the reference gives the chosen answers -30 nats
    assert perplexity_growth(last) == pytest.approx(last["perplexity/chosen"] / before, rel=1e-12)
    assert f"perplexity by {growth:.3g};" in said(last)
    assert f"perplexity by {growth:.3g};" in said({**last, "logps/chosen": math.nan}), "from nats per token"


def test_without_lengths_no_advice_is_given_and_without_lambda_what_to_try_after_dpo():
    last = {n: v for n, v in metrics().items() if n not in ("perplexity/chosen", "displacement/chosen_per_token")}
    assert "it is unknown whether this fall is large" in said(last)
    last = {n: v for n, v in metrics().items() if n != "shift/lambda"}
    assert "Which lambda the model was trained with is unknown. If it was trained with DPO, train" in said(last)
    unmoved = {n: v for n, v in metrics(chosen=0.5).items() if n != "shift/lambda"}
    assert said(unmoved).endswith("The chosen answers kept their probability, so there is no need for DPO-Shift.")


def test_it_is_one_paragraph_that_reads_the_same_twice():
    text = said(metrics())
    assert "\n" not in text
    assert text.endswith(".")
    assert text == said(metrics())


@pytest.mark.parametrize("growth", [1e-300, 1e300])
def test_extreme_metrics_raise_no_error(growth):
    assert said(metrics(growth=growth, perplexity__chosen=math.inf))


def test_a_log_without_an_evaluation_before_training_is_compared_with_the_reference():
    late = {"step": 10} | {f"eval_{name}": value for name, value in metrics(rewards__margins=4.0).items()}
    last = {"step": 20} | {f"eval_{name}": value for name, value in metrics(rewards__margins=3.0).items()}
    assert str(verdict_of([late, last])) == str(verdict_of([last])) == said(metrics())
    assert "The preference was learned: margin 3 (95% interval 2.5 to 3.5)" in str(verdict_of([late, last]))


@pytest.mark.parametrize(
    ("schedule", "logged", "says"),
    [
        pytest.param("linear_decrease", [0.875, 0.9167, 0.75], "from 1 to 0.75. Try a fixed", id="late-evaluation"),
        pytest.param("linear_decrease", [0.95, 0.9], "from 1 to 0.9. Try a fixed", id="interrupted"),
        pytest.param([[0, 1], [0.5, 0.8], [1, 1]], [0.9, 1.0], "from 1 to 0.8 to 1. Try a fixed", id="returns-to-1"),
        pytest.param(None, [0.9, 0.85], "from 0.9 to 0.85. Try a fixed", id="only-the-log-is-known"),
    ],
)
def test_lambda_goes_from_where_the_settings_start_to_where_it_was_last(schedule, logged, says):
    plan = LambdaPlan.of({"lambda_schedule": schedule}) if schedule else None
    assert f"Lambda went {says}" in said(metrics(shift_lambda=logged[-1]), plan, logged)


def near_0(low, high, chosen=-0.4):
    return metrics(chosen=chosen, growth=1.05, displacement__chosen_low=low, displacement__chosen_high=high)


def test_a_change_that_the_interval_does_not_tell_from_0_did_not_move_measurably():
    found = verdict(near_0(-0.9, 0.1))
    assert "answers did not move measurably: -0.40 nats per answer (95% interval -0.90 to +0.10, from" in str(found)
    assert "no reason to change lambda" in str(found)
    assert "slight fall" not in str(found)
    assert found.headline.startswith(
        "Chosen answers did not move measurably: 0.40 nats lower per answer (95% interval -0.90 to +0.10)"
    )
    told = verdict(near_0(-0.9, -0.1))
    assert "chosen answers fell by 0.40 nats per answer (95% interval 0.10 to 0.90, from" in str(told)
    assert "slight fall" in str(told)


@pytest.mark.parametrize(
    ("last", "headline"),
    [
        pytest.param(
            metrics(chosen=-0.65, growth=1.04, displacement__chosen_fell=0.83),
            "Chosen answers held: 0.65 nats lower per answer, 4% more perplexity; 83% of them fell, slightly.",
            id="slight",
        ),
        pytest.param(
            metrics(growth=1.3),
            "Chosen answers fell: 10.00 nats lower per answer, 30% more perplexity; 90% of them fell.",
            id="clear",
        ),
        pytest.param(
            metrics(growth=3.2),
            "Chosen answers fell far: 10.00 nats lower per answer, 3.2 times the perplexity; 90% of them fell.",
            id="large",
        ),
        pytest.param(
            metrics(chosen=4.0, growth=0.8),
            "Chosen answers rose: 4.00 nats higher per answer, 20% less perplexity; 20% of them fell.",
            id="rose",
        ),
        pytest.param(
            metrics(chosen=0.0, rejected=0.0), "Nothing moved: the policy is still the reference.", id="same"
        ),
        pytest.param(
            metrics(rewards__margins=0.2, rewards__margins_low=-0.1),
            "The preference was not learned: margin 0.2 (95% interval -0.1 to 3.5).",
            id="not-learned",
        ),
        pytest.param(
            metrics(rewards__accuracies=0.2, rewards__accuracies_low=0.1, rewards__accuracies_high=0.3),
            "The policy prefers the rejected answers: accuracy 0.200 (95% interval 0.100 to 0.300).",
            id="wrong-way",
        ),
    ],
)
def test_the_headline_is_one_sentence(last, headline):
    assert verdict(last).headline == headline


RATED = ("chosen", "rejected", "margin", "accuracy")


@pytest.mark.parametrize(
    ("last", "ratings"),
    [
        pytest.param(metrics(growth=1.05), "good good good good", id="slight"),
        pytest.param(metrics(growth=1.3), "fair good good good", id="clear"),
        pytest.param(metrics(growth=2.0), "bad good good good", id="large"),
        pytest.param(near_0(-0.9, 0.1), "good good good good", id="not-moved"),
        pytest.param(metrics(chosen=4.0, growth=0.8, rejected=3.0), "good fair good good", id="rejected-rose"),
        pytest.param(metrics(rewards__margins_low=-1.0, rejected=3.0), "bad bad fair good", id="rejected-rose-alone"),
        pytest.param(metrics(rejected=0.0), "bad fair good good", id="rejected-same"),
        pytest.param(metrics(rewards__margins_low=-1.0), "bad good fair good", id="margin-unclear"),
        pytest.param(metrics(rewards__margins_low=-1.0, rewards__margins_high=-0.5), "bad good bad good", id="margin"),
        pytest.param(metrics(rewards__accuracies_low=0.4), "bad good good fair", id="accuracy-unclear"),
        pytest.param(metrics(rewards__accuracies_low=math.nan), "bad good good unknown", id="no-interval"),
        pytest.param(metrics(rewards__margins_low=None), "bad good unknown good", id="no-margin-interval"),
        pytest.param(metrics(rewards__margins=math.nan), "bad good unknown good", id="no-margin"),
        pytest.param({}, "unknown unknown unknown unknown", id="nothing"),
        pytest.param(
            metrics(
                chosen=0.0,
                rejected=0.0,
                growth=1.0,
                rewards__margins=0.0,
                rewards__margins_low=0.0,
                rewards__margins_high=0.0,
                rewards__accuracies=0.0,
                rewards__accuracies_low=0.0,
                rewards__accuracies_high=0.01,
            ),
            "unknown unknown unknown unknown",
            id="still-the-reference",
        ),
    ],
)
def test_each_number_is_rated_by_the_rules_of_the_paragraph(last, ratings):
    assert dict(zip(RATED, ratings.split(), strict=True)) == {tile.name: tile.rating for tile in verdict(last).tiles}


def test_a_tile_holds_the_number_that_was_logged_and_its_interval():
    chosen, _, margin, accuracy = verdict(near_0(-0.9, -0.1)).tiles
    assert chosen == Tile("chosen", -0.4, -0.9, -0.1, "nats per answer", "good")
    assert margin == Tile("margin", 3.0, 2.5, 3.5, "nats", "good")
    assert accuracy == Tile("accuracy", 0.8, 0.75, 0.85, "share", "good")
    assert verdict({}).tiles[0] == Tile("chosen", None, None, None, "nats per answer", "unknown")


def outcome(name, shift_lambda, chosen, accuracy=0.8, margin=3.0, start=-30.0, **others):
    last = metrics(
        chosen=chosen,
        shift_lambda=shift_lambda,
        logps__chosen=start + chosen,
        rewards__accuracies=accuracy,
        rewards__accuracies_low=accuracy - 0.05,
        rewards__accuracies_high=accuracy + 0.05,
        rewards__margins=margin,
        rewards__margins_low=margin - 0.5,
        **others,
    )
    return Outcome.of(name, last, (shift_lambda, shift_lambda))


DPO = outcome("dpo", 1.0, -12.0)


def test_the_qualified_run_with_the_most_likely_chosen_answers_is_recommended():
    runs = [
        DPO,
        outcome("a", 0.9, -8.0),
        outcome("b", 0.75, -3.0, accuracy=0.74),
        outcome("c", 0.5, -1.0, accuracy=0.6),
    ]
    name, reason = recommend_lambda(runs)
    assert name == "b"
    assert "-3.00 nats against -12.00" in reason
    assert "confirm it with more seeds" in reason


def test_a_run_that_lost_half_the_margin_is_not_recommended():
    assert recommend_lambda([DPO, outcome("a", 0.9, -8.0), outcome("b", 0.5, -1.0, margin=1.4)])[0] == "a"


def test_dpo_itself_is_recommended_if_no_lower_lambda_is_better():
    name, reason = recommend_lambda([DPO, outcome("a", 0.9, -13.0)])
    assert name == "dpo"
    assert "no lower lambda" in reason


def test_the_most_accurate_of_several_runs_at_lambda_1_is_compared_with():
    better = outcome("better dpo", 1.0, -14.0, accuracy=0.95)
    assert recommend_lambda([DPO, better, outcome("a", 0.9, -3.0, accuracy=0.84)])[0] == "better dpo"


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        pytest.param([], "a comparison needs two runs", id="none"),
        pytest.param([DPO], "1 of 1 runs did", id="one"),
        pytest.param([DPO, Outcome("empty")], "1 of 2 runs", id="no-evaluation"),
        pytest.param([DPO, outcome("nan", 0.9, math.nan)], "1 of 2 runs", id="nan"),
        pytest.param([outcome("a", 0.9, -3.0), outcome("b", 0.8, -2.0)], "no DPO run to compare with", id="no-dpo"),
        pytest.param([DPO, outcome("a", 0.9, -3.0, start=-35.0)], "different models", id="other-pairs"),
        pytest.param(
            [outcome("dpo", 1.0, -12.0, accuracy=0.52), outcome("a", 0.9, -3.0)], "did not learn", id="no-signal"
        ),
    ],
)
def test_without_a_recommendation_the_reason_is_given(runs, says):
    name, reason = recommend_lambda(runs)
    assert name is None
    assert says in reason


def test_a_schedule_that_ends_at_1_is_not_dpo():
    assert not Outcome.of("increase", metrics(chosen=-3.0), (0.75, 1.0)).is_dpo


def test_a_run_that_leaves_lambda_1_and_comes_back_is_not_dpo():
    assert DPO.is_dpo
    assert not dataclasses.replace(DPO, shifted_between=True).is_dpo


def test_the_plan_of_lambda_has_the_defaults_of_the_config():
    fields = {field.name: field.default for field in dataclasses.fields(DPOShiftConfig)}
    assert {name: fields[name] for name in LAMBDA_DEFAULTS} == LAMBDA_DEFAULTS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({}, LambdaPlan(0.95, 0.95), id="defaults"),
        pytest.param(
            {"lambda_schedule": "cosine_decrease"}, LambdaPlan(1.0, 0.75, schedule="cosine_decrease"), id="schedule"
        ),
        pytest.param(
            {"lambda_schedule": "adaptive", "lambda_min": 0.25, "lambda_target": -3},
            LambdaPlan(adaptive=True, low=0.25, target=-3.0, schedule="adaptive"),
            id="adaptive",
        ),
        pytest.param(
            {"lambda_schedule": "adaptive", "lambda_min": 1.0},
            LambdaPlan(1.0, 1.0, low=1.0),
            id="adaptive-without-room",
        ),
    ],
)
def test_the_plan_of_lambda_is_read_from_the_settings(settings, expected):
    assert LambdaPlan.of(settings) == expected
    assert LambdaPlan.of({"learning_rate": 1e-6, **settings}) == expected


@pytest.mark.parametrize(
    ("plan", "end", "says"),
    [
        pytest.param(LambdaPlan(adaptive=True, low=0.8), 0.8, "Try a lower `lambda_min`", id="at-its-bound"),
        pytest.param(LambdaPlan(adaptive=True, low=0.25), 0.25, "already low: a lower one can", id="at-a-low-one"),
        pytest.param(
            LambdaPlan(adaptive=True, low=0.25, target=-5.0), 0.6, "at -5, and evaluation pairs may differ, above "
            "all after several epochs or if rows share their answers. Try a higher `lambda_target`",
            id="above-its-bound",
        ),
        pytest.param(
            LambdaPlan(adaptive=True, low=0.25, target=0.5, metric="displacement/chosen_fell"), 1.0,
            "Try a lower `lambda_target`", id="share",
        ),
    ],
)  # fmt: skip
def test_for_an_adaptive_lambda_the_advice_is_another_bound_or_target_and_no_fixed_lambda(plan, end, says):
    text = said(metrics(shift_lambda=end), plan)
    assert says in text
    assert "fixed" not in text
    assert "this is DPO" not in text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param(
            {"lambda_schedule": "adaptive", "lambda_target": -2.0}, "| lambda target | -2.0 (", id="adaptive"
        ),
        pytest.param({}, "| lambda | 0.95 |", id="fixed"),
    ],
)
def test_the_model_card_says_how_lambda_was_set(settings, says, tmp_path):
    (tmp_path / "README.md").write_text("# Card\n")
    args = DPOShiftConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)
    append_shift_section(tmp_path, args, LambdaInForce.of(args, configured_schedule(args)), [])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert says in card
    assert ("lambda target" in card) == ("lambda_target" in settings)


def answered(**statistics):
    return {"count": 64.0, "empty": 0.0, "cut": 0.2, "repetition": 0.05} | statistics


def test_degenerate_text_is_reported_if_the_statistics_show_it():
    text = degeneration(
        {
            "sft greedy": answered(),
            "dpo greedy": answered(repetition=0.82, cut=0.97),
            "dpo sampled": answered(empty=0.25, repetition=math.nan),
        },
        answered(cut=0.0),
    )
    assert text.endswith("It occurs in dpo greedy (repetition 0.82 and 97% cut); dpo sampled (25% empty).")
    assert text.count(".") == text.count("0.") + 2


def test_without_degenerate_text_the_largest_statistics_are_reported():
    text = degeneration({"sft greedy": answered(empty=0.02), "dpo greedy": answered(repetition=0.31)})
    assert "does not occur: at most 2% of the answers are empty and repetition is at most 0.31" in text


def test_answers_that_repeat_themselves_as_the_data_does_are_not_called_degenerate():
    figures = {"dpo greedy": answered(repetition=0.62)}
    assert "It occurs" in degeneration(figures)
    assert "does not occur" in degeneration(figures, answered(repetition=0.6))


@pytest.mark.parametrize("figures", [{}, {"dpo greedy": answered(count=0.0, empty=math.nan)}])
def test_without_answers_nothing_is_known_about_degenerate_text(figures):
    assert "no statistics" in degeneration(figures)
