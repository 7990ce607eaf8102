"""
The table of `displacement.py`: means over seeds with intervals, and what differs from a baseline after correction.

Every method is trained from the same models on the same pairs, seed by seed, so methods are compared by their paired
differences: a t-test over seeds, two-sided, and Holm's correction over all methods and columns compared.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats


COLUMNS = {
    "displacement/chosen": "chosen log-ratio, nats",
    "displacement/chosen_fell": "fell",
    "displacement/rejected": "rejected log-ratio, nats",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "perplexity/chosen": "perplexity of chosen",
    "transfer/accuracies": "accuracy on the other set",
    "shift/lambda": "lambda at the end",
    "greedy/mean_tokens": "tokens per greedy answer",
    "greedy/repetition": "repetition",
    "greedy/empty": "empty",
}
TESTED = ("displacement/chosen", "displacement/chosen_fell", "rewards/margins", "rewards/accuracies")

Runs = list[dict[str, float]]


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down procedure, in the order given."""
    order = np.argsort(values)
    factors = len(values) - np.arange(len(values))
    corrected = np.minimum(np.maximum.accumulate(np.asarray(values)[order] * factors), 1.0)
    return corrected[np.argsort(order)].tolist()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (t), which is not a number for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def table(results: dict[str, Runs]) -> str:
    """
    One row per method, in Markdown: means over seeds and half of a 95 % interval.

    Args:
        results (`dict[str, list[dict[str, float]]]`):
            Metrics of each seed, by method. Columns that no run has are left out.
    """
    columns = {
        name: title for name, title in COLUMNS.items() if any(name in r for runs in results.values() for r in runs)
    }
    lines = ["| method | " + " | ".join(columns.values()) + " |", "| --- |" + " --- |" * len(columns)]
    for method, runs in results.items():
        cells = []
        for name in columns:
            values = [run[name] for run in runs if name in run]
            mean, half = interval(values) if values else (None, None)
            cells.append("" if mean is None else f"{mean:.3f}" + (f" ± {half:.3f}" if half == half else ""))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(results: dict[str, Runs], baseline: str) -> str:
    """
    Paired differences from a baseline, in Markdown, with p-values after Holm's correction.

    Args:
        results (`dict[str, list[dict[str, float]]]`):
            Metrics of each seed, by method, in the same order of seeds.
        baseline (`str`):
            Method that the others are compared with.
    """
    others = [
        method
        for method, runs in results.items()
        if method != baseline and len(runs) == len(results[baseline]) and all(name in runs[0] for name in TESTED)
    ]
    cells: dict[tuple[str, str], tuple[float, float]] = {}
    for method in others:
        for name in TESTED:
            pairs = zip(results[method], results[baseline], strict=True)
            differences = [run[name] - base[name] for run, base in pairs]
            p = stats.ttest_1samp(differences, 0.0).pvalue if np.ptp(differences) > 0 else float(not any(differences))
            cells[method, name] = float(np.mean(differences)), float(p)
    corrected = dict(zip(cells, holm([p for _, p in cells.values()]), strict=True))
    lines = [
        f"| method, against {baseline} | " + " | ".join(COLUMNS[name] for name in TESTED) + " |",
        "| --- |" + " --- |" * len(TESTED),
    ]
    for method in others:
        texts = [f"{cells[method, name][0]:+.3f} (p {corrected[method, name]:.2g})" for name in TESTED]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
