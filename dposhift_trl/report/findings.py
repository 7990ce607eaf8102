"""What an evaluation shows, by rules on its numbers alone: each mean with its interval, and how it is rated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


# Perplexity of the chosen answers, policy over reference. Conventions of this report, not numbers of the paper: nats
# per answer grow with its length, so they cannot tell a slight fall from a large one.
SLIGHT_RISE_OF_PERPLEXITY = 1.1
LARGE_RISE_OF_PERPLEXITY = 1.5
UNCHANGED = 1e-3  # nats per answer: float32 sums of log-probabilities agree to about this
LARGEST_EXPONENT = 700.0  # of a float64

Change = Literal["unknown", "unmoved", "rose", "fell"]
Fall = Literal["slight", "clear", "large", "unknown"]
Learning = Literal["learned", "wrong way", "no margin", "margin unclear", "accuracy unclear", "no interval", "unknown"]
Rating = Literal["good", "fair", "bad", "unknown"]


def finite(metrics: Mapping[str, float], name: str) -> float | None:
    """A metric, or `None` if it was not logged or is not finite."""
    value = metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Estimate:
    """
    A mean over pairs with its 95% interval.

    Args:
        value (`float`, *optional*):
            The mean. `None` if it was not logged or is not finite, like the ends of the interval.
        low, high (`float`, *optional*):
            Ends of the interval.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, metrics: Mapping[str, float], name: str) -> "Estimate":
        """Read a metric and its `_low` and `_high`."""
        value, low, high = (finite(metrics, name + end) for end in ("", "_low", "_high"))
        return cls(value) if None in (value, low, high) else cls(value, low, high)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval, or `None` if there is none."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def text(self, form: str) -> str:
        """The value and its interval, if there is one."""
        value = f"{self.value:{form}}"
        if self.interval is None:
            return value
        low, high = self.interval
        return f"{value} (95% interval {low:{form}} to {high:{form}})"

    @property
    def change(self) -> Change:
        """Direction of a log-ratio, whose value under the reference is 0 by definition."""
        if self.value is None:
            return "unknown"
        if abs(self.value) < UNCHANGED or (self.interval and self.interval[0] <= 0 <= self.interval[1]):
            return "unmoved"
        return "rose" if self.value > 0 else "fell"


@dataclass(frozen=True)
class Findings:
    """
    The last evaluation, as the verdict judges it.

    Args:
        chosen, rejected ([`Estimate`]):
            Mean log-ratios, in nats per answer.
        fell ([`Estimate`]):
            Share of pairs whose chosen answer fell.
        margin, accuracy ([`Estimate`]):
            Unshifted.
        growth (`float`, *optional*):
            Perplexity of the chosen answers, policy over reference.
    """

    chosen: Estimate
    rejected: Estimate
    fell: Estimate
    margin: Estimate
    accuracy: Estimate
    growth: float | None

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> "Findings":
        """Read the findings from the metrics of an evaluation, without the prefix `eval_`."""
        return cls(
            Estimate.of(metrics, "displacement/chosen"),
            Estimate.of(metrics, "displacement/rejected"),
            Estimate.of(metrics, "displacement/chosen_fell"),
            Estimate.of(metrics, "rewards/margins"),
            Estimate.of(metrics, "rewards/accuracies"),
            perplexity_growth(metrics),
        )

    @property
    def known(self) -> bool:
        """Whether both log-ratios were logged."""
        return "unknown" not in (self.chosen.change, self.rejected.change)

    @property
    def untrained(self) -> bool:
        """Whether the policy is still the reference."""
        values = self.chosen.value, self.rejected.value
        return all(value is not None and abs(value) < UNCHANGED for value in values)

    @property
    def fall(self) -> Fall:
        """How far the chosen answers fell, given that they did."""
        if self.growth is None:
            return "unknown"
        if self.growth < SLIGHT_RISE_OF_PERPLEXITY:
            return "slight"
        return "large" if self.growth >= LARGE_RISE_OF_PERPLEXITY else "clear"

    @property
    def learning(self) -> Learning:
        """Whether the preference was learned: margin above 0 and accuracy above 0.5, by their intervals."""
        margin, accuracy = self.margin, self.accuracy
        if margin.value is None or accuracy.value is None:
            return "unknown"
        if accuracy.high is not None and accuracy.high < 0.5:
            return "wrong way"
        if margin.value <= 0:
            return "no margin"
        if margin.low is not None and margin.low <= 0:
            return "margin unclear"
        if margin.low is None or accuracy.low is None:
            return "no interval"
        return "learned" if accuracy.low > 0.5 else "accuracy unclear"

    @property
    def ratings(self) -> dict[str, Rating]:
        """How good each of the four numbers is, by the rules above. Unknown if the policy is still the reference."""
        if self.untrained:  # every pair is a tie, which counts as not accurate
            return dict.fromkeys(("chosen", "rejected", "margin", "accuracy"), "unknown")
        falls: dict[Fall, Rating] = {"slight": "good", "clear": "fair", "large": "bad", "unknown": "unknown"}
        chosen: dict[Change, Rating] = {
            "unknown": "unknown", "unmoved": "good", "rose": "good", "fell": falls[self.fall]
        }  # fmt: skip
        rose: Rating = "fair" if self.learning == "learned" else "bad"
        rejected: dict[Change, Rating] = {"unknown": "unknown", "unmoved": "fair", "rose": rose, "fell": "good"}
        return {
            "chosen": chosen[self.chosen.change],
            "rejected": rejected[self.rejected.change],
            "margin": _above(self.margin, 0.0),
            "accuracy": _above(self.accuracy, 0.5),
        }


def _above(estimate: Estimate, threshold: float) -> Rating:
    """Rating of a mean that should be above a threshold."""
    if estimate.interval is None:
        return "unknown"
    low, high = estimate.interval
    return "good" if low > threshold else "bad" if high < threshold else "fair"


def perplexity_growth(metrics: Mapping[str, float]) -> float | None:
    r"""
    Perplexity of the chosen answers, policy over reference, from the metrics of one evaluation of the policy.

    With mean log-probability \\( \ell \\) and log-ratio \\( \Delta \\) per answer, and perplexity
    \\( p = \exp(-\ell / n) \\) over \\( n \\) tokens per answer, it is \\( \exp(-\Delta / n) = p^{\Delta / \ell} \\).
    Without these, it is the exponential of the mean log-ratio per token, which weights answers instead of tokens.
    """
    chosen, logps = finite(metrics, "displacement/chosen"), finite(metrics, "logps/chosen")
    perplexity = finite(metrics, "perplexity/chosen")
    if chosen is not None and logps and perplexity and perplexity > 0:
        exponent = math.log(perplexity) * chosen / logps
    elif (per_token := finite(metrics, "displacement/chosen_per_token")) is not None:
        exponent = -per_token
    else:
        return None
    return math.exp(min(exponent, LARGEST_EXPONENT))
