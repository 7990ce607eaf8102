"""Lambda as a pure function of training progress."""

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol


LambdaSchedule = Callable[[float], float]

LAMBDA_SCHEDULES = ("fixed", "linear_increase", "linear_decrease", "cosine_increase", "cosine_decrease")

# No function of progress: callbacks.py takes it from what training measures
ADAPTIVE = "adaptive"

# The spelling of the paper's authors
LAMBDA_SCHEDULE_ALIASES = {"increase_linear": "linear_increase", "decrease_linear": "linear_decrease"}


# Those of `DPOShiftConfig`, whose import takes seconds; a test compares them
LAMBDA_DEFAULTS: dict[str, Any] = {
    "lambda_schedule": "fixed",
    "shift_lambda": 0.95,
    "lambda_min": 0.75,
    "lambda_max": 1.0,
    "lambda_target": 0.0,
    "lambda_target_metric": "displacement/chosen",
}


class LambdaSettings(Protocol):
    """The four fields of [`DPOShiftConfig`] that determine lambda."""

    lambda_schedule: Any
    shift_lambda: float
    lambda_min: float
    lambda_max: float


def make_lambda_schedule(config: LambdaSettings) -> LambdaSchedule:
    r"""
    Build lambda as a pure function of progress, Section 3.2 of
    [DPO-Shift](https://huggingface.co/papers/2502.07599).

    With progress \\( t \\), the share of the optimizer steps that are completed:

    | `lambda_schedule` | \\( \lambda(t) \\) |
    | --- | --- |
    | `fixed` | `shift_lambda` |
    | `linear_increase` | \\( \lambda_{\min} + t\,(\lambda_{\max} - \lambda_{\min}) \\) |
    | `linear_decrease` | \\( \lambda_{\max} - t\,(\lambda_{\max} - \lambda_{\min}) \\) |
    | `cosine_increase`, `cosine_decrease` | the linear ones at \\( (1 - \cos \pi t) / 2 \\) |
    | `[[t_1, lambda_1], ...]` | straight lines through the knots, held before the first and after the last |

    Two knots at the same progress make a step; at the step itself the later knot holds.

    Args:
        config ([`DPOShiftConfig`]):
            Anything with `lambda_schedule`, `shift_lambda`, `lambda_min` and `lambda_max`.

    Returns:
        `Callable[[float], float]`: Lambda at a progress in [0, 1]; a progress outside is held at the nearer end.

    Raises:
        ValueError: If `lambda_schedule` is no known name, or its knots are not in order.
        TypeError: If `lambda_schedule` is neither a name nor a list of pairs of numbers.
    """
    name = config.lambda_schedule
    if not isinstance(name, str):
        return _piecewise_linear(check_knots(name))
    name = LAMBDA_SCHEDULE_ALIASES.get(name, name)
    if name == "fixed":
        return _piecewise_linear([(0.0, config.shift_lambda)])
    if name not in LAMBDA_SCHEDULES:
        raise ValueError(
            f"`lambda_schedule` must be one of {', '.join(LAMBDA_SCHEDULES)} or a list of [progress, lambda] knots, "
            f"got {name!r}."
        )
    shape, direction = name.split("_")
    ends = [config.lambda_min, config.lambda_max]
    start, end = ends if direction == "increase" else ends[::-1]
    line = _piecewise_linear([(0.0, start), (1.0, end)])
    if shape == "linear":
        return line
    return lambda progress: line((1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2)


def check_knots(knots: Any) -> list[tuple[float, float]]:
    """
    Check the form of a list of `[progress, lambda]` knots: pairs of finite numbers, progress in [0, 1], in order.

    Args:
        knots (`list[list[float]]`):
            The knots as the user wrote them.

    Returns:
        `list[tuple[float, float]]`: The same knots as floats.

    Raises:
        TypeError: If it is not a list of pairs of numbers.
        ValueError: If it is empty, or a progress lies outside [0, 1] or before the one ahead of it.
    """
    example = "Write for example [[0, 1.0], [0.5, 0.75]] to lower lambda over the first half and hold it after."
    if not isinstance(knots, (list, tuple)):
        raise TypeError(
            f"`lambda_schedule` must be a name or a list of [progress, lambda] knots, got {knots!r}. {example}"
        )
    if not knots:
        raise ValueError(f"`lambda_schedule` must hold at least one [progress, lambda] knot, got []. {example}")
    checked: list[tuple[float, float]] = []
    for knot in knots:
        if (
            not isinstance(knot, (list, tuple))
            or len(knot) != 2
            or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in knot)
            or not all(abs(x) <= sys.float_info.max for x in knot)  # a whole number can be larger than any float
        ):
            raise TypeError(
                "`lambda_schedule` must be made of [progress, lambda] pairs of numbers, got the knot "
                f"{knot!r}. {example}"
            )
        progress, shift_lambda = float(knot[0]), float(knot[1])
        if not 0 <= progress <= 1:
            raise ValueError(
                f"`lambda_schedule` must keep every knot's progress in [0, 1], got {progress} in {knot!r}. Progress "
                "is the share of the optimizer steps that are completed, not a step number."
            )
        if checked and progress < checked[-1][0]:
            raise ValueError(
                f"`lambda_schedule` must list its knots in order of progress, got {progress} after {checked[-1][0]}."
            )
        checked.append((progress, shift_lambda))
    return checked


