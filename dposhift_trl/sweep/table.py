"""The table of a sweep: the last evaluation of each finished point."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..artifacts import FINISHED, RECIPE, ArtifactError, read_mapping
from ..report.files import number
from ..schedules import LambdaPlan


COLUMNS = {
    "chosen log-ratio": "eval_displacement/chosen",
    "margin": "eval_rewards/margins",
    "accuracy": "eval_rewards/accuracies",
    "chosen logps": "eval_logps/chosen",
}


def make_table(folders: Sequence[Path]) -> tuple[str, list[str]]:
    """
    The last evaluation of each point, the highest chosen log-ratio first.

    Args:
        folders (`Sequence[Path]`):
            Run folders of the finished points.

    Returns:
        `tuple[str, list[str]]`: The table, and one line for each point whose files cannot be read.
    """
    rows: list[tuple[float, list[str]]] = []
    problems = []
    for folder in folders:
        try:
            rows.append(_row(folder))
        except ArtifactError as error:
            problems.append(f"{folder.name} is not in the table: {error}")
    lines = [["point", "lambda", *COLUMNS, "seconds"], *(cells for _, cells in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(["", *text, ""]), problems


def _row(folder: Path) -> tuple[float, list[str]]:
    """Sort key and cells of one point."""
    finished, recipe = read_mapping(folder / "dpo" / FINISHED), read_mapping(folder / RECIPE)
    metrics = finished.get("metrics")
    if not isinstance(metrics, dict):
        raise ArtifactError(folder / "dpo" / FINISHED, f"must contain a mapping `metrics`, got {metrics!r}")
    try:
        plan = LambdaPlan.of(recipe.get("dpo", {}))
    except (TypeError, ValueError) as error:
        raise ArtifactError(folder / RECIPE, f"has no valid section `dpo`: {error}") from None
    values = [number(metrics.get(key)) for key in COLUMNS.values()]
    chosen_logratio = values[0] if math.isfinite(values[0]) else -math.inf
    cells = [_cell(value, ".4g") for value in values]
    return -chosen_logratio, [folder.name, plan.text, *cells, _cell(number(finished.get("seconds")), ".0f")]


def _cell(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
