"""The recommended lambda: from every seed, and never on noise."""

import dataclasses
import json
import re

import pytest
from test_report import Page, make_run

from dposhift_trl.report import figures, write_report
from dposhift_trl.report.drawing import Drawing
from dposhift_trl.report.findings import Estimate
from dposhift_trl.report.recommendation import Outcome, difference, recommend_lambda
from dposhift_trl.report.run_folder import read_run
from dposhift_trl.report.seeds import seed_groups
from dposhift_trl.sweep.table import make_seed_table


def of_one_run(shift_lambda, chosen, width=None, accuracy=0.8, margin=3.0, name=None, start=-30.0):
    """A run that learned the preference; `width` is half of the interval of its chosen log-ratio."""
    ends = (None, None) if width is None else (chosen - width, chosen + width)
    return Outcome(
        name or f"lambda {shift_lambda}", (shift_lambda, shift_lambda), Estimate(chosen, *ends),
        Estimate(margin, margin - 0.5, margin + 0.5), Estimate(accuracy, accuracy - 0.05, accuracy + 0.05), start,
        settings={"dpo.shift_lambda": shift_lambda, "dpo.beta": 0.1},
    )  # fmt: skip


def over_seeds(shift_lambda, chosen, **others):
    runs = {seed: of_one_run(shift_lambda, value, **others) for seed, value in enumerate(chosen, 1)}
    return Outcome.over_seeds(f"lambda {shift_lambda}", runs)


def test_means_and_intervals_over_seeds_are_those_of_student():
    outcome = over_seeds(0.9, [-1.0, -2.0, -3.0])
    assert outcome.chosen == Estimate(-2.0, pytest.approx(-4.4841, abs=1e-4), pytest.approx(0.4841, abs=1e-4))
    assert outcome.accuracy == Estimate(pytest.approx(0.8), pytest.approx(0.8), pytest.approx(0.8))
    assert outcome.reference_chosen == -30.0


def test_the_interval_of_a_share_over_seeds_ends_at_1():
    runs = {seed: of_one_run(0.9, -1.0, accuracy=accuracy) for seed, accuracy in enumerate((0.99, 0.9, 0.95))}
    accuracy = Outcome.over_seeds("x", runs).accuracy
    assert accuracy.value == pytest.approx(0.9467, abs=1e-4)
    assert accuracy.low == pytest.approx(0.8347, abs=1e-3)
    assert accuracy.high == 1.0


def test_a_seed_without_the_number_leaves_the_mean_unknown():
    runs = {1: of_one_run(0.9, -1.0), 2: dataclasses.replace(of_one_run(0.9, -1.0), chosen=Estimate())}
    assert Outcome.over_seeds("x", runs).chosen == Estimate()
    assert not Outcome.over_seeds("x", runs).complete


def test_seeds_that_started_from_different_models_are_not_compared():
    runs = {1: of_one_run(0.9, -1.0), 2: of_one_run(0.9, -1.0, start=-40.0)}
    assert Outcome.over_seeds("x", runs).reference_chosen is None


def test_differences_are_taken_seed_by_seed():
    # The seeds scatter by 10 nats, but lambda 0.9 is 1 nat better in each
    dpo, low = over_seeds(1.0, [-20.0, -10.0, -30.0]), over_seeds(0.9, [-19.0, -9.0, -29.1])
    gain = difference(low, dpo, "chosen")
    assert gain.value == pytest.approx(2.9 / 3)
    assert gain.low > 0.8
    assert recommend_lambda([dpo, low])[0] == "lambda 0.9"
    others = {seed + 7: outcome for seed, outcome in low.seeds.items()}
    unpaired = difference(dataclasses.replace(low, seeds=others), dpo, "chosen")
    assert unpaired.low < 0 < unpaired.high


def test_without_seeds_in_common_two_intervals_are_independent():
    gain = difference(of_one_run(0.9, -5.0, 0.3), of_one_run(1.0, -7.0, 0.4), "chosen")
    assert (gain.value, gain.low, gain.high) == pytest.approx((2.0, 1.5, 2.5))
    assert difference(of_one_run(0.9, -5.0), of_one_run(1.0, -7.0, 0.4), "chosen") == Estimate(2.0)


@pytest.mark.parametrize(
    ("dpo", "low"),
    [
        pytest.param(of_one_run(1.0, -7.0, 1.0), of_one_run(0.9, -6.0, 1.0), id="pairs"),
        pytest.param(over_seeds(1.0, [-7.0, -8.0, -6.0]), over_seeds(0.9, [-6.0, -5.0, -7.5]), id="seeds"),
    ],
)
def test_a_difference_that_is_not_told_from_0_is_not_recommended(dpo, low):
    name, reason = recommend_lambda([dpo, low])
    assert name is None
    assert "No recommendation: no run kept the chosen answers measurably more likely than lambda 1.0" in reason
    assert re.search(r"largest for lambda 0.9, \+\d.\d\d, 95% interval -\d.\d\d to \+\d.\d\d. Add seeds", reason)


