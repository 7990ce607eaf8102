"""What the page about one run shows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..artifacts import FINISHED, GENERATIONS, STATISTICS
from ..data.config import legend
from .answers import STATISTICS_OF_ANSWERS, degeneration, read_examples
from .drawing import Drawing
from .figures import Line, curves
from .files import number
from .pairs import show_pairs
from .run_folder import Run
from .samples import Sample, read_samples
from .texts import as_text, opening, plain, row_name


SHOWN_QUESTIONS = 6  # questions whose answers differ most
LONGEST_OPENING = 90  # characters of a prompt in the heading of a question


def describe_run(run: Run) -> tuple[dict[str, Any], list[Drawing]]:
    """Values of the template and figures of the page about one run."""
    pairs, drawn_pairs = show_pairs(run)
    curves_of_run = [] if run.diagnosis else _draw_curves(run)  # it has one evaluation and no training
    drawings = [drawing for drawing in [*curves_of_run, *drawn_pairs] if drawing]
    values = {
        "title": run.name,
        **pairs,
        "facts": _facts(run) if run.diagnosis is None else [("The diagnosis", _facts_of_diagnosis(run.diagnosis))],
        "summary": _summary(run),
        "audit": _audit(run),
        "answers": _answers(run),
        "answers_exist": (run.folder / GENERATIONS / STATISTICS).exists(),
        "generations": GENERATIONS,
        "samples": [_sample(sample) for sample in read_samples(run.dpo.folder, run.notes)],
    }
    return values, drawings


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
    answers, zero = "nats per answer", (0, "SFT model")
    drawings = [
        # On a scale of its own: beside the rejected answers, which move much more, a fall cannot be seen
        curves(
            "chosen",
            "Chosen answers: log-ratio to the SFT model",
            answers,
            [*both("displacement/chosen", "chosen", "chosen"), *target],
            zero,
        ),
        curves(
            "logratios",
            "Chosen and rejected: log-ratio to the SFT model",
            answers,
            [
                *both("displacement/chosen", "chosen", "chosen"),
                *both("displacement/rejected", "rejected", "rejected"),
            ],
            zero,
        ),
        curves("margin", "Reward margin, unshifted", "nats", both("rewards/margins", "margin", "accent"), zero),
        curves(
            "accuracy",
            "Reward accuracy, unshifted",
            "share of pairs",
            both("rewards/accuracies", "accuracy", "accent"),
            (0.5, "chance"),
            percent=True,
        ),
        curves(
            "logps",
            "Log-probability of the answers",
            answers,
            [*both("logps/chosen", "chosen", "chosen"), *both("logps/rejected", "rejected", "rejected")],
        ),
        curves(
            "loss",
            "Loss at lambda(t) and at lambda 1",
            "nats",
            # Dashed, since the two curves are the same at lambda 1
            [*both("loss", "at λ(t)", "slate"), *both("dpo_loss", "at λ = 1", "accent", dash="--")],
        ),
    ]
    if _constant_lambda(run) is None:
        level = (plan.low, "lower bound") if plan.adaptive else None
        drawings.append(curves("lambda", "Lambda", "lambda (no unit)", [Line("λ", "purple", *lambdas)], level))
    if sft:
        lines = [Line("train", "muted", *sft.series("loss")), Line("evaluation", "accent", *sft.series("eval_loss"))]
        drawings.append(curves("sft_loss", "Loss of the SFT stage", "nats per token", lines))
    return drawings


def _constant_lambda(run: Run) -> float | None:
    """Lambda, if every log has the same one. It needs no figure then."""
    logged = run.logged_lambdas
    return logged[0] if logged and math.isclose(min(logged), max(logged), abs_tol=1e-9) else None


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
            interval = f" (95% interval {plain(low, 3)} to {plain(high, 3)})" if math.isfinite(low + high) else ""
            found.append((label, f"{plain(last[name], 3)}{interval}"))
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


def _sample(sample: Sample) -> dict[str, Any]:
    """A prompt: its first words, and the answers of data, reference and policy."""
    texts = [("reference", sample.reference), *((f"policy, {steps}", answer) for steps, answer in sample.answers)]
    if sample.chosen is not None:
        texts.insert(0, ("chosen in the data", as_text(sample.chosen)))
    return {
        "row": sample.row,
        "opening": opening(sample.prompt, LONGEST_OPENING),
        "prompt": as_text(sample.prompt),
        "texts": texts,
        "changed": sample.changed,
    }


def _example(line: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """A question: its first words, and each turn with the greedy answers of both models."""
    answers = {model: line["answers"][model]["greedy"] for model in (models[0], models[-1])}
    prompts = [line.get("prompt"), *line["follow_ups"]]
    turns = [
        (as_text(prompt), [(model, as_text(texts[turn])) for model, texts in answers.items() if turn < len(texts)])
        for turn, prompt in enumerate(prompts)
    ]
    if line["chosen"] is not None:
        turns[0][1].append(("chosen in the data", as_text(line["chosen"])))
    return {
        "id": line["question_id"],
        "category": line["category"],
        "opening": opening(prompts[0], LONGEST_OPENING),
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
                "legend": legend(name for name, finding in findings.items() if finding.get("count")),
                "findings": [
                    {
                        "name": name,
                        "count": finding.get("count"),
                        "policy": finding.get("policy"),
                        "rows": _examples(finding.get("examples") or []),
                    }
                    for name, finding in findings.items()
                    if finding.get("count")
                ],
            }
        )
    return found


def _facts_of_diagnosis(diagnosis: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was scored, and how."""
    settings = diagnosis.get("settings")
    beta = settings.get("beta") if isinstance(settings, dict) else None
    facts = {
        "Policy": diagnosis.get("policy"),
        "Reference": diagnosis.get("reference"),
        "Pairs": diagnosis.get("pairs"),
        "Beta of the rewards": beta,
        "Device": diagnosis.get("device"),
        "Time, seconds": diagnosis.get("seconds"),
        "Versions": f"dposhift_trl {diagnosis.get('version')}",
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Versions, hardware, time and speed of each stage, as far as they were recorded."""
    found = []
    for name, stage in run.stages.items():
        finished = stage.finished or {}
        steps = stage.state.get("global_step"), stage.state.get("max_steps")
        facts = [("Optimizer steps", f"{steps[0]} of {steps[1]}")] if steps[0] is not None else []
        if name == "dpo" and (constant := _constant_lambda(run)) is not None:
            facts.append(("Lambda", f"{constant:.4g} at every log"))
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
        found.append((f"{name.upper()} stage", facts))
    return found


def _examples(examples: list[dict[str, Any]]) -> str:
    names = [row_name(None, example).removeprefix("Row ") for example in examples]
    return ("; " if any("," in name for name in names) else ", ").join(names)
