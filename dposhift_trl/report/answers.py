"""Generated answers: their statistics, whether they are degenerate, and the questions whose answers differ most."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import GENERATIONS, SIDE_BY_SIDE, read_mapping, read_text
from ..identity import weights_identity
from .files import number, read_file


STATISTICS_OF_ANSWERS = (
    "count",
    "mean_tokens",
    "median_tokens",
    "empty",
    "cut",
    "repetition",
    "distinct_1",
    "distinct_2",
)

# Conventions of this report: half of an answer's 4-grams occurred before; one answer in ten is empty
REPETITIVE = 0.5
OFTEN_EMPTY = 0.1
ABOVE_DATA = 0.1  # above the repetition of the chosen answers, which may be tables or code


@dataclass
class Answers:
    """
    Statistics of the answers that `dposhift_trl.generate` wrote.

    Args:
        models (`list[str]`):
            Names of the models, the earlier one first.
        settings (`dict[str, Any]`):
            How the answers were generated.
        questions (`int`):
            Number of questions.
        statistics (`dict[str, dict[str, float]]`):
            Statistics by `"<model> <mode>"`; NaN where unknown.
        chosen (`dict[str, float]`, *optional*):
            The same statistics of the chosen answers in the data.
        weights (`dict[str, Any]`):
            Which weights answered, by model.
    """

    models: list[str]
    settings: dict[str, Any]
    questions: int
    statistics: dict[str, dict[str, float]]
    chosen: dict[str, float] | None
    weights: dict[str, Any]

    @property
    def final_greedy(self) -> dict[str, float]:
        """Statistics of the final model's greedy answers."""
        return self.statistics.get(f"{self.models[-1]} greedy", {})


@dataclass
class Examples:
    """
    Questions with their greedy answers.

    Args:
        lines (`list[dict[str, Any]]`):
            Lines of `side_by_side.jsonl`, those whose answers differ most first.
        total (`int`):
            Number of questions in the file.
        same (`int`):
            Number of questions with the same greedy answer from both models.
    """

    lines: list[dict[str, Any]]
    total: int
    same: int


def read_answers(path: Path) -> Answers:
    """Read `statistics.json`."""
    content = read_mapping(path)
    models, modes = ([str(name) for name in content[key]] for key in ("models", "modes"))
    if not models or not modes:
        raise ValueError(f"`models` and `modes` must not be empty, got {models} and {modes}.")
    chosen, settings, weights = (content.get(name) for name in ("chosen", "settings", "weights"))
    return Answers(
        models,
        settings if isinstance(settings, dict) else {},
        int(content["questions"]),
        {f"{model} {mode}": _numbers(content["statistics"][model][mode]) for model in models for mode in modes},
        None if chosen is None else _numbers(chosen),
        weights if isinstance(weights, dict) else {},
    )


def of_these_weights(answers: Answers, folder: Path, notes: list[str]) -> Answers | None:
    """
    The answers, or `None` if they are of other weights than a run's.

    Args:
        answers ([`Answers`]):
            The answers.
        folder (`Path`):
            Run folder. Weights that are not in it are not compared.
        notes (`list[str]`):
            Notes for the reader of the report. The reason, or what was not compared, is appended.
    """
    found = {name: weights_identity(folder / name) for name in answers.models}
    if other := [name for name, weights in found.items() if weights and weights != answers.weights.get(name)]:
        notes.append(
            f"The generated answers are not of the weights that {' and '.join(f'`{name}/`' for name in other)} now "
            f"{'holds' if len(other) == 1 else 'hold'}, so they are left out. Generate them again."
        )
        return None
    if unknown := [name for name, weights in found.items() if not weights]:
        notes.append(
            f"There are no weights in {' and '.join(f'`{name}/`' for name in unknown)}, so it is unknown whether the "
            "generated answers are of this run."
        )
    return answers


def _numbers(values: Any) -> dict[str, float]:
    return {name: number(values.get(name)) for name in STATISTICS_OF_ANSWERS}


def read_examples(folder: Path, models: list[str], limit: int, notes: list[str]) -> Examples:
    """
    Read the questions whose greedy answers differ most between the first and the last model.

    Args:
        folder (`Path`):
            Run folder.
        models (`list[str]`):
            Names of the models, the earlier one first.
        limit (`int`):
            Maximum number of questions.
        notes (`list[str]`):
            Notes for the reader of the report. Unreadable lines are reported here.
    """
    text = read_file(folder / GENERATIONS / SIDE_BY_SIDE, read_text, "", notes, "answers side by side")
    found: list[tuple[float, dict[str, Any]]] = []
    broken = same = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            first, last = ("\n".join(content["answers"][model]["greedy"]) for model in (models[0], models[-1]))
            content = {"question_id": None, "category": None, "chosen": None} | content
            content["follow_ups"] = [str(turn) for turn in content.get("follow_ups") or []]
            found.append((difference(first, last), content))
            same += first == last
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken += 1
    if broken:
        notes.append(f"{SIDE_BY_SIDE}: {broken} of {broken + len(found)} lines cannot be read and are left out.")
    found.sort(key=lambda item: -item[0])
    return Examples([content for _, content in found[:limit]], len(found), same)


def difference(first: str, second: str) -> float:
    """Share of the character 3-grams of two texts that only one of them has, from 0 (equal) to 1."""
    if first == second:
        return 0.0
    counts = [Counter(text[i : i + 3] for i in range(max(1, len(text) - 2))) for text in (first, second)]
    return 1 - 2 * (counts[0] & counts[1]).total() / (counts[0].total() + counts[1].total())


def degeneration(statistics: Mapping[str, Mapping[str, float]], chosen: Mapping[str, float] | None = None) -> str:
    """
    Say what degenerate text looks like in the statistics of generated answers, and whether it is present.

    Args:
        statistics (`dict[str, dict[str, float]]`):
            Output of [`~generate.statistics.answer_statistics`] by name, such as `"dpo greedy"`; NaN where unknown.
        chosen (`dict[str, float]`, *optional*):
            The same statistics of the chosen answers.

    Returns:
        `str`: Two sentences.
    """
    definition = "Degenerate text is empty or repeats itself until it is cut (repetition near 1, distinct-n near 0)."
    usual = number((chosen or {}).get("repetition"))
    allowed = max(REPETITIVE, usual + ABOVE_DATA) if math.isfinite(usual) else REPETITIVE
    measured, degenerate = [], []
    for name, values in statistics.items():
        empty, repetition, cut = (number(values.get(key)) for key in ("empty", "repetition", "cut"))
        if not values.get("count") or not math.isfinite(empty):
            continue
        measured.append((empty, repetition if math.isfinite(repetition) else 0.0))
        signs = [f"{empty:.0%} empty"] if empty >= OFTEN_EMPTY else []
        if repetition >= allowed:
            signs.append(f"repetition {repetition:.2f}" + (f" and {cut:.0%} cut" if math.isfinite(cut) else ""))
        if signs:
            degenerate.append(f"{name} ({', '.join(signs)})")
    if not measured:
        return f"{definition} There are no statistics that show whether it occurs."
    if degenerate:
        return f"{definition} It occurs in {'; '.join(degenerate)}."
    empty, repetition = (max(values) for values in zip(*measured, strict=True))
    return (
        f"{definition} It does not occur: at most {empty:.0%} of the answers are empty and repetition is at most "
        f"{repetition:.2f} (thresholds: {OFTEN_EMPTY:.0%} and {allowed:.2f})."
    )
