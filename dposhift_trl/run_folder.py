"""A run folder as it lies on the disk, read for the report: what is there, and why the rest is not."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .verdict import Outcome, verdict


STATE = "trainer_state.json"


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
class Run:
    """A run folder, as far as it could be read; `notes` says what is not there and why."""

    folder: Path
    name: str
    stages: dict[str, Stage]
    recipe: str | None
    audit: dict[str, Any]
    rows: dict[int, dict[str, Any]]
    notes: list[str]

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
        return verdict(*self.ends)

    @property
    def outcome(self) -> Outcome:
        return Outcome.of(self.name, *self.ends)

    @property
    def lambda_text(self) -> str:
        ends = self.outcome.lambdas
        if ends is None:
            return "λ unknown"
        return f"λ {ends[1]:.4g}" if math.isclose(*ends) else f"λ {ends[0]:.4g} to {ends[1]:.4g}"


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
    audit = read_file(folder / "audit.json", _as_mapping, {}, notes, "the row audit")
    rows = read_file(folder / "eval_rows.parquet", _as_rows, {}, notes, "the text of the evaluated pairs")
    recipe = read_file(folder / "recipe.yaml", _as_text, None, notes, "the recipe")
    if "dpo" in stages:
        if not any("displacement/chosen" in values for values in stages["dpo"].evaluations()):
            notes.append(
                "No evaluation with log-ratios is logged, so curves are of training, and there is no verdict."
            )
        if not stages["dpo"].pairs:
            notes.append("No scores of pairs are saved (`pairs/`), so there are no histograms and no lists of pairs.")
    return Run(folder, folder.resolve().name, stages, recipe, audit, rows, notes)


def _read_stage(folder: Path, notes: list[str]) -> Stage:
    stage = Stage(folder)
    states = [folder / STATE, *sorted(folder.glob(f"checkpoint-*/{STATE}"), key=_step_of, reverse=True)]
    for path in states:
        state = read_file(path, _as_mapping, {}, [], "")
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
    stage.finished = read_file(folder / "finished.json", _as_mapping, None, [], "")
    names = {name for entry in stage.history for name in entry}
    pairs = sorted(path for path in folder.glob("pairs/*.parquet") if re.search(r"-\d+$", path.stem))
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
    if not path.is_file():
        notes.append(f"{path.name} is missing, so {what} cannot be shown.")
        return default
    try:
        return reader(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}), so {what} cannot be shown.")
        return default


def _as_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _as_mapping(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(type(content))
    return content


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
