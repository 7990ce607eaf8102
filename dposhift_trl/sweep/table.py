"""The table of a sweep: the last evaluation of each finished point."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..artifacts import FINISHED, RECIPE, ArtifactError, read_mapping
from ..report.files import number
from ..report.findings import Estimate
from ..report.seeds import SeedGroup
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
    return "\n".join(["", *_aligned(lines), ""]), problems


def make_seed_table(groups: Sequence[SeedGroup]) -> list[str]:
    """
    Means over the seeds with their 95% intervals, the highest chosen log-ratio first.

    Args:
        groups (`Sequence[SeedGroup]`):
            Points, grouped by what they have in common besides the seed.

    Returns:
        `list[str]`: The lines of the table, none if no group has several seeds.
    """
    several = [group for group in groups if len(group.runs) > 1]
    if not several:
        return []
    lines = [["setting", "seeds", "lambda", *COLUMNS]]
    for group in sorted(several, key=_chosen, reverse=True):
        means = [group.mean(metric.removeprefix("eval_")) for metric in COLUMNS.values()]
        lines.append([group.name, str(len(group.runs)), group.runs[0].plan.text, *map(_interval, means)])
    return ["Means over seeds, with 95% intervals by Student's t:", *_aligned(lines), ""]


def _chosen(group: SeedGroup) -> float:
    value = group.outcome.chosen.value
    return -math.inf if value is None else value


def _interval(estimate: Estimate) -> str:
    if estimate.value is None or estimate.interval is None:
        return "-" if estimate.value is None else f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} ({estimate.interval[0]:.4g} to {estimate.interval[1]:.4g})"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


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
