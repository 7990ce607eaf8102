"""Callbacks that set lambda, count tokens across resumed runs, and keep freed memory."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from trl import DPOConfig

from ..config import DPOShiftConfig
from ..schedules import LambdaSchedule
from .adaptive import LambdaController
from .allocator import keep_freed_memory
from .checks import TrainingStopped
from .metrics import PairScores


logger = get_logger(__name__)

# Values of progress at which a schedule is sampled before training
SAMPLES = [step / 1000 for step in range(1001)]


class LambdaScheduleCallback(TrainerCallback):
    r"""
    Sets lambda from the share of optimizer steps that are completed.

    $$ \lambda = \mathrm{schedule}(\mathrm{global\_step} / \mathrm{max\_steps}) $$

    The first training step uses progress 0, the last one \\( (T - 1) / T \\), and an evaluation after the last step 1.
    Lambda is constant during gradient accumulation. It depends only on `global_step`, and is therefore correct across
    epochs, on every process and after a resume.

    [`DPOShiftTrainer`] creates this callback from its config. Pass your own to use any function of progress:

    ```python
    DPOShiftTrainer(..., callbacks=[LambdaScheduleCallback(lambda progress: 1 - 0.25 * progress**2)])
    ```

    The schedule is sampled over [0, 1] before training. If it still fails later, the step that has just ended is saved
    before training stops.

    Args:
        schedule (`Callable[[float], float]`):
            Lambda as a function of progress in [0, 1].

    Raises:
        TypeError: If `schedule` is not a function.
        ValueError: If `schedule` returns anything but a finite number above 0 for a progress in [0, 1], or a number
            above 1 without `allow_lambda_above_one=True` in the config.
    """

    _failure: ValueError | None = None

    def __init__(self, schedule: LambdaSchedule):
        if not callable(schedule):
            raise TypeError(
                f"`schedule` must be a function of progress, got {schedule!r}. Write for example "
                "`LambdaScheduleCallback(lambda progress: 1 - 0.25 * progress)`."
            )
        self.schedule = schedule
        self.check(SAMPLES)
        self.shift_lambda = self._lambda_at(0.0)

    def check(self, samples: Iterable[float], allow_above_one: bool = True) -> None:
        """
        Check lambda at some values of progress.

        Raises:
            ValueError: If it is not a finite number above 0, or above 1 although that is not allowed.
        """
        for progress in samples:
            self._lambda_at(progress, allow_above_one)

    def _lambda_at(self, progress: float, allow_above_one: bool = True) -> float:
        try:
            shift_lambda = float(self.schedule(progress))
        except Exception as error:  # of the user's own function
            raise ValueError(
                f"`schedule` must return a number, got {type(error).__name__} ({error}) at progress {progress}. "
                "Return a number in (0, 1] for every progress in [0, 1]."
            ) from error
        if not math.isfinite(shift_lambda) or shift_lambda <= 0:
            raise ValueError(
                f"`schedule` must return a lambda above 0, got {shift_lambda} at progress {progress}. Return a number "
                "in (0, 1] for every progress in [0, 1]."
            )
        if shift_lambda > 1 and not allow_above_one:
            raise ValueError(
                f"`schedule` must not exceed 1, got {shift_lambda} at progress {progress}. To use a lambda above 1, "
                "set `allow_lambda_above_one=True` in `DPOShiftConfig`."
            )
        return shift_lambda

    def _update(self, args: TrainingArguments, state: TrainerState) -> None:
        self.shift_lambda = self._lambda_at(_progress(state, state.global_step), _allows_above_one(args))

    def observe(self, matrix: torch.Tensor) -> None:
        """Receive the scores of a training batch from all processes; see [`~metrics.PairScores.as_matrix`]."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._failure = None
        steps = range(state.global_step, state.max_steps + 1)
        self.check((_progress(state, step) for step in steps), _allows_above_one(args))
        self._update(args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._update(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            self._update(args, state)
        except ValueError as error:
            self._failure = error  # raised once the step is saved
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._failure is not None:
            raise TrainingStopped(f"{self._failure} Step {state.global_step} is saved.") from self._failure

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._failure is not None:  # another callback has asked not to save
            raise TrainingStopped(str(self._failure)) from self._failure


def _progress(state: TrainerState, step: int) -> float:
    return step / state.max_steps if state.max_steps > 0 else 0.0


def _allows_above_one(args: TrainingArguments) -> bool:
    return bool(getattr(args, "allow_lambda_above_one", False))


class AdaptiveLambdaCallback(LambdaScheduleCallback, ExportableState):
    r"""
    Sets lambda after each optimizer step from the scores of its pairs, with a [`~adaptive.LambdaController`].

    The state of the controller is saved in each checkpoint (`trainer_state.json`), so that a resumed run uses the same
    lambdas. Reading the measurement synchronizes with the device once per optimizer step.

    Args:
        target (`float`):
            Target for `metric`, in nats or as a share.
        metric (`str`):
            `"displacement/chosen"`, the mean log-ratio of the chosen answers, or `"displacement/chosen_fell"`, the
            share of chosen answers below the reference.
        lambda_min (`float`):
            Lower bound of lambda.
        lambda_max (`float`):
            Upper bound of lambda.
    """

    def __init__(self, target: float, metric: str, lambda_min: float, lambda_max: float):
        self.arguments: dict[str, Any] = {
            "target": target,
            "metric": metric,
            "lambda_min": lambda_min,
            "lambda_max": lambda_max,
        }
        self.metric = metric
        self.controller = self._new_controller(max_steps=0)
        self._observed: list[torch.Tensor] = []
        super().__init__(lambda progress: self.controller.shift_lambda)

    def _new_controller(self, max_steps: int) -> LambdaController:
        # In a run that is twice as long, the policy usually moves half as far per step
        return LambdaController(
            self.arguments["target"],
            self.arguments["lambda_min"],
            self.arguments["lambda_max"],
            smoothing_steps=max(5.0, max_steps / 15),
            integral_steps=max(20.0, max_steps / 3),
        )

    def observe(self, matrix: torch.Tensor) -> None:
        self._observed.append(matrix)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._observed.clear()
        if state.global_step == 0:
            self.controller = self._new_controller(state.max_steps)
            state.stateful_callbacks[type(self).__name__] = self.state()
        # A checkpoint of a run with another schedule has no such state
        saved: Any = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.controller_state = saved["attributes"]["controller_state"]
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._observed:
            chosen = PairScores.from_matrices(self._observed).chosen_logratios
            self._observed.clear()
            if self.metric == "displacement/chosen":
                shortfall, spread = self.controller.target - chosen.mean().item(), chosen.std(correction=0).item()
            else:
                shortfall, spread = (chosen < 0).double().mean().item() - self.controller.target, 0.5
            self.controller.update(shortfall, spread)
        super().on_step_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        highest, target = self.arguments["lambda_max"], self.arguments["target"]
        lambdas = [entry["shift/lambda"] for entry in state.log_history if "shift/lambda" in entry]
        if state.global_step > 0 and min([*lambdas, self.shift_lambda]) >= highest:
            logger.warning(
                f"The adaptive schedule kept lambda at `lambda_max` ({highest:g}) throughout: {self.metric} did not "
                f"miss `lambda_target` ({target:g}). For an effect, choose a stricter target."
            )

    @property
    def controller_state(self) -> dict[str, float]:
        """Fields of the controller, as saved in a checkpoint."""
        return asdict(self.controller)

    @controller_state.setter
    def controller_state(self, values: dict[str, float]) -> None:
        self.controller = LambdaController(**values)

    def state(self) -> dict[str, Any]:
        """State to save in a checkpoint."""
        return {"args": self.arguments, "attributes": {"controller_state": self.controller_state}}


class TokenCountCallback(TrainerCallback, ExportableState):
    """Counts training tokens. Checkpoints save the count, and a resumed run continues it, where TRL restarts at 0."""

    num_tokens: int | torch.Tensor = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            saved: Any = state.stateful_callbacks.get(type(self).__name__)
            if saved is None:  # a checkpoint of an earlier release
                logged = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
                saved = {"attributes": {"num_tokens": int(logged[-1]) if logged else 0}}
            self.num_tokens = saved["attributes"]["num_tokens"]
        state.stateful_callbacks[type(self).__name__] = self.state()

    def state(self) -> dict[str, Any]:
        """State to save in a checkpoint."""
        return {"args": {}, "attributes": {"num_tokens": int(self.num_tokens)}}


class KeepFreedMemoryCallback(TrainerCallback):
    """Keeps freed memory in the process if training runs on a CPU; see [`~allocator.keep_freed_memory`]."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cpu":
            keep_freed_memory()


def configured_schedule(args: DPOShiftConfig) -> LambdaScheduleCallback:
    """Create the callback for the lambda settings of a config."""
    plan = args.lambda_plan
    if plan.adaptive:
        return AdaptiveLambdaCallback(plan.target, plan.metric, plan.low, plan.high)
    return LambdaScheduleCallback(plan.function)


def is_schedule(callback: Any) -> bool:
    """Whether a callback, or the class of one, sets lambda."""
    return issubclass(callback if isinstance(callback, type) else type(callback), LambdaScheduleCallback)


def check_schedules(args: DPOConfig, callbacks: list[Any]) -> None:
    """
    Check that the settings allow the [`LambdaScheduleCallback`]s among the callbacks.

    Raises:
        ValueError: If `args` is not a [`DPOShiftConfig`], more than one callback sets lambda, or the loss does not
            support a shift, or lambda exceeds 1 although the settings do not allow it.
    """
    schedules = [cb for cb in callbacks if is_schedule(cb)]
    if not schedules:
        return
    name = (schedules[0] if isinstance(schedules[0], type) else type(schedules[0])).__name__
    if not isinstance(args, DPOShiftConfig):
        raise ValueError(
            f"`args` must be a `DPOShiftConfig` with a `{name}`, got a "
            f"`{type(args).__name__}`, which trains with plain DPO. Pass a `DPOShiftConfig`."
        )
    if len(schedules) > 1:
        raise ValueError(
            f"`callbacks` must contain at most one `LambdaScheduleCallback`, got {len(schedules)}. Pass one, "
            "or remove the first with `trainer.remove_callback(...)` before you add another."
        )
    if args.lambda_plan.adaptive:
        raise ValueError(
            f"`lambda_schedule='adaptive'` is not supported with a `{name}` in `callbacks`, "
            "since both would set lambda. Remove `lambda_schedule` from the config, or the callback."
        )
    args.validate_loss_supports_shift()
    if not isinstance(schedules[0], type):
        schedules[0].check(SAMPLES, args.allow_lambda_above_one)
