"""A run folder as it lies on the disk, read for the report: what is there, and why the rest is not."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..artifacts import (
    AUDIT,
    EVAL_ROWS,
    FINISHED,
    GENERATIONS,
    PAIRS,
    RECIPE,
    SIDE_BY_SIDE,
    STATE,
    STATISTICS,
    ArtifactError,
    read_mapping,
    read_text,
)
from ..schedules import LambdaPlan, lambda_path
from .verdict import Outcome, verdict


FIGURES = ("count", "mean_tokens", "median_tokens", "empty", "cut", "repetition", "distinct_1", "distinct_2")


class ReportError(ValueError):
    """A report that cannot be written; the message is one line for the user."""


@dataclass
class Stage:
    """What one stage left: its log, what it was run with, and the scores of each evaluation by step."""

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    pairs: dict[int, Path] = field(default_factory=dict)
    prefix: str = "eval_"

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric; of several entries for a step the last, NaN for what is no number."""
        points = {entry["step"]: number(entry[name]) for entry in self.history if name in entry and "step" in entry}
        return sorted(points), [points[step] for step in sorted(points)]

    def evaluations(self) -> list[dict[str, float]]:
        """The metrics of each evaluation, by step, without prefix."""
        found: dict[int, dict[str, float]] = {}
        for entry in self.history:
            values = {name.removeprefix(self.prefix): number(v) for name, v in entry.items() if self._is_ours(name)}
            if values and "step" in entry:
                found.setdefault(entry["step"], {"step": entry["step"]}).update(values)
        return [found[step] for step in sorted(found)]

    def _is_ours(self, name: str) -> bool:
        return name.startswith(self.prefix) and "runtime" not in name and "per_second" not in name


@dataclass
class Answers:
    """Figures of generated answers: `figures` by "<model> <mode>", `chosen` those of the data's chosen answers."""

    models: list[str]
    settings: dict[str, Any]
    questions: int
    figures: dict[str, dict[str, float]]
    chosen: dict[str, float] | None

    @property
    def final_greedy(self) -> dict[str, float]:
        return self.figures.get(f"{self.models[-1]} greedy", {})


@dataclass
class Run:
    """A run folder, as far as it could be read; `notes` says what is not there and why."""

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
        return self.stages.get("dpo") or Stage(self.folder)

    @property
    def ends(self) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of the first and the last evaluation of DPO."""
        found = self.dpo.evaluations()
        return (found[0], found[-1]) if found else ({}, {})

    @property
    def verdict(self) -> str:
        return verdict(*self.ends, self.plan)

    @property
    def outcome(self) -> Outcome:
        return Outcome.of(self.name, *self.ends, any(abs(value - 1) > 1e-9 for value in self.lambdas()))

    def lambdas(self, first: float = -math.inf, last: float = math.inf) -> list[float]:
        """Every logged lambda within two steps, of training and of evaluations."""
        return [
            value
            for name in ("shift/lambda", f"{self.dpo.prefix}shift/lambda")
            for step, value in zip(*self.dpo.series(name), strict=True)
            if first <= step <= last and math.isfinite(value)
        ]

    @property
    def lambda_text(self) -> str:
        if self.plan.adaptive:
            return f"λ {self.plan.adaptive_text}"
        ends = self.outcome.lambdas
        if ends is None:
            return "λ unknown"
        logged = self.lambdas(self.ends[0]["step"], self.ends[1]["step"])
        return f"λ {' to '.join(f'{value:.4g}' for value in lambda_path(*ends, logged))}"


def read_run(folder: Path) -> Run:
    """
    Read what a run folder holds; whatever is missing or broken becomes a note.

    Raises:
        ReportError: If there is neither a stage nor a trainer's state in it.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder. Give the `output_dir` of a run.")
    notes: list[str] = []
    stages = {name: _read_stage(folder / name, notes) for name in ("sft", "dpo") if (folder / name).is_dir()}
    if not stages:
        stages = {"dpo": _read_stage(folder, notes)}
        if not stages["dpo"].history and not stages["dpo"].pairs:
            raise ReportError(
                f"{folder} holds no run: neither `sft/` nor `dpo/`, nor a {STATE} in it or in a checkpoint."
            )
    elif "dpo" not in stages:
        notes.append("There is no DPO stage (`dpo/`), so there is nothing to say of chosen and rejected answers.")
    elif "sft" not in stages:
        notes.append("There is no SFT stage (`sft/`): the run started from a given model, and SFT below means it.")
    audit = read_file(folder / AUDIT, read_mapping, {}, notes, "the row audit")
    rows = read_file(folder / EVAL_ROWS, _as_rows, {}, notes, "the text of the evaluated pairs")
    settings = read_file(folder / RECIPE, read_mapping, None, notes, "the recipe")
    recipe = None if settings is None else read_text(folder / RECIPE)
    if "dpo" in stages:
        if not any("displacement/chosen" in values for values in stages["dpo"].evaluations()):
            notes.append(
                "No evaluation with log-ratios is logged, so curves are of training, and there is no verdict."
            )
        if not stages["dpo"].pairs:
            notes.append("No scores of pairs are saved (`pairs/`), so there are no histograms and no lists of pairs.")
    plan = _read_plan(settings or {}, stages.get("dpo") or Stage(folder), notes)
    answers = None
    if (folder / GENERATIONS / STATISTICS).exists():
        answers = read_file(folder / GENERATIONS / STATISTICS, _as_answers, None, notes, "the figures of answers")
    return Run(folder, folder.resolve().name, stages, recipe, audit, rows, notes, plan, answers)


