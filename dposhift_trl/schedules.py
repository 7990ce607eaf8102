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
            Settings of the controller; `low` and `high` are also the bounds of a named schedule.
        schedule (`str` or `tuple[tuple[float, float], ...]`, *optional*, defaults to `"fixed"`):
            Name of the schedule, `"fixed"` whenever lambda does not move, or its knots.
    """

    start: float | None = None
    end: float | None = None
    adaptive: bool = False
    low: float = 0.75
    high: float = 1.0
    target: float = 0.0
    metric: str = "displacement/chosen"
    schedule: str | tuple[tuple[float, float], ...] = "fixed"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "LambdaPlan":
        """
        Read the plan from the fields of a [`DPOShiftConfig`], as its attributes or as a recipe has them.

        Args:
            settings (`Mapping[str, Any]`):
                The fields by name; a missing field has its default, other keys are ignored.

        Raises:
            TypeError, ValueError: If a field has no value that a run could have had.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"The settings of lambda must be a mapping, got {settings!r}.")
        fields = LAMBDA_DEFAULTS | {name: settings[name] for name in LAMBDA_DEFAULTS if name in settings}
        low, high, target = (float(fields[name]) for name in ("lambda_min", "lambda_max", "lambda_target"))
        metric, schedule = str(fields["lambda_target_metric"]), fields["lambda_schedule"]
        if schedule == ADAPTIVE and low == high:
            return cls(low, low, False, low, high, target, metric)
        if schedule == ADAPTIVE:
            return cls(None, None, True, low, high, target, metric, ADAPTIVE)
        in_force = make_lambda_schedule(SimpleNamespace(**fields))
        start, end = float(in_force(0.0)), float(in_force(1.0))
        if isinstance(schedule, str):
            schedule = LAMBDA_SCHEDULE_ALIASES.get(schedule, schedule) if start != end else "fixed"
        else:
            schedule = tuple(check_knots(schedule))
            if len({value for _, value in schedule}) == 1:
                schedule = "fixed"
            elif [progress for progress, _ in schedule] == [0, 1]:
                schedule = "linear_increase" if start < end else "linear_decrease"
                low, high = min(start, end), max(start, end)
        return cls(start, end, False, low, high, target, metric, schedule)

    def at(self, progress: float) -> float | None:
        """Lambda at a progress in [0, 1]; `None` if a controller sets it."""
        if self.adaptive:
            return None
        return make_lambda_schedule(SimpleNamespace(**LAMBDA_DEFAULTS | self.settings))(progress)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of [`DPOShiftConfig`] that have an effect: equal for two plans with the same lambda."""
        if self.schedule == "fixed":
            return {"lambda_schedule": "fixed", "shift_lambda": self.start}
        if not isinstance(self.schedule, str):
            return {"lambda_schedule": [list(knot) for knot in self.schedule]}
        fields = {"lambda_schedule": self.schedule, "lambda_min": self.low, "lambda_max": self.high}
        if self.adaptive:
            fields |= {"lambda_target": self.target, "lambda_target_metric": self.metric}
        return fields

    @property
    def slug(self) -> str:
        """Schedule and numbers for a file name: `fixed-0.95`, `adaptive-0.75-1.0-chosen-0.0`."""
        if self.adaptive:
            numbers: list[Any] = [self.low, self.high, self.metric.removeprefix("displacement/"), self.target]
        elif not isinstance(self.schedule, str):
            numbers = [number for knot in self.schedule for number in knot]
        else:
            numbers = [self.start] if self.schedule == "fixed" else [self.start, self.end]
        name = self.schedule if isinstance(self.schedule, str) else "knots"
        return "-".join(map(str, [name, *numbers]))

    @property
    def text(self) -> str:
        """Lambda in a few words: `0.95`, `1 -> 0.75`, `1 -> 0.6 -> 1`, or bounds and target of the controller."""
        if self.adaptive:
            share = "share " if self.metric == "displacement/chosen_fell" else ""
            return f"adaptive {self.low:.4g} to {self.high:.4g}, target {share}{self.target:.4g}"
        if self.start is None or self.end is None:
            return "unknown"
        knots = [] if isinstance(self.schedule, str) else [value for _, value in self.schedule]
        return " -> ".join(f"{value:.4g}" for value in lambda_path(self.start, self.end, knots))


def lambda_path(start: float, end: float, between: Sequence[float] = ()) -> list[float]:
    """
    The values that describe how lambda moves: both ends, and the one between them that is furthest outside, if any.

    >>> lambda_path(1.0, 1.0)
    [1.0]
    >>> lambda_path(1.0, 0.8, [1.0, 0.9, 0.8])
    [1.0, 0.8]
    >>> lambda_path(1.0, 1.0, [1.0, 0.6, 1.0])
    [1.0, 0.6, 1.0]
    """
    low, high = min(start, end), max(start, end)
    furthest = max(between, key=lambda value: max(low - value, value - high), default=start)
    if not low - 1e-3 <= furthest <= high + 1e-3:
        return [start, furthest, end]
    return [end] if math.isclose(start, end) else [start, end]
