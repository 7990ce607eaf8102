"""SIGTERM, which clusters send before they take a machine away: save a checkpoint, then stop."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import RUN_AGAIN, Terminated


class SaveOnSigterm(TrainerCallback):
    """
    After SIGTERM, finishes the optimizer step, saves a checkpoint and stops, on all processes if it reached any.

    transformers' `enable_jit_checkpoint` does not replace it: it saves in the middle of a step, it stops only the
    processes that got the signal, and it ignores signals that arrive outside of training.
    """

    def __init__(self) -> None:
        self.received = False
        self.in_training = False
        self.stopped_at: int | None = None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        if not self.in_training:
            raise Terminated(f"Stopped by SIGTERM outside of training. {RUN_AGAIN}")
        self.received = True

    def received_anywhere(self, args: TrainingArguments) -> bool:
        """Whether any process got the signal; every process must ask."""
        received = torch.tensor(int(self.received), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return bool(received.item())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.in_training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After the last step, training ends and saves without being asked
        if self.received_anywhere(args) and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.in_training = False


@contextlib.contextmanager
def saving_on_sigterm() -> Iterator[SaveOnSigterm]:
    """Handle SIGTERM with a [`SaveOnSigterm`] inside the `with` block, and restore the previous handler after it."""
    callback = SaveOnSigterm()
    previous = signal.signal(signal.SIGTERM, callback.receive)
    try:
        yield callback
    finally:
        # None is a handler that was not installed from Python
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
