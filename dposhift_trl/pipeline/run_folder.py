"""The run folder: taken by one command at a time, and only if what is in it fits the recipe."""

import contextlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock, Timeout

from ..artifacts import AUDIT, EVAL_ROWS, FINISHED, LOCK, RECIPE, WANDB_ID, write_whole
from ..columns import PREFERENCE_COLUMNS, ROW_INDEX, SAVED_ROW_INDEX, with_row_index
from ..data.errors import one_line
from ..data.sources import Rows
from ..recipe import STAGES, Recipe, RecipeError, changed_keys, dump_yaml, read_yaml
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
    broken = _broken_file(folder)
    if broken is not None:
        return broken
    if not saved.exists():
        # A command that was killed while it saved the recipe leaves the second one
        others = [entry.name for entry in folder.iterdir() if entry.name not in (LOCK, f"{RECIPE}.tmp")]
        if others:
            return f"`output_dir` must be empty or a run folder, got {folder} with {others[0]}. Choose a new folder."
    else:
        try:
            earlier = read_yaml(str(saved))
        except RecipeError as error:
            if not accept_changes:
                return (
                    f"{str(error).rstrip('.')}. It is the recipe that this run folder was started with. Restore it, "
                    "choose a new `output_dir`, or pass --accept-changes to continue with the recipe given."
                )
        else:
            ignored = {"output_dir": None}
            changes = changed_keys({**earlier, **ignored}, {**recipe.resolved, **ignored})
            if not changes:
                return None
            trained = [*folder.glob(f"*/{FINISHED}"), *folder.glob("*/checkpoint-*")]
            if trained and not accept_changes:
                return (
                    f"{folder} was started with a different recipe: {', '.join(changes)} changed. Choose a new "
                    "`output_dir`, or pass --accept-changes to continue here; finished stages are not trained again."
                )
        number = 1 + len(list(folder.glob("recipe.*.yaml")))
        shutil.copy(saved, folder / f"recipe.{number}.yaml")
    write_whole(saved, dump_yaml(recipe.resolved))
    return None


def _broken_file(folder: Path) -> str | None:
    """The first file in the folder that the run would read or replace and cannot, with what to do about it."""
    in_stages = [f"{stage}/{name}" for stage in STAGES for name in (FINISHED, WANDB_ID)]
    for name in (RECIPE, AUDIT, EVAL_ROWS, *in_stages):
        path = folder / name
        if path.exists() and not path.is_file():
            found = "folder" if path.is_dir() else "pipe or a device"
            return f"{path} must be a file, got a {found}. Move it away."
    for stage in STAGES:
        for name, check, remedy in (
            (FINISHED, _check_summary, "Delete it to finish the stage from its last checkpoint."),
            (WANDB_ID, _check_wandb_id, "Delete it to start a new W&B run for the stage."),
        ):
            path = folder / stage / name
            try:
                if path.exists():
                    check(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                return one_line(f"{path} cannot be used: {error}. {remedy}")
    return None


def _check_summary(text: str) -> None:
    if not isinstance(json.loads(text), dict):
        raise ValueError("not a JSON object")


def _check_wandb_id(text: str) -> None:
    if not re.fullmatch(r"[^/\\#?%:\s]{1,128}", text.strip()) or not text.strip().isprintable():
        raise ValueError(f"not the id of a W&B run, {text[:40]!r}")


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
