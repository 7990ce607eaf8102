"""Where in an answer its log-probability changed: the tokens of the pairs that fell and rose most."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..artifacts import TOKENS
from ..columns import SAVED_ROW_INDEX
from .files import read_file
from .run_folder import Run
from .texts import signed


MOST_TOKENS = 1_000  # of an answer that are shown
MOST_WORDS = 5  # of an answer that are named
LEVELS = 4  # shades of a color
LADDER = tuple(float(f"{digit}e{power}") for power in range(-6, 7) for digit in (1, 3))  # of their bounds, in nats
SAME_SCORE = {"rel_tol": 0.02, "abs_tol": 0.1}  # what rounding to half precision explains, in nats per answer
WRITTEN_WITHOUT_SPACES = "\u2e80"  # from here on, Unicode holds scripts such as Chinese


@dataclass(frozen=True)
class Token:
    """
    A token of an answer, or the tokens of a character that takes several.

    Args:
        text (`str`):
            Its part of the answer.
        logps, ref_logps (`float`):
            Its log-probability under the policy and under the reference, in nats.
    """

    text: str
    logps: float
    ref_logps: float

    @property
    def change(self) -> float:
        """Log-ratio, in nats."""
        return self.logps - self.ref_logps

    @property
    def title(self) -> str:
        """The change in words and numbers."""
        before, after = (f"{100 * math.exp(min(value, 0.0)):.3g}%" for value in (self.ref_logps, self.logps))
        return f"{signed(self.change)} nats: {before} → {after}"


Answers = dict[tuple[int, str], list[Token]]  # by row and `"chosen"` or `"rejected"`


def read_tokens(run: Run, pairs: Path, scores: Mapping[str, np.ndarray]) -> Answers:
    """
    The tokens that were saved with the scores of an evaluation, as far as they are of the same evaluation.

    Args:
        run ([`Run`]):
            The run. What is left out is noted.
        pairs (`Path`):
            File with the scores of its pairs.
        scores (`Mapping[str, np.ndarray]`):
            Its columns.
    """
    path = pairs.parent / TOKENS / pairs.name
    if not path.exists():  # runs that are sharded, or older than this file
        return {}
    found: Answers = read_file(path, _read, {}, run.notes, "the words whose probability changed most")
    known = {int(row): place for place, row in enumerate(scores[SAVED_ROW_INDEX])}
    agreeing: Answers = {}
    for (row, answer), tokens in found.items():
        place = known.get(row)
        score = None if place is None else (scores[f"{answer}_logps"][place], scores[f"{answer}_logratios"][place])
        if score is not None and _agree(tokens, *score):
            agreeing[row, answer] = tokens
    if len(agreeing) < len(found):
        run.notes.append(
            f"{TOKENS}/{path.name}: the tokens of {len(found) - len(agreeing)} of {len(found)} answers do not add up "
            "to the scores of their pairs, so they are of another evaluation and are left out."
        )
    return agreeing


def _read(path: Path) -> Answers:
    found: Answers = {}
    for row in pq.read_table(path).to_pylist():
        if row["answer"] not in ("chosen", "rejected"):
            raise ValueError(f"`answer` must be chosen or rejected, got {row['answer']!r}.")
        token = Token(str(row["text"]), float(row["logps"]), float(row["ref_logps"]))
        found.setdefault((int(row[SAVED_ROW_INDEX]), row["answer"]), []).append(token)
    return found


def _agree(tokens: Sequence[Token], logps: float, logratio: float) -> bool:
    sums = sum(token.logps for token in tokens), sum(token.ref_logps for token in tokens)
    return all(math.isclose(a, b, **SAME_SCORE) for a, b in zip(sums, (logps, logps - logratio), strict=True))


@dataclass(frozen=True)
class Scale:
    """
    Shades for changes of log-probability.

    Args:
        bounds (`tuple[float, ...]`):
            Smallest change of each shade, in nats, the palest first.
    """

    bounds: tuple[float, ...]

    @classmethod
    def of(cls, answers: Sequence[Sequence[Token]]) -> "Scale":
        """Bounds of 1 or 3 times a power of ten, chosen so that the largest change has the darkest shade."""
        largest = max((abs(token.change) for tokens in answers for token in tokens), default=1.0)
        end = max(LEVELS, bisect_right(LADDER, largest))
        return cls(LADDER[end - LEVELS : end])

    def shade(self, change: float) -> str:
        """Class of the style sheet: `"rose"` or `"fell"` with its level, or nothing for a small change."""
        level = sum(abs(change) >= bound for bound in self.bounds)
        return f"{'rose' if change > 0 else 'fell'}{level}" if level else ""


def shown_tokens(tokens: Sequence[Token], scale: Scale) -> dict[str, Any]:
    """What the template shows of an answer."""
    return {
        "words": [(_visible(word.text), signed(word.change)) for word in most_changed_words(tokens)],
        "tokens": [(token.text, scale.shade(token.change), token.title) for token in tokens[:MOST_TOKENS]],
        "left_out": max(0, len(tokens) - MOST_TOKENS),
    }


def most_changed_words(tokens: Sequence[Token]) -> list[Token]:
    """The words whose log-probability, the sum over their tokens, changed most; the largest change first."""
    words: list[Token] = []
    for token in tokens:
        if words and _continues(words[-1].text, token.text):
            last = words.pop()
            token = Token(last.text + token.text, last.logps + token.logps, last.ref_logps + token.ref_logps)
        words.append(token)
    changed = [word for word in words if abs(word.change) >= 0.005]  # which is not printed as 0
    return sorted(changed, key=lambda word: -abs(word.change))[:MOST_WORDS]


def _continues(before: str, after: str) -> bool:
    joined = before[-1:].isalnum() and after[:1].isalnum()
    return joined and max(before[-1], after[0]) < WRITTEN_WITHOUT_SPACES


def _visible(text: str) -> str:
    return text.strip() or text.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
