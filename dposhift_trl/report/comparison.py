"""What the page that compares several runs shows."""

import json
import math
from collections.abc import Sequence
from typing import Any

from .drawing import Drawing
from .figures import DASHES, SERIES, Dot, Line, curves, trade_off
from .recommendation import RULE, difference, dpo_among, recommend_lambda
from .run_folder import Run
from .seeds import SeedGroup, seed_groups


COLUMNS = (
    ("λ", "shift/lambda"),
    ("Chosen log-ratio, nats", "displacement/chosen"),
    ("Chosen fell, share", "displacement/chosen_fell"),
    ("Rejected log-ratio, nats", "displacement/rejected"),
    ("Margin, nats", "rewards/margins"),
    ("Accuracy", "rewards/accuracies"),
    ("Perplexity of chosen", "perplexity/chosen"),
    ("Loss at λ 1, nats", "dpo_loss"),
)
SORTED_BY = 1  # the chosen log-ratio, which the recommendation is about
ANSWER_COLUMNS = (("Repetition", "answers/repetition"), ("Empty answers, share", "answers/empty"))


def compare_runs(runs: Sequence[Run]) -> tuple[dict[str, Any], list[Drawing]]:
    """Values of the template and figures of the page that compares runs."""
    groups = seed_groups(runs)
    name, reason = recommend_lambda([group.outcome for group in groups])
    recommended = next((group for group in groups if group.name == name), None)
    recommended_runs = {run.name for run in recommended.runs} if recommended is not None else set()
    drawings = [drawing for drawing in [*_trade_offs(groups), *_overlays(runs)] if drawing]
    answered = [run.answers for run in runs if run.answers is not None]
    columns = [*COLUMNS, *(ANSWER_COLUMNS if answered else ())]
    by_name = {run.name: run for run in runs}
    table: list[dict[str, Any]] = [
        {
            "name": run.name,
            "lambda_text": run.lambda_text,
            "recommended": run.name in recommended_runs,
            "values": [_value(run, name) for _, name in columns],
        }
        for run in runs
    ]
    # A run without the number comes last
    table.sort(key=lambda row: -row["values"][SORTED_BY] if math.isfinite(row["values"][SORTED_BY]) else math.inf)
    betas = [beta for run in runs if (beta := run.beta) is not None]
    headline = _headline(recommended, groups, reason)
    values = {
        "title": f"{len(runs)} runs compared",
        "headline": headline,
        "cards": [(by_name[row["name"]], row["recommended"]) for row in table],
        "table": table,
        "seeds": [_over_seeds(group, group is recommended) for group in groups if len(group.runs) > 1],
        "columns": [label for label, _ in columns],
        "sorted_by": SORTED_BY,
        "answered": bool(answered),
        "other_questions": len({json.dumps(answers.settings, sort_keys=True) for answers in answered}) > 1,
        "reason": reason.removeprefix(headline).lstrip(),  # the headline may be its first sentence
        "rule": RULE,
        "other_betas": bool(betas) and max(betas) > 1.01 * min(betas),
    }
    return values, drawings


def _headline(recommended: SeedGroup | None, groups: Sequence[SeedGroup], reason: str) -> str:
    """The recommendation and its reason as one sentence."""
    dpo = dpo_among([group.outcome for group in groups])
    if recommended is None or dpo is None:
        return reason.split(". ")[0].rstrip(".") + "."
    if recommended.outcome.is_dpo:
        return f"Keep {_named(recommended)}: no lower lambda kept the chosen answers more likely at the same quality."
    gain = difference(recommended.outcome, dpo, "chosen").value or 0.0
    now, before = (outcome.accuracy.value or 0.0 for outcome in (recommended.outcome, dpo))
    return (
        f"Take {_named(recommended)}: its chosen answers are {gain:.2f} nats more likely than DPO's, at an accuracy "
        f"of {now:.1%} against {before:.1%}."
    )


def _named(group: SeedGroup) -> str:
    """A run, or the runs with other seeds, with its lambda."""
    seeds = f", {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    return f"{group.name} ({group.lambda_text}{seeds})"


def _over_seeds(group: SeedGroup, recommended: bool) -> dict[str, Any]:
    """Means over the seeds of a group with their intervals, for the table of the page."""
    return {
        "name": group.name,
        "count": len(group.runs),
        "lambda_text": group.lambda_text,
        "recommended": recommended,
        "values": [group.mean(name) for _, name in COLUMNS[1:]],
    }


def _value(run: Run, name: str) -> float:
    """A number of the table."""
    if name.startswith("answers/"):
        return math.nan if run.answers is None else run.answers.final_greedy.get(name.split("/")[1], math.nan)
    if name == "shift/lambda" and run.outcome.lambdas is not None:
        return run.outcome.lambdas[1]
    return run.last.get(name, math.nan)


def _trade_offs(groups: Sequence[SeedGroup]) -> list[Drawing | None]:
    found, labels = [], _labels(groups)
    for name, title, label in (
        ("margin", "Chosen log-ratio against margin", "Reward margin (nats; up is better)"),
        ("accuracy", "Chosen log-ratio against accuracy", "Reward accuracy (up is better)"),
    ):
        dots = []
        for index, group in enumerate(groups):
            outcome = group.outcome
            chosen, value = outcome.chosen.value, getattr(outcome, name)
            dots.append(
                Dot(
                    labels[index],
                    math.nan if chosen is None else chosen,
                    math.nan if value.value is None else value.value,
                    SERIES[index % len(SERIES)],
                    value.low,
                    value.high,
                    outcome.is_dpo,
                )
            )
        found.append(trade_off(f"trade_off_{name}", title, label, dots, percent=name == "accuracy"))
    return found


def _labels(entries: Sequence[Run] | Sequence[SeedGroup]) -> list[str]:
    """Lambda of each entry of a figure, or its name if another one has the same."""
    lambdas = [entry.lambda_text for entry in entries]
    return [entry.lambda_text if lambdas.count(entry.lambda_text) == 1 else entry.name for entry in entries]


def _overlays(runs: Sequence[Run]) -> list[Drawing | None]:
    """The curves of all runs, one figure per metric, of the evaluations if there are any, otherwise of training."""
    labels = _labels(runs)

    def lines(name: str) -> list[Line]:
        found = []
        for index, run in enumerate(runs):
            steps, values = run.dpo.evaluation_series(name)
            if not steps:
                steps, values = run.dpo.series(name)
            dash = DASHES[index // len(SERIES) % len(DASHES)]
            found.append(Line(labels[index], SERIES[index % len(SERIES)], steps, values, dash=dash))
        return found

    zero, answers = (0, "SFT model"), "nats per answer"
    return [
        curves("curves_chosen", "Chosen log-ratio", answers, lines("displacement/chosen"), zero),
        curves("curves_rejected", "Rejected log-ratio", answers, lines("displacement/rejected"), zero),
        curves("curves_margin", "Reward margin, unshifted", "nats", lines("rewards/margins"), zero),
        curves(
            "curves_accuracy",
            "Reward accuracy, unshifted",
            "share of pairs",
            lines("rewards/accuracies"),
            (0.5, "chance"),
            percent=True,
        ),
    ]
