"""One voice and one view for all processes of a run."""

from typing import TypeVar

import torch
from accelerate import PartialState

from .. import console


T = TypeVar("T")


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    if PartialState().num_processes > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        value = box[0]
    return value


def say(*lines: object) -> None:
    """Print lines, on the main process only."""
    if PartialState().is_main_process:
        console.say(*lines)


def say_wrapped(*paragraphs: str, indent: int = 0) -> None:
    """Print paragraphs that fit the terminal, on the main process only."""
    for paragraph in paragraphs:
        say(*console.wrapped(paragraph, indent))


def complain(error: BaseException) -> None:
    """Print an error to stderr, on the main process only; a recipe's mistakes are one line each."""
    if PartialState().is_main_process:
        console.complain(*str(error).split("\n"))
