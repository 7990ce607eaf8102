"""What the evaluations say: of one run in one plain paragraph, of several as a recommended lambda."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..schedules import LambdaPlan


# Perplexity of the chosen answers, last over first. Conventions of ours, not figures of the paper: nats an answer grow
# with its length, so that they cannot tell a slight fall from a large one.
SLIGHT_RISE_OF_PERPLEXITY = 1.1
LARGE_RISE_OF_PERPLEXITY = 1.5
# The lowest `lambda_min` of the paper's schedules; its fixed lambdas end at 0.5, where the margin had fallen by half
LOW_LAMBDA = 0.75
# Of the reference's margin, what a recommended run must keep; ours too
KEPT_MARGIN = 0.5
STILL = 1e-3  # nats an answer: float32 sums of log-probabilities agree to about this


def verdict(first: Mapping[str, float], last: Mapping[str, float], plan: LambdaPlan | None = None) -> str:
    """
    Say whether the chosen answers became less likely, how far and for how many, what the rejected ones did, what that
    usually means, and what to try.

    The rules, in this order; each needs its figures to be there and to be numbers, and no advice is given without:
    - Margin not above 0, or accuracy not above one half by their intervals: nothing about lambda can be said.
    - The rejected answers rose: lambda may be too low, if it is below 1 and the chosen answers rose too.
    - The chosen answers fell: slightly, clearly or much by what became of their perplexity. Below 1.1 times nothing is
      to be done; above, a lower lambda is to be tried, unless it is at most 0.75 already. Of an adaptive lambda, its
      lower bound is to be tried lower where lambda ended there, and else its target is to be moved.

    Args:
        first (`Mapping[str, float]`):
            Metrics of the evaluation before the first step, without the prefix `eval_`. May be empty: what stands in
            `displacement/*` is relative to the reference anyhow.
        last (`Mapping[str, float]`):
            Metrics of the last evaluation, without the prefix.
        plan ([`LambdaPlan`], *optional*):
            What the run was told of lambda.

    Returns:
        `str`: One paragraph, without markup or line breaks.
    """
    chosen, rejected = _number(last, "displacement/chosen"), _number(last, "displacement/rejected")
    if chosen is None or rejected is None:
        return (
            "Whether the chosen answers fell cannot be said: there is no evaluation with log-ratios that are numbers. "
            "Give the run evaluation rows and evaluate before the first step and at the end."
        )
    if abs(chosen) < STILL and abs(rejected) < STILL:
        return (
            "Neither the chosen nor the rejected answers moved between the reference and the last evaluation: the "
            "policy still is the reference, so nothing can be said of lambda. Evaluate again after training."
        )
    growth = _perplexity_growth(first, last)
    sentences = [_what_chosen_did(chosen, growth, last), _what_rejected_did(rejected, last)]
    doubt = _why_nothing_was_learned(first, last)
    if doubt:
        return " ".join([*sentences, doubt])
    sentences.append(_what_was_learned(last))
    return " ".join([*sentences, _meaning_and_advice(chosen, rejected, growth, first, last, plan or LambdaPlan())])


def verdict_of(log_history: Sequence[Mapping[str, float]], plan: LambdaPlan | None = None) -> str | None:
    """
    [`verdict`] of the first and the last evaluation in a trainer's log, or `None` if there was none.

    Args:
        log_history (`list[dict[str, float]]`):
            `trainer.state.log_history`.
        plan ([`LambdaPlan`], *optional*):
            What the run was told of lambda.
    """
    evaluations = [entry for entry in log_history if "eval_displacement/chosen" in entry]
    if not evaluations:
        return None
    first, last = (
        {name.removeprefix("eval_"): value for name, value in evaluations[place].items()} for place in (0, -1)
    )
    return verdict(first if evaluations[0].get("step") == 0 else {}, last, plan)


def _number(metrics: Mapping[str, float], name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def _perplexity_growth(first: Mapping[str, float], last: Mapping[str, float]) -> float | None:
    """Perplexity of the chosen answers, last over first; from nats a token where the first was not the reference."""
    before, after = _number(first, "perplexity/chosen"), _number(last, "perplexity/chosen")
    if before and after and abs(_number(first, "displacement/chosen") or 0.0) < STILL:
        return after / before
    per_token = _number(last, "displacement/chosen_per_token")
    return None if per_token is None else math.exp(min(-per_token, 700.0))


def _lambdas(first: Mapping[str, float], last: Mapping[str, float]) -> tuple[float, float] | None:
    end = _number(last, "shift/lambda")
    start = _number(first, "shift/lambda")
    return None if end is None else (end if start is None else start, end)


def _what_chosen_did(chosen: float, growth: float | None, last: Mapping[str, float]) -> str:
    before_after, share = "", _number(last, "displacement/chosen_fell")
    logps = _number(last, "logps/chosen")
    if logps is not None:
        before_after = f" (from {logps - chosen:.2f} to {logps:.2f})"
    if abs(chosen) < STILL:
        moved = f"On average the log-probability of the chosen answers did not move{before_after}"
    else:
        verb = "fell" if chosen < 0 else "rose"
        moved = f"The log-probability of the chosen answers {verb} by {abs(chosen):.2f} nats an answer{before_after}"
    if growth is not None:
        moved += f", which multiplies their perplexity by {growth:.3g}"
    return moved + (f"; {share:.0%} of them became less likely." if share is not None else ".")


def _what_rejected_did(rejected: float, last: Mapping[str, float]) -> str:
    if abs(rejected) < STILL:
        return "The rejected answers did not move."
    logps, share = _number(last, "logps/rejected"), _number(last, "displacement/both_fell")
    both = f"; in {share:.0%} of the pairs both answers fell" if share else ""
    before_after = "" if logps is None else f" (from {logps - rejected:.2f} to {logps:.2f})"
    return (
        f"The rejected answers {'fell' if rejected < 0 else 'rose'} by {abs(rejected):.2f} nats{before_after}{both}."
    )


def _why_nothing_was_learned(first: Mapping[str, float], last: Mapping[str, float]) -> str | None:
    margin, accuracy = _number(last, "rewards/margins"), _number(last, "rewards/accuracies")
    margin_low = _number(last, "rewards/margins_low")
    low, high = _number(last, "rewards/accuracies_low"), _number(last, "rewards/accuracies_high")
    remedy = "Before lambda matters, look at learning rate, number of steps and data, and evaluate on more pairs."
    if margin is None or accuracy is None:
        return "There is no margin or accuracy that is a number, so no advice follows."
    interval = "" if low is None or high is None else f" (95 % interval {low:.3f} to {high:.3f})"
    if high is not None and high < 0.5:
        return (
            "The policy prefers the rejected answer more often than the chosen one: accuracy "
            f"{accuracy:.3f}{interval}. "
            "Check that the columns `chosen` and `rejected` are not swapped; a lower lambda does not mend this."
        )
    grown = margin > (_number(first, "rewards/margins") or 0.0)
    if not grown or (margin_low is not None and margin_low <= 0):
        why = "did not grow" if not grown else f"cannot be told from 0 (its 95 % interval begins at {margin_low:.3g})"
        return f"The margin, {margin:.3g}, {why}: the preference was not learned. {remedy}"
    if low is None or high is None:
        return (
            f"Accuracy is {accuracy:.3f}, without an interval: there are too few pairs, or no record of how sure "
            "it is, "
            "so no advice follows."
        )
    if low <= 0.5:
        return (
            f"The margin grew to {margin:.3g}, but accuracy, {accuracy:.3f}{interval}, cannot be told from chance on "
            f"these pairs. {remedy}"
        )
    return None


def _what_was_learned(last: Mapping[str, float]) -> str:
    return (
        f"The preference was learned: margin {last['rewards/margins']:.3g}, accuracy "
        f"{last['rewards/accuracies']:.3f} (95 % interval {last['rewards/accuracies_low']:.3f} to "
        f"{last['rewards/accuracies_high']:.3f})."
    )


def _meaning_and_advice(
    chosen: float,
    rejected: float,
    growth: float | None,
    first: Mapping[str, float],
    last: Mapping[str, float],
    plan: LambdaPlan,
) -> str:
    lambdas = _lambdas(first, last)
    if rejected >= STILL:
        if lambdas and min(lambdas) < 1 and chosen >= STILL:
            return (
                "Rejected answers that rise are unusual: below lambda 1 the tokens that both answers share are pushed "
                "up in both. If they should fall, try a lambda closer to 1."
            )
        return (
            "Rejected answers that rise are unusual: training mostly lowers them. Read the pairs in which they "
            "rose before "
            "changing a setting."
        )
    if chosen > -STILL:
        return "The chosen answers kept their probability, so the figures ask for no other lambda."
    if growth is None:
        return "Without the answers' lengths it cannot be said whether that fall is large, so no advice follows."
    if growth < SLIGHT_RISE_OF_PERPLEXITY:
        return (
            "That is a slight fall, under a tenth more perplexity, and the figures ask for no other lambda. A fall is "
            "usual: the shift mitigates it, it does not abolish it."
        )
    large = growth >= LARGE_RISE_OF_PERPLEXITY
    meaning = (
        "That is a large fall, known as likelihood displacement: the good answers lost probability too, to "
        "text that is "
        "neither answer."
        if large
        else "That is a clear fall, though not a large one: some probability left the good answers too."
    )
    return f"{meaning} {_what_to_try_adaptive(lambdas, plan) if plan.adaptive else _what_to_try(lambdas)}"


def _what_to_try_adaptive(lambdas: tuple[float, float] | None, plan: LambdaPlan) -> str:
    if lambdas is None:
        return "Lambda was not logged, so it cannot be said whether the controller had room to lower it."
    end, share = lambdas[1], plan.metric == "displacement/chosen_fell"
    held = "the share of chosen answers that fell" if share else "the mean chosen log-ratio"
    if end <= 1.01 * plan.low:
        where = f"Lambda ended at its lower bound, {plan.low:.3g}, so the controller had no room left"
        if plan.low <= LOW_LAMBDA:
            return f"{where}, and that is already low; {_MOVE_LESS}"
        return f"{where}. Try a lower `lambda_min`, {_SAME_PAIRS}"
    return (
        f"Lambda ended at {end:.3g}, above its lower bound, {plan.low:.3g}, with a controller that holds {held} of "
        f"the training pairs at {plan.target:.3g}; evaluation pairs may lie elsewhere. Try a "
        f"{'lower' if share else 'higher'} `lambda_target`, {_SAME_PAIRS}"
    )


def _what_to_try(lambdas: tuple[float, float] | None) -> str:
    if lambdas is None:
        return "Lambda was not logged, so it cannot be said whether there is room to lower it."
    start, end = lambdas
    low = min(lambdas)
    if not math.isclose(start, end, rel_tol=1e-3):
        if low < LOW_LAMBDA:
            return f"Lambda, from {start:.3g} to {end:.3g}, was already low in part; {_MOVE_LESS}"
        return f"Lambda went from {start:.3g} to {end:.3g}. Try it fixed at {low:.3g}, {_SAME_PAIRS}"
    if low >= 1:
        return (
            f"With lambda {low:.3g} this is DPO{'' if low == 1 else ' or beyond'}. Try `shift_lambda: 0.95`, then "
            f"lower, {_SAME_PAIRS}"
        )
    if low <= LOW_LAMBDA:
        return f"Lambda, {low:.3g}, is already low; {_MOVE_LESS}"
    return f"Lambda was {low:.3g}. Try a lower one in small steps, {_SAME_PAIRS}"


_SAME_PAIRS = "and look at margin and accuracy on the same pairs: a lower lambda can cost both."
_MOVE_LESS = (
    "a lower one can cost margin (in the paper .58 became .24 at 0.5). Try a smaller learning rate or "
    "fewer steps, which "
    "move the policy less, and compare."
)


@dataclass(frozen=True)
class Outcome:
    """
    A run's last evaluation, as [`recommend_lambda`] compares it.

    Args:
        name (`str`):
            What to call the run.
        lambdas (`tuple[float, float]`, *optional*):
            Lambda at the first and at the last evaluation; with one for each pair, that of the shifted pairs.
        chosen (`float`, *optional*):
            Mean chosen log-ratio, nats an answer.
        margin, accuracy (`float`, *optional*):
            Means over the pairs, unshifted; `_low` and `_high` are the ends of their 95 % intervals.
        reference_chosen (`float`, *optional*):
            Mean log-probability of the chosen answers under the SFT model, by which to see that two runs started
            from the same model and were evaluated on the same pairs.
        shifted_between (`bool`, *optional*, defaults to `False`):
            Whether lambda differed from 1 at some step, whatever it was at both ends.
    """

    name: str
    lambdas: tuple[float, float] | None = None
    chosen: float | None = None
    margin: float | None = None
    margin_low: float | None = None
    margin_high: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    reference_chosen: float | None = None
    shifted_between: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        first: Mapping[str, float],
        last: Mapping[str, float],
        shifted_between: bool = False,
    ) -> "Outcome":
        """From the metrics that [`verdict`] takes."""
        logps, chosen = _number(last, "logps/chosen"), _number(last, "displacement/chosen")
        return cls(
            name,
            _lambdas(first, last),
            chosen,
            _number(last, "rewards/margins"),
            _number(last, "rewards/margins_low"),
            _number(last, "rewards/margins_high"),
            _number(last, "rewards/accuracies"),
            _number(last, "rewards/accuracies_low"),
            _number(last, "rewards/accuracies_high"),
            None if logps is None or chosen is None else logps - chosen,
            shifted_between,
        )

    @property
    def is_dpo(self) -> bool:
        if self.lambdas is None or self.shifted_between:
            return False
        return all(math.isclose(end, 1, abs_tol=1e-9) for end in self.lambdas)

    @property
    def complete(self) -> bool:
        needed = (self.lambdas, self.chosen, self.margin, self.margin_low, self.accuracy_low, self.accuracy_high)
        return None not in needed

    @property
    def learned(self) -> bool:
        return self.complete and self.margin_low > 0 and self.accuracy_low > 0.5  # type: ignore[operator]


RULE = (
    "Compared with the run at lambda 1 (of several, the most accurate one), a run stays in if its preference was "
    "learned (the 95 % intervals of margin and accuracy lie above 0 and one half), its accuracy interval reaches that "
    "of the reference, and it keeps at least half of the reference's margin. Of those, the one whose chosen answers "
    "kept most of their log-probability is recommended. All runs must start from the same SFT model and be evaluated "
    "on the same pairs."
)


def recommend_lambda(outcomes: Sequence[Outcome]) -> tuple[str | None, str]:
    """
    Which run's lambda to take, and why, or why none.

    The rule is `RULE`, word for word: it stands on the report's page too.

    Args:
        outcomes (`Sequence[Outcome]`):
            One a run.

    Returns:
        `tuple[str | None, str]`: Name of the recommended run, or None where the figures support none, and the reason.
    """
    usable = [outcome for outcome in outcomes if outcome.complete]
    if len(usable) < 2:
        return None, (
            f"No recommendation: {len(usable)} of {len(outcomes)} runs have a last evaluation with log-ratios, "
            "margin, "
            "accuracy and their intervals, and a comparison takes two."
        )
    starts = [outcome.reference_chosen for outcome in usable if outcome.reference_chosen is not None]
    if len(starts) < len(usable) or max(starts) - min(starts) > 0.01 * max(map(abs, starts)):
        return None, (
            "No recommendation: the SFT models do not give the chosen answers the same log-probability (within 1 "
            "%), so "
            "the runs started from different models or were evaluated on different pairs, and their log-ratios do not "
            "compare."
        )
    references = [outcome for outcome in usable if outcome.is_dpo]
    if not references:
        return None, (
            "No recommendation: no run has lambda 1 throughout, so there is no DPO to compare with. Add one with "
            "`dpo.shift_lambda=1.0`."
        )
    reference = max(references, key=lambda outcome: (outcome.accuracy or 0.0, outcome.chosen))
    if not reference.learned:
        return None, (
            f"No recommendation: the reference, {reference.name}, has not learned the preference by its intervals, so "
            "keeping up with it means nothing."
        )
    candidates = [
        outcome
        for outcome in usable
        if outcome.learned
        and outcome.accuracy_high >= reference.accuracy_low  # type: ignore[operator]
        and outcome.margin >= KEPT_MARGIN * reference.margin  # type: ignore[operator]
    ]
    best = max(candidates, key=lambda outcome: outcome.chosen or 0.0)
    if best.is_dpo:
        return best.name, (
            f"{best.name}: no lower lambda kept the chosen answers more likely than DPO while accuracy and margin "
            "kept up."
        )
    return best.name, (
        f"{best.name}: of {len(candidates)} runs whose accuracy is not surely below {reference.name}'s and which keep "
        "at least half of its margin, this one's chosen answers stayed the likeliest: log-ratio "
        f"{best.chosen:.2f} nats against {reference.chosen:.2f}, accuracy "
        f"{best.accuracy:.3f} against {reference.accuracy:.3f}, margin {best.margin:.3g} against "
        f"{reference.margin:.3g}. One seed and one evaluation set; confirm with another seed before relying on it."
    )


# Conventions of ours: half of an answer's runs of four tokens have been there before; one answer in ten has no text.
REPETITIVE = 0.5
OFTEN_EMPTY = 0.1
ABOVE_DATA = 0.1  # by which repetition must exceed that of the chosen answers, which may be tables or code


def degeneration(figures: Mapping[str, Mapping[str, float]], chosen: Mapping[str, float] | None = None) -> str:
    """
    Say what degenerate text looks like in the figures of generated answers, and whether it shows.

    Args:
        figures (`dict[str, dict[str, float]]`):
            By kind of answers, as "dpo greedy", the figures of [`~generate.answer_statistics`]; NaN where unknown.
        chosen (`dict[str, float]`, *optional*):
            The same of the chosen answers.

    Returns:
        `str`: One sentence.
    """
    looks = "Degenerate text is empty, or repeats itself (repetition near 1, distinct-n near 0) until it is cut"
    allowed = max(REPETITIVE, (_number(chosen or {}, "repetition") or 0.0) + ABOVE_DATA)
    known, shown = [], []
    for name, values in figures.items():
        empty, repetition, cut = (_number(values, figure) for figure in ("empty", "repetition", "cut"))
        if not values.get("count") or empty is None:
            continue
        known.append((empty, repetition or 0.0))
        signs = [f"{empty:.0%} empty"] if empty >= OFTEN_EMPTY else []
        if repetition is not None and repetition >= allowed:
            signs.append(f"repetition {repetition:.2f}" + ("" if cut is None else f" and {cut:.0%} cut"))
        if signs:
            shown.append(f"{name} ({', '.join(signs)})")
    if not known:
        return f"{looks}: whether it shows cannot be said, since there are no figures of answers."
    if shown:
        return f"{looks}: it shows in {'; '.join(shown)}."
    empty, repetition = (max(values) for values in zip(*known, strict=True))
    return (
        f"{looks}: by these figures it does not show, with at most {empty:.0%} empty and repetition at most "
        f"{repetition:.2f} (here it would be said to show from {OFTEN_EMPTY:.0%} and {allowed:.2f})."
    )
