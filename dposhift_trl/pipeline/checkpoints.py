"""Checkpoints of a stage: the last one to resume from, and a disk that is full."""

import contextlib
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from .errors import WriteError


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


def last_complete_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """
    Find the newest complete checkpoint, and the incomplete ones that are newer.

    The trainer state is the last file written to a checkpoint, so a checkpoint is complete if it can be parsed.

    Args:
        folder (`Path`):
            Folder of the stage.

    Returns:
        `tuple[Path or None, list[Path]]`: The checkpoint to resume from and the incomplete ones, newest first.
    """
    checkpoints = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    incomplete: list[Path] = []
    for step in sorted(checkpoints, reverse=True):
        try:
            state = json.loads((checkpoints[step] / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if state["global_step"] == step:
                return checkpoints[step], incomplete
        except (OSError, ValueError, KeyError, TypeError):
            pass
        incomplete.append(checkpoints[step])
    return None, incomplete


@contextlib.contextmanager
def explaining_disk_errors(name: str, folder: Path) -> Iterator[None]:
    """Raise a one-line [`WriteError`] if the disk cannot be written, which every library reports differently."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        is_disk_error = isinstance(error, OSError) and error.errno in DISK_ERRORS
        is_disk_error |= not isinstance(error, OSError) and any(text in str(error) for text in DISK_MESSAGES)
        if not is_disk_error:
            raise
        checkpoint = last_complete_checkpoint(folder)[0]
        raise WriteError(
            f"{name}: cannot write to {folder}: {' '.join(str(error).split())}. "
            + (f"The last complete checkpoint is {checkpoint}" if checkpoint else "No checkpoint is saved yet")
            + ". Free some space and run the same command again."
        ) from error
