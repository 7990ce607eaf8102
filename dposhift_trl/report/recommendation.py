"""Which lambda to take, given the last evaluations of several runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..intervals import t_interval
from .findings import Estimate, finite


UNKNOWN = Estimate()
KEPT_MARGIN = 0.5  # share of DPO's margin that a recommended run must keep; a convention of this report


@dataclass(frozen=True)
class Outcome:
    """
    The last evaluation of a run, or of several that differ in their seed, as [`recommend_lambda`] compares it.

    Args:
        name (`str`):
            Name of the run, or of what the runs have in common.
        lambdas (`tuple[float, float]`, *optional*):
            Lambda at the start of training and at the last evaluation.
        chosen ([`Estimate`]):
            Mean chosen log-ratio, in nats per answer, with its interval over pairs or over seeds.
        margin, accuracy ([`Estimate`]):
            Unshifted, with their intervals.
        reference_chosen (`float`, *optional*):
            Mean log-probability of the chosen answers under the SFT model. It shows whether two runs started from the
            same model and were evaluated on the same pairs.
        shifted_between (`bool`, *optional*, defaults to `False`):
            Whether lambda differed from 1 at any step, even if it was 1 at start and end.
        settings (`Mapping[str, float]`):
            The numbers of the recipe, by key.
        evaluated (`frozenset[str]`):
            Digest of the evaluated rows, one for each set of them; empty if they are unknown.
        seeds (`Mapping[int, Outcome]`):
            The runs by seed, if there are several.
    """

    name: str
    lambdas: tuple[float, float] | None = None
    chosen: Estimate = UNKNOWN
    margin: Estimate = UNKNOWN
    accuracy: Estimate = UNKNOWN
    reference_chosen: float | None = None
    shifted_between: bool = False
    settings: Mapping[str, float] = field(default_factory=dict)
    evaluated: frozenset[str] = frozenset()
    seeds: Mapping[int, "Outcome"] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        last: Mapping[str, float],
        lambdas: tuple[float, float] | None = None,
        shifted_between: bool = False,
        settings: Mapping[str, float] | None = None,
        evaluated: frozenset[str] = frozenset(),
    ) -> "Outcome":
        """Read the outcome from the metrics of the last evaluation, as [`~report.verdict.verdict`] takes them."""
        logps, chosen = finite(last, "logps/chosen"), finite(last, "displacement/chosen")
        return cls(
            name,
            lambdas,
            Estimate.of(last, "displacement/chosen"),
            Estimate.of(last, "rewards/margins"),
            Estimate.of(last, "rewards/accuracies"),
            None if logps is None or chosen is None else logps - chosen,
            shifted_between,
            settings or {},
            evaluated,
        )

    @classmethod
    def over_seeds(cls, name: str, seeds: Mapping[int, "Outcome"]) -> "Outcome":
        """The mean of several runs that differ in their seed, with intervals over the seeds by Student's t."""
        outcomes = [*seeds.values()]
        starts = [outcome.reference_chosen for outcome in outcomes if outcome.reference_chosen is not None]
        same_start = len(starts) == len(outcomes) and _alike(starts)
        return cls(
            name,
            outcomes[0].lambdas,
            mean_over_seeds([outcome.chosen for outcome in outcomes]),
            mean_over_seeds([outcome.margin for outcome in outcomes]),
            mean_over_seeds([outcome.accuracy for outcome in outcomes], share=True),
            math.fsum(starts) / len(starts) if same_start else None,
            any(outcome.shifted_between for outcome in outcomes),
            outcomes[0].settings,
            frozenset().union(*(outcome.evaluated for outcome in outcomes)),
            seeds,
        )

    @property
    def is_dpo(self) -> bool:
        """Whether lambda was 1 throughout."""
        if self.lambdas is None or self.shifted_between:
            return False
        return all(math.isclose(end, 1, abs_tol=1e-9) for end in self.lambdas)

    @property
    def complete(self) -> bool:
        """Whether everything that the comparison needs was logged."""
        known = self.lambdas is not None and self.chosen.value is not None and self.margin.value is not None
        return known and self.margin.interval is not None and self.accuracy.interval is not None

    @property
    def learned(self) -> bool:
        """
        Whether margin and accuracy are above 0 and 0.5 by their intervals.

        Seeds that agree are no evidence about other pairs, so of several seeds the intervals over pairs count too.
        """
        if not self.complete:
            return False
        over_pairs = [_lowest(outcome) for outcome in self.seeds.values()] or [_lowest(self)]
        margin, accuracy = (math.fsum(lows) / len(lows) for lows in zip(*over_pairs, strict=True))
        return min(margin, _lowest(self)[0]) > 0 and min(accuracy, _lowest(self)[1]) > 0.5


def _lowest(outcome: Outcome) -> tuple[float, float]:
    """Lower ends of the intervals of margin and accuracy."""
    low, other = outcome.margin.low, outcome.accuracy.low
    return (-math.inf if low is None else low), (-math.inf if other is None else other)


