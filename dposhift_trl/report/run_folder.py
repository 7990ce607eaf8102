"""A run folder as the report reads it: what is in it, and a note for everything that is missing or broken."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import (
    AUDIT,
    DIAGNOSIS,
    EVAL_ROWS,
    GENERATIONS,
    PAIRS,
    RECIPE,
    STATE,
    STATISTICS,
    read_mapping,
    read_rows,
    read_text,
)
from ..columns import PREFERENCE_COLUMNS, SAVED_ROW_INDEX
from ..schedules import ADAPTIVE, LambdaPlan
from .advice import path_of_lambda
from .answers import Answers, of_these_weights, read_answers
from .errors import ReportError
from .files import number, read_file
from .recommendation import Outcome
from .stage import Stage, read_stage
from .verdict import Verdict, verdict


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
        settings (`dict[str, Any]`, *optional*):
            The resolved recipe.
        diagnosis (`dict[str, Any]`, *optional*):
            What was scored, if this is no run but a diagnosis.
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
    settings: dict[str, Any] | None = None
    diagnosis: dict[str, Any] | None = None

    @property
    def dpo(self) -> Stage:
        """The DPO stage, empty if there is none."""
        return self.stages.get("dpo") or Stage(self.folder)

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last evaluation of the DPO stage, or of the last logs of a stock trainer without any."""
        found = self.dpo.evaluations()
        return found[-1] if found else self.dpo.last_logs

    @property
    def verdict(self) -> Verdict:
        """What the last evaluation says."""
        return verdict(self.last, self.plan, self.logged_lambdas)

    @property
    def outcome(self) -> Outcome:
        """What the comparison of runs needs to know."""
        path, planned = self.lambdas, self.plan.range if self.plan.start is not None else ()
        shifted = any(abs(value - 1) > 1e-9 for value in (*self.logged_lambdas, *planned))
        section = (self.settings or {}).get("dpo")
        numbers = {
            f"dpo.{key}": float(value)
            for key, value in (section if isinstance(section, dict) else {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        lambdas = (path[0], path[-1]) if path else None
        return Outcome.of(self.name, self.last, lambdas, shifted, numbers, self._evaluated)

    @property
    def _evaluated(self) -> frozenset[str]:
        """Digest of the evaluated pairs, in any order; empty if their text was not saved."""
        if not self.rows:
            return frozenset()
        texts = [[row.get(name) for name in PREFERENCE_COLUMNS] for row in self.rows.values()]
        lines = sorted(json.dumps(pair, sort_keys=True, default=str) for pair in texts)
        return frozenset([hashlib.sha256("\n".join(lines).encode()).hexdigest()])

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


def read_run(folder: Path, beta: float | None = None) -> Run:
    """
    Read a run folder. Whatever is missing or broken becomes a note.

    Args:
        folder (`Path`):
            Folder of `dposhift_trl.run`, output folder of a [`DPOShiftTrainer`] or of a stock `DPOTrainer`, or folder
            that holds `pairs/` alone.
        beta (`float`, *optional*):
            Beta of a run whose log has rewards and no log-ratios, or scores of pairs alone. By default it is read
            from the text files in the folder.

    Raises:
        ReportError: If the folder contains neither a stage nor a trainer's state, or if beta is needed and unknown.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder. Pass the `output_dir` of a run.")
    notes: list[str] = []
    stages = {
        name: read_stage(folder / name, folder, beta, notes) for name in ("sft", "dpo") if (folder / name).is_dir()
    }
    if not stages:
        stages = {"dpo": read_stage(folder, folder, beta, notes)}
        if not stages["dpo"].history and not stages["dpo"].pairs:
            raise ReportError(
                f"{folder} contains no run: no `sft/`, no `dpo/`, and no {STATE} in it or in a checkpoint. Pass the "
                "`output_dir` of a run."
            )
    elif "dpo" not in stages:
        notes.append("There is no DPO stage (`dpo/`), so chosen and rejected answers are not compared.")
    elif "sft" not in stages:
        notes.append("There is no SFT stage (`sft/`): `SFT model` below means the model that the run started from.")
    # A stock trainer, or whoever saved scores of pairs alone, writes none of the next three
    plain = stages.get("dpo")
    is_plain = plain is not None and plain.folder == folder and (plain.stock or not plain.state)
    of_a_run = [] if is_plain else notes
    noted = {name: notes if (folder / name).exists() else of_a_run for name in (AUDIT, EVAL_ROWS, RECIPE)}
    audit = read_file(folder / AUDIT, read_mapping, {}, noted[AUDIT], "the row audit")
    rows = read_file(folder / EVAL_ROWS, _read_rows, {}, noted[EVAL_ROWS], "the text of the evaluated pairs")
    settings = read_file(folder / RECIPE, read_mapping, None, noted[RECIPE], "the recipe")
    if "dpo" in stages:
        if not stages["dpo"].evaluated and not stages["dpo"].stock:
            notes.append("No evaluation logged log-ratios, so the curves are those of training, without a verdict.")
        if not stages["dpo"].pairs:
            notes.append(f"There are no scores of pairs (`{PAIRS}/`), so histograms and lists of pairs are left out.")
    plan = _read_plan(settings or {}, stages.get("dpo") or Stage(folder), notes)
    answers = None
    if (folder / GENERATIONS / STATISTICS).exists():
        answers = read_file(folder / GENERATIONS / STATISTICS, read_answers, None, notes, "the table of answers")
        answers = None if answers is None else of_these_weights(answers, folder, notes)
    recipe = None if settings is None else read_text(folder / RECIPE)
    diagnosis = None
    if (folder / DIAGNOSIS).exists():
        diagnosis = read_file(folder / DIAGNOSIS, read_mapping, None, notes, "what was diagnosed")
    return Run(folder, folder.resolve().name, stages, recipe, audit, rows, notes, plan, answers, settings, diagnosis)


def _read_plan(recipe: dict[str, Any], stage: Stage, notes: list[str]) -> LambdaPlan:
    """The plan of the recipe, or the controller's, whose state a plain trainer's folder has too."""
    if stage.stock:
        return LambdaPlan(1.0, 1.0)
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


def _read_rows(path: Path) -> dict[int, dict[str, Any]]:
    return {row[SAVED_ROW_INDEX]: row for row in read_rows(path)}
