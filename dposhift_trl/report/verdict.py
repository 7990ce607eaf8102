"""The verdict on one run: a headline, four rated numbers, and a paragraph that says what to try."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..schedules import LambdaPlan
from .advice import path_of_lambda, what_to_try
from .findings import Estimate, Findings, Rating, finite


@dataclass(frozen=True)
class Tile:
    """
    One number of a verdict.

    Args:
        name (`str`):
            `"chosen"` or `"rejected"`: the mean log-ratio. `"margin"` or `"accuracy"`: unshifted.
        value, low, high (`float`, *optional*):
            The mean over the pairs and the ends of its 95% interval. `None` if unknown.
        unit (`str`):
            `"nats per answer"`, `"nats"`, or `"share"`.
        rating (`str`):
            `"good"`, `"fair"`, `"bad"`, or `"unknown"`, by the rules of [`verdict`].
    """

    name: Literal["chosen", "rejected", "margin", "accuracy"]
    value: float | None
    low: float | None
    high: float | None
    unit: str
    rating: Rating


@dataclass(frozen=True)
class Verdict:
    """
    What an evaluation says about a run. As a string it is the paragraph.

    Args:
        headline (`str`):
            One sentence.
        paragraph (`str`):
            What happened, what that usually means, and what to try; without markup or line breaks.
        tiles (`tuple[Tile, ...]`):
            Chosen, rejected, margin, and accuracy, in this order.
    """

    headline: str
    paragraph: str
    tiles: tuple[Tile, ...]

    def __str__(self) -> str:
        return self.paragraph


def verdict(last: Mapping[str, float], plan: LambdaPlan | None = None, lambdas: Sequence[float] = ()) -> Verdict:
    """
    Say whether the chosen answers became less likely, by how much and in how many pairs, what happened to the rejected
    answers, what that usually means, and what to try.

    Everything is compared with the reference, whose log-ratios and margin are 0 by definition, so one evaluation is
    enough. The rules, in this order. Each needs its metrics to be logged and finite; without them there is no advice.

    - If the margin is not above 0, or accuracy not above 0.5, by their intervals: nothing can be said about lambda.
    - If the rejected answers rose: below lambda 1 that is usual where the chosen answers rose too, and costs margin.
    - If the 95% interval of the chosen log-ratio contains 0: the chosen answers did not move measurably.
    - If the chosen answers fell: slightly, clearly or much, depending on their perplexity. If it rose by less than
      10%, there is nothing to do. Otherwise the advice is a lower lambda, unless lambda is at most 0.75 already. For
      the adaptive schedule it is a lower `lambda_min` if lambda ended there, otherwise another `lambda_target`.

    The ratings of the tiles follow the same rules. Chosen is good unless it fell; a slight fall is good too, a clear
    one fair, a large one bad. Rejected is good if it fell; if it rose, fair if the preference was learned, else bad.
    Margin and accuracy are good if their interval is above 0 and 0.5, bad if it is below, fair if it contains them.
    All four are unknown if the policy is still the reference.

    Args:
        last (`Mapping[str, float]`):
            Metrics of the last evaluation, without the prefix `eval_`.
        plan ([`LambdaPlan`], *optional*):
            What the settings of the run say about lambda.
        lambdas (`Sequence[float]`, *optional*, defaults to `()`):
            Every lambda that was logged until then, in the order of steps. Where lambda starts and ends is read from
            the plan if it says so.
    """
    plan, findings = plan or LambdaPlan(), Findings.of(last)
    if not lambdas and (shift_lambda := finite(last, "shift/lambda")) is not None:
        lambdas = [shift_lambda]
    return Verdict(
        _headline(findings),
        " ".join(_paragraph(findings, last, path_of_lambda(plan, lambdas), plan)),
        _tiles(findings),
    )


def verdict_of(log_history: Sequence[Mapping[str, float]], plan: LambdaPlan | None = None) -> Verdict | None:
    """
    [`verdict`] on the last evaluation in a trainer's log, or `None` if there was none.

    Args:
        log_history (`list[dict[str, float]]`):
            `trainer.state.log_history`.
        plan ([`LambdaPlan`], *optional*):
            What the settings of the run say about lambda.
    """
    evaluations = [index for index, entry in enumerate(log_history) if "eval_displacement/chosen" in entry]
    if not evaluations:
        return None
    until = log_history[: evaluations[-1] + 1]
    last = {name.removeprefix("eval_"): value for name, value in until[-1].items()}
    logged = [finite(entry, name) for entry in until for name in ("shift/lambda", "eval_shift/lambda")]
    return verdict(last, plan, [value for value in logged if value is not None])


def _tiles(findings: Findings) -> tuple[Tile, ...]:
    ratings = findings.ratings

    def tile(name: Literal["chosen", "rejected", "margin", "accuracy"], estimate: Estimate, unit: str) -> Tile:
        return Tile(name, estimate.value, estimate.low, estimate.high, unit, ratings[name])

    return (
        tile("chosen", findings.chosen, "nats per answer"),
        tile("rejected", findings.rejected, "nats per answer"),
        tile("margin", findings.margin, "nats"),
        tile("accuracy", findings.accuracy, "share"),
    )


def _headline(findings: Findings) -> str:
    chosen, margin, accuracy = findings.chosen, findings.margin, findings.accuracy
    if not findings.known or chosen.value is None:
        return "No verdict: no evaluation logged finite log-ratios."
    if findings.untrained:
        return "Nothing moved: the policy is still the reference."
    if findings.learning == "wrong way":
        return f"The policy prefers the rejected answers: accuracy {accuracy.text('.3f')}."
    if findings.learning in ("no margin", "margin unclear"):
        return f"The preference was not learned: margin {margin.text('.3g')}."
    if findings.learning == "accuracy unclear":
        return f"The preference was not learned: accuracy {accuracy.text('.3f')} is not above chance."
    slight = chosen.change == "fell" and findings.fall == "slight"
    fell = "fell far" if findings.fall == "large" else "held" if slight else "fell"
    moved = {"unmoved": "did not move measurably", "rose": "rose", "fell": fell}[chosen.change]
    amount = f"{abs(chosen.value):.2f} nats {'lower' if chosen.value < 0 else 'higher'} per answer"
    if chosen.change == "unmoved":
        amount += "" if chosen.interval is None else " (95% interval {:+z.2f} to {:+z.2f})".format(*chosen.interval)
    if findings.learning == "no interval":
        amount += " (no interval)"
    perplexity = "" if findings.growth is None else f", {_growth(findings.growth)}"
    share = ""
    if findings.fell.value is not None:
        share = f"; {findings.fell.value:.0%} of them fell{', slightly' if slight else ''}"
    return f"Chosen answers {moved}: {amount}{perplexity}{share}."


def _growth(growth: float) -> str:
    """Perplexity over that of the reference, in words."""
    if growth >= 2:
        return f"{growth:.3g} times the perplexity"
    percent = round(100 * (growth - 1))
    return f"{abs(percent)}% {'more' if percent > 0 else 'less'} perplexity" if percent else "the same perplexity"


def _paragraph(findings: Findings, last: Mapping[str, float], lambdas: list[float], plan: LambdaPlan) -> list[str]:
    """Its sentences."""
    if not findings.known:
        return [
            "There is no verdict: no evaluation logged finite log-ratios. Give the run evaluation rows, and evaluate "
            "at the end of training."
        ]
    if findings.untrained:
        return [
            "Neither the chosen nor the rejected answers changed: at the last evaluation the policy is still the "
            "reference, so nothing can be said about lambda. Evaluate again after training."
        ]
    sentences = [_change_of_chosen(findings, last), _change_of_rejected(findings, last)]
    if reason := _why_nothing_was_learned(findings, bool(lambdas) or plan.adaptive):
        return [*sentences, reason]
    return [*sentences, _what_was_learned(findings), _meaning_and_advice(findings, lambdas, plan)]


def _change_of_chosen(findings: Findings, last: Mapping[str, float]) -> str:
    change, share = _change("chosen", findings.chosen, last), findings.fell
    if findings.growth is not None:
        factor = f"{findings.growth:.3g}"
        change += ", at the same perplexity" if factor == "1" else f", which multiplies their perplexity by {factor}"
    if share.value is None:
        return f"{change}."
    return f"{change}; {share.text('.0%')} of them became less likely."


def _change_of_rejected(findings: Findings, last: Mapping[str, float]) -> str:
    change, share = _change("rejected", findings.rejected, last), finite(last, "displacement/both_fell")
    return f"{change}; in {share:.0%} of the pairs both answers fell." if share else f"{change}."


def _change(name: str, logratio: Estimate, last: Mapping[str, float]) -> str:
    """How a log-probability changed: by how much, with its interval, and from where to where."""
    value, logps = logratio.value or 0.0, finite(last, f"logps/{name}")
    subject = f"The log-probability of the {name} answers"
    before_after = [] if logps is None else [f"from {logps - value:.2f} to {logps:.2f}"]
    if logratio.change == "unmoved":
        interval = (
            [] if logratio.interval is None else ["95% interval {:+z.2f} to {:+z.2f}".format(*logratio.interval)]
        )
        return (
            f"{subject} did not move measurably: {value:+z.2f} nats per answer{_in_brackets(interval + before_after)}"
        )
    ends = sorted(map(abs, logratio.interval or ()))
    interval = ["95% interval {:.2f} to {:.2f}".format(*ends)] if ends else []
    amount = f"{abs(value):.2f} nats per answer{_in_brackets(interval + before_after)}"
    return f"{subject} {logratio.change} by {amount}"


def _in_brackets(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _why_nothing_was_learned(findings: Findings, of_ours: bool) -> str | None:
    margin, accuracy = findings.margin, findings.accuracy
    models = "" if of_ours else ", nor, in a diagnosis, policy and reference"
    remedy = "Before changing lambda, check learning rate, number of steps and data, and evaluate on more pairs."
    match findings.learning:
        case "learned":
            return None
        case "wrong way":
            return (
                "The policy prefers the rejected answer more often than the chosen one: accuracy "
                f"{accuracy.text('.3f')}. Check that the columns `chosen` and `rejected` are not swapped{models}; a "
                "lower lambda does not fix this."
            )
        case "no margin":
            return (
                f"The margin, {margin.text('.3g')}, did not grow above 0, its value under the reference: the "
                f"preference was not learned. {remedy}"
            )
        case "margin unclear":
            return (
                f"The margin, {margin.text('.3g')}, is not significantly above 0: the "
                f"preference was not learned. {remedy}"
            )
        case "no interval":
            return (
                f"The margin is {margin.text('.3g')} and accuracy {accuracy.text('.3f')}. There is no advice without "
                "an interval of both, which this log does not have or too few pairs do not allow."
            )
        case "accuracy unclear":
            return (
                f"The margin grew to {margin.value:.3g}, but accuracy, {accuracy.text('.3f')}, is not significantly "
                f"above chance on these pairs. {remedy}"
            )
        case _:
            return "Margin or accuracy was not logged or is not finite, so there is no advice."


def _what_was_learned(findings: Findings) -> str:
    margin, accuracy = findings.margin, findings.accuracy
    return f"The preference was learned: margin {margin.text('.3g')}, accuracy {accuracy.text('.3f')}."


def _meaning_and_advice(findings: Findings, lambdas: Sequence[float], plan: LambdaPlan) -> str:
    chosen = findings.chosen.change
    if findings.rejected.change == "rose":
        if lambdas and min(lambdas) < 1 and chosen == "rose":
            return (
                "Both answers rose: below lambda 1, training also raises the tokens that they share, as SFT on the "
                "chosen answers does. For a larger margin, try a lambda closer to 1."
            )
        return (
            "It is unusual for rejected answers to rise: training normally lowers them. Read the pairs in which they "
            "rose before changing a setting."
        )
    # Lambda is unknown where a model was trained elsewhere, most likely by DPO
    no_reason = "no reason to change lambda" if lambdas or plan.adaptive else "no need for DPO-Shift"
    if chosen != "fell":
        return f"The chosen answers kept their probability, so there is {no_reason}."
    if findings.fall == "unknown":
        return "The lengths of the answers were not logged, so it is unknown whether this fall is large."
    if findings.fall == "slight":
        return (
            f"This is a slight fall, with perplexity up by less than 10%, and {no_reason}. Some fall is normal: "
            "DPO-Shift reduces it but does not prevent it."
        )
    if findings.fall == "large":
        meaning = (
            "This is a large fall, known as likelihood displacement: the chosen answers, too, lost probability to "
            "text that is neither answer."
        )
    else:
        meaning = "This is a clear fall, though not a large one: the chosen answers, too, lost some probability."
    return f"{meaning} {what_to_try(lambdas, plan)}"
