"""One self-contained page about a run, or about several compared, and its figures as files."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from .. import __version__
from ..artifacts import FIGURES as FIGURES_FOLDER
from ..artifacts import FINISHED, GENERATIONS, PAGE, STATISTICS, write_whole
from .figures import (
    DASHES,
    SERIES,
    Dot,
    Drawing,
    Line,
    color_variables,
    curves,
    density,
    histogram,
    scatter,
    trade_off,
)
from .run_folder import (
    FIGURES,
    ReportError,
    Run,
    Stage,
    as_columns,
    number,
    read_examples,
    read_file,
    read_run,
)
from .verdict import RULE, degeneration, recommend_lambda


MARK = '<meta name="generator" content="dposhift_trl'  # by which a page is known as ours
SHOWN_PAIRS = 5  # that fell most, and that rose most
SHOWN_QUESTIONS = 6  # whose answers differ most
LONGEST_OPENING = 90  # characters of a prompt by which a question is told
LONGEST_TEXT = 4_000  # characters of a prompt or answer


def write_report(folders: Sequence[Path], destination: Path) -> Path:
    """
    Write `report.html` and `figures/*.png`, `figures/*.svg` about one run, or about several compared.

    What a run folder lacks is named on the page; a figure without numbers is left out.

    Args:
        folders (`Sequence[Path]`):
            Folders of `dposhift_trl.run`, or output folders of a [`DPOShiftTrainer`].
        destination (`Path`):
            Folder to write to: new, empty, or one that holds a report of ours.

    Returns:
        `Path`: The page.

    Raises:
        ReportError: If a folder holds no run, or `destination` holds other files or cannot be written.
    """
    folders = list(dict.fromkeys(Path(folder) for folder in folders))
    if not folders:
        raise ReportError("`folders` must name at least one run, got none.")
    _check_destination(destination)
    runs = [read_run(folder) for folder in folders]
    _tell_apart(runs)
    if len(runs) == 1:
        page, drawings = _page_of_one(runs[0])
    else:
        page, drawings = _page_of_several(runs)
    try:
        write_whole(destination / PAGE, page)
        for drawing in drawings:
            write_whole(destination / FIGURES_FOLDER / f"{drawing.name}.png", drawing.png)
            write_whole(destination / FIGURES_FOLDER / f"{drawing.name}.svg", drawing.svg)
    except OSError as error:
        raise ReportError(f"{destination}: the report cannot be written: {error.strerror or error}.") from error
    return destination / PAGE


def _check_destination(destination: Path) -> None:
    try:
        if destination.exists() and not destination.is_dir():
            raise ReportError(f"{destination} is a file. Choose a folder for the report.")
        page = destination / PAGE
        if page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]:
            return
        others = sorted(entry.name for entry in destination.iterdir()) if destination.is_dir() else []
    except OSError as error:
        raise ReportError(f"{destination}: cannot be read: {error.strerror or error}.") from error
    if others:
        raise ReportError(f"{destination} holds other files ({others[0]}) and no report of ours. Choose a new folder.")


def _tell_apart(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    for index, run in enumerate(runs, 1):
        if sum(other.name == run.name for other in runs) > 1:
            run.name += f" ({index})"


def _page_of_one(run: Run) -> tuple[str, list[Drawing]]:
    scores = _last_scores(run)
    drawings = [drawing for drawing in [*_curves_of(run), *_figures_of(run, scores)] if drawing]
    fell, rose = _moved_most(run, scores)
    page = _render(
        title=run.name,
        runs=[run],
        drawings=drawings,
        fell=fell,
        rose=rose,
        facts=_facts(run),
        summary=_summary(run),
        audit=_audit(run),
        answers=_answers(run),
        answers_lie=(run.folder / GENERATIONS / STATISTICS).exists(),
        generations=GENERATIONS,
        several=False,
    )
    return page, drawings


def _last_scores(run: Run) -> dict[str, np.ndarray]:
    """Columns of the last evaluation's pairs; nothing of a pair whose log-ratios are not numbers."""
    if not run.dpo.pairs:
        return {}
    step = max(run.dpo.pairs)
    columns = read_file(run.dpo.pairs[step], as_columns, {}, run.notes, "the scores of the last evaluation")
    if not columns:
        return {}
    needed = {"row_index", "chosen_logps", "rejected_logps", "chosen_logratios", "rejected_logratios"}
    if needed - set(columns):
        run.notes.append(f"{run.dpo.pairs[step].name} lacks columns, so its pairs are not shown.")
        return {}
    finite = np.logical_and.reduce([np.isfinite(columns[name]) for name in sorted(needed)])
    if not finite.all():
        run.notes.append(
            f"{(~finite).sum()} of {len(finite)} evaluated pairs have a score that is not a number, and are left out."
        )
    last = run.ends[1].get("step")
    if last is not None and last != step:
        run.notes.append(
            f"The last scores of pairs are of step {step}, the last logged evaluation is of step {last:g}."
        )
    return {name: values[finite] for name, values in columns.items()} if finite.any() else {}


