"""Which lambda to take, given the last evaluations of several runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .findings import finite


KEPT_MARGIN = 0.5  # share of DPO's margin that a recommended run must keep; a convention of this report


@dataclass(frozen=True)
class Outcome:
    """
    The last evaluation of a run, as [`recommend_lambda`] compares it.

    Args:
        name (`str`):
            Name of the run.
        lambdas (`tuple[float, float]`, *optional*):
            Lambda at the start of training and at the last evaluation.
        chosen (`float`, *optional*):
            Mean chosen log-ratio, in nats per answer.
        margin, accuracy (`float`, *optional*):
            Means over the pairs, unshifted. `_low` and `_high` are the ends of their 95% intervals.
        reference_chosen (`float`, *optional*):
            Mean log-probability of the chosen answers under the SFT model. It shows whether two runs started from the
            same model and were evaluated on the same pairs.
        shifted_between (`bool`, *optional*, defaults to `False`):
            Whether lambda differed from 1 at any step, even if it was 1 at start and end.
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
        last: Mapping[str, float],
        lambdas: tuple[float, float] | None = None,
        shifted_between: bool = False,
    ) -> "Outcome":
        """Read the outcome from the metrics of the last evaluation, as [`~report.verdict.verdict`] takes them."""
        logps, chosen = finite(last, "logps/chosen"), finite(last, "displacement/chosen")
        return cls(
            name,
            lambdas,
            chosen,
            finite(last, "rewards/margins"),
            finite(last, "rewards/margins_low"),
            finite(last, "rewards/margins_high"),
            finite(last, "rewards/accuracies"),
            finite(last, "rewards/accuracies_low"),
            finite(last, "rewards/accuracies_high"),
            None if logps is None or chosen is None else logps - chosen,
            shifted_between,
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
        needed = (self.lambdas, self.chosen, self.margin, self.margin_low, self.accuracy_low, self.accuracy_high)
        return None not in needed

    @property
    def learned(self) -> bool:
        """Whether margin and accuracy are above 0 and 0.5 by their intervals."""
        return self.complete and self.margin_low > 0 and self.accuracy_low > 0.5  # type: ignore[operator]


RULE = (
    "Every run is compared with the run at lambda 1, which is DPO (if there are several, with the most accurate one). "
    "A run qualifies if it learned the preference (the 95% intervals of margin and accuracy are above 0 and 0.5), if "
    "the upper end of its accuracy interval reaches the lower end of DPO's, and if it keeps at least half of DPO's "
    "margin. Of these runs, the one whose chosen answers kept most of their log-probability is recommended. All runs "
    "must start from the same SFT model and be evaluated on the same pairs."
)


def recommend_lambda(outcomes: Sequence[Outcome]) -> tuple[str | None, str]:
    """
    Recommend the lambda of one of several runs by `RULE`, which the report's page prints too.

    Args:
        outcomes (`Sequence[Outcome]`):
            One per run.

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
    starts = [outcome.reference_chosen for outcome in usable if outcome.reference_chosen is not None]
    if len(starts) < len(usable) or max(starts) - min(starts) > 0.01 * max(map(abs, starts)):
        return None, (
            "No recommendation: the SFT models do not give the chosen answers the same log-probability (within 1%). "
            "The runs started from different models or were evaluated on different pairs, so their log-ratios cannot "
            "be compared."
        )
    references = [outcome for outcome in usable if outcome.is_dpo]
    if not references:
        return None, (
            "No recommendation: no run has lambda 1 throughout, so there is no DPO run to compare with. Add one with "
            "`dpo.shift_lambda=1.0`."
        )
    dpo = max(references, key=lambda outcome: (outcome.accuracy or 0.0, outcome.chosen))
    if not dpo.learned:
        return None, (
            f"No recommendation: the DPO run, {dpo.name}, did not learn the preference by its intervals, so there is "
            "nothing to compare with."
        )
    candidates = [
        outcome
        for outcome in usable
        if outcome.learned
        and outcome.accuracy_high >= dpo.accuracy_low  # type: ignore[operator]
        and outcome.margin >= KEPT_MARGIN * dpo.margin  # type: ignore[operator]
    ]
    best = max(candidates, key=lambda outcome: outcome.chosen or 0.0)
    if best.is_dpo:
        return best.name, (
            f"{best.name}: no lower lambda kept the chosen answers more likely than DPO at a comparable accuracy and "
            "margin."
        )
    return best.name, (
        f"{best.name}: of the {len(candidates)} runs whose accuracy is not significantly below that of {dpo.name} and "
        f"that keep at least half of its margin, this one kept the chosen answers most likely: log-ratio "
        f"{best.chosen:.2f} nats against {dpo.chosen:.2f}, accuracy {best.accuracy:.3f} against {dpo.accuracy:.3f}, "
        f"margin {best.margin:.3g} against {dpo.margin:.3g}. This is one seed and one evaluation set: confirm it with "
        "another seed before you rely on it."
    )