def _read_plan(recipe: dict[str, Any], stage: Stage, notes: list[str]) -> LambdaPlan:
    """From the recipe; else, as for a plain trainer's folder, from the controller's state."""
    plan = LambdaPlan()
    if recipe.get("dpo") is not None:
        try:
            plan = LambdaPlan.of(recipe["dpo"])
        except (ValueError, TypeError) as error:
            notes.append(f"{RECIPE} has no valid settings of lambda, so lambda is read from the log: {error}")
    controller = stage.state.get("stateful_callbacks", {})
    controller = controller.get("AdaptiveLambdaCallback") if isinstance(controller, dict) else None
    told = controller.get("args") if isinstance(controller, dict) else None
    if isinstance(told, dict) and not plan.adaptive:
        low, high, target = (number(told.get(name)) for name in ("lambda_min", "lambda_max", "target"))
        if 0 < low < high and math.isfinite(target):
            plan = replace(plan, adaptive=True, low=low, high=high, target=target, metric=str(told.get("metric")))
    return plan


def _as_answers(path: Path) -> Answers:
    content = read_mapping(path)
    models, modes = ([str(name) for name in content[key]] for key in ("models", "modes"))
    if not models or not modes:
        raise ValueError(models)
    chosen, settings = content.get("chosen"), content.get("settings")
    return Answers(
        models,
        settings if isinstance(settings, dict) else {},
        int(content["questions"]),
        {f"{model} {mode}": _figures(content["statistics"][model][mode]) for model in models for mode in modes},
        None if chosen is None else _figures(chosen),
    )


def _figures(values: Any) -> dict[str, float]:
    return {name: number(values.get(name)) for name in FIGURES}