def _curves_of(run: Run) -> list[Drawing | None]:
    stage = run.dpo
    sft = run.stages.get("sft")

    def both(name: str, label: str, color: str) -> list[Line]:
        low, high = _series(stage, f"{name}_low")[1], _series(stage, f"{name}_high")[1]
        steps, values = _series(stage, name)
        band = (low, high) if len(low) == len(high) == len(steps) else ((), ())
        training = Line(f"{label} (train)" if steps else label, color, *stage.series(name), faint=bool(steps))
        return [training, Line(label, color, steps, values, *band)]

    plan = run.plan
    target = []
    if plan.adaptive and plan.metric == "displacement/chosen" and plan.target:
        steps = stage.series("shift/lambda")[0]
        target = [Line("target", "muted", steps, [plan.target] * len(steps), faint=True, dash="--")]
    bound = None
    if plan.adaptive:
        bound = (plan.low, "lower bound")
    lambdas = stage.series("shift/lambda") if stage.series("shift/lambda")[0] else _series(stage, "shift/lambda")
    at_t, at_1 = both("loss", "at λ(t)", "slate"), both("dpo_loss", "at λ = 1", "accent")
    at_1[-1].dash = "--"  # with lambda 1 throughout it lies on the other
    return [
        curves(
            "logps",
            "Log-probability of the answers",
            "nats an answer",
            [*both("logps/chosen", "chosen", "chosen"), *both("logps/rejected", "rejected", "rejected")],
        ),
        curves(
            "logratios",
            "Log-ratio to the SFT model",
            "nats an answer",
            [
                *both("displacement/chosen", "chosen", "chosen"),
                *both("displacement/rejected", "rejected", "rejected"),
                *target,
            ],
            (0, "SFT model"),
        ),
        curves(
            "margin", "Reward margin, unshifted", "nats", both("rewards/margins", "margin", "accent"), (0, "SFT model")
        ),
        curves(
            "accuracy",
            "Reward accuracy, unshifted",
            "share of pairs",
            both("rewards/accuracies", "accuracy", "accent"),
            (0.5, "chance"),
            percent=True,
        ),
        curves(
            "lambda",
            "Lambda",
            "lambda (no unit)",
            [Line("λ", "purple", *lambdas)],
            bound,
        ),
        curves("loss", "Loss at lambda(t) and at lambda 1", "nats", [*at_t, *at_1]),
        curves(
            "sft_loss",
            "Loss of the SFT stage",
            "nats a token",
            [
                Line("train", "muted", *sft.series("loss")),
                Line("evaluation", "accent", *sft.series("eval_loss")),
            ],
        )
        if sft
        else None,
    ]


def _series(stage: Stage, name: str) -> tuple[list[float], list[float]]:
    """A metric of the evaluations. Accuracy of the reference itself is left out: each of its pairs is a tie."""
    steps, values = stage.series(stage.prefix + name)
    if name.startswith("rewards/accuracies"):
        moved = dict(zip(*stage.series(stage.prefix + "displacement/chosen"), strict=True))
        kept = [(step, value) for step, value in zip(steps, values, strict=True) if moved.get(step) != 0]
        return [step for step, _ in kept], [value for _, value in kept]
    return steps, values