def mean_over_seeds(estimates: Sequence[Estimate], share: bool = False) -> Estimate:
    """
    Mean of one value per seed and its 95% interval; unknown if one of them is.

    Args:
        estimates (`Sequence[Estimate]`):
            One per seed.
        share (`bool`, *optional*, defaults to `False`):
            Whether the values are shares, whose interval ends at 0 and 1.
    """
    values = [estimate.value for estimate in estimates if estimate.value is not None]
    if len(values) < len(estimates) or not values:
        return UNKNOWN
    mean, interval = math.fsum(values) / len(values), t_interval(values)
    if interval is None:
        return Estimate(mean)
    return Estimate(mean, *(min(max(end, 0.0), 1.0) for end in interval)) if share else Estimate(mean, *interval)


def difference(one: Outcome, other: Outcome, name: str) -> Estimate:
    """
    How much higher a mean is in one outcome than in another, with a 95% interval.

    Of runs with the same seeds it is the mean of the differences per seed, by Student's t. Otherwise the two intervals
    are taken as independent, which is too wide for runs that were evaluated on the same pairs.

    Args:
        one ([`Outcome`]), other ([`Outcome`]):
            The outcomes.
        name (`str`):
            `"chosen"`, `"margin"` or `"accuracy"`.
    """
    paired = [
        (getattr(one.seeds[seed], name).value, getattr(other.seeds[seed], name).value)
        for seed in sorted(one.seeds.keys() & other.seeds.keys())
    ]
    if len(paired) > 1 and not any(None in pair for pair in paired):
        return mean_over_seeds([Estimate(first - second) for first, second in paired])
    first, second = getattr(one, name), getattr(other, name)
    if first.value is None or second.value is None:
        return UNKNOWN
    value = first.value - second.value
    if first.interval is None or second.interval is None:
        return Estimate(value)
    below = math.hypot(first.value - first.interval[0], second.interval[1] - second.value)
    above = math.hypot(first.interval[1] - first.value, second.value - second.interval[0])
    return Estimate(value, value - below, value + above)


RULE = (
    "Every run is compared with the run at lambda 1, which is DPO (if there are several, with the most accurate one). "
    "Runs that differ only in their seed count as one, with means and 95% intervals over the seeds, and differences "
    "are taken seed by seed. A run qualifies if it learned the preference (the 95% intervals of margin and accuracy "
    "are above 0 and 0.5, those over the seeds and, on average, those over the pairs), if its accuracy is not "
    "significantly below DPO's, and if it keeps at least half of DPO's margin. Of these runs, the one whose chosen "
    "answers kept most of their log-probability is recommended, if that is measurably more than in DPO; of runs that "
    "do not differ measurably, the one whose lambda is closest to 1. All runs must start from the same SFT model and "
    "be evaluated on the same pairs."
)


def recommend_lambda(outcomes: Sequence[Outcome]) -> tuple[str | None, str]:
    """
    Recommend the lambda of one of several runs by `RULE`, which the report's page prints too.

    Args:
        outcomes (`Sequence[Outcome]`):
            One per run, or per group of runs that differ in their seed.

    Returns:
        `tuple[str | None, str]`: Name of the recommended run, or `None` if the metrics support no recommendation, and
        the reason.
    """
    usable = [outcome for outcome in outcomes if outcome.complete]
    if len(usable) < 2:
        return None, (
            "No recommendation: a comparison needs two runs whose last evaluation logged log-ratios, margin, accuracy "
            f"and their intervals, and {len(usable)} of {len(outcomes)} runs did."
        )
    if len(frozenset().union(*(outcome.evaluated for outcome in usable))) > 1:
        return None, (
            "No recommendation: the runs were evaluated on different pairs, so their log-ratios cannot be compared. "
            "Set the same `data.eval_split`, or with `data.eval_size` the same `data.seed`."
        )
    starts = [outcome.reference_chosen for outcome in usable if outcome.reference_chosen is not None]
    if len(starts) < len(usable) or not _alike(starts):
        return None, (
            "No recommendation: the SFT models do not give the chosen answers the same log-probability (within 1%). "
            "The runs started from different models or were evaluated on different pairs, so their log-ratios cannot "
            "be compared."
        )
    dpo = dpo_among(usable)
    if dpo is None:
        return None, (
            "No recommendation: no run has lambda 1 throughout, so there is no DPO run to compare with. Add one with "
            "`dpo.shift_lambda=1.0`."
        )
    if not dpo.learned:
        return None, (
            f"No recommendation: the DPO run, {dpo.name}, did not learn the preference by its intervals, so there is "
            "nothing to compare with."
        )
    candidates = [outcome for outcome in usable if not outcome.is_dpo and _qualifies(outcome, dpo)]
    gains = {outcome.name: difference(outcome, dpo, "chosen") for outcome in candidates}
    better = [outcome for outcome in candidates if gains[outcome.name].change == "rose"]
    if not better:
        return _without_a_better_one(candidates, gains, dpo)
    top = max(better, key=_chosen)
    alike = [other for other in better if other is top or difference(top, other, "chosen").change == "unmoved"]
    best = max(alike, key=lambda outcome: (min(outcome.lambdas or (0.0,)), _chosen(outcome)))
    return best.name, " ".join(
        [
            f"{best.name}: {_choice(best, len(candidates) + 1, alike, dpo)}: log-ratio {best.chosen.value:.2f} nats "
            f"against {dpo.chosen.value:.2f} ({_by_how_much(gains[best.name])}), accuracy {best.accuracy.value:.3f} "
            f"against {dpo.accuracy.value:.3f}, margin {best.margin.value:.3g} against {dpo.margin.value:.3g}.",
            *_edges(best, usable),
            _confidence(best),
        ]
    )


