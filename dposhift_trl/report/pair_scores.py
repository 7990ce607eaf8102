"""The metrics of an evaluation from its scores of pairs, for a folder without a log."""

from collections.abc import Mapping

import numpy as np

from ..intervals import bootstrap_interval, share_interval


NEEDED = ("chosen_logratios", "rejected_logratios")


def metrics_of_pairs(columns: Mapping[str, np.ndarray], beta: float) -> dict[str, float]:
    """
    What an evaluation would have logged about its pairs, with 95% intervals.

    Args:
        columns (`Mapping[str, np.ndarray]`):
            Columns of `pairs/*.parquet`. Pairs whose log-ratios are not finite are left out.
        beta (`float`):
            Factor of the rewards.

    Returns:
        `dict[str, float]`: Metrics by the names that a trainer logs; empty if there is no pair. Those whose columns
        are missing are left out.
    """
    if any(name not in columns for name in NEEDED):
        return {}
    kept = np.logical_and.reduce([np.isfinite(columns[name]) for name in NEEDED])
    if not kept.any():
        return {}
    columns = {name: values[kept] for name, values in columns.items()}
    chosen, rejected = (columns[name] for name in NEEDED)
    margins = beta * (chosen - rejected)
    shares = {"displacement/chosen_fell": chosen < 0, "rewards/accuracies": chosen > rejected}
    told = {"displacement/chosen": chosen, "displacement/rejected": rejected, "rewards/margins": margins}
    means = {
        **shares,
        **told,
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "displacement/both_fell": (chosen < 0) & (rejected < 0),
        "dpo_loss": np.logaddexp(0.0, -margins),
    }
    for answer, logratios in (("chosen", chosen), ("rejected", rejected)):
        if f"{answer}_logps" in columns:
            means[f"logps/{answer}"] = columns[f"{answer}_logps"]
        if f"{answer}_tokens" in columns:
            means[f"displacement/{answer}_per_token"] = logratios / np.maximum(columns[f"{answer}_tokens"], 1)
    if "shift_lambda" in columns:
        means["shift/lambda"] = columns["shift_lambda"]
    metrics = {name: float(values.mean()) for name, values in means.items()}
    if {"chosen_logps", "chosen_tokens"} <= columns.keys():
        tokens = max(columns["chosen_tokens"].sum(), 1)
        metrics["perplexity/chosen"] = float(np.exp(-columns["chosen_logps"].sum() / tokens))
    intervals = {name: bootstrap_interval(values) for name, values in told.items()}
    intervals |= {name: share_interval(values) for name, values in shares.items()}
    for name, interval in intervals.items():
        if interval is not None:
            metrics |= {f"{name}_low": interval[0], f"{name}_high": interval[1]}
    return metrics