def _beta(run: Run) -> float | None:
    """From the logged metrics, since a plain trainer's folder states it nowhere in the open."""
    last = run.ends[1]
    difference = last.get("displacement/chosen", math.nan) - last.get("displacement/rejected", math.nan)
    margin = last.get("rewards/margins", math.nan)
    return margin / difference if math.isfinite(margin) and abs(difference) > 1e-6 else None


def _figures_of(run: Run, scores: Mapping[str, np.ndarray]) -> list[Drawing | None]:
    if not scores:
        return []
    chosen, rejected = scores["chosen_logratios"], scores["rejected_logratios"]
    beta = _beta(run)
    label = f"β (chosen − rejected log-ratio), β = {beta:.3g} (nats)" if beta else "chosen − rejected log-ratio (nats)"
    return [
        *(
            histogram(
                f"histogram_{name}",
                f"{name.capitalize()} answers: log-probability",
                "Log-probability (nats an answer)",
                name,
                scores[f"{name}_logps"] - scores[f"{name}_logratios"],
                scores[f"{name}_logps"],
            )
            for name in ("chosen", "rejected")
        ),
        density("margin_density", "Reward margin over the pairs", label, (beta or 1.0) * (chosen - rejected)),
        scatter("scatter", "Each pair: chosen against rejected", chosen, rejected),
    ]


