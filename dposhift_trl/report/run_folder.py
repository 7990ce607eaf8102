"""A run folder as the report reads it: what is in it, and a note for everything that is missing or broken."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts import (
    AUDIT,
    EVAL_ROWS,
    FINISHED,
    GENERATIONS,
    PAIRS,
    RECIPE,
    STATE,
    STATISTICS,
    read_mapping,
    read_rows,
    read_text,
)
from ..columns import SAVED_ROW_INDEX
from ..console import one_line
from ..schedules import ADAPTIVE, LambdaPlan
from .advice import path_of_lambda
from .answers import Answers, of_these_weights, read_answers
from .files import number, read_file
from .recommendation import Outcome
from .verdict import Verdict, verdict


class ReportError(ValueError):
    """A report that cannot be written. The message is one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclass
class Stage:
    """
    What one stage saved.

    Args:
        folder (`Path`):
            Folder of the stage.
        history (`list[dict[str, Any]]`):
            `log_history` of the trainer's state.
        state (`dict[str, Any]`):
            The trainer's state.
        finished (`dict[str, Any]`, *optional*):
            Content of `finished.json`.
        pairs (`dict[int, Path]`):
            Files with the scores of every pair, by the step of the evaluation.
        prefix (`str`, *optional*, defaults to `"eval_"`):
            Prefix of the metrics of the evaluation set that is shown.
    """

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    pairs: dict[int, Path] = field(default_factory=dict)
    prefix: str = "eval_"

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric. The last entry of a step counts; a value that is not a number is NaN."""
        points = {entry["step"]: number(entry[name]) for entry in self.history if name in entry and "step" in entry}
        return sorted(points), [points[step] for step in sorted(points)]

    def evaluation_series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric of the evaluations. Accuracy is left out if every pair is a tie."""
        steps, values = self.series(self.prefix + name)
        if name.startswith("rewards/accuracies"):
            # Before the first step the policy is the reference, so no pair prefers either answer
            moved = dict(zip(*self.series(f"{self.prefix}displacement/chosen"), strict=True))
            kept = [(step, value) for step, value in zip(steps, values, strict=True) if moved.get(step) != 0]
            return [step for step, _ in kept], [value for _, value in kept]
        return steps, values

    def evaluations(self) -> list[dict[str, float]]:
        """Metrics of each evaluation in the order of steps, without their prefix."""
        found: dict[int, dict[str, float]] = {}
        for entry in self.history:
            metrics = {
                name.removeprefix(self.prefix): number(value)
                for name, value in entry.items()
                if name.startswith(self.prefix) and "runtime" not in name and "per_second" not in name
            }
            if metrics and "step" in entry:
                found.setdefault(entry["step"], {"step": entry["step"]}).update(metrics)
        return [found[step] for step in sorted(found)]


@dataclass
class Run:
    """
    A run folder.

    Args:
        folder (`Path`), name (`str`):
            The folder, and the run's name in the report.
        stages (`dict[str, Stage]`):
            The stages that were found, by name: `sft`, `dpo`.
        recipe (`str`, *optional*):
            Text of the resolved recipe.
        audit (`dict[str, Any]`):
            Findings of the row audit, by split.
        rows (`dict[int, dict[str, Any]]`):
            Text of the evaluated pairs, by row index.
        notes (`list[str]`):
            What the report cannot show, and why.
        plan ([`LambdaPlan`]):
            What the recipe, or the controller's saved state, says about lambda.
        answers ([`Answers`], *optional*):
            Statistics of the generated answers.
    """

    folder: Path
    name: str
    stages: dict[str, Stage]
    recipe: str | None
    audit: dict[str, Any]
    rows: dict[int, dict[str, Any]]
    notes: list[str]
    plan: LambdaPlan
    answers: Answers | None

    @property
    def dpo(self) -> Stage:
        """The DPO stage, empty if there is none."""
        return self.stages.get("dpo") or Stage(self.folder)

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last evaluation of the DPO stage."""
        found = self.dpo.evaluations()
        return found[-1] if found else {}

    @property
    def verdict(self) -> Verdict:
        """What the last evaluation says."""
        return verdict(self.last, self.plan, self.logged_lambdas)

    @property
    def outcome(self) -> Outcome:
        """What the comparison of runs needs to know."""
        path, planned = self.lambdas, self.plan.range if self.plan.start is not None else ()
        shifted = any(abs(value - 1) > 1e-9 for value in (*self.logged_lambdas, *planned))
        return Outcome.of(self.name, self.last, (path[0], path[-1]) if path else None, shifted)

    @property
    def beta(self) -> float | None:
        """Beta, computed from the logged metrics since a plain trainer's folder has no recipe."""
        last = self.last
        difference = last.get("displacement/chosen", math.nan) - last.get("displacement/rejected", math.nan)
        margin = last.get("rewards/margins", math.nan)
        return margin / difference if math.isfinite(margin) and abs(difference) > 1e-6 else None

    @property
    def logged_lambdas(self) -> list[float]:
        """Every lambda that was logged until the last evaluation, in training and in evaluations."""
        end, names = self.last.get("step", math.inf), ("shift/lambda", f"{self.dpo.prefix}shift/lambda")
        values = [number(entry.get(name)) for entry in self.dpo.history if entry["step"] <= end for name in names]
        return [value for value in values if math.isfinite(value)]

    @property
    def lambdas(self) -> list[float]:
        """How lambda changed, as [`~report.advice.path_of_lambda`] says."""
        return path_of_lambda(self.plan, self.logged_lambdas)

    @property
    def lambda_text(self) -> str:
        """How lambda changed, in a few words."""
        if self.plan.adaptive:
            return f"λ {self.plan.text}"
        return f"λ {' to '.join(f'{value:.4g}' for value in self.lambdas) or 'unknown'}"


