"""The verdict on one run: one paragraph about what the evaluations show and what to try."""

import math
from collections.abc import Mapping, Sequence

from ..schedules import LambdaPlan


# Perplexity of the chosen answers, last over first. Conventions of this report, not numbers of the paper: nats per
# answer grow with its length, so they cannot tell a slight fall from a large one.
SLIGHT_RISE_OF_PERPLEXITY = 1.1
LARGE_RISE_OF_PERPLEXITY = 1.5
# The lowest `lambda_min` of the paper's schedules. Its fixed lambdas end at 0.5, where the margin had fallen by half.
LOW_LAMBDA = 0.75
UNCHANGED = 1e-3  # nats per answer: float32 sums of log-probabilities agree to about this


def verdict(first: Mapping[str, float], last: Mapping[str, float], plan: LambdaPlan | None = None) -> str:
    """
    Say whether the chosen answers became less likely, by how much and in how many pairs, what happened to the rejected
    answers, what that usually means, and what to try.

    The rules, in this order. Each needs its metrics to be logged and finite; without them there is no advice.

    - If the margin is not above 0, or accuracy not above 0.5, by their intervals: nothing can be said about lambda.
    - If the rejected answers rose: lambda may be too low, if it is below 1 and the chosen answers rose too.
    - If the chosen answers fell: slightly, clearly or much, depending on their perplexity. If it rose by less than
      10%, there is nothing to do. Otherwise the advice is a lower lambda, unless lambda is at most 0.75 already. For
      the adaptive schedule it is a lower `lambda_min` if lambda ended there, otherwise another `lambda_target`.

    Args:
        first (`Mapping[str, float]`):
            Metrics of the evaluation before the first step, without the prefix `eval_`. May be empty, since
            `displacement/*` is relative to the reference anyway.
        last (`Mapping[str, float]`):
            Metrics of the last evaluation, without the prefix.
        plan ([`LambdaPlan`], *optional*):
            What the settings of the run say about lambda.

    Returns:
        `str`: One paragraph, without markup or line breaks.
    """
    chosen, rejected = finite(last, "displacement/chosen"), finite(last, "displacement/rejected")
    if chosen is None or rejected is None:
        return (
            "There is no verdict: no evaluation logged finite log-ratios. Give the run evaluation rows, and evaluate "
            "before the first step and at the end."
        )
    if abs(chosen) < UNCHANGED and abs(rejected) < UNCHANGED:
        return (
            "Neither the chosen nor the rejected answers changed: at the last evaluation the policy is still the "
            "reference, so nothing can be said about lambda. Evaluate again after training."
        )
    growth = _perplexity_growth(first, last)
    sentences = [_change_of_chosen(chosen, growth, last), _change_of_rejected(rejected, last)]
    if reason := _why_nothing_was_learned(first, last):
        return " ".join([*sentences, reason])
    sentences.append(_what_was_learned(last))
    return " ".join([*sentences, _meaning_and_advice(chosen, rejected, growth, first, last, plan or LambdaPlan())])


def verdict_of(log_history: Sequence[Mapping[str, float]], plan: LambdaPlan | None = None) -> str | None:
    """
    [`verdict`] on the first and the last evaluation in a trainer's log, or `None` if there was none.

    Args:
        log_history (`list[dict[str, float]]`):
            `trainer.state.log_history`.
        plan ([`LambdaPlan`], *optional*):
            What the settings of the run say about lambda.
    """
    evaluations = [entry for entry in log_history if "eval_displacement/chosen" in entry]
    if not evaluations:
        return None
    first, last = (
        {name.removeprefix("eval_"): value for name, value in evaluations[index].items()} for index in (0, -1)
    )
    return verdict(first if evaluations[0].get("step") == 0 else {}, last, plan)


def finite(metrics: Mapping[str, float], name: str) -> float | None:
    """A metric, or `None` if it was not logged or is not finite."""
    value = metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def first_and_last_lambda(first: Mapping[str, float], last: Mapping[str, float]) -> tuple[float, float] | None:
    """Lambda at both evaluations, or `None` if the last one did not log it."""
    start, end = finite(first, "shift/lambda"), finite(last, "shift/lambda")
    return None if end is None else (end if start is None else start, end)


