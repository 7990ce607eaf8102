"""
The tables of `displacement.py`: means over seeds with intervals, and what differs from a baseline after correction.

Every method is trained from the same models on the same pairs, seed by seed, so methods are compared by their paired
differences: a t-test over seeds, two-sided, and Holm's correction over all differences of a table. A star marks what
is left with p below 0.05.
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
# Columns that methods are compared in
TESTED = ("displacement/chosen", "displacement/chosen_fell", "rewards/margins", "rewards/accuracies")
SIGNIFICANT = 0.05
# Accuracies that differ by no more count as equal
EQUAL = 0.01

Runs = list[dict[str, float]]


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down procedure, in the order given."""
    order = np.argsort(values)
    factors = len(values) - np.arange(len(values))
    corrected = np.minimum(np.maximum.accumulate(np.asarray(values)[order] * factors), 1.0)
    return corrected[np.argsort(order)].tolist()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95% interval (t), which is not a number for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def table(results: dict[str, Runs], baseline: str) -> str:
    """
    One row per method, in Markdown: means over seeds and half of a 95% interval.

    Args:
        results (`dict[str, list[dict[str, float]]]`):
            Metrics of each seed, by method, in the same order of seeds. Columns that no run has are left out.
        baseline (`str`):
            Method that the others are compared with.
    """
    columns = {n: title for n, title in COLUMNS.items() if any(n in run for runs in results.values() for run in runs)}
    others = dict.fromkeys((method for method in _comparable(results) if method != baseline), baseline)
    tests = _paired_tests(results, others if baseline in results else {})
    lines = ["| method | " + " | ".join(columns.values()) + " |", "| --- |" + " --- |" * len(columns)]
    for method, runs in results.items():
        cells = []
        for name in columns:
            values = [run[name] for run in runs if name in run]
            mean, half = interval(values) if values else (None, None)
            text = "" if mean is None else f"{mean:.3f}" + (f" ± {half:.3f}" if half == half else "")
            cells.append(text + _star(tests, method, name))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_best_fixed(results: dict[str, Runs], fixed: Sequence[str]) -> str:
    """
    Paired differences of each method from the best fixed lambda at its accuracy, in Markdown.

    That is, of the values whose mean accuracy is at most one point below the method's, the one with the highest chosen
    log-ratio; if there is none, the value with the highest accuracy.

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
        if method not in values:
            level = mean(method, "rewards/accuracies") - EQUAL - 1e-9
            reached = [value for value in values if mean(value, "rewards/accuracies") >= level]
            criterion = "displacement/chosen" if reached else "rewards/accuracies"
            best[method] = max(reached or values, key=lambda value: mean(value, criterion))
    tests = _paired_tests(results, best)
    titles = ["method", "best fixed lambda", *(COLUMNS[name] for name in TESTED)]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " --- |" * (len(titles) - 1)]
    for method, baseline in best.items():
        cells = [f"{tests[method, name][0]:+.3f}{_star(tests, method, name)}" for name in TESTED]
        lines.append(f"| {method} | {baseline} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _comparable(results: dict[str, Runs]) -> list[str]:
    """Methods with all seeds and metrics that are compared."""
    seeds = max(map(len, results.values()))
    return [m for m, runs in results.items() if len(runs) == seeds and all(name in runs[0] for name in TESTED)]


def _paired_tests(results: dict[str, Runs], baselines: dict[str, str]) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean difference of each method from its baseline, and its corrected p-value, by method and column."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for method, baseline in baselines.items():
        for name in TESTED:
            pairs = zip(results[method], results[baseline], strict=True)
            differences = [run[name] - base[name] for run, base in pairs]
            p = stats.ttest_1samp(differences, 0.0).pvalue if np.ptp(differences) > 0 else float(not any(differences))
            found[method, name] = float(np.mean(differences)), float(p)
    corrected = holm([p for _, p in found.values()])
    return {key: (mean, p) for (key, (mean, _)), p in zip(found.items(), corrected, strict=True)}


def _star(tests: dict[tuple[str, str], tuple[float, float]], method: str, name: str) -> str:
    return "*" if tests.get((method, name), (0.0, 1.0))[1] < SIGNIFICANT else ""
