"""What a run prints while it trains: a line for each log and each evaluation, and a status line on a terminal."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import has_length

from ..console import columns, is_terminal, rewrite
from .processes import say


REFRESH = 0.1  # seconds between two status lines
BAR = 20  # characters


class Field(NamedTuple):
    """A part of a line. Where the terminal is too narrow, fields with the highest `rank` are left out first."""

    text: str
    rank: int = 0


def number(value: float, width: int = 4, signed: bool = False) -> str:
    """
    A number in a column, with as many decimals as fit and no zero before the point.

    >>> [number(value) for value in (0.6612, 7.097, 65.1, 1212.4, 162754.8, float("nan"))]
    ['.661', '7.10', '65.1', '1212', '163k', ' nan']
    >>> [number(value, signed=True) for value in (0.0517, 1.234, -74.66, -1098.3)]
    ['+.05', '+1.2', ' -75', ' -1k']
    """
    if not math.isfinite(value):
        return f"{value:{'+' * signed}}".rjust(width)
    for scale, unit in ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G")):
        for decimals in range(3 if scale == 1 else 0, -1, -1):
            text = f"{value / scale:{'+' * signed}.{decimals}f}{unit}"
            text = text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text
            if len(text) <= width:
                return text.rjust(width)
    return f"{value:.0e}"


def clock(seconds: float) -> str:
    """
    A time as on a clock.

    >>> clock(52), clock(3723)
    ('0:52', '1:02:03')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def fit(fields: Sequence[Field], width: int | None) -> str:
    """
    Join the fields of a line that the terminal has room for.

    >>> fit([Field("loss .661"), Field("acc .59", 2), Field("eta 0:52", 1)], 20)
    'loss .661  eta 0:52'
    """
    kept = list(fields)
    while True:
        line = "  ".join(field.text for field in kept)
        last = max(kept, key=lambda field: field.rank)
        if width is None or len(line) < width or last.rank == 0:
            return line.rstrip()
        kept.remove(last)


def preference_fields(logs: Mapping[str, float], lambda_varies: bool) -> list[Field]:
    """The metrics of the stage `dpo` in a line."""
    fell = logs["displacement/chosen_fell"]
    share = "all" if fell == 1 else f"{min(fell, 0.99):.0%}"
    fields = [
        Field(f"loss {number(logs['loss'])}"),
        Field(f"margin {number(logs['rewards/margins'], signed=True)}"),
        Field(f"acc {number(logs['rewards/accuracies'], 3)}", 2),
        Field(f"chosen {number(logs['displacement/chosen'], signed=True)} ({share:>3} fell)"),
    ]
    return [*fields, Field(f"lambda {number(logs['shift/lambda'])}")] if lambda_varies else fields


def language_fields(logs: Mapping[str, float]) -> list[Field]:
    """The metrics of the stage `sft` in a line."""
    loss = logs["loss"]
    fields = [Field(f"loss {number(loss)}"), Field(f"perplexity {number(math.exp(min(loss, 700.0)))}")]
    if "mean_token_accuracy" in logs:
        fields.append(Field(f"token acc {number(logs['mean_token_accuracy'], 3)}", 2))
    if "learning_rate" in logs:
        fields.append(Field(f"lr {logs['learning_rate']:.1e}", 4))
    return fields


class ProgressLines(TrainerCallback):
    """
    Prints a line for each log and each evaluation, and a status line on a terminal, as transformers' callbacks do.

    Args:
        stage (`str`):
            Name of the stage.
        lambda_varies (`bool`, *optional*, defaults to `False`):
            Whether lambda changes during training. A constant lambda is not repeated in each line.
    """

    def __init__(self, stage: str, lambda_varies: bool = False):
        self.stage, self.lambda_varies = stage, lambda_varies
        self.status_is_shown = False
        self.began = self.logged = self.stepped = self.drawn = time.monotonic()
        self.first_step = self.logged_step = self.batches = 0
        self.interrupted, self.interruptions = False, 0.0  # by evaluations and saving, in seconds since the last log
        self.pace: float | None = None  # seconds per step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.status_is_shown = state.is_world_process_zero and not args.disable_tqdm and is_terminal()
        self.first_step = self.logged_step = state.global_step
        self.pace, self.batches = None, 0
        self._restart_clock()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.first_step:  # an evaluation before it is not part of the pace
            self._restart_clock()
        elif self.interrupted:
            self.interruptions += time.monotonic() - self.stepped
        self.interrupted = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stepped = time.monotonic()
        self._draw(state)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self.batches += 1
        total = f" of {len(eval_dataloader)}" if has_length(eval_dataloader) else ""
        self._draw(state, f"evaluating, batch {self.batches}{total}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.interrupted, self.batches = True, 0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.interrupted = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            steps = state.global_step - self.first_step
            say(f"{self.stage}: {steps} step{'s' * (steps != 1)} in {clock(logs['train_runtime'])}")
        elif "loss" in logs:
            self._measure(state)
            self._say("step", state, logs, self._timing(state))
        elif "eval_loss" in logs:
            values = {name.removeprefix("eval_"): value for name, value in logs.items()}
            self._say("eval", state, values, [Field(f"{number(values.get('runtime', math.nan))} s", 5)])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Clear the status line."""
        if self.status_is_shown:
            rewrite("")
            self.status_is_shown = False

    def _say(self, kind: str, state: TrainerState, logs: Mapping[str, float], timing: list[Field]) -> None:
        fields = [Field(f"{kind} {_step(state)}")]
        if "displacement/chosen" in logs:
            fields += preference_fields(logs, self.lambda_varies)
        else:
            fields += language_fields(logs)
        say(fit([*fields, *timing], columns()))

    def _measure(self, state: TrainerState) -> None:
        """The pace since the last log, without evaluations and saving."""
        now, steps = time.monotonic(), state.global_step - self.logged_step
        if steps > 0:
            self.pace = max(now - self.logged - self.interruptions, 0.0) / steps
        self.logged, self.logged_step, self.interruptions = now, state.global_step, 0.0

    def _timing(self, state: TrainerState) -> list[Field]:
        if self.pace is None:
            return []
        # On a terminal the status line has both
        return [
            Field(f"{number(self.pace)} s/step", 5),
            Field(f"eta {self._eta(state)}", 3 if self.status_is_shown else 1),
        ]

    def _eta(self, state: TrainerState) -> str:
        """Time that is left, evaluations included, at the average pace so far."""
        done = state.global_step - self.first_step
        left = state.max_steps - state.global_step
        return clock((time.monotonic() - self.began) / max(done, 1) * left)

    def _draw(self, state: TrainerState, activity: str = "") -> None:
        now = time.monotonic()
        if not self.status_is_shown or now < self.drawn + REFRESH:
            return
        self.drawn = now
        filled = BAR * state.global_step // max(state.max_steps, 1)
        fields = [Field(f"{self.stage} {_step(state)}"), Field(f"[{'#' * filled}{'-' * (BAR - filled)}]", 1)]
        if state.global_step > self.first_step:
            fields.append(Field(f"eta {self._eta(state)}", 2))
        if activity:
            fields.append(Field(activity, 3))
        width = columns()
        rewrite(fit(fields, width)[: None if width is None else width - 1])

    def _restart_clock(self) -> None:
        self.began = self.logged = self.stepped = time.monotonic()
        self.interruptions = 0.0


def _step(state: TrainerState) -> str:
    return f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"


def replace_printer(trainer: Trainer, progress: ProgressLines) -> None:
    """Let a trainer print [`ProgressLines`] in place of transformers' dictionaries and progress bars."""
    for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(callback)
    trainer.add_callback(progress)
