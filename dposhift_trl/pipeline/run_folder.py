"""The run folder: taken by one command at a time, and only if what is in it fits the recipe."""

import contextlib
import itertools
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock, Timeout

from ..artifacts import (
    AUDIT,
    EARLIER_RECIPE,
    EVAL_ROWS,
    FINISHED,
    LOCK,
    RECIPE,
    START,
    STATE,
    WANDB_ID,
    ArtifactError,
    read_mapping,
    write_whole,
)
from ..columns import (
    FILE_ROW,
    FILE_SOURCE,
    PREFERENCE_COLUMNS,
    ROW_INDEX,
    SAVED_ROW_INDEX,
    TEMPLATE_COLUMNS,
    with_row_index,
)
from ..data.config import ROW_ID
from ..data.errors import one_line
from ..data.origin import ROW, SOURCE
from ..data.sources import Rows
from ..integrity import is_last, stage_fault
from ..recipe import STAGES, Recipe, RecipeError, changed_keys, dump_yaml, read_yaml
from .checkpoints import last_complete_checkpoint
from .errors import RunError
from .processes import from_main


# Where the rows and the model come from; a stage that goes on compares what they contain
PLACES = ("data.path", "model.model_name_or_path", "data.mixture.path")
SAVED_NAMES = {ROW_INDEX: SAVED_ROW_INDEX, FILE_ROW: ROW}
# What a run shows of itself, and where; neither rows nor weights depend on it
SHOWN = re.compile(
    r"report|logging_format|sample_prompts|wandb\..*|dpo\.print_verdict|"
    r"(sft|dpo)\.(report_to|disable_tqdm|logging_steps|log_level|log_level_replica)"
)


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
        except FileExistsError:
            problem = f"`output_dir` must be a folder, got the file {folder}. Write another name."
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
            changes = recipe_changes(earlier, recipe.resolved)
            if not changes:
                write_whole(saved, dump_yaml(recipe.resolved))  # with the places of today
                return None
            if (refused := _unverified(changes, folder)) and not accept_changes:
                return (
                    f"{folder} was started with a different recipe: {', '.join(refused)} changed. Choose a new "
                    "`output_dir`, or pass --accept-changes to continue here; finished stages are not trained again."
                )
        free = (folder / EARLIER_RECIPE.format(number) for number in itertools.count(1))
        write_whole(next(path for path in free if not path.exists()), saved.read_bytes())
    write_whole(saved, dump_yaml(recipe.resolved))
    return None


def recipe_changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted keys that differ between the recipes of a run folder, except for those that moving the folder changes."""
    moved = changed_keys(_in_place(earlier), _in_place(now))
    changes = [key for key in changed_keys(earlier, now) if key in moved]
    only_places = "data.mixture" in changes and _sources(earlier) == _sources(now)
    return ["data.mixture.path" if only_places and key == "data.mixture" else key for key in changes]


def _sources(recipe: dict[str, Any]) -> Any:
    """The sources of a mixture without their places."""
    data = recipe.get("data")
    sources = data.get("mixture") if isinstance(data, dict) else None
    if not isinstance(sources, list):
        return sources
    return [{**source, "path": None} if isinstance(source, dict) else source for source in sources]


def _in_place(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as seen from its run folder: without its place, and the names that follow from it."""
    folder, model = Path(str(recipe.get("output_dir"))), recipe.get("model")
    values = {**recipe, "output_dir": None}
    # By default, or as a point of a sweep
    if values.get("run_name") in (folder.name, f"{folder.parent.name}-{folder.name}"):
        values["run_name"] = None
    if isinstance(model, dict) and (start := model.get("model_name_or_path")):
        values["model"] = {**model, "model_name_or_path": os.path.relpath(str(start), folder)}
    return values


def _unverified(changes: list[str], folder: Path) -> list[str]:
    """The changes that matter once a stage is trained. Of rows and model it is their content, if that is recorded."""
    changes = [key for key in changes if not SHOWN.fullmatch(key)]
    trained = {path.parent for path in (*folder.glob(f"*/{FINISHED}"), *folder.glob("*/checkpoint-*"))}
    if not trained:
        return []
    recorded = all((stage / START).is_file() for stage in trained)
    return [key for key in changes if not (recorded and key in PLACES)]


def _broken_file(folder: Path) -> str | None:
    """The first file in the folder that the run would read or replace and cannot, with what to do about it."""
    in_stages = [f"{stage}/{name}" for stage in STAGES for name in (FINISHED, START, STATE, WANDB_ID)]
    for name in (RECIPE, AUDIT, EVAL_ROWS, *in_stages):
        path = folder / name
        if path.exists() and not path.is_file():
            found = "folder" if path.is_dir() else "pipe or a device"
            return f"{path} must be a file, got a {found}. Move it away."
    for stage in STAGES:
        problem = _broken_stage(folder / stage)
        if problem is not None:
            return one_line(problem)
    return None


def _broken_stage(stage: Path) -> str | None:
    try:
        if (stage / START).exists():
            read_mapping(stage / START)
    except ArtifactError as error:
        return f"{error} Delete it to resume the stage without comparing its rows and model."
    try:
        if (stage / WANDB_ID).exists():
            _check_wandb_id((stage / WANDB_ID).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{stage / WANDB_ID} cannot be used: {error}. Delete it to start a new W&B run for the stage."
    if (stage / FINISHED).exists():
        checkpoint = last_complete_checkpoint(stage).newest
        again = f"finish the stage from {checkpoint.name}" if checkpoint else "train the stage again"
        try:
            fault = stage_fault(stage)
        except ArtifactError as error:
            return f"{error} Delete it to {again}."
        if fault is not None and not (checkpoint and is_last(checkpoint)):
            return f"{stage / FINISHED} is there, but {fault}. Restore the model, or delete {FINISHED} to {again}."
    return None


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


def save_evaluated_rows(rows: Rows | None, path: Path, sources: Sequence[str] = ()) -> None:
    """
    Save the evaluation rows before tokenization.

    With them the `row_index` under which their scores are saved, their `id` if they have one, and of several sources
    the `source` and the number of the `row` in it.

    Args:
        rows (`Dataset` or `IterableDataset`, *optional*):
            Rows of the audit. Those that are streamed are not saved.
        path (`Path`):
            Parquet file.
        sources (`Sequence[str]`, *optional*):
            Paths of the sources, from [`~data.origin.sources_of`].
    """
    if isinstance(rows, Dataset):
        rows = with_row_index(rows)
        names = [*PREFERENCE_COLUMNS, *TEMPLATE_COLUMNS, ROW_INDEX, ROW_ID]
        if len(sources) > 1:
            rows = rows.add_column(SOURCE, [sources[source] for source in rows[FILE_SOURCE]])
            names += [FILE_ROW, SOURCE]
        saved = rows.select_columns([name for name in names if name in rows.column_names])
        renames = {name: new for name, new in SAVED_NAMES.items() if name in saved.column_names}
        write_whole(path, saved.rename_columns(renames).with_format("arrow")[:])
