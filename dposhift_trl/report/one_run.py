"""What the page about one run shows."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..artifacts import FINISHED, GENERATIONS, STATISTICS
from ..columns import SAVED_ROW_INDEX
from ..data.messages import message_as_text, tool_calls
from .answers import STATISTICS_OF_ANSWERS, degeneration, read_examples
from .drawing import Drawing
from .figures import Line, curves, density, histogram, scatter
from .files import number, read_columns, read_file
from .run_folder import Run


SHOWN_PAIRS = 5  # pairs that fell most, and pairs that rose most
SHOWN_QUESTIONS = 6  # questions whose answers differ most
LONGEST_OPENING = 90  # characters of a prompt in the heading of a question
LONGEST_TEXT = 4_000  # characters of a prompt or answer


def describe_run(run: Run) -> tuple[dict[str, Any], list[Drawing]]:
    """Values of the template and figures of the page about one run."""
    scores = _last_scores(run)
    drawings = [drawing for drawing in [*_draw_curves(run), *_draw_pairs(run, scores)] if drawing]
    fell, rose = _pairs_that_changed_most(run, scores)
    values = {
        "title": run.name,
        "fell": fell,
        "rose": rose,
        "facts": _facts(run),
        "summary": _summary(run),
        "audit": _audit(run),
        "answers": _answers(run),
        "answers_exist": (run.folder / GENERATIONS / STATISTICS).exists(),
        "generations": GENERATIONS,
    }
    return values, drawings


def _last_scores(run: Run) -> dict[str, np.ndarray]:
    """Columns of the scores of the last logged evaluation, without pairs whose scores are not finite."""
    logged = {int(metrics["step"]): metrics for metrics in run.dpo.evaluations()}
    steps = [step for step in run.dpo.pairs if step in logged or not logged]
    if unlogged := sorted(set(run.dpo.pairs) - set(steps)):
        run.notes.append(
            f"The scores of pairs of step {', '.join(map(str, unlogged))} are left out, since the log has no "
            "evaluation there: they are of an earlier training, or of steps after the last checkpoint."
        )
    if not steps:
        return {}
    step = max(steps)
    path = run.dpo.pairs[step]
    columns = read_file(path, read_columns, {}, run.notes, "the scores of the last evaluation")
    if not columns:
        return {}
    needed = {SAVED_ROW_INDEX, "chosen_logps", "rejected_logps", "chosen_logratios", "rejected_logratios"}
    if needed - set(columns):
        missing = ", ".join(f"`{name}`" for name in sorted(needed - set(columns)))
        run.notes.append(f"{path.name} lacks the columns {missing}, so its pairs are not shown.")
        return {}
    finite = np.logical_and.reduce([np.isfinite(columns[name]) for name in sorted(needed)])
    if finite.all() and not _agree(columns, logged.get(step, {})):
        run.notes.append(
            f"{path.name} is left out, since its means are not those that the log has for step {step}: its scores are "
            "of another training."
        )
        return {}
    if not finite.all():
        run.notes.append(
            f"{(~finite).sum()} of {len(finite)} evaluated pairs have a score that is not a number and are left out."
        )
    last = run.last.get("step")
    if last is not None and last != step:
        run.notes.append(
            f"The last scores of pairs are from step {step}, but the last logged evaluation is from step {last:g}."
        )
    return {name: values[finite] for name, values in columns.items()} if finite.any() else {}


def _agree(columns: Mapping[str, np.ndarray], logged: Mapping[str, float]) -> bool:
    """Whether the means over the pairs are those that were logged with them."""
    means = {
        "logps/chosen": "chosen_logps",
        "logps/rejected": "rejected_logps",
        "displacement/chosen": "chosen_logratios",
        "displacement/rejected": "rejected_logratios",
    }
    known = [(float(columns[name].mean()), logged[metric]) for metric, name in means.items() if metric in logged]
    return all(math.isclose(*pair, rel_tol=1e-6, abs_tol=1e-6) for pair in known if math.isfinite(pair[1]))


def _draw_curves(run: Run) -> list[Drawing | None]:
    stage, sft, plan = run.dpo, run.stages.get("sft"), run.plan

    def both(name: str, label: str, color: str, dash: str = "-") -> list[Line]:
        """A metric in training and in the evaluations."""
        steps, values = stage.evaluation_series(name)
        low, high = stage.evaluation_series(f"{name}_low")[1], stage.evaluation_series(f"{name}_high")[1]
        if not len(low) == len(high) == len(steps):
            low, high = [], []
        training = Line(f"{label} (train)" if steps else label, color, *stage.series(name), faint=bool(steps))
        return [training, Line(label, color, steps, values, low, high, dash=dash)]

    lambdas = stage.series("shift/lambda")
    target = []
    if plan.adaptive and plan.metric == "displacement/chosen" and plan.target:
        target = [Line("target", "muted", lambdas[0], [plan.target] * len(lambdas[0]), faint=True, dash="--")]
    if not lambdas[0]:
        lambdas = stage.evaluation_series("shift/lambda")
    answers = "nats per answer"
    drawings = [
        curves(
            "logps",
            "Log-probability of the answers",
            answers,
            [*both("logps/chosen", "chosen", "chosen"), *both("logps/rejected", "rejected", "rejected")],
        ),
        curves(
            "logratios",
            "Log-ratio to the SFT model",
            answers,
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
            (plan.low, "lower bound") if plan.adaptive else None,
        ),
        curves(
            "loss",
            "Loss at lambda(t) and at lambda 1",
            "nats",
            # Dashed, since the two curves are the same at lambda 1
            [*both("loss", "at λ(t)", "slate"), *both("dpo_loss", "at λ = 1", "accent", dash="--")],
        ),
    ]
    if sft:
        lines = [Line("train", "muted", *sft.series("loss")), Line("evaluation", "accent", *sft.series("eval_loss"))]
        drawings.append(curves("sft_loss", "Loss of the SFT stage", "nats per token", lines))
    return drawings


def _draw_pairs(run: Run, scores: Mapping[str, np.ndarray]) -> list[Drawing | None]:
    if not scores:
        return []
    chosen, rejected, beta = scores["chosen_logratios"], scores["rejected_logratios"], run.beta
    label = f"β (chosen − rejected log-ratio), β = {beta:.3g} (nats)" if beta else "chosen − rejected log-ratio (nats)"
    histograms = [
        histogram(
            f"histogram_{name}",
            f"{name.capitalize()} answers: log-probability",
            "Log-probability (nats per answer)",
            name,
            scores[f"{name}_logps"] - scores[f"{name}_logratios"],
            scores[f"{name}_logps"],
        )
        for name in ("chosen", "rejected")
    ]
    return [
        *histograms,
        density("margin_density", "Reward margin over the pairs", label, (beta or 1.0) * (chosen - rejected)),
        scatter("scatter", "Each pair: chosen against rejected", chosen, rejected),
    ]


def _pairs_that_changed_most(
    run: Run, scores: Mapping[str, np.ndarray]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pairs whose chosen answer fell most, and those whose chosen answer rose most."""
    if not scores:
        return [], []
    order = np.argsort(scores["chosen_logratios"], kind="stable")

    def pairs(indices: np.ndarray) -> list[dict[str, Any]]:
        return [_pair(run, {name: column[index] for name, column in scores.items()}) for index in indices]

    fell = [pair for pair in pairs(order[:SHOWN_PAIRS]) if pair["chosen_logratio"] < 0]
    rose = [pair for pair in pairs(order[::-1][:SHOWN_PAIRS]) if pair["chosen_logratio"] > 0]
    return fell, rose


