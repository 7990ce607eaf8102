"""One stage of a run: its log, and the scores of pairs that its evaluations saved."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts import DIAGNOSIS, FINISHED, PAIRS, STATE, read_mapping
from .files import number, read_columns, read_file
from .pair_scores import metrics_of_pairs
from .stock import find_beta, is_stock, mean_of_last_logs, settings_of, with_log_ratios


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
        stock (`bool`, *optional*, defaults to `False`):
            Whether a stock `DPOTrainer` wrote the log.
        last_logs (`dict[str, float]`):
            Means of the last logs of training, if a stock trainer's log has no evaluation.
    """

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    pairs: dict[int, Path] = field(default_factory=dict)
    prefix: str = "eval_"
    stock: bool = False
    last_logs: dict[str, float] = field(default_factory=dict)

    @property
    def evaluated(self) -> bool:
        """Whether an evaluation logged log-ratios."""
        return any("displacement/chosen" in metrics for metrics in self.evaluations())

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


def read_stage(folder: Path, run: Path, beta: float | None, notes: list[str]) -> Stage:
    """
    Read what one stage saved. Whatever is missing or broken becomes a note.

    Args:
        folder (`Path`), run (`Path`):
            Folder of the stage and of the run.
        beta (`float`, *optional*):
            Beta, where the log does not tell it.
        notes (`list[str]`):
            Notes for the reader of the report, which are appended to.

    Raises:
        ReportError: If beta is needed and unknown.
    """
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
    stage.stock = is_stock(stage.history)
    if stage.stock:
        _read_stock(stage, run, beta, notes)
    _find_pairs(stage, notes)
    if stage.stock and not stage.evaluated:
        _use_last_logs(stage, notes)
    if not stage.state:
        if stage.pairs:
            _read_pairs_alone(stage, run, beta, notes)
        else:
            notes.append(f"{folder.name}: no {STATE} can be read, so this stage has no curves.")
    if (folder / FINISHED).exists():
        stage.finished = read_file(folder / FINISHED, read_mapping, None, notes, "device, time and versions")
    return stage


def _read_stock(stage: Stage, run: Path, beta: float | None, notes: list[str]) -> None:
    """Turn the rewards of a stock trainer's log into log-ratios, and say what such a log does not tell."""
    beta, source = find_beta(stage.history, run, beta)
    stage.history = with_log_ratios(stage.history, beta)
    notes.append(
        f"{stage.folder.name}: the log is of a stock `DPOTrainer`. Log-ratios are its rewards divided by beta, "
        f"{beta:g} ({source}), as for the sigmoid loss. It has no scores of pairs, so the share of chosen answers "
        "that fell, their perplexity, and intervals are unknown: `python -m dposhift_trl.diagnose` scores the models "
        "themselves."
    )


def _use_last_logs(stage: Stage, notes: list[str]) -> None:
    """Take the last logs of training for an evaluation, which there is none of."""
    stage.last_logs, steps = mean_of_last_logs(stage.history)
    if steps:
        notes.append(
            f"{stage.folder.name}: there are no evaluations, so the verdict is on the mean of the last {len(steps)} "
            f"logs of training (steps {steps[0]:g} to {steps[-1]:g}): noisy means of batches, of pairs that were "
            "trained on."
        )


def _read_pairs_alone(stage: Stage, run: Path, beta: float | None, notes: list[str]) -> None:
    """Compute what the evaluations would have logged from the scores of their pairs."""
    betas = settings_of(run).betas
    if beta is None:
        beta = next(iter(betas)) if len(betas) == 1 else None
    if not (run / DIAGNOSIS).exists():
        notes.append(
            f"{stage.folder.name}: no {STATE} can be read, so all numbers are computed from the scores of pairs"
            + ("." if beta else ", with margins at beta 1: pass `--beta` for those of the run.")
        )
    for step, path in sorted(stage.pairs.items()):
        columns = read_file(path, read_columns, {}, notes, f"the evaluation of step {step}")
        if metrics := metrics_of_pairs(columns, beta or 1.0):
            stage.history.append({"step": step, **{stage.prefix + name: value for name, value in metrics.items()}})


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