def _moved_most(run: Run, scores: Mapping[str, np.ndarray]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pairs whose chosen answer fell most, and those whose rose most."""
    if not scores:
        return [], []
    order = np.argsort(scores["chosen_logratios"], kind="stable")

    def pairs(indices: np.ndarray) -> list[dict[str, Any]]:
        return [_pair(run, {name: column[index] for name, column in scores.items()}) for index in indices]

    fell = [pair for pair in pairs(order[:SHOWN_PAIRS]) if pair["chosen_logratio"] < 0]
    rose = [pair for pair in pairs(order[::-1][:SHOWN_PAIRS]) if pair["chosen_logratio"] > 0]
    return fell, rose


def _pair(run: Run, scores: Mapping[str, float]) -> dict[str, Any]:
    row = run.rows.get(int(scores["row_index"]))
    texts = (
        [] if row is None else [(name, as_text(row[name])) for name in ("prompt", "chosen", "rejected") if name in row]
    )
    return {
        "row": int(scores["row_index"]),
        "chosen_logratio": scores["chosen_logratios"],
        "rejected_logratio": scores["rejected_logratios"],
        "chosen_logps": scores["chosen_logps"],
        "rejected_logps": scores["rejected_logps"],
        "tokens": int(scores["chosen_tokens"]) if math.isfinite(scores.get("chosen_tokens", math.nan)) else None,
        "texts": texts,
    }


def as_text(content: Any) -> str:
    """A prompt or an answer, text or conversation, as plain text of bounded length."""
    if isinstance(content, list):
        text = "\n".join(map(as_text, content))
    elif isinstance(content, dict) and "role" in content:
        text = f"{content['role']}: {as_text(content.get('content'))}"
    elif isinstance(content, dict) and isinstance(content.get("text"), str):
        text = content["text"]
    elif content is None:
        text = "(missing)"
    else:
        text = content if isinstance(content, str) else json.dumps(content, default=str)
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT} more characters are not shown)"
    return text


def _summary(run: Run) -> list[tuple[str, str]]:
    """The last evaluation in figures, with the unit in the name."""
    last = run.ends[1]
    names = {
        "Chosen log-ratio, nats an answer": "displacement/chosen",
        "Chosen log-ratio, nats a token": "displacement/chosen_per_token",
        "Rejected log-ratio, nats an answer": "displacement/rejected",
        "Reward margin, nats": "rewards/margins",
        "Reward accuracy": "rewards/accuracies",
        "Perplexity of the chosen answers": "perplexity/chosen",
        "Loss at lambda 1, nats": "dpo_loss",
        "Lambda": "shift/lambda",
    }
    found = []
    for label, name in names.items():
        if name in last:
            low, high = last.get(f"{name}_low", math.nan), last.get(f"{name}_high", math.nan)
            interval = f" (95 % {low:.3f} to {high:.3f})" if math.isfinite(low + high) else ""
            found.append((label, f"{last[name]:.3f}{interval}"))
    return found


def _answers(run: Run) -> dict[str, Any] | None:
    """The table, the sentence and the examples of generated answers; None where there are none to be read."""
    answers = run.answers
    if answers is None:
        return None
    rows = {**answers.figures, **({"chosen in the data": answers.chosen} if answers.chosen else {})}
    examples, count, same = read_examples(run, SHOWN_QUESTIONS)
    return {
        "questions": answers.questions,
        "prompts": answers.settings.get("prompts"),
        "limit": answers.settings.get("max_new_tokens"),
        "rows": [(name, [_figure(key, values[key]) for key in FIGURES]) for name, values in rows.items()],
        "sentence": degeneration(answers.figures, answers.chosen),
        "count": count,
        "same": same,
        "examples": [_example(line, answers.models) for line in examples],
    }


def _figure(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    forms = {"count": ".0f", "mean_tokens": ".1f", "median_tokens": ".1f", "empty": ".0%", "cut": ".0%"}
    return format(value, forms.get(name, ".3f"))


def _example(line: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """One question: its opening words, and each turn with both models' greedy answers."""
    answers = {model: line["answers"][model]["greedy"] for model in (models[0], models[-1])}
    prompts = [line.get("prompt"), *line["follow_ups"]]
    opening = " ".join(as_text(prompts[0]).split())
    turns = [
        (as_text(prompt), [(model, as_text(texts[turn])) for model, texts in answers.items() if turn < len(texts)])
        for turn, prompt in enumerate(prompts)
    ]
    if line["chosen"] is not None:
        turns[0][1].append(("chosen in the data", as_text(line["chosen"])))
    return {
        "id": line["question_id"],
        "category": line["category"],
        "opening": opening if len(opening) <= LONGEST_OPENING else f"{opening[:LONGEST_OPENING]} …",
        "turns": turns,
    }


def _audit(run: Run) -> list[dict[str, Any]]:
    """Per split: rows, kept rows, and each kind of finding that occurred, with its policy and first rows."""
    found = []
    for split, audit in run.audit.items():
        findings = audit.get("findings") if isinstance(audit, dict) else None
        if not isinstance(findings, dict):
            continue
        kinds = {kind: finding for kind, finding in findings.items() if isinstance(finding, dict)}
        found.append(
            {
                "split": split,
                "rows": audit.get("rows"),
                "kept": audit.get("kept"),
                "kinds": ", ".join(kinds),
                "found": [
                    {
                        "kind": kind,
                        "count": finding.get("count"),
                        "policy": finding.get("policy"),
                        "rows": ", ".join(str(example.get("row")) for example in finding.get("examples") or []),
                    }
                    for kind, finding in kinds.items()
                    if finding.get("count")
                ],
            }
        )
    return found


def _facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Versions, hardware, time and speed of each stage, as far as they were recorded."""
    found = []
    for name, stage in run.stages.items():
        finished = stage.finished or {}
        steps = stage.state.get("global_step"), stage.state.get("max_steps")
        facts = [("Optimizer steps", f"{steps[0]} of {steps[1]}")] if steps[0] is not None else []
        if stage.state.get("best_global_step"):
            facts.append(("Best step by the recipe's metric", f"{stage.state['best_global_step']}; shown is the last"))
        if finished:
            facts.append(
                ("Device", f"{finished.get('device', 'unknown')}, {finished.get('processes', '?')} process(es)")
            )
            facts.append(("Time, seconds", f"{number(finished.get('seconds')):.1f}"))
        else:
            facts.append(("Device, time, versions", f"not recorded: no readable {FINISHED} in {stage.folder.name}/"))
        tokens, seconds = stage.series("num_tokens")[1], stage.series("train_runtime")[1]
        if tokens and seconds and seconds[-1] > 0:
            facts.append(("Tokens per second, evaluations included", f"{tokens[-1] / seconds[-1]:,.0f}"))
        versions = finished.get("versions")
        if isinstance(versions, dict):
            facts.append(("Versions", ", ".join(f"{package} {version}" for package, version in versions.items())))
        found.append((name, facts))
    return found


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


ANSWER_COLUMNS = (("Repetition", "answers/repetition"), ("Empty answers, share", "answers/empty"))


def _compared(run: Run, name: str) -> float:
    """A figure of the table that compares runs."""
    if name.startswith("answers/"):
        return math.nan if run.answers is None else run.answers.final_greedy.get(name.split("/")[1], math.nan)
    if name == "shift/lambda" and run.outcome.lambdas is not None:
        return run.outcome.lambdas[1]
    return run.ends[1].get(name, math.nan)


def _page_of_several(runs: Sequence[Run]) -> tuple[str, list[Drawing]]:
    outcomes = [run.outcome for run in runs]
    recommended, reason = recommend_lambda(outcomes)
    drawings = [drawing for drawing in [*_trade_offs(runs), *_overlays(runs)] if drawing]
    answered = [run.answers for run in runs if run.answers is not None]
    columns = [*COLUMNS, *(ANSWER_COLUMNS if answered else ())]
    table: list[dict[str, Any]] = [
        {
            "name": run.name,
            "lambda_text": run.lambda_text,
            "recommended": run.name == recommended,
            "values": [_compared(run, name) for _, name in columns],
        }
        for run in runs
    ]
    # Sorted by what the recommendation is about; a run without the figure comes last
    table.sort(key=lambda row: -row["values"][1] if math.isfinite(row["values"][1]) else math.inf)
    betas = [beta for run in runs if (beta := _beta(run)) is not None]
    page = _render(
        title=f"{len(runs)} runs compared",
        runs=runs,
        drawings=drawings,
        table=table,
        columns=[label for label, _ in columns],
        answered=len(answered),
        other_questions=len({json.dumps(answers.settings, sort_keys=True) for answers in answered}) > 1,
        reason=reason,
        rule=RULE,
        other_betas=bool(betas) and max(betas) > 1.01 * min(betas),
        several=True,
    )
    return page, drawings


def _trade_offs(runs: Sequence[Run]) -> list[Drawing | None]:
    found = []
    for name, title, label in (
        ("margin", "Chosen log-ratio against margin", "Reward margin (nats; up is better)"),
        ("accuracy", "Chosen log-ratio against accuracy", "Reward accuracy (up is better)"),
    ):
        dots = []
        for index, run in enumerate(runs):
            end = run.outcome
            low, high = getattr(end, f"{name}_low"), getattr(end, f"{name}_high")
            x, y = end.chosen, getattr(end, name)
            dots.append(
                Dot(
                    f"{run.name}, {run.lambda_text}" if len(runs) <= 4 else run.lambda_text,
                    math.nan if x is None else x,
                    math.nan if y is None else y,
                    SERIES[index % len(SERIES)],
                    low,
                    high,
                    end.is_dpo,
                )
            )
        found.append(trade_off(f"trade_off_{name}", title, label, dots, percent=name == "accuracy"))
    return found


def _overlays(runs: Sequence[Run]) -> list[Drawing | None]:
    """Each metric's curves of all runs, of evaluation where there is one, else of training."""

    def lines(name: str) -> list[Line]:
        found = []
        for index, run in enumerate(runs):
            steps, values = _series(run.dpo, name)
            if not steps:
                steps, values = run.dpo.series(name)
            label = run.lambda_text if [r.lambda_text for r in runs].count(run.lambda_text) == 1 else run.name
            dash = DASHES[index // len(SERIES) % len(DASHES)]
            found.append(Line(label, SERIES[index % len(SERIES)], steps, values, dash=dash))
        return found

    zero = (0, "SFT model")
    return [
        curves("curves_chosen", "Chosen log-ratio", "nats an answer", lines("displacement/chosen"), zero),
        curves("curves_rejected", "Rejected log-ratio", "nats an answer", lines("displacement/rejected"), zero),
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


def _render(**values: Any) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:.3f}" if math.isfinite(value) else "–"
    # Drawn by us, from numbers and names of metrics alone but for runs' names, which matplotlib escapes
    environment.filters["prose"] = lambda text: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    environment.filters["drawn"] = lambda drawing: Markup(drawing.inline)
    return environment.get_template("report.html.j2").render(
        version=__version__,
        light=color_variables(dark=False),
        dark=color_variables(dark=True),
        **values,
    )