def test_if_lower_lambdas_are_measurably_worse_dpo_is_recommended():
    name, reason = recommend_lambda([of_one_run(1.0, -7.0, 0.1), of_one_run(0.9, -9.0, 0.1)])
    assert name == "lambda 1.0"
    assert "no lower lambda kept" in reason


def test_of_runs_that_are_not_told_apart_the_one_closest_to_1_is_recommended():
    runs = [
        of_one_run(1.0, -20.0, 1.0),
        of_one_run(0.9, -5.2, 1.0),
        of_one_run(0.75, -5.0, 1.0),
        of_one_run(0.5, -9.0, 1.0),
    ]
    name, reason = recommend_lambda(runs)
    assert name == "lambda 0.9"
    assert "this one and lambda 0.75 kept the chosen answers most likely and do not differ measurably" in reason
    assert "closest to 1: log-ratio -5.20 nats against -20.00 (+14.80, 95% interval +13.39 to +16.21)" in reason


@pytest.mark.parametrize(
    ("accuracies", "qualifies"),
    [pytest.param([0.78, 0.79, 0.8], True, id="unclear"), pytest.param([0.7, 0.71, 0.72], False, id="below")],
)
def test_accuracy_is_compared_with_dpo_seed_by_seed(accuracies, qualifies):
    def runs(shift_lambda, chosen, values):
        return Outcome.over_seeds(
            f"lambda {shift_lambda}",
            {seed: of_one_run(shift_lambda, chosen, accuracy=value) for seed, value in enumerate(values)},
        )

    name, _ = recommend_lambda([runs(1.0, -20.0, [0.8, 0.79, 0.81]), runs(0.9, -5.0, accuracies)])
    assert (name == "lambda 0.9") == qualifies


@pytest.mark.parametrize(
    ("lambdas", "says"),
    [
        pytest.param(
            (1.0, 0.9, 0.5), "The lowest value tried of `dpo.shift_lambda`, 0.5, is the best: try", id="lowest"
        ),
        pytest.param((1.0, 0.5, 0.4), None, id="between"),
    ],
)
def test_the_edge_of_the_grid_is_said(lambdas, says):
    chosen = {1.0: -20.0, 0.9: -10.0, 0.5: -2.0, 0.4: -15.0}
    name, reason = recommend_lambda([of_one_run(value, chosen[value], 0.1) for value in lambdas])
    assert name == "lambda 0.5"
    assert (says in reason) if says else "value tried" not in reason
    assert "dpo.beta" not in reason  # of which one value was tried


def test_the_highest_value_of_another_setting_is_said_and_lambda_1_is_not():
    runs = [of_one_run(1.0, -20.0, 0.1), of_one_run(0.9, -10.0, 0.1), of_one_run(0.9, -5.0, 0.1, name="more")]
    runs[2] = dataclasses.replace(runs[2], settings={"dpo.shift_lambda": 0.9, "dpo.beta": 0.3, "dpo.lambda_max": 1.0})
    runs[1] = dataclasses.replace(runs[1], settings={"dpo.shift_lambda": 0.9, "dpo.beta": 0.1, "dpo.lambda_max": 0.9})
    name, reason = recommend_lambda(runs)
    assert name == "more"
    assert "The highest value tried of `dpo.beta`, 0.3, is the best: try higher ones too." in reason
    assert "lambda_max" not in reason


def test_seeds_that_agree_by_chance_have_not_learned():
    # Each run's accuracy, 0.52, has an interval over pairs from 0.47 to 0.57
    dpo, lower = over_seeds(1.0, [-9.0, -9.1], accuracy=0.52), over_seeds(0.5, [-1.0, -1.1], accuracy=0.52)
    assert dpo.accuracy.interval == (0.52, 0.52)
    assert not dpo.learned
    assert recommend_lambda([dpo, lower])[0] is None
    assert over_seeds(1.0, [-9.0, -9.1], accuracy=0.56).learned


def test_the_confidence_is_that_of_the_seeds():
    assert (
        "confirm it with more seeds (`--seeds 3`"
        in recommend_lambda([of_one_run(1.0, -9.0), of_one_run(0.9, -1.0)])[1]
    )
    several = [over_seeds(1.0, [-9.0, -9.1]), over_seeds(0.9, [-1.0, -1.1])]
    assert recommend_lambda(several)[1].endswith("These are means over 2 seeds on one evaluation set.")


