"""The run folder: taken by one command at a time, and only if what is in it fits the recipe."""

import contextlib
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock, Timeout

from ..artifacts import FINISHED, LOCK, RECIPE, write_whole
from ..columns import PREFERENCE_COLUMNS, ROW_INDEX, SAVED_ROW_INDEX, with_row_index
from ..data.sources import Rows
from ..recipe import Recipe, changed_keys, dump_yaml, parse_yaml
from .errors import RunError
from .processes import from_main


@contextlib.contextmanager
def claimed(recipe: Recipe, accept_changes: bool) -> Iterator[None]:
    """
    Create the run folder, or check the one that is there, and keep other commands out inside the `with` block.

    Args:
        recipe ([`~recipe.Recipe`]):
            Checked recipe.
        accept_changes (`bool`):
            Whether to continue in a folder that was started with another recipe.

    Raises:
        RunError: If the folder cannot be used.
    """
    problem, lock, folder = None, None, recipe.output_dir
    if PartialState().is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK, blocking=False)
            lock.acquire()
            problem = _refusal(recipe, accept_changes)
        except Timeout:
            problem = f"{folder}: another command is running in this folder."
        except (OSError, ValueError) as error:
            problem = f"`output_dir` {folder} cannot be written: {error}"
    problem = from_main(problem)
    if problem is not None:
        raise RunError(problem)
    try:
        _check_shared(folder)
        yield
    finally:
        if lock is not None:
            lock.release()


def _refusal(recipe: Recipe, accept_changes: bool) -> str | None:
    """Why the folder cannot be used for this recipe. If it can, saves the recipe in it and returns `None`."""
    folder, saved = recipe.output_dir, recipe.output_dir / RECIPE
    if not saved.is_file():
        others = [entry.name for entry in folder.iterdir() if entry.name != LOCK]
        if others:
            return f"`output_dir` {folder} holds other files ({others[0]}) and no run of ours. Choose a new folder."
    else:
        earlier = parse_yaml(saved.read_text(encoding="utf-8"))
        ignored = {"output_dir": None}
        changes = changed_keys({**earlier, **ignored}, {**recipe.resolved, **ignored})
        if not changes:
            return None
        trained = [*folder.glob(f"*/{FINISHED}"), *folder.glob("*/checkpoint-*")]
        if trained and not accept_changes:
            return (
                f"{folder} holds a run of another recipe; they differ in {', '.join(changes)}. Choose a new "
                "`output_dir`, or pass --accept-changes to go on here: finished stages stay as they are."
            )
        number = 1 + len(list(folder.glob("recipe.*.yaml")))
        shutil.copy(saved, folder / f"recipe.{number}.yaml")
    write_whole(saved, dump_yaml(recipe.resolved))
    return None


def _check_shared(folder: Path) -> None:
    """Check that all machines see the same run folder: every process loads what the main process saves there."""
    if PartialState().num_processes == 1:
        return
    token, note = from_main(uuid.uuid4().hex), folder / LOCK
    if PartialState().is_main_process:
        note.write_text(token)
    PartialState().wait_for_everyone()
    deadline = time.monotonic() + 10  # network disks may show a new file late
    while not (seen := note.is_file() and note.read_text() == token) and time.monotonic() < deadline:
        time.sleep(0.5)
    everyone = [None] * PartialState().num_processes
    torch.distributed.all_gather_object(everyone, seen)
    if not all(everyone):
        raise RunError(f"`output_dir` must be the same folder on every machine, got {folder}. Choose a shared disk.")


def save_evaluated_rows(rows: Rows | None, path: Path) -> None:
    """Save the evaluation rows as text, with the `row_index` under which their scores are saved."""
    if isinstance(rows, Dataset):
        rows = with_row_index(rows)
        names = [name for name in (*PREFERENCE_COLUMNS, ROW_INDEX) if name in rows.column_names]
        texts = rows.select_columns(names).rename_column(ROW_INDEX, SAVED_ROW_INDEX)
        write_whole(path, texts.with_format("arrow")[:])