def _pair(run: Run, scores: Mapping[str, float]) -> dict[str, Any]:
    index = int(scores[SAVED_ROW_INDEX])
    row = run.rows.get(index, {})
    return {
        "row": index,
        "chosen_logratio": scores["chosen_logratios"],
        "rejected_logratio": scores["rejected_logratios"],
        "chosen_logps": scores["chosen_logps"],
        "rejected_logps": scores["rejected_logps"],
        "tokens": int(scores["chosen_tokens"]) if math.isfinite(scores.get("chosen_tokens", math.nan)) else None,
        "texts": [(name, as_text(row[name])) for name in ("prompt", "chosen", "rejected") if name in row],
    }


def as_text(content: Any) -> str:
    """A prompt or an answer, text or conversation, as plain text of bounded length."""
    if isinstance(content, list):
        text = "\n".join(map(as_text, content))
    elif isinstance(content, dict) and "role" in content:
        has_calls = bool(tool_calls(content))
        text = f"{content['role']}: {message_as_text(content) if has_calls else as_text(content.get('content'))}"
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
    """The metrics of the last evaluation, with their units."""
    last = run.last
    names = {
        "Chosen log-ratio, nats per answer": "displacement/chosen",
        "Chosen log-ratio, nats per token": "displacement/chosen_per_token",
        "Rejected log-ratio, nats per answer": "displacement/rejected",
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
            interval = f" (95% interval {low:.3f} to {high:.3f})" if math.isfinite(low + high) else ""
            found.append((label, f"{last[name]:.3f}{interval}"))
    return found


def _answers(run: Run) -> dict[str, Any] | None:
    """Table, verdict and examples of the generated answers, or `None` if there are none or they cannot be read."""
    answers = run.answers
    if answers is None:
        return None
    rows = {**answers.statistics, **({"chosen in the data": answers.chosen} if answers.chosen else {})}
    examples = read_examples(run.folder, answers.models, SHOWN_QUESTIONS, run.notes)
    return {
        "questions": answers.questions,
        "prompts": answers.settings.get("prompts"),
        "limit": answers.settings.get("max_new_tokens"),
        "rows": [(name, [_cell(key, values[key]) for key in STATISTICS_OF_ANSWERS]) for name, values in rows.items()],
        "verdict": degeneration(answers.statistics, answers.chosen),
        "count": examples.total,
        "same": examples.same,
        "examples": [_example(line, answers.models) for line in examples.lines],
    }


def _cell(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    forms = {"count": ".0f", "mean_tokens": ".1f", "median_tokens": ".1f", "empty": ".0%", "cut": ".0%"}
    return format(value, forms.get(name, ".3f"))


def _example(line: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """A question: its first words, and each turn with the greedy answers of both models."""
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
    """For each split: rows, kept rows, and each finding that occurred, with its policy and first rows."""
    found = []
    for split, audit in run.audit.items():
        findings = audit.get("findings") if isinstance(audit, dict) else None
        if not isinstance(findings, dict):
            continue
        findings = {name: finding for name, finding in findings.items() if isinstance(finding, dict)}
        found.append(
            {
                "split": split,
                "rows": audit.get("rows"),
                "kept": audit.get("kept"),
                "checks": ", ".join(findings),
                "findings": [
                    {
                        "name": name,
                        "count": finding.get("count"),
                        "policy": finding.get("policy"),
                        "rows": ", ".join(str(example.get("row")) for example in finding.get("examples") or []),
                    }
                    for name, finding in findings.items()
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
        if best := stage.state.get("best_global_step"):
            facts.append(("Best step by the recipe's metric", f"{best}; the report shows the last one"))
        if finished:
            processes = finished.get("processes", "?")
            facts.append(("Device", f"{finished.get('device', 'unknown')}, {processes} process(es)"))
            facts.append(("Time, seconds", f"{number(finished.get('seconds')):.1f}"))
        else:
            facts.append(("Device, time, versions", f"not recorded: no readable {FINISHED} in {stage.folder.name}/"))
        tokens, seconds = stage.series("num_tokens")[1], stage.series("train_runtime")[1]
        if tokens and seconds and seconds[-1] > 0:
            facts.append(("Tokens per second, including evaluations", f"{tokens[-1] / seconds[-1]:,.0f}"))
        versions = finished.get("versions")
        if isinstance(versions, dict):
            facts.append(("Versions", ", ".join(f"{package} {version}" for package, version in versions.items())))
        found.append((name, facts))
    return found