def read_examples(run: Run, limit: int) -> tuple[list[dict[str, Any]], int, int]:
    """
    The questions whose greedy answers by the two models differ most, that first.

    Returns:
        `tuple[list[dict[str, Any]], int, int]`: Lines of `side_by_side.jsonl`; how many it holds, and how many of them
        have the same greedy answer from both models.
    """
    assert run.answers is not None
    models = run.answers.models
    texts = read_file(run.folder / GENERATIONS / SIDE_BY_SIDE, read_text, "", run.notes, "answers side by side")
    found: list[tuple[float, dict[str, Any]]] = []
    broken = same = 0
    for line in texts.split("\n"):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            greedy = ["\n".join(content["answers"][model]["greedy"]) for model in (models[0], models[-1])]
            content = {"question_id": None, "category": None, "chosen": None} | content
            content["follow_ups"] = [str(turn) for turn in content.get("follow_ups") or []]
            found.append((difference(*greedy), content))
            same += greedy[0] == greedy[1]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken += 1
    if broken:
        run.notes.append(f"{SIDE_BY_SIDE}: {broken} of {broken + len(found)} lines cannot be read, and are left out.")
    found.sort(key=lambda item: -item[0])
    return [content for _, content in found[:limit]], len(found), same


def difference(one: str, other: str) -> float:
    """From 0, the same text, to 1: the share of runs of three characters that only one of two texts has."""
    if one == other:
        return 0.0
    counts = [Counter(text[i : i + 3] for i in range(max(1, len(text) - 2))) for text in (one, other)]
    return 1 - 2 * (counts[0] & counts[1]).total() / (counts[0].total() + counts[1].total())


def _read_stage(folder: Path, notes: list[str]) -> Stage:
    stage = Stage(folder)
    states = [folder / STATE, *sorted(folder.glob(f"checkpoint-*/{STATE}"), key=_step_of, reverse=True)]
    for path in states:
        state = read_file(path, read_mapping, {}, [], "")
        history = state.get("log_history")
        if isinstance(history, list):
            stage.state, stage.history = state, [entry for entry in history if _has_step(entry)]
            if path != states[0]:
                notes.append(
                    f"{folder.name}: the log is that of {path.parent.name}; the stage was interrupted after it, or "
                    "did not save its last state."
                )
            break
    else:
        notes.append(f"{folder.name}: no {STATE} can be read, so there are no curves of this stage.")
    if (folder / FINISHED).exists():
        stage.finished = read_file(folder / FINISHED, read_mapping, None, notes, "device, time and versions")
    names = {name for entry in stage.history for name in entry}
    pairs = sorted(path for path in folder.glob(f"{PAIRS}/*.parquet") if re.search(r"-\d+$", path.stem))
    sets = sorted(
        {name.removesuffix("displacement/chosen") for name in names if name.endswith("_displacement/chosen")}
    )
    sets = sets or sorted({path.stem.rsplit("-", 1)[0] + "_" for path in pairs})
    if sets and "eval_" not in sets:
        stage.prefix = sets[0]
        if len(sets) > 1:
            others = ", ".join(name.rstrip("_") for name in sets[1:])
            notes.append(f"{folder.name}: of several evaluation sets this shows {sets[0].rstrip('_')}, not {others}.")
    stage.pairs = {
        int(path.stem.rsplit("-", 1)[1]): path for path in pairs if path.stem.startswith(stage.prefix[:-1] + "-")
    }
    return stage


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
    return int(match[1]) if match else -1


def read_file(path: Path, reader: Callable[[Path], Any], default: Any, notes: list[str], what: str) -> Any:
    """What a file holds, or `default` and a note."""
    if not path.exists():
        notes.append(f"{path.name} is missing, so {what} cannot be shown.")
        return default
    try:
        if path.is_dir():
            raise ArtifactError(path, "must be a file, got a directory")
        return reader(path)
    except ArtifactError as error:
        notes.append(f"{path.name} {error.reason}, so {what} cannot be shown.")
        return default
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}), so {what} cannot be shown.")
        return default


def _has_step(entry: Any) -> bool:
    return isinstance(entry, dict) and math.isfinite(number(entry.get("step")))


def as_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of a Parquet file of numbers, in float64; null is NaN."""
    table = pq.read_table(path)
    return {name: np.asarray(table[name].to_pylist(), dtype=float) for name in table.column_names}


def _as_rows(path: Path) -> dict[int, dict[str, Any]]:
    return {row["row_index"]: row for row in pq.read_table(path).to_pylist()}


def number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
