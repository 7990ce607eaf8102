"""What the page shows of the evaluated pairs: their distribution, and those that changed most."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..columns import SAVED_ROW_INDEX
from .drawing import Drawing
from .figures import density, histogram, scatter
from .files import read_columns, read_file
from .run_folder import Run
from .texts import as_text, opening, row_name
from .tokens import Answers, Scale, read_tokens, shown_tokens


SHOWN_PAIRS = 5  # pairs that fell most, and pairs that rose most
OPENING = 60  # characters of a prompt that name a pair
MOST_NAMED_DOTS = 5_000  # the outermost, if there are more


def show_pairs(run: Run) -> tuple[dict[str, Any], list[Drawing | None]]:
    """Values of the template, and figures."""
    path, scores = _last_scores(run)
    if path is None:
        return {"fell": [], "rose": [], "scale": None}, []
    fell, rose, scale = _pairs_that_changed_most(run, scores, read_tokens(run, path, scores))
    return {"fell": fell, "rose": rose, "scale": scale}, _draw_pairs(run, scores)


def _last_scores(run: Run) -> tuple[Path | None, dict[str, np.ndarray]]:
    """File and columns of the scores of the last logged evaluation, without pairs whose scores are not finite."""
    logged = {int(metrics["step"]): metrics for metrics in run.dpo.evaluations()}
    steps = [step for step in run.dpo.pairs if step in logged or not logged]
    if unlogged := sorted(set(run.dpo.pairs) - set(steps)):
        run.notes.append(
            f"The scores of pairs of step {', '.join(map(str, unlogged))} are left out, since the log has no "
            "evaluation there: they are of an earlier training, or of steps after the last checkpoint."
        )
    if not steps:
        return None, {}
    step = max(steps)
    path = run.dpo.pairs[step]
    columns = read_file(path, read_columns, {}, run.notes, "the scores of the last evaluation")
    if not columns:
        return None, {}
    needed = {SAVED_ROW_INDEX, "chosen_logps", "rejected_logps", "chosen_logratios", "rejected_logratios"}
    if needed - set(columns):
        missing = ", ".join(f"`{name}`" for name in sorted(needed - set(columns)))
        run.notes.append(f"{path.name} lacks the columns {missing}, so its pairs are not shown.")
        return None, {}
    finite = np.logical_and.reduce([np.isfinite(columns[name]) for name in sorted(needed)])
    if finite.all() and not _agree(columns, logged.get(step, {})):
        run.notes.append(
            f"{path.name} is left out, since its means are not those that the log has for step {step}: its scores are "
            "of another training."
        )
        return None, {}
    if not finite.all():
        run.notes.append(
            f"{(~finite).sum()} of {len(finite)} evaluated pairs have a score that is not a number and are left out."
        )
    last = run.last.get("step")
    if last is not None and last != step:
        run.notes.append(
            f"The last scores of pairs are from step {step}, but the last logged evaluation is from step {last:g}."
        )
    if not finite.any():
        return None, {}
    return path, {name: values[finite] for name, values in columns.items()}


def _agree(columns: Mapping[str, np.ndarray], logged: Mapping[str, float]) -> bool:
    """Whether the means over the pairs are those that were logged with them."""
    means = {
        "logps/chosen": "chosen_logps",
        "logps/rejected": "rejected_logps",
        "displacement/chosen": "chosen_logratios",
        "displacement/rejected": "rejected_logratios",
    }
    known = [(float(columns[name].mean()), logged[metric]) for metric, name in means.items() if metric in logged]
    return all(math.isclose(*pair, rel_tol=1e-6, abs_tol=1e-6) for pair in known if math.isfinite(pair[1]))


def _draw_pairs(run: Run, scores: Mapping[str, np.ndarray]) -> list[Drawing | None]:
    chosen, rejected, beta = scores["chosen_logratios"], scores["rejected_logratios"], run.beta
    label = f"β (chosen − rejected log-ratio), β = {beta:.3g} (nats)" if beta else "chosen − rejected log-ratio (nats)"
    histograms = [
        histogram(
            f"histogram_{name}",
            f"{name.capitalize()} answers: log-probability",
            "Log-probability (nats per answer)",
            name,
            scores[f"{name}_logps"] - scores[f"{name}_logratios"],
            scores[f"{name}_logps"],
        )
        for name in ("chosen", "rejected")
    ]
    dots = scatter("scatter", "Each pair: chosen against rejected", chosen, rejected)
    if dots is not None:
        dots.dots |= _names_of_dots(run, scores)
    return [
        dots,
        density("margin_density", "Reward margin over the pairs", label, (beta or 1.0) * (chosen - rejected)),
        *histograms,
    ]


def _names_of_dots(run: Run, scores: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """For each dot of the scatter its row, both log-ratios, and how its prompt begins."""
    chosen, rejected = scores["chosen_logratios"], scores["rejected_logratios"]
    distance = np.hypot(chosen - np.median(chosen), rejected - np.median(rejected))
    outermost = np.argsort(-distance, kind="stable")[:MOST_NAMED_DOTS]
    shown = outermost[np.argsort(chosen[outermost], kind="stable")]  # the order in which keys pass through them
    rows = [int(row) for row in scores[SAVED_ROW_INDEX][shown]]
    prompts = [run.rows.get(row, {}) for row in rows]
    return {
        "rows": rows,
        "names": [row_name(*named) for named in zip(rows, prompts, strict=True)],
        "chosen": [round(float(value), 3) for value in chosen[shown]],
        "rejected": [round(float(value), 3) for value in rejected[shown]],
        "prompts": [opening(row["prompt"], OPENING) if "prompt" in row else "" for row in prompts],
    }


def _pairs_that_changed_most(
    run: Run, scores: Mapping[str, np.ndarray], answers: Answers
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Scale | None]:
    """The pairs whose chosen answer fell most, those whose chosen answer rose most, and the shades of their tokens."""
    order = np.argsort(scores["chosen_logratios"], kind="stable")
    falling = [index for index in order[:SHOWN_PAIRS] if scores["chosen_logratios"][index] < 0]
    rising = [index for index in order[::-1][:SHOWN_PAIRS] if scores["chosen_logratios"][index] > 0]
    rows = {int(scores[SAVED_ROW_INDEX][index]) for index in (*falling, *rising)}
    shown = [tokens for (row, _), tokens in answers.items() if row in rows]
    scale = Scale.of(shown) if shown else None

    def pairs(indices: list[Any]) -> list[dict[str, Any]]:
        columns = ({name: column[index] for name, column in scores.items()} for index in indices)
        return [_pair(run, values, answers, scale) for values in columns]

    return pairs(falling), pairs(rising), scale


def _pair(run: Run, scores: Mapping[str, float], answers: Answers, scale: Scale | None) -> dict[str, Any]:
    index = int(scores[SAVED_ROW_INDEX])
    row = run.rows.get(index, {})
    texts = [
        (name, as_text(row[name]), _tokens(answers, index, name, scale))
        for name in ("prompt", "chosen", "rejected")
        if name in row
    ]
    return {
        "row": row_name(index, row),
        "opening": opening(row["prompt"], OPENING) if "prompt" in row else "",
        "chosen_logratio": scores["chosen_logratios"],
        "rejected_logratio": scores["rejected_logratios"],
        "chosen_logps": scores["chosen_logps"],
        "rejected_logps": scores["rejected_logps"],
        "tokens": int(scores["chosen_tokens"]) if math.isfinite(scores.get("chosen_tokens", math.nan)) else None,
        "texts": texts,
    }


def _tokens(answers: Answers, row: int, name: str, scale: Scale | None) -> dict[str, Any] | None:
    tokens = answers.get((row, name))
    return None if tokens is None or scale is None else shown_tokens(tokens, scale)
