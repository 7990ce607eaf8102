"""Files of a run folder: their names, writing them atomically, and reading the mappings in them."""

import contextlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from .console import printable


# In the run folder
RECIPE = "recipe.yaml"
EARLIER_RECIPE = "recipe.{}.yaml"  # a number for each recipe that was replaced
AUDIT = "audit.json"
EVAL_ROWS = "eval_rows.parquet"
REPORT = "report"
GENERATIONS = "generations"
NEXT_STEPS = "next_steps.md"
PREFERENCES = "eval_pairs.jsonl"  # the evaluated pairs as conversations, for RewardBench
LOCK = ".lock"

# In the folder of a diagnosis, beside those of a run folder
DIAGNOSIS = "diagnosis.json"

# In the folder of a stage
START = "start.json"
FINISHED = "finished.json"
STATE = "trainer_state.json"
PAIRS = "pairs"  # <prefix>-<step>.parquet, the scores that an evaluation gave each pair
SAMPLES = "samples.jsonl"  # answers of policy and reference to a few evaluation prompts, at each evaluation
TOKENS = "tokens"  # in PAIRS, <prefix>-<step>.parquet: the tokens of the pairs that fell and rose most
WANDB_ID = "wandb_id"
MERGED = "merged"
EARLIER = "earlier"  # <n>: log and scores of an earlier training

# In the folders `generations` and `report`
STATISTICS = "statistics.json"
SIDE_BY_SIDE = "side_by_side.jsonl"
PAGE = "report.html"
FIGURES = "figures"
UNFINISHED = ".unfinished.tmp"  # what is being written to a folder


class ArtifactError(ValueError):
    """
    A file of a run folder that cannot be used. The message is one line.

    Args:
        path (`Path`):
            The file.
        reason (`str`):
            What is wrong with it, to be read after its name.
    """

    def __init__(self, path: Path, reason: str):
        self.reason = printable(" ".join(reason.split()))[:300]
        super().__init__(f"{printable(path)} {self.reason}.")


def write_whole(path: Path, content: str | bytes | pa.Table, temporary: Path | None = None) -> None:
    """
    Write a file atomically: it is complete or absent, even if the process is killed or the disk is full.

    Args:
        path (`Path`):
            The file. An existing one is replaced.
        content (`str`, `bytes` or `pyarrow.Table`):
            Text, written as UTF-8, bytes, or a table, written as Parquet.
        temporary (`Path`, *optional*):
            File in the same folder that is written first, `<name>.tmp` by default. Pass a unique name if several
            processes may write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a kill
        with open(temporary, "xb") as file:  # which follows no link to a file elsewhere, and waits for no pipe
            _write(file, content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """
    Write a folder atomically: it appears under its name once everything in it is written.

    Args:
        folder (`Path`):
            The folder, which must not exist.

    Yields:
        `Path`: Where to write it, `<name>.tmp` in the same parent folder.
    """
    unfinished = folder.with_name(folder.name + ".tmp")
    yield unfinished
    unfinished.replace(folder)


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder, so that nothing reads, replaces or deletes it. Returns its new place."""
    names = [f"damaged-{path.name}", *(f"damaged-{path.name}-{number}" for number in range(2, 1000))]
    place = next(place for name in names if not (place := path.with_name(name)).exists())
    path.rename(place)
    return place


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """
    Write several files of a folder, and of folders in it, together: those there are replaced once all are written.

    Args:
        folder (`Path`):
            The folder. Other files in it are kept.

    Yields:
        `Path`: Where to write them. They are moved in the order of their names, those in folders first.
    """
    unfinished, is_new = folder / UNFINISHED, not folder.exists()
    try:
        _remove(unfinished)  # left by a kill
        unfinished.mkdir(parents=True)
        yield unfinished
        found = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
        for name in sorted(found, key=lambda name: (-len(name.parts), name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).replace(folder / name)
    finally:
        with contextlib.suppress(OSError):
            _remove(unfinished)
            if is_new:
                folder.rmdir()  # if nothing was written


def set_earlier_aside(folder: Path) -> Path | None:
    """
    Move the log and the scores of an earlier training away, so that they are not taken for those of a new one.

    Args:
        folder (`Path`):
            Folder of a stage that starts anew.

    Returns:
        `Path` or `None`: The folder in it where they are now, or `None` if there is no such log.
    """
    if not (folder / STATE).exists():
        return None
    places = (folder / f"{EARLIER}-{number}" for number in itertools.count(1))
    place = next(place for place in places if not place.exists())
    place.mkdir()
    for name in (PAIRS, SAMPLES, STATE):  # the log last, so that a kill leaves it for the next call
        if (folder / name).exists():
            (folder / name).replace(place / name)
    return place


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _write(file: Any, content: str | bytes | pa.Table) -> None:
    if isinstance(content, pa.Table):
        pq.write_table(content, file)
    else:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """
    Read rows from a Parquet file. Messages that do not all have the same keys are JSON there, and are decoded.

    Args:
        path (`Path`):
            The file.
        limit (`int`, *optional*):
            Maximum number of rows.
    """
    table = pq.read_table(path).slice(0, limit)
    rows: list[dict[str, Any]] = table.to_pylist()
    return [{field.name: _decoded(row[field.name], field.type) for field in table.schema} for row in rows]


def _decoded(value: Any, of_type: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(of_type, pa.JsonType):
        return json.loads(value)
    if pa.types.is_list(of_type):
        return [_decoded(item, of_type.value_type) for item in value]
    if pa.types.is_struct(of_type):
        return {field.name: _decoded(value[field.name], field.type) for field in of_type}
    return value


def check_file(path: Path) -> None:
    """
    Check that a path leads to a file, since opening a FIFO or a device may wait for ever.

    Raises:
        ArtifactError: If it does not exist, or is not a file.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(path, "does not exist") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise ArtifactError(path, f"must be a file, got {kinds.get(stat.S_IFMT(mode), 'a device')}")


def read_text(path: Path) -> str:
    """
    Read a text file.

    Raises:
        ArtifactError: If it does not exist, is not a file, or is not UTF-8.
    """
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ArtifactError(path, "is not UTF-8 text") from None
    except OSError as error:
        raise ArtifactError(path, f"cannot be read: {error.strerror or error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """
    Read a mapping from a JSON file (`.json`) or a YAML file (any other suffix).

    Raises:
        ArtifactError: If the file cannot be read, is empty, is not valid, or does not contain a mapping.
    """
    text = read_text(path)
    if not text.strip():
        raise ArtifactError(path, "is empty")
    language = "JSON" if path.suffix == ".json" else "YAML"
    try:
        content = json.loads(text) if language == "JSON" else YAML(typ="safe", pure=True).load(text)
    except Exception as error:  # the YAML library converts some values unchecked
        raise ArtifactError(path, f"is not valid {language}: {str(error) or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise ArtifactError(path, f"must contain a mapping, got {type(content).__name__}")
    return content
