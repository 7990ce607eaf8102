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
    others = [method for method in _comparable(results) if method != baseline]
    return _differences(results, dict.fromkeys(others, baseline), f"method, against {baseline}")


def against_best_fixed(results: dict[str, Runs], fixed: Sequence[str]) -> str:
    """
    Paired differences of each method from the best fixed lambda at its accuracy, in Markdown.

    That is, of the values whose mean accuracy is not below the method's, the one with the highest chosen log-ratio; if
    there is none, the value with the highest accuracy.

    Args:
        results (`dict[str, list[dict[str, float]]]`):
            Metrics of each seed, by method, in the same order of seeds.
        fixed (`list[str]`):
            The methods with a fixed lambda.
    """
    known = _comparable(results)
    values = [method for method in fixed if method in known]

    def mean(method: str, name: str) -> float:
        return float(np.mean([run[name] for run in results[method]]))

    best = {}
    for method in known:
        if method in values:
            continue
        level = mean(method, "rewards/accuracies")
        reached = [value for value in values if mean(value, "rewards/accuracies") >= level - 1e-9]
        criterion = "displacement/chosen" if reached else "rewards/accuracies"
        best[method] = max(reached or values, key=lambda value: mean(value, criterion))
    return _differences(results, best, "method, against the best fixed lambda at its accuracy", named=True)


def _comparable(results: dict[str, Runs]) -> list[str]:
    """Methods with all seeds and metrics that are compared."""
    seeds = max(map(len, results.values()))
    return [m for m, runs in results.items() if len(runs) == seeds and all(name in runs[0] for name in TESTED)]


def _differences(results: dict[str, Runs], baselines: dict[str, str], title: str, *, named: bool = False) -> str:
    cells: dict[tuple[str, str], tuple[float, float]] = {}
    for method, baseline in baselines.items():
        for name in TESTED:
            pairs = zip(results[method], results[baseline], strict=True)
            differences = [run[name] - base[name] for run, base in pairs]
            p = stats.ttest_1samp(differences, 0.0).pvalue if np.ptp(differences) > 0 else float(not any(differences))
            cells[method, name] = float(np.mean(differences)), float(p)
    corrected = dict(zip(cells, holm([p for _, p in cells.values()]), strict=True))
    lines = [f"| {title} | " + " | ".join(COLUMNS[name] for name in TESTED) + " |", "| --- |" + " --- |" * len(TESTED)]
    for method, baseline in baselines.items():
        texts = [f"{cells[method, name][0]:+.3f} (p {corrected[method, name]:.2g})" for name in TESTED]
        lines.append(f"| {method}" + (f", {baseline}" if named else "") + " | " + " | ".join(texts) + " |")
    return "\n".join(lines)
