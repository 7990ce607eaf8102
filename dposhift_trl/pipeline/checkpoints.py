"""Checkpoints of a stage: the one to resume from, why the others are not used, and a disk that is full."""

import contextlib
import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from ..artifacts import ArtifactError
from ..integrity import is_last, read_step, training_state_fault, weights_fault
from .errors import RunError, WriteError


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
# safetensors and `torch.save` report no errno
DISK_MESSAGES = (
    "I/O error",
    "No space left",
    "File too large",
    "PytorchStreamWriter failed",
    "iostream error",
    "unexpected pos",
)
# The methods in which a `Trainer` reads a checkpoint
LOADING = {
    *("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state", "_load_best_model"),
    *("_load_callback_state", "load_from_json", "deepspeed_load_checkpoint"),
}


class Checkpoints(NamedTuple):
    """
    The checkpoints of a stage.

    Args:
        newest (`Path` or `None`):
            The newest one from which the stage can go on exactly.
        interrupted (`list[Path]`):
            Newer ones that were never written to their end, newest first.
        damaged (`dict[Path, str]`):
            Newer ones that were, but miss something, and what, newest first.
    """

    newest: Path | None
    interrupted: list[Path]
    damaged: dict[Path, str]


def last_complete_checkpoint(folder: Path, *, processes: int | None = None, scales_loss: bool = False) -> Checkpoints:
    """
    Find the newest checkpoint from which a stage can go on exactly.

    The trainer's state is the last file written to a checkpoint. The last checkpoint of a training needs only weights.

    Args:
        folder (`Path`):
            Folder of the stage.
        processes (`int`, *optional*), scales_loss (`bool`, *optional*, defaults to `False`):
            As for [`~integrity.training_state_fault`].
    """
    steps = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    found = Checkpoints(None, [], {})
    for step in sorted(steps, reverse=True):
        path = steps[step]
        try:
            complete = read_step(path)[0] == step
        except ArtifactError:
            complete = False
        if not complete:
            found.interrupted.append(path)
            continue
        fault = weights_fault(path)
        if fault is None and not is_last(path):
            fault = training_state_fault(path, processes=processes, scales_loss=scales_loss)
        if fault is None:
            return found._replace(newest=path)
        found.damaged[path] = fault
    return found


@contextlib.contextmanager
def explaining_load_errors(name: str, checkpoint: Path | None) -> Iterator[None]:
    """Raise a one-line [`RunError`] if a checkpoint cannot be read, which each library reports with its own errors."""
    try:
        yield
    except Exception as error:
        readers = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.name in LOADING]
        if not readers or isinstance(error, torch.OutOfMemoryError):
            raise
        if readers[0] == "_load_best_model":
            what = "the best checkpoint"
            remedy = "pass `load_best_model_at_end=false` for this stage and --accept-changes to save the last weights"
        else:
            what, remedy = str(checkpoint), "move the folder away to go on from an older checkpoint"
        reason = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
        raise RunError(
            f"Stage `{name}` cannot load {what}: {reason}. If it is damaged, restore it, or {remedy}."
        ) from error


@contextlib.contextmanager
def explaining_disk_errors(folder: Path, stage: str | None = None) -> Iterator[None]:
    """
    Raise a one-line [`WriteError`] if the disk cannot be written, which every library reports differently.

    Args:
        folder (`Path`):
            Folder that is written to, of a stage or of the run.
        stage (`str`, *optional*):
            Name of the stage whose checkpoints are in the folder.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, (RunError, WriteError)) or not _is_disk_error(error):
            raise
        saved = ""
        if stage is not None:
            checkpoint = last_complete_checkpoint(folder).newest
            saved = f" The last complete checkpoint is {checkpoint}." if checkpoint else " No checkpoint is saved yet."
        raise WriteError(
            f"{stage or 'The run'}: cannot write to {folder}: {' '.join(str(error).split())}.{saved} Free some space "
            "and run the same command again."
        ) from error


def _is_disk_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    return any(text in str(error) for text in DISK_MESSAGES)