def _piecewise_linear(knots: Sequence[tuple[float, float]]) -> LambdaSchedule:
    positions = [progress for progress, _ in knots]

    def schedule(progress: float) -> float:
        right = bisect_right(positions, progress)
        if right == 0:
            return knots[0][1]
        if right == len(knots):
            return knots[-1][1]
        (t0, lambda0), (t1, lambda1) = knots[right - 1], knots[right]
        value = lambda0 + (progress - t0) / (t1 - t0) * (lambda1 - lambda0)
        # Rounding may not carry lambda past a knot: above 1 it would leave its range
        return min(max(value, min(lambda0, lambda1)), max(lambda0, lambda1))

    return schedule


@dataclass(frozen=True)
class LambdaPlan:
    """
    What the settings of a run say about lambda, before training.

    Args:
        start (`float`, *optional*), end (`float`, *optional*):
            Lambda at both ends of the run; `None` if a controller sets it.
        adaptive (`bool`, *optional*, defaults to `False`):
            Whether a controller moves lambda between `low` and `high` to hold `metric` at `target`.
        low (`float`), high (`float`), target (`float`), metric (`str`):
            Settings of the controller.
    """

    start: float | None = None
    end: float | None = None
    adaptive: bool = False
    low: float = 0.75
    high: float = 1.0
    target: float = 0.0
    metric: str = "displacement/chosen"

    @classmethod
    def of(cls, settings: Mapping[str, Any], progress: tuple[float, float] = (0.0, 1.0)) -> "LambdaPlan":
        """
        Read the plan from the fields of a [`DPOShiftConfig`], as its attributes or as a recipe has them.

        Args:
            settings (`Mapping[str, Any]`):
                The fields by name; a missing field has its default, other keys are ignored.
            progress (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                Progress at which `start` and `end` are taken.

        Raises:
            TypeError, ValueError: If a field has no value that a run could have had.
        """
        fields = LAMBDA_DEFAULTS | {name: settings[name] for name in LAMBDA_DEFAULTS if name in settings}
        low, high, target = (float(fields[name]) for name in ("lambda_min", "lambda_max", "lambda_target"))
        metric = str(fields["lambda_target_metric"])
        if fields["lambda_schedule"] != ADAPTIVE:
            schedule = make_lambda_schedule(SimpleNamespace(**fields))
            start, end = (float(schedule(share)) for share in progress)
            return cls(start, end, False, low, high, target, metric)
        if low == high:
            return cls(low, low, False, low, high, target, metric)
        return cls(None, None, True, low, high, target, metric)

    @property
    def adaptive_text(self) -> str:
        """Bounds and target in a few words."""
        share = "share " if self.metric == "displacement/chosen_fell" else ""
        return f"adaptive {self.low:.4g} to {self.high:.4g}, target {share}{self.target:.4g}"