def dpo_among(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The run at lambda 1 that the others are compared with, the most accurate one, or `None` if there is none."""
    references = [outcome for outcome in outcomes if outcome.complete and outcome.is_dpo]
    return max(references, key=lambda outcome: (outcome.accuracy.value or 0.0, _chosen(outcome)), default=None)


def _qualifies(outcome: Outcome, dpo: Outcome) -> bool:
    """Whether a run learned the preference about as well as DPO."""
    if outcome.seeds.keys() & dpo.seeds.keys():
        as_accurate = difference(outcome, dpo, "accuracy").high
        accurate = as_accurate is None or as_accurate >= 0
    else:
        accurate = (outcome.accuracy.high or 0.0) >= (dpo.accuracy.low or 0.0)
    return outcome.learned and accurate and (outcome.margin.value or 0.0) >= KEPT_MARGIN * (dpo.margin.value or 0.0)


def _without_a_better_one(
    candidates: Sequence[Outcome], gains: Mapping[str, Estimate], dpo: Outcome
) -> tuple[str | None, str]:
    """DPO itself, unless a run may be better by an amount that is not measurable."""
    unclear = [outcome for outcome in candidates if gains[outcome.name].change == "unmoved"]
    unclear = [outcome for outcome in unclear if (gains[outcome.name].value or 0.0) > 0]
    if not unclear:
        return dpo.name, (
            f"{dpo.name}: no lower lambda kept the chosen answers more likely than DPO at a comparable accuracy and "
            "margin."
        )
    best = max(unclear, key=_chosen)
    return None, (
        f"No recommendation: no run kept the chosen answers measurably more likely than {dpo.name} at a comparable "
        f"accuracy and margin. The difference is largest for {best.name}, {_by_how_much(gains[best.name])}. Add seeds "
        "or evaluation pairs to measure it."
    )


def _choice(best: Outcome, count: int, alike: Sequence[Outcome], dpo: Outcome) -> str:
    """Why this one, of a number of runs that qualify, DPO among them."""
    qualified = (
        f"of the {count} runs whose accuracy is not significantly below that of {dpo.name} and that keep at least "
        "half of its margin, "
    )
    if len(alike) == 1:
        return f"{qualified}this one kept the chosen answers most likely"
    names = ", ".join(outcome.name for outcome in alike if outcome is not best)
    return (
        f"{qualified}this one and {names} kept the chosen answers most likely and do not differ measurably, and its "
        "lambda is closest to 1"
    )


def _by_how_much(gain: Estimate) -> str:
    """A difference in nats per answer with its interval."""
    interval = "" if gain.interval is None else ", 95% interval {:+.2f} to {:+.2f}".format(*gain.interval)
    return f"{gain.value:+.2f}{interval}"


def _edges(best: Outcome, outcomes: Sequence[Outcome]) -> list[str]:
    """Which settings of the recommended run are the lowest or the highest that were tried."""
    found = []
    for key, value in best.settings.items():
        tried = {outcome.settings[key] for outcome in outcomes if key in outcome.settings}
        if len(tried) < 2 or value not in (min(tried), max(tried)):
            continue
        end, direction = ("lowest", "lower") if value == min(tried) else ("highest", "higher")
        if direction == "lower" or "lambda" not in key or value < 1:  # lambda 1 is DPO
            found.append(f"The {end} value tried of `{key}`, {value:g}, is the best: try {direction} ones too.")
    return found


def _confidence(best: Outcome) -> str:
    if len(best.seeds) > 1:
        return f"These are means over {len(best.seeds)} seeds on one evaluation set."
    return (
        "This is one seed and one evaluation set: confirm it with more seeds (`--seeds 3` of the sweep) before you "
        "rely on it."
    )


def _chosen(outcome: Outcome) -> float:
    return -math.inf if outcome.chosen.value is None else outcome.chosen.value


def _alike(starts: Sequence[float]) -> bool:
    """Whether log-probabilities agree within 1%."""
    return max(starts) - min(starts) <= 0.01 * max(map(abs, starts))
