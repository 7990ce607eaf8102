"""Whether a stage is finished, or where it goes on, and whether that is exactly what was interrupted."""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import SFTConfig

from ..artifacts import FINISHED, START, ArtifactError, read_mapping, set_aside, write_whole
from ..config import DPOShiftConfig
from ..integrity import is_last, read_step, stage_fault
from .checkpoints import last_complete_checkpoint
from .errors import RunError
from .processes import from_main, say
from .start import Start


def is_finished(name: str, folder: Path, start: Start) -> bool:
    """
    Whether a stage has finished and its model is still there. Says so, and what has changed since.

    Args:
        name (`str`), folder (`Path`):
            Name and folder of the stage.
        start (`Start`):
            What it would start from now, from [`~pipeline.start.stage_start`].
    """
    finished, lines = from_main(_finished(name, folder, start) if PartialState().is_main_process else (False, []))
    for line in lines:
        say(line)
    return finished


def resume_point(
    name: str, folder: Path, args: SFTConfig | DPOShiftConfig, start: Start, accept_changes: bool
) -> Path | None:
    """
    Find the checkpoint from which a stage goes on, and record what it starts from.

    Newer checkpoints that are damaged are moved out of the way: left in place, their files would be mixed with those
    of the checkpoints that replace them.

    Args:
        name (`str`), folder (`Path`), args (`SFTConfig` or [`DPOShiftConfig`]):
            Name, folder and settings of the stage.
        start (`Start`):
            What it starts from now, from [`~pipeline.start.stage_start`].
        accept_changes (`bool`):
            Whether to go on if it started from something else.

    Returns:
        `Path` or `None`: The checkpoint, or `None` to start the stage.

    Raises:
        RunError: If the stage was interrupted, and cannot go on exactly.
    """
    problem: str | None = None
    checkpoint: Path | None = None
    lines: list[str] = []
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        now = {**start, "processes": PartialState().num_processes}
        try:
            checkpoint, lines = _resume_point(name, folder, args, now, accept_changes)
        except (RunError, ArtifactError) as error:
            problem = str(error)
    problem, checkpoint, lines = from_main((problem, checkpoint, lines))
    if problem is not None:
        raise RunError(problem)
    for line in lines:
        say(line)
    return checkpoint


def _finished(name: str, folder: Path, start: Start) -> tuple[bool, list[str]]:
    if not (folder / FINISHED).is_file():
        return False, []
    fault = stage_fault(folder)
    if fault is not None:
        (folder / FINISHED).unlink()
        return False, [f"{name}: finished before, but {fault}, so the model is saved again"]
    lines = [f"{name}: finished before, skipped ({folder})"]
    if (folder / START).exists() and (changed := _changes(read_mapping(folder / START), start)):
        lines.append(f"{name}: {changed} changed since it was trained. To train it again, choose a new `output_dir`.")
    return True, lines


def _resume_point(
    name: str, folder: Path, args: SFTConfig | DPOShiftConfig, now: dict[str, Any], accept_changes: bool
) -> tuple[Path | None, list[str]]:
    before = read_mapping(folder / START) if (folder / START).exists() else None
    processes = before.get("processes") if before else None
    processes = processes if isinstance(processes, int) else None
    checkpoint, interrupted, damaged = last_complete_checkpoint(folder, processes=processes, scales_loss=args.fp16)
    lines = [f"{name}: {path} is incomplete, skipped" for path in interrupted]
    if checkpoint is None:
        lines += _start_anew(name, folder, args.save_only_model, damaged)
        if args.save_only_model and args.save_strategy != "no":
            lines.append(
                f"{name}: `save_only_model` saves no optimizer, so the stage starts anew if it is interrupted"
            )
        write_whole(folder / START, json.dumps(now, indent=2))
        return None, lines

    step, last_step = read_step(checkpoint)
    if 0 < args.max_steps < step or (is_last(checkpoint) and 0 < args.max_steps != last_step):
        raise RunError(
            f"Stage `{name}` cannot be resumed: `max_steps` is {args.max_steps} now, and {checkpoint} is of step "
            f"{step} of {last_step}. Set `max_steps` as it was, or choose a new `output_dir`."
        )
    changed = _changes(now if before is None else before, now)
    if changed and not accept_changes and not is_last(checkpoint):
        raise RunError(
            f"Stage `{name}` cannot be resumed: {changed} changed since it started. Restore what it started from, "
            "choose a new `output_dir`, or pass --accept-changes to go on with what is there now."
        )
    if changed:
        lines.append(f"{name}: {changed} changed since it {'was trained' if is_last(checkpoint) else 'started'}")
    if before is None:
        lines.append(f"{name}: what it started from was not recorded, so its rows and model are not compared")
    for path, fault in damaged.items():
        lines.append(f"{name}: {path} is damaged ({fault}), moved to {set_aside(path)}")
    if not is_last(checkpoint):
        write_whole(folder / START, json.dumps(now, indent=2))
    return checkpoint, lines


def _start_anew(name: str, folder: Path, only_models: bool, damaged: dict[Path, str]) -> list[str]:
    """Lines about checkpoints of which none can be resumed from, unless they would be lost without a word."""
    if not damaged:
        return []
    if only_models:
        return [f"{name}: the checkpoints hold only models (`save_only_model`), so the stage starts anew"]
    path, fault = next(iter(damaged.items()))
    raise RunError(
        f"Stage `{name}` cannot be resumed: in {path}, {fault}. Restore it, or delete the checkpoints in {folder} to "
        "start the stage anew."
    )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(name for name, value in now.items() if before.get(name) != value)
