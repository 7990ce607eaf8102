"""One voice and one view for all processes of a run."""

import sys
from typing import TypeVar

import torch
from accelerate import PartialState


T = TypeVar("T")


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    if PartialState().num_processes > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        value = box[0]
    return value


def say(message: str) -> None:
    """Print a line, on the main process only."""
    if PartialState().is_main_process:
        print(message, flush=True)


def complain(error: BaseException) -> None:
    """Print an error to stderr, on the main process only."""
    if PartialState().is_main_process:
        print(error, file=sys.stderr)
