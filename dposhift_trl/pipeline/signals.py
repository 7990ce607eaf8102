"""Signals that stop a run, from a user, a terminal or a cluster: save a checkpoint, then stop."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..command import Terminated, handling
from .errors import RUN_AGAIN


ECHO = 1.0  # seconds within which a signal may arrive twice, as from `timeout`, which also sends it to the group


class SaveOnSignal(TrainerCallback):
    """
    After a signal, finishes the optimizer step or evaluation, saves a checkpoint and stops, on all processes.

    A second Ctrl-C stops at once, and so does any signal outside of training, where there is nothing to save.

    transformers' `enable_jit_checkpoint` does not replace it: it saves in the middle of a step, it stops only the
    processes that got the signal, it ignores signals that arrive outside of training, and it only knows SIGTERM.
    """

    def __init__(self) -> None:
        self.received = 0  # the first signal
        self.heard = -ECHO
        self.has_begun = False
        self.in_training = False
        self.stopping = False

    def receive(self, number: int) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if now < self.heard + ECHO:
            return
        self.heard, again = now, bool(self.received)
        self.received = self.received or number
        if not self.in_training:
            raise Terminated(number, f"Stopped by {_name(number)} outside of training. {RUN_AGAIN}")
        if number == signal.SIGINT and again:
            raise Terminated(number, f"Stopped by {_name(number)} without saving. {RUN_AGAIN}")
        if number == signal.SIGINT and PartialState().is_main_process:
            # `print` may be what the signal has interrupted
            with contextlib.suppress(OSError):
                os.write(2, b"\nSaving after the current step or evaluation. Press Ctrl-C again to stop at once.\n")

    def received_anywhere(self, args: TrainingArguments) -> int:
        """The signal that any process got, or 0; every process must ask."""
        if args.world_size == 1:
            return self.received
        received = torch.tensor(self.received, device=args.device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return int(received.item())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.has_begun = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.in_training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _within_epoch(state):  # what is due at the end of an epoch follows its last step
            self._stop_if_received(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_if_received(args, state, control)
        if self.stopping and _within_epoch(state):
            control.should_log = False  # what is due at its end is not due yet

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # With `save_strategy: best` the result of the evaluation then replaces `should_save`
        if self.in_training and args.save_strategy != SaveStrategy.BEST:
            self._stop_if_received(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _within_epoch(state):
            self._stop_if_received(args, state, control)
        if self.stopping:
            PartialState().wait_for_everyone()  # each process saves its own random state
            stage, name = Path(args.output_dir).name, _name(self.received)
            raise Terminated(
                self.received, f"{stage}: stopped by {name}, saved at step {state.global_step}. {RUN_AGAIN}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.has_begun, self.in_training = False, self.stopping

    def _stop_if_received(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        # After the last step, training ends and saves without being asked
        if state.global_step < state.max_steps and (received := self.received_anywhere(args)):
            self.received = received
            self.stopping = control.should_save = control.should_training_stop = True


def _within_epoch(state: TrainerState) -> bool:
    return state.epoch is None or state.epoch % 1 != 0


def _name(number: int) -> str:
    return signal.Signals(number).name


@contextlib.contextmanager
def saving_on_signals() -> Iterator[SaveOnSignal]:
    """Handle signals with a [`SaveOnSignal`] inside the `with` block, and restore the previous handlers after it."""
    callback = SaveOnSignal()
    with handling(callback.receive):
        yield callback
