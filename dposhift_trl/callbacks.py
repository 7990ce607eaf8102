"""The one writer of lambda."""

import math

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .schedules import LambdaSchedule


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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._update(args, state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._update(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._update(args, state)
