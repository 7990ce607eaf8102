"""The callbacks of a run: the one writer of lambda, and what is set or restored when training begins."""

import math
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from trl import DPOConfig

from ..config import DPOShiftConfig
from ..schedules import ADAPTIVE, LambdaSchedule, make_lambda_schedule
from .adaptive import LambdaController
from .allocator import keep_freed_memory
from .metrics import PairScores


class LambdaScheduleCallback(TrainerCallback):
    r"""
    Sets lambda from the share of the optimizer steps that are completed.

    $$ \lambda = \mathrm{schedule}(\mathrm{global\_step} / \mathrm{max\_steps}) $$

    The first training step uses progress 0, the last one \\( (T - 1) / T \\), an evaluation after the last step 1.
    Lambda is constant inside a gradient accumulation window, and follows `global_step` alone, so it is right across
    epochs, on every process and after a resume.

    [`DPOShiftTrainer`] adds one by itself, made from its config; pass your own to use any function of progress:

    ```python
    DPOShiftTrainer(..., callbacks=[LambdaScheduleCallback(lambda progress: 1 - 0.25 * progress**2)])
    ```

    Args:
        schedule (`Callable[[float], float]`):
            Lambda as a function of progress in [0, 1].

    Raises:
        ValueError: If `schedule` returns no finite number above 0, or one above 1 without the config's
            `allow_lambda_above_one`.
    """

    def __init__(self, schedule: LambdaSchedule):
        self.schedule = schedule
        self.shift_lambda = self._at(0.0)

    def _at(self, progress: float) -> float:
        shift_lambda = float(self.schedule(progress))
        if not math.isfinite(shift_lambda) or shift_lambda <= 0:
            raise ValueError(
                f"`schedule` must return a lambda above 0, got {shift_lambda} at progress {progress}. Return a number "
                "in (0, 1] for every progress in [0, 1]."
            )
        return shift_lambda

    def _update(self, args: TrainingArguments, state: TrainerState) -> None:
        progress = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
        shift_lambda = self._at(progress)
        if shift_lambda > 1 and not getattr(args, "allow_lambda_above_one", False):
            raise ValueError(
                f"`schedule` must not exceed 1, got {shift_lambda} at progress {progress}. For lambda above 1 set "
                "`allow_lambda_above_one=True` in `DPOShiftConfig`."
            )
        self.shift_lambda = shift_lambda

    def observe(self, matrix: torch.Tensor) -> None:
        """Receive the scores of a training batch from all processes, as of [`~metrics.PairScores.as_matrix`]."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._update(args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._update(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._update(args, state)


class AdaptiveLambdaCallback(LambdaScheduleCallback, ExportableState):
    r"""
    Sets lambda after each optimizer step from what the step's pairs say, by a [`~adaptive.LambdaController`].

    Its state is part of each checkpoint (`trainer_state.json`), so that a resumed run takes the same lambdas. Reading
    the measurement is one wait for the device at each optimizer step.

    Args:
        target (`float`):
            What to hold: nats, or a share.
        metric (`str`):
            `"displacement/chosen"`, the mean log-ratio of the chosen answers, or `"displacement/chosen_fell"`, the
            share of them below the reference.
        lambda_min (`float`), lambda_max (`float`):
            Bounds of lambda.
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
        # A run twice as long usually moves the policy half as far per step
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
        # A checkpoint of another schedule has no such state
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

    @property
    def controller_state(self) -> dict[str, float]:
        return asdict(self.controller)

    @controller_state.setter
    def controller_state(self, values: dict[str, float]) -> None:
        self.controller = LambdaController(**values)

    def state(self) -> dict[str, Any]:
        return {"args": self.arguments, "attributes": {"controller_state": self.controller_state}}


class TokenCountCallback(TrainerCallback, ExportableState):
    """Number of tokens trained on, saved in each checkpoint and restored on resume, where TRL would count from 0."""

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
        return {"args": {}, "attributes": {"num_tokens": int(self.num_tokens)}}


class KeepFreedMemoryCallback(TrainerCallback):
    """On a CPU, lets the process keep the memory that a step has freed; see [`~allocator.keep_freed_memory`]."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cpu":
            keep_freed_memory()


def configured_schedule(args: DPOShiftConfig) -> LambdaScheduleCallback:
    """The callback that sets lambda as the config says."""
    if args.lambda_schedule == ADAPTIVE:
        return AdaptiveLambdaCallback(args.lambda_target, args.lambda_target_metric, args.lambda_min, args.lambda_max)
    return LambdaScheduleCallback(make_lambda_schedule(args))


def check_schedules(args: DPOConfig, callbacks: list[Any]) -> None:
    """Refuse a schedule passed as a callback if lambda has no meaning or another writer."""
    schedules = [cb for cb in callbacks if isinstance(cb, LambdaScheduleCallback)]
    if not schedules:
        return
    if not isinstance(args, DPOShiftConfig):
        raise ValueError(
            f"`args` must be a `DPOShiftConfig` if a `{type(schedules[0]).__name__}` sets lambda, got a "
            f"`{type(args).__name__}`, with which the trainer is TRL's. Pass `DPOShiftConfig(...)`."
        )
    if len(schedules) > 1:
        raise ValueError(
            f"`callbacks` must hold at most one `LambdaScheduleCallback`, got {len(schedules)}. Remove the others "
            "with `trainer.remove_callback(...)`, since lambda has one writer."
        )
    if args.lambda_schedule == ADAPTIVE:
        raise ValueError(
            f"`lambda_schedule='adaptive'` is not supported with a `{type(schedules[0]).__name__}` of your own, since "
            "lambda has one writer. Leave `lambda_schedule` out, or do not pass the callback."
        )
    args.validate_loss_supports_shift()