def _perplexity_growth(first: Mapping[str, float], last: Mapping[str, float]) -> float | None:
    """Perplexity of the chosen answers, last over first, or from nats per token if the first was not the reference."""
    before, after = finite(first, "perplexity/chosen"), finite(last, "perplexity/chosen")
    if before and after and abs(finite(first, "displacement/chosen") or 0.0) < UNCHANGED:
        return after / before
    per_token = finite(last, "displacement/chosen_per_token")
    return None if per_token is None else math.exp(min(-per_token, 700.0))


def _change_of_chosen(chosen: float, growth: float | None, last: Mapping[str, float]) -> str:
    logps, share = finite(last, "logps/chosen"), finite(last, "displacement/chosen_fell")
    before_after = "" if logps is None else f" (from {logps - chosen:.2f} to {logps:.2f})"
    if abs(chosen) < UNCHANGED:
        change = f"The mean log-probability of the chosen answers did not change{before_after}"
    else:
        verb = "fell" if chosen < 0 else "rose"
        change = f"The log-probability of the chosen answers {verb} by {abs(chosen):.2f} nats per answer{before_after}"
    if growth is not None:
        change += f", which multiplies their perplexity by {growth:.3g}"
    return change + (f"; {share:.0%} of them became less likely." if share is not None else ".")


def _change_of_rejected(rejected: float, last: Mapping[str, float]) -> str:
    if abs(rejected) < UNCHANGED:
        return "The rejected answers did not change."
    logps, share = finite(last, "logps/rejected"), finite(last, "displacement/both_fell")
    verb = "fell" if rejected < 0 else "rose"
    before_after = "" if logps is None else f" (from {logps - rejected:.2f} to {logps:.2f})"
    both = f"; in {share:.0%} of the pairs both answers fell" if share else ""
    return f"The rejected answers {verb} by {abs(rejected):.2f} nats per answer{before_after}{both}."


def _why_nothing_was_learned(first: Mapping[str, float], last: Mapping[str, float]) -> str | None:
    margin, accuracy = finite(last, "rewards/margins"), finite(last, "rewards/accuracies")
    margin_low = finite(last, "rewards/margins_low")
    low, high = finite(last, "rewards/accuracies_low"), finite(last, "rewards/accuracies_high")
    remedy = "Before changing lambda, check learning rate, number of steps and data, and evaluate on more pairs."
    if margin is None or accuracy is None:
        return "Margin or accuracy was not logged or is not finite, so there is no advice."
    interval = "" if low is None or high is None else f" (95% interval {low:.3f} to {high:.3f})"
    if high is not None and high < 0.5:
        return (
            f"The policy prefers the rejected answer more often than the chosen one: accuracy {accuracy:.3f}"
            f"{interval}. Check that the columns `chosen` and `rejected` are not swapped; a lower lambda does not fix "
            "this."
        )
    if margin <= (finite(first, "rewards/margins") or 0.0):
        return f"The margin, {margin:.3g}, did not grow: the preference was not learned. {remedy}"
    if margin_low is not None and margin_low <= 0:
        return (
            f"The margin, {margin:.3g}, is not significantly above 0 (its 95% interval starts at {margin_low:.3g}): "
            f"the preference was not learned. {remedy}"
        )
    if low is None or high is None:
        return (
            f"Accuracy is {accuracy:.3f}, without an interval: there are too few pairs, or the interval was not "
            "logged. So there is no advice."
        )
    if low <= 0.5:
        return (
            f"The margin grew to {margin:.3g}, but accuracy, {accuracy:.3f}{interval}, is not significantly above "
            f"chance on these pairs. {remedy}"
        )
    return None