def read_run(folder: Path) -> Run:
    """
    Read a run folder. Whatever is missing or broken becomes a note.

    Args:
        folder (`Path`):
            Folder of `dposhift_trl.run`, or output folder of a [`DPOShiftTrainer`].

    Raises:
        ReportError: If the folder contains neither a stage nor a trainer's state.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder. Pass the `output_dir` of a run.")
    notes: list[str] = []
    stages = {name: _read_stage(folder / name, notes) for name in ("sft", "dpo") if (folder / name).is_dir()}
    if not stages:
        stages = {"dpo": _read_stage(folder, notes)}
        if not stages["dpo"].history and not stages["dpo"].pairs:
            raise ReportError(
                f"{folder} contains no run: no `sft/`, no `dpo/`, and no {STATE} in it or in a checkpoint. Pass the "
                "`output_dir` of a run."
            )
    elif "dpo" not in stages:
        notes.append("There is no DPO stage (`dpo/`), so chosen and rejected answers are not compared.")
    elif "sft" not in stages:
        notes.append("There is no SFT stage (`sft/`): `SFT model` below means the model that the run started from.")
    audit = read_file(folder / AUDIT, read_mapping, {}, notes, "the row audit")
    rows = read_file(folder / EVAL_ROWS, _read_rows, {}, notes, "the text of the evaluated pairs")
    settings = read_file(folder / RECIPE, read_mapping, None, notes, "the recipe")
    if "dpo" in stages:
        if not any("displacement/chosen" in metrics for metrics in stages["dpo"].evaluations()):
            notes.append("No evaluation logged log-ratios, so the curves are those of training, without a verdict.")
        if not stages["dpo"].pairs:
            notes.append(f"There are no scores of pairs (`{PAIRS}/`), so histograms and lists of pairs are left out.")
    plan = _read_plan(settings or {}, stages.get("dpo") or Stage(folder), notes)
    answers = None
    if (folder / GENERATIONS / STATISTICS).exists():
        answers = read_file(folder / GENERATIONS / STATISTICS, read_answers, None, notes, "the table of answers")
        answers = None if answers is None else of_these_weights(answers, folder, notes)
    recipe = None if settings is None else read_text(folder / RECIPE)
    return Run(folder, folder.resolve().name, stages, recipe, audit, rows, notes, plan, answers)


def _read_plan(recipe: dict[str, Any], stage: Stage, notes: list[str]) -> LambdaPlan:
    """The plan of the recipe, or the controller's, whose state a plain trainer's folder has too."""
    plan = LambdaPlan()
    if recipe.get("dpo") is not None:
        try:
            plan = LambdaPlan.of(recipe["dpo"])
        except (ValueError, TypeError) as error:
            notes.append(f"{RECIPE} has no valid settings of lambda, so lambda is read from the log: {error}")
    callbacks = stage.state.get("stateful_callbacks")
    controller = callbacks.get("AdaptiveLambdaCallback") if isinstance(callbacks, dict) else None
    settings = controller.get("args") if isinstance(controller, dict) else None
    if isinstance(settings, dict) and not plan.adaptive:
        low, high, target = (number(settings.get(name)) for name in ("lambda_min", "lambda_max", "target"))
        if 0 < low < high and math.isfinite(target):
            plan = LambdaPlan(None, None, True, low, high, target, str(settings.get("metric")), ADAPTIVE)
    return plan


def _read_stage(folder: Path, notes: list[str]) -> Stage:
    stage = Stage(folder)
    states = [folder / STATE, *sorted(folder.glob(f"checkpoint-*/{STATE}"), key=_checkpoint_step, reverse=True)]
    for path in states:
        state = read_file(path, read_mapping, {}, [], "the log")
        history = state.get("log_history")
        if isinstance(history, list):
            stage.state, stage.history = state, [entry for entry in history if _has_step(entry)]
            if path != states[0]:
                notes.append(
                    f"{folder.name}: the log is from {path.parent.name}. The stage was interrupted after it, or did "
                    "not save its final state."
                )
            break
    else:
        notes.append(f"{folder.name}: no {STATE} can be read, so this stage has no curves.")
    if (folder / FINISHED).exists():
        stage.finished = read_file(folder / FINISHED, read_mapping, None, notes, "device, time and versions")
    _find_pairs(stage, notes)
    return stage


def _find_pairs(stage: Stage, notes: list[str]) -> None:
    """Set the evaluation set that is shown, `eval` if there is one, and the files with the scores of its pairs."""
    names = {name for entry in stage.history for name in entry}
    files = sorted(path for path in stage.folder.glob(f"{PAIRS}/*.parquet") if re.search(r"-\d+$", path.stem))
    prefixes = sorted(
        {name.removesuffix("displacement/chosen") for name in names if name.endswith("_displacement/chosen")}
    )
    prefixes = prefixes or sorted({path.stem.rsplit("-", 1)[0] + "_" for path in files})
    if prefixes and "eval_" not in prefixes:
        stage.prefix = prefixes[0]
        if len(prefixes) > 1:
            shown, *others = (prefix.rstrip("_") for prefix in prefixes)
            notes.append(f"{stage.folder.name}: only the evaluation set {shown} is shown, not {', '.join(others)}.")
    stage.pairs = {
        int(path.stem.rsplit("-", 1)[1]): path for path in files if path.stem.startswith(stage.prefix[:-1] + "-")
    }


def _checkpoint_step(path: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
    return int(match[1]) if match else -1


def _has_step(entry: Any) -> bool:
    return isinstance(entry, dict) and math.isfinite(number(entry.get("step")))


def _read_rows(path: Path) -> dict[int, dict[str, Any]]:
    return {row[SAVED_ROW_INDEX]: row for row in read_rows(path)}
