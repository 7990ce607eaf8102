"""Length, repetition and variety of answers."""

import statistics
from collections.abc import Sequence


Statistics = dict[str, int | float | None]


def answer_statistics(
    answers: Sequence[Sequence[int]], texts: Sequence[str] | None = None, cut: Sequence[bool] | None = None
) -> Statistics:
    r"""
    Length, repetition and variety of answers.

    An answer of \\( T \\) tokens has \\( T - n + 1 \\) n-grams, overlapping ones included. Its repetition is
    \\( 1 - d / (T - 3) \\), where \\( d \\) is the number of its distinct 4-grams: 0 if no 4-gram occurs twice, near 1
    if one token is repeated throughout.

    Args:
        answers (`Sequence[Sequence[int]]`):
            Tokens of each answer, without the token that ends it.
        texts (`Sequence[str]`, *optional*):
            Text of each answer. Without it, an answer is empty if it has no tokens.
        cut (`Sequence[bool]`, *optional*):
            Whether each answer reached its maximum length. By default none did.

    Returns:
        `dict[str, int or float or None]`:
            - `count`: number of answers;
            - `mean_tokens`, `median_tokens`: length of an answer;
            - `empty`, `cut`: share of answers without text (or only white space), and of answers that were cut;
            - `repetition`: mean over the answers with at least one 4-gram;
            - `distinct_1`, `distinct_2`: distinct n-grams of all answers divided by their number, which falls with the
              amount of text, so compare it at similar lengths.

            A value is `None` if there is nothing to measure.

    >>> answer_statistics([[1, 2, 3], []])["mean_tokens"]
    1.5
    >>> answer_statistics([[7] * 10])["repetition"]
    0.8571428571428572
    """
    lengths = [len(answer) for answer in answers]
    empty = [not text.strip() for text in texts] if texts is not None else [not length for length in lengths]
    repetitions = [1 - len(set(grams)) / len(grams) for answer in answers if (grams := _ngrams(answer, 4))]

    def mean(values: Sequence[float]) -> float | None:
        return statistics.fmean(values) if values else None

    def distinct(n: int) -> float | None:
        grams = [gram for answer in answers for gram in _ngrams(answer, n)]
        return len(set(grams)) / len(grams) if grams else None

    return {
        "count": len(answers),
        "mean_tokens": mean(lengths),
        "median_tokens": float(statistics.median(lengths)) if lengths else None,
        "empty": mean(empty),
        "cut": mean(cut if cut is not None else [False] * len(answers)),
        "repetition": mean(repetitions),
        "distinct_1": distinct(1),
        "distinct_2": distinct(2),
    }


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