def _what_was_learned(last: Mapping[str, float]) -> str:
    return (
        f"The preference was learned: margin {last['rewards/margins']:.3g}, accuracy "
        f"{last['rewards/accuracies']:.3f} (95% interval {last['rewards/accuracies_low']:.3f} to "
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
    lambdas = first_and_last_lambda(first, last)
    if rejected >= UNCHANGED:
        if lambdas and min(lambdas) < 1 and chosen >= UNCHANGED:
            return (
                "It is unusual for rejected answers to rise: below lambda 1, training also raises the tokens that "
                "both answers share. If the rejected answers should fall, try a lambda closer to 1."
            )
        return (
            "It is unusual for rejected answers to rise: training normally lowers them. Read the pairs in which they "
            "rose before changing a setting."
        )
    if chosen > -UNCHANGED:
        return "The chosen answers kept their probability, so there is no reason to change lambda."
    if growth is None:
        return "The lengths of the answers were not logged, so it is unknown whether this fall is large."
    if growth < SLIGHT_RISE_OF_PERPLEXITY:
        return (
            "This is a slight fall, with perplexity up by less than 10%, and no reason to change lambda. Some fall is "
            "normal: DPO-Shift reduces it but does not prevent it."
        )
    if growth >= LARGE_RISE_OF_PERPLEXITY:
        meaning = (
            "This is a large fall, known as likelihood displacement: the chosen answers, too, lost probability to "
            "text that is neither answer."
        )
    else:
        meaning = "This is a clear fall, though not a large one: the chosen answers, too, lost some probability."
    return f"{meaning} {_what_to_try_adaptive(lambdas, plan) if plan.adaptive else _what_to_try(lambdas)}"


def _what_to_try_adaptive(lambdas: tuple[float, float] | None, plan: LambdaPlan) -> str:
    if lambdas is None:
        return "Lambda was not logged, so it is unknown whether the controller had room to lower it."
    end, share = lambdas[1], plan.metric == "displacement/chosen_fell"
    held = "share of chosen answers that fell" if share else "mean chosen log-ratio"
    if end <= 1.01 * plan.low:
        bound = f"Lambda ended at its lower bound, {plan.low:.3g}, so the controller had no room left"
        if plan.low <= LOW_LAMBDA:
            return f"{bound}. That bound is already low: {_SMALLER_STEPS}"
        return f"{bound}. Try a lower `lambda_min`, {_SAME_PAIRS}"
    return (
        f"Lambda ended at {end:.3g}, above its lower bound, {plan.low:.3g}: the controller holds the {held} of the "
        f"training pairs at {plan.target:.3g}, and evaluation pairs may differ. Try a "
        f"{'lower' if share else 'higher'} `lambda_target`, {_SAME_PAIRS}"
    )


def _what_to_try(lambdas: tuple[float, float] | None) -> str:
    if lambdas is None:
        return "Lambda was not logged, so it is unknown whether there is room to lower it."
    start, end = lambdas
    low = min(lambdas)
    if not math.isclose(start, end, rel_tol=1e-3):
        if low < LOW_LAMBDA:
            return f"Lambda went from {start:.3g} to {end:.3g}, so it was already low in part: {_SMALLER_STEPS}"
        return f"Lambda went from {start:.3g} to {end:.3g}. Try a fixed lambda of {low:.3g}, {_SAME_PAIRS}"
    if low >= 1:
        description = "With lambda 1 this is DPO." if low == 1 else f"Lambda {low:.3g} is above 1, the lambda of DPO."
        return f"{description} Try `shift_lambda: 0.95`, then lower, {_SAME_PAIRS}"
    if low <= LOW_LAMBDA:
        return f"Lambda, {low:.3g}, is already low: {_SMALLER_STEPS}"
    return f"Lambda was {low:.3g}. Try a lower one in small steps, {_SAME_PAIRS}"


_SAME_PAIRS = "and compare margin and accuracy on the same pairs: a lower lambda can reduce both."
_SMALLER_STEPS = (
    "a lower one can cost margin (in the paper, the margin fell from .58 to .24 at lambda 0.5). Try a smaller "
    "learning rate or fewer steps, which move the policy less, and compare."
)
