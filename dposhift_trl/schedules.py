"""Lambda as a pure function of training progress."""

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol


LambdaSchedule = Callable[[float], float]

LAMBDA_SCHEDULES = ("fixed", "linear_increase", "linear_decrease", "cosine_increase", "cosine_decrease")

# Not a function of progress; set from training metrics by `AdaptiveLambdaCallback`
ADAPTIVE = "adaptive"

# Names in the code of the paper's authors
LAMBDA_SCHEDULE_ALIASES = {"increase_linear": "linear_increase", "decrease_linear": "linear_decrease"}

# Defaults of `DPOShiftConfig`, whose import takes seconds; a test compares them
LAMBDA_DEFAULTS: dict[str, Any] = {
    "lambda_schedule": "fixed",
    "shift_lambda": 0.95,
    "lambda_min": 0.75,
    "lambda_max": 1.0,
    "lambda_target": 0.0,
    "lambda_target_metric": "displacement/chosen",
}


class LambdaSettings(Protocol):
    """The fields of [`DPOShiftConfig`] that determine lambda as a function of progress."""

    lambda_schedule: Any
    shift_lambda: float
    lambda_min: float
    lambda_max: float


def make_lambda_schedule(config: LambdaSettings) -> LambdaSchedule:
    r"""
    Create lambda as a pure function of progress, Section 3.2 of
    [DPO-Shift](https://huggingface.co/papers/2502.07599).

    With progress \\( t \\), the share of optimizer steps that are completed:

    | `lambda_schedule` | \\( \lambda(t) \\) |
    | --- | --- |
    | `fixed` | `shift_lambda` |
    | `linear_increase` | \\( \lambda_{\min} + t\,(\lambda_{\max} - \lambda_{\min}) \\) |
    | `linear_decrease` | \\( \lambda_{\max} - t\,(\lambda_{\max} - \lambda_{\min}) \\) |
    | `cosine_increase`, `cosine_decrease` | the linear schedules at \\( (1 - \cos \pi t) / 2 \\) |
    | `[[t_1, lambda_1], ...]` | straight lines between the knots, constant before the first and after the last |

    Two knots with the same progress make a step, at which the value of the later knot applies.

    Args:
        config ([`DPOShiftConfig`]):
            Any object with `lambda_schedule`, `shift_lambda`, `lambda_min` and `lambda_max`.

    Returns:
        `Callable[[float], float]`: Lambda at a progress in [0, 1]. A progress outside [0, 1] is clipped.

    Raises:
        ValueError: If `lambda_schedule` is an unknown name, or its knots are not in order.
        TypeError: If `lambda_schedule` is neither a name nor a list of pairs of numbers.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(lambda_schedule="linear_decrease", shift_lambda=0.95, lambda_min=0.75, lambda_max=1.0)
    >>> schedule = make_lambda_schedule(config)
    >>> [schedule(progress) for progress in (0.0, 0.5, 1.0)]
    [1.0, 0.875, 0.75]

    ```
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
    Check that knots are `[progress, lambda]` pairs of finite numbers, in order, with progress in [0, 1].

    Args:
        knots (`list[list[float]]`):
            Knots of `lambda_schedule`.

    Returns:
        `list[tuple[float, float]]`: The same knots as floats.

    Raises:
        TypeError: If `knots` is not a list of pairs of finite numbers.
        ValueError: If `knots` is empty, or if a progress is outside [0, 1] or less than the previous one.

    Example:

    ```python
    >>> check_knots([[0, 1], [0.5, 0.75]])
    [(0.0, 1.0), (0.5, 0.75)]

    ```
    """
    example = "Write for example [[0, 1.0], [0.5, 0.75]] to decrease lambda in the first half of training."
    if not isinstance(knots, (list, tuple)):
        raise TypeError(
            f"`lambda_schedule` must be a name or a list of [progress, lambda] knots, got {knots!r}. {example}"
        )
    if not knots:
        raise ValueError(f"`lambda_schedule` must contain at least one [progress, lambda] knot, got []. {example}")
    checked: list[tuple[float, float]] = []
    for knot in knots:
        if (
            not isinstance(knot, (list, tuple))
            or len(knot) != 2
            or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in knot)
            or not all(abs(x) <= sys.float_info.max for x in knot)  # an integer can be larger than any float
        ):
            raise TypeError(
                "`lambda_schedule` must be made of [progress, lambda] pairs of numbers, got the knot "
                f"{knot!r}. {example}"
            )
        progress, shift_lambda = float(knot[0]), float(knot[1])
        if not 0 <= progress <= 1:
            raise ValueError(
                f"`lambda_schedule` must have the progress of every knot in [0, 1], got {progress} in {knot!r}. "
                "Progress is the share of optimizer steps that are completed, not a step number."
            )
        if checked and progress < checked[-1][0]:
            raise ValueError(
                f"`lambda_schedule` must have its knots in order of progress, got {progress} after {checked[-1][0]}."
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
        # Rounding must not move lambda past a knot, where it could exceed 1
        return min(max(value, min(lambda0, lambda1)), max(lambda0, lambda1))

    return schedule


@dataclass(frozen=True)
class LambdaPlan:
    """
    Lambda over a run, as far as the settings determine it before training.

    Args:
        start (`float`, *optional*):
            Lambda at the start of training. `None` if a controller sets it.
        end (`float`, *optional*):
            Lambda at the end of training. `None` if a controller sets it.
        adaptive (`bool`, *optional*, defaults to `False`):
            Whether a controller moves lambda between `low` and `high` to hold `metric` at `target`.
        low (`float`, *optional*, defaults to `0.75`):
            Lower bound of lambda with a controller or a named schedule.
        high (`float`, *optional*, defaults to `1.0`):
            Upper bound of lambda with a controller or a named schedule.
        target (`float`, *optional*, defaults to `0.0`):
            Target of the controller.
        metric (`str`, *optional*, defaults to `"displacement/chosen"`):
            Metric of the controller.
        schedule (`str` or `tuple[tuple[float, float], ...]`, *optional*, defaults to `"fixed"`):
            Name of the schedule, or its knots. `"fixed"` if lambda is constant.
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
        Read the plan from the fields of a [`DPOShiftConfig`], or from the section of a recipe.

        Args:
            settings (`Mapping[str, Any]`):
                Fields by name. Missing fields have their defaults, and other keys are ignored.

        Raises:
            TypeError: If `settings` is not a mapping, or a field has an invalid type.
            ValueError: If a field has an invalid value.

        Example:

        ```python
        >>> plan = LambdaPlan.of({"lambda_schedule": "linear_decrease", "lambda_min": 0.5})
        >>> plan.start, plan.end, plan.range
        (1.0, 0.5, (0.5, 1.0))
        >>> plan.text
        '1 -> 0.5'

        ```
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"`settings` must be a mapping from field names to values, got {settings!r}.")
        fields = LAMBDA_DEFAULTS | {name: settings[name] for name in LAMBDA_DEFAULTS if name in settings}
        low, high, target = (float(fields[name]) for name in ("lambda_min", "lambda_max", "lambda_target"))
        metric, schedule = str(fields["lambda_target_metric"]), fields["lambda_schedule"]
        if schedule == ADAPTIVE and low == high:
            return cls(low, low, False, low, high, target, metric)
        if schedule == ADAPTIVE:
            return cls(None, None, True, low, high, target, metric, ADAPTIVE)
        lambda_at = make_lambda_schedule(SimpleNamespace(**fields))
        start, end = float(lambda_at(0.0)), float(lambda_at(1.0))
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

    @property
    def function(self) -> LambdaSchedule:
        """Lambda as a function of progress, from [`make_lambda_schedule`]; a `ValueError` if a controller sets it."""
        return make_lambda_schedule(SimpleNamespace(**LAMBDA_DEFAULTS | self.settings))

    def at(self, progress: float) -> float | None:
        """Lambda at a progress in [0, 1]; `None` if a controller sets it."""
        return None if self.adaptive else self.function(progress)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest lambda over the run."""
        if not isinstance(self.schedule, str):
            values = [value for _, value in self.schedule]
            return min(values), max(values)
        if self.schedule == "fixed" and self.start is not None:
            return self.start, self.start
        return self.low, self.high

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of [`DPOShiftConfig`] that have an effect; equal for plans with the same lambda."""
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
        """Schedule and numbers as part of a file name: `fixed-0.95`, `adaptive-0.75-1.0-chosen-0.0`."""
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
        """Lambda in short: `0.95`, `1 -> 0.75`, `1 -> 0.6 -> 1`, or the bounds and target of the controller."""
        if self.adaptive:
            share = "share " if self.metric == "displacement/chosen_fell" else ""
            return f"adaptive {self.low:.4g} to {self.high:.4g}, target {share}{self.target:.4g}"
        if self.start is None or self.end is None:
            return "unknown"
        knots = [] if isinstance(self.schedule, str) else [value for _, value in self.schedule]
        return " -> ".join(f"{value:.4g}" for value in lambda_path(self.start, self.end, knots))


def lambda_path(start: float, end: float, between: Sequence[float] = ()) -> list[float]:
    """
    Values that summarize how lambda changes: both ends, and the value furthest outside their range, if there is one.

    Args:
        start (`float`):
            Lambda at the start.
        end (`float`):
            Lambda at the end.
        between (`Sequence[float]`, *optional*, defaults to `()`):
            Values of lambda in between.

    Returns:
        `list[float]`: One to three values. One if lambda is constant.

    Example:

    ```python
    >>> lambda_path(1.0, 1.0)
    [1.0]
    >>> lambda_path(1.0, 0.8, [1.0, 0.9, 0.8])
    [1.0, 0.8]
    >>> lambda_path(1.0, 1.0, [1.0, 0.6, 1.0])
    [1.0, 0.6, 1.0]

    ```
    """
    low, high = min(start, end), max(start, end)
    furthest = max(between, key=lambda value: max(low - value, value - high), default=start)
    if not low - 1e-3 <= furthest <= high + 1e-3:
        return [start, furthest, end]
    return [end] if math.isclose(start, end) else [start, end]


def settings_without_effect(schedule: str | Sequence[Sequence[float]], given: Iterable[str]) -> list[str]:
    """
    Lambda settings that a schedule does not read.

    Args:
        schedule (`str` or `list[list[float]]`):
            `lambda_schedule` of a [`DPOShiftConfig`].
        given (`Iterable[str]`):
            Names of the settings that were set. Those of other settings are ignored.

    Example:

    ```python
    >>> settings_without_effect("fixed", ["shift_lambda", "lambda_min", "beta"])
    ['lambda_min']

    ```
    """
    read = LambdaPlan.of({"lambda_schedule": schedule}).settings if isinstance(schedule, str) else {}
    return [name for name in given if name in LAMBDA_DEFAULTS and name not in {"lambda_schedule", *read}]
