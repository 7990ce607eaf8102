"""The one writer of lambda."""

import math
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..schedules import LambdaSchedule
from .adaptive import LambdaController
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
                " `allow_lambda_above_one=True` in `DPOShiftConfig`."
            )
        self.shift_lambda = shift_lambda

    def observe(self, matrix: torch.Tensor) -> None:
        """Take the scores of a batch in training, of all processes, as of [`~metrics.PairScores.as_matrix`]."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._update(args, state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._update(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
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
        self.arguments = {"target": target, "metric": metric, "lambda_min": lambda_min, "lambda_max": lambda_max}
        self.metric = metric
        self.controller = LambdaController(target, lambda_min, lambda_max, smoothing_steps=5, integral_steps=20)
        self._observed: list[torch.Tensor] = []
        super().__init__(lambda progress: self.controller.shift_lambda)

    def observe(self, matrix: torch.Tensor) -> None:
        self._observed.append(matrix)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._observed.clear()
        if state.global_step == 0:
            # A run twice as long takes its steps half as far, as a rule
            self.controller.smoothing_steps = max(5.0, state.max_steps / 15)
            self.controller.integral_steps = max(20.0, state.max_steps / 3)
            state.stateful_callbacks[type(self).__name__] = self.state()
        # A checkpoint of another schedule has no state of ours
        saved: Any = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.controller_state = saved["attributes"]["controller_state"]
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
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
