"""Whether saved models and checkpoints are whole, judged by their files, without loading any of them."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .artifacts import FINISHED, MERGED, STATE, ArtifactError, read_mapping


WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Accelerate's name for FSDP's own format: a file with `FULL_STATE_DICT`, a folder with `SHARDED_STATE_DICT`
FSDP_WEIGHTS = "pytorch_model_fsdp*"


def read_step(checkpoint: Path) -> tuple[int, int]:
    """
    Read the step of a checkpoint, and the number of steps of its training, from the trainer's state.

    Raises:
        ArtifactError: If there is no valid trainer's state, which is the last file written to a checkpoint.
    """
    path = checkpoint / STATE
    state = read_mapping(path)
    step, last_step = state.get("global_step"), state.get("max_steps")
    if not isinstance(step, int) or not isinstance(last_step, int) or not isinstance(state.get("log_history"), list):
        raise ArtifactError(path, "must contain `global_step`, `max_steps` and `log_history`")
    return step, last_step


def is_last(checkpoint: Path) -> bool:
    """
    Whether nothing is left to train after a checkpoint.

    Raises:
        ArtifactError: As [`read_step`].
    """
    step, last_step = read_step(checkpoint)
    return 0 < last_step <= step


def weights_fault(folder: Path) -> str | None:
    """
    What is missing or cut of the weights in a folder: whole, sharded or of adapters, saved by transformers, PEFT,
    FSDP or DeepSpeed.
    """
    files = [folder / name for name in WEIGHTS if (folder / name).exists()]
    for name in INDEXES:
        if (folder / name).exists():
            try:
                files += [folder / shard for shard in sorted(set(read_mapping(folder / name)["weight_map"].values()))]
            except (ArtifactError, KeyError, AttributeError, TypeError):
                return f"{name} is broken"
    fsdp = sorted(folder.glob(FSDP_WEIGHTS))
    if not files and not fsdp:
        expected = WEIGHTS[(folder / "adapter_config.json").exists()]
        return _deepspeed_fault(folder) if _has_deepspeed(folder) else f"{expected} is missing"
    files += sorted(folder.glob("*/adapter_model.*"))  # of further adapters, such as the frozen reference
    return _first_fault(folder, [*files, *fsdp])


def training_state_fault(checkpoint: Path, *, processes: int | None = None, scales_loss: bool = False) -> str | None:
    """
    What is missing or cut of the state with which training goes on as if it had not been interrupted.

    transformers goes on without any of it: with new moments of the optimizer, the learning rate of the first step, or
    other random numbers.

    Args:
        checkpoint (`Path`):
            The checkpoint.
        processes (`int`, *optional*):
            Number of processes that wrote it, each with random numbers of its own. `None` if it is unknown.
        scales_loss (`bool`, *optional*, defaults to `False`):
            Whether training scales the loss, as it does with `fp16`.
    """
    if _has_deepspeed(checkpoint):
        # With the state of optimizer and loss scale, and of its own scheduler; transformers requires any other
        fault, files = _deepspeed_fault(checkpoint), sorted(checkpoint.glob("scheduler.pt"))
        if fault is not None:
            return fault
    else:
        files = [*_found(checkpoint, r"(rank\d+-of-\d+-)?optimizer\.pt|optimizer(_\w+)?(\.bin)?")]
        if not files:
            return "optimizer.pt is missing"
        files.append(checkpoint / "scheduler.pt")
        if scales_loss or (checkpoint / "scaler.pt").exists():
            files.append(checkpoint / "scaler.pt")
    return _first_fault(checkpoint, [*files, *_random_states(checkpoint, processes)])


def stage_fault(folder: Path) -> str | None:
    """
    What is missing or cut of the model of a stage that has finished.

    Raises:
        ArtifactError: If `finished.json` cannot be read.
    """
    names = read_mapping(folder / FINISHED).get("files")  # recorded at the end of the stage
    for name in names if isinstance(names, list) else ():
        if not (folder / str(name)).is_file():
            return f"{name} is missing"
    fault = weights_fault(folder)
    if fault is None and (folder / MERGED).is_dir() and (fault := weights_fault(folder / MERGED)) is not None:
        fault = f"{MERGED}/{fault}"
    return fault


def model_files(folder: Path) -> list[str]:
    """Names of the files of a saved model and its tokenizer, for `finished.json`."""
    patterns = ("*.safetensors", "*model*.bin", "*.index.json", "config.json", "adapter_config.json", "tokenizer*")
    found = {path.relative_to(folder) for root in (folder, folder / MERGED) for x in patterns for path in root.glob(x)}
    return sorted(path.as_posix() for path in found)


def _has_deepspeed(folder: Path) -> bool:
    return bool(_found(folder, r"global_step\d+|latest"))


def _deepspeed_fault(folder: Path) -> str | None:
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        states = [path for path in (folder / tag).rglob("*") if path.is_file()] if tag else []
    except (OSError, ValueError):
        return "latest is missing"
    if not states:
        return f"{tag or 'latest'} is empty"
    empty = [path for path in states if path.stat().st_size == 0]
    return f"{empty[0].relative_to(folder)} is empty" if empty else None


def _random_states(checkpoint: Path, processes: int | None) -> list[Path]:
    """The files of random states that the processes of a training wrote, whether they are there or not."""
    numbered = _found(checkpoint, r"rng_state_\d+\.pth")
    if processes is None and numbered and not (checkpoint / "rng_state.pth").exists():
        # Whoever has a number had a neighbor
        processes = max(2, *(1 + int(re.findall(r"\d+", path.name)[0]) for path in numbered))
    if processes is None or processes == 1:
        return [checkpoint / "rng_state.pth"]
    return [checkpoint / f"rng_state_{number}.pth" for number in range(processes)]


def _found(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name)) if folder.is_dir() else []


def _first_fault(folder: Path, paths: list[Path]) -> str | None:
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():  # FSDP's; `torch.distributed.checkpoint` writes the metadata last
            names = {inner.name for inner in path.iterdir()}
            if not names or (".metadata" not in names and any(inner.endswith(".distcp") for inner in names)):
                return f"{name} is incomplete"
        elif not path.is_file():
            return f"{name} is missing"
        elif not _is_whole(path, _check_safetensors if path.suffix == ".safetensors" else _check_zip):
            return f"{name} is cut or broken"
    return None


def _is_whole(path: Path, check: Callable[[Path], bool]) -> bool:
    try:
        return check(path)
    except Exception:  # the content may be anything
        return False


def _check_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if length > size:
            return False
        header: dict[str, Any] = json.loads(file.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0) == size


def _check_zip(path: Path) -> bool:
    """Whether a file of `torch.save`, a ZIP archive, has the table of contents at its end."""
    with zipfile.ZipFile(path) as archive:
        return bool(archive.namelist())