# From run folders


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two lambdas with three seeds each, and one lambda with one."""
    root = tmp_path_factory.mktemp("sweep")
    folders = []
    for shift_lambda, fall, seeds in ((1.0, 9.0, (1, 2, 3)), (0.75, 1.0, (1, 2, 3)), (0.5, 2.0, (1,))):
        for seed in seeds:
            name = f"fixed-{shift_lambda}" + (f"_seed-{seed}" if seed > 1 else "")
            folder = make_run(root / name, shift_lambda, fall=fall * (1 + seed / 100), pairs=20)
            data = {"path": "rows.jsonl", "eval_size": 20} | ({"seed": 1} if seed > 1 else {})  # as in a sweep
            recipe = {"seed": seed, "output_dir": str(folder), "run_name": name, "data": data}
            recipe["dpo"] = {"shift_lambda": shift_lambda}
            (folder / "recipe.yaml").write_text(json.dumps(recipe))
            folders.append(folder)
    return folders


def test_runs_that_differ_in_their_seed_are_one_group(sweep):
    groups = seed_groups([read_run(folder) for folder in sweep])
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("fixed-1.0", 3),
        ("fixed-0.75", 3),
        ("fixed-0.5", 1),
    ]
    chosen = [run.last["displacement/chosen"] for run in groups[1].runs]
    assert groups[1].outcome.chosen.value == pytest.approx(sum(chosen) / 3)
    assert groups[1].outcome.seeds.keys() == {1, 2, 3}
    fell = groups[1].mean("displacement/chosen_fell")
    assert 0 <= fell.low <= fell.value <= fell.high <= 1
    assert not groups[2].outcome.seeds
    assert recommend_lambda([group.outcome for group in groups])[0] == "fixed-0.75"


def test_runs_that_hold_out_other_rows_are_no_group(sweep):
    runs = [read_run(folder) for folder in sweep[:3]]
    runs[2].settings["data"]["seed"] = 3
    assert [len(group.runs) for group in seed_groups(runs)] == [2, 1]
    for run in runs:  # the first rows of a stream are the same for each seed
        run.settings["data"] = {"path": "rows.jsonl", "eval_size": 20, "streaming": True}
    assert [len(group.runs) for group in seed_groups(runs)] == [3]


def test_runs_that_were_evaluated_on_other_pairs_are_not_compared(sweep, tmp_path):
    same, other = sweep[3:6], make_run(tmp_path / "other", 0.75, fall=1.0, pairs=20, text="other answer")
    for folders, comparable in ((same, True), ([*same, other], False)):
        groups = seed_groups([read_run(folder) for folder in (sweep[0], *folders)])
        recommended, reason = recommend_lambda([group.outcome for group in groups])
        assert (recommended == "fixed-0.75", "evaluated on different pairs" in reason) == (comparable, not comparable)
    group = Outcome.over_seeds("x", {1: read_run(same[0]).outcome, 2: read_run(other).outcome})
    assert "evaluated on different pairs" in recommend_lambda([read_run(sweep[0]).outcome, group])[1]
    unknown = [dataclasses.replace(read_run(folder).outcome, evaluated=frozenset()) for folder in (sweep[0], other)]
    assert recommend_lambda(unknown)[0] == "other"


def test_a_run_with_other_settings_keeps_its_name_from_a_group(sweep):
    runs = [read_run(sweep[0]), *(read_run(folder) for folder in sweep[1:3])]
    runs[0].settings = {**runs[0].settings, "dpo": {"shift_lambda": 0.9}}
    groups = seed_groups(runs)
    assert [(group.name, len(group.runs)) for group in groups] == [("fixed-1.0", 1), ("fixed-1.0_seed-2", 2)]


def test_the_same_run_twice_and_runs_without_a_recipe_are_no_seeds(sweep, tmp_path):
    twice = [read_run(sweep[0]), read_run(sweep[0])]
    plain = [read_run(make_run(tmp_path / name, pairs=3)) for name in "ab"]
    for run in plain:
        run.settings = None
    assert [len(group.runs) for group in seed_groups([*twice, *plain])] == [1, 1, 1, 1]


def test_seeds_without_an_effect_are_no_seeds(sweep):
    runs = [read_run(folder) for folder in sweep[:3]]
    for run in runs:
        run.stages = runs[0].stages
    assert [len(group.runs) for group in seed_groups(runs)] == [1, 1, 1]


def test_the_table_of_a_sweep_has_a_mean_and_an_interval_per_setting(sweep):
    lines = make_seed_table(seed_groups([read_run(folder) for folder in sweep]))
    assert [line.split()[0] for line in lines[2:-1]] == ["fixed-0.75", "fixed-1.0"]
    assert re.match(r"fixed-0.75 +3 +0.75 +-\d\.\d+ \(-\d\.\d+ to -\d\.\d+\)", lines[2])
    assert make_seed_table(seed_groups([read_run(sweep[-1])])) == []


def test_the_page_compares_means_over_seeds(sweep, tmp_path, monkeypatch):
    dots = []
    monkeypatch.setattr(
        figures, "draw", lambda name, title, alt, figure: Drawing(name, title, alt, b"", b"", "<svg/>")
    )
    monkeypatch.setattr(
        "dposhift_trl.report.comparison.trade_off", lambda name, title, label, drawn, **_: dots.append(drawn)
    )
    text = Page(write_report(sweep, tmp_path / "out")).text
    assert "Means over seeds" in text
    assert "fixed-0.75 recommended 3 0.75" in text
    assert "Take fixed-0.75 (λ 0.75, 3 seeds)" in text
    assert [dot.label for dot in dots[0]] == ["λ 1", "λ 0.75", "λ 0.5"]
    assert "Means over seeds" not in Page(write_report(sweep[2:4], tmp_path / "out")).text
