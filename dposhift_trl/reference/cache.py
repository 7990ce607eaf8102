"""
Cache of reference log-probabilities on disk: computed once, and shared by all runs with the same key.

`python -m dposhift_trl.reference list` shows the stored entries, and `clear` removes them.
"""

import contextlib
import json
import logging
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.constants import HF_HOME

from .. import __version__
from ..artifacts import write_whole
from ..columns import REFERENCE_LOGPS
from ..console import printable
from .fingerprint import stable_hash


logger = logging.getLogger(__name__)

HEADER, CHECKSUM = b"dposhift_trl", b"dposhift_trl.checksum"
# <key>.parquet, its parts <key>.<first row>-<end>.parquet until it is complete, and <key>.<random>.tmp while writing
FILE_NAME = re.compile(r"([0-9a-f]{32})(?:\.parquet|\.(\d{9,})-(\d{9,})\.parquet|\.[0-9a-f]{32}\.tmp)")
POLL_SECONDS = 20  # far below the timeout of the collective in which the other processes wait

Scores = tuple[np.ndarray, np.ndarray]


class ReferenceCacheError(OSError):
    """The cache folder cannot be read or written."""


def default_folder() -> Path:
    """
    `DPOSHIFT_CACHE` if it is set, else `dposhift_trl/reference` in the Hugging Face home (`HF_HOME`).

    Raises:
        ReferenceCacheError: If that is in the home of a user that has none.
    """
    folder = Path(os.environ.get("DPOSHIFT_CACHE") or Path(HF_HOME, "dposhift_trl", "reference"))
    try:
        return folder.expanduser()
    except RuntimeError:
        raise ReferenceCacheError(
            f"The cache of reference scores, {folder}, needs a home directory, and this user has none. Set the "
            "environment variable HOME, HF_HOME, or DPOSHIFT_CACHE."
        ) from None


def cached_reference_logps(
    key: str,
    num_rows: int,
    score: Callable[[range], tuple[torch.Tensor, torch.Tensor]],
    *,
    description: dict[str, Any],
    folder: str | Path | None = None,
    chunk_rows: int = 1024,
    confirm: Callable[[dict[tuple[int, int], Scores]], str | None] | None = None,
) -> Scores:
    """
    Read reference log-probabilities from disk, and first score the rows that are missing there.

    Scores are stored in `<key>.parquet`. Until all rows are scored, each finished chunk has a file of its own, and an
    interrupted computation continues from there. Files are written whole or not at all, with a checksum, and the rows
    of a damaged file are scored again. If several runs need the same scores, one computes them and the others wait. If
    it is killed, another one continues.

    All processes of a run must call this function with the same arguments. Only the main process accesses the disk.

    Args:
        key (`str`):
            Key from [`reference_key`].
        num_rows (`int`):
            Number of rows of the dataset.
        score (`Callable`):
            Takes a range of rows and returns the log-probabilities of their chosen and of their rejected answers, in
            nats, each of shape `(len(rows),)`. Every process calls it with the same range and must get all values.
        description (`dict[str, Any]`):
            Information that `python -m dposhift_trl.reference list` shows, such as the path of the model.
        folder (`str` or `Path`, *optional*):
            Cache folder. Defaults to [`default_folder`].
        chunk_rows (`int`, *optional*, defaults to `1024`):
            Number of rows per chunk, which is the most that an interruption can lose.
        confirm (`Callable`, *optional*):
            Takes the scores that were found, by first row and end, and returns how they differ from what `score`
            returns, or `None`. Every process calls it. Scores that differ are scored again.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Log-probabilities of the chosen and of the rejected answers, in nats, bit for
        bit as scored. Half precision is converted to float32. Shape: `(num_rows,)` each.

    Raises:
        ReferenceCacheError: On every process, if the folder cannot be read or written.
        ValueError: If processes pass different keys, or if `score` returns too few values or non-finite ones.
    """
    if len(set(gather_object([key]))) > 1:
        raise ValueError(
            "`key` must be the same on every process, got different keys. Load the same reference and rows on every "
            "process."
        )
    entry, whole = _CacheEntry(Path(folder or default_folder()), key, num_rows, description), (0, num_rows)
    confirm = confirm or (lambda found: None)
    values = entry.on_main_process(entry.read, range(num_rows))
    difference = None if values is None else confirm({whole: values})
    if values is not None and difference is None:
        return values
    lock, seconds = filelock.FileLock(entry.folder / f"{key}.lock"), 0
    try:
        while not entry.on_main_process(entry.acquire, lock, seconds):
            seconds = POLL_SECONDS
        parts = entry.on_main_process(entry.find) if difference is None else {}
        difference = confirm(parts) if parts else difference
        if difference is not None:
            entry.on_main_process(entry.discard, difference)
            parts = {}
        if whole in parts:
            return parts[whole]
        for rows in _missing(parts, num_rows, chunk_rows):
            parts[rows.start, rows.stop] = validated(score(rows), rows)
            entry.on_main_process(entry.write, rows, parts[rows.start, rows.stop])
        chosen, rejected = zip(*(parts[bounds] for bounds in sorted(parts)), strict=True)
        values = np.concatenate(chosen), np.concatenate(rejected)
        entry.on_main_process(entry.finish, values)
        return values
    finally:
        lock.release()


@dataclass
class _CacheEntry:
    """The files of one key, which only the main process reads and writes."""

    folder: Path
    key: str
    num_rows: int
    description: dict[str, Any]
    reported: set[Path] = field(default_factory=set)  # files that cannot be used

    def on_main_process(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function on the main process. Its result is returned, or its exception raised, on every process."""
        outcome: list[Any] = [None, None]
        if PartialState().is_main_process:
            try:
                outcome[0] = function(*args)
            except BaseException as exception:  # including signals, so that no process waits forever
                outcome[1] = exception
        result, error = broadcast_object_list(outcome)
        if isinstance(error, OSError):
            raise ReferenceCacheError(
                f"Reference log-probabilities cannot be read or written in {self.folder}: {error}. Free disk space, "
                "fix the permissions, or set `DPOSHIFT_CACHE` to another folder."
            ) from error
        if error is not None:
            raise error
        return result

    def path(self, rows: range) -> Path:
        """The file with the scores of these rows."""
        part = "" if len(rows) == self.num_rows else f".{rows.start:09d}-{rows.stop:09d}"
        return self.folder / f"{self.key}{part}.parquet"

    def acquire(self, lock: filelock.BaseFileLock, seconds: float) -> bool:
        """Try to lock the entry, and log once if another run has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=seconds)
            return True
        if not seconds:
            logger.warning(
                "Waiting for another run, which is computing %s.", printable(self.path(range(self.num_rows)))
            )
        return False

    def read(self, rows: range) -> Scores | None:
        """Scores of these rows, or `None` if their file is missing or damaged."""
        path = self.path(rows)
        try:
            header, values = load_entry(path)
            if (header["key"], header["rows"]) != (self.key, [rows.start, rows.stop, self.num_rows]):
                problem = "belongs to another key or to other rows"
            elif any(len(x) != len(rows) or x.dtype.kind != "f" or not np.isfinite(x).all() for x in values):
                problem = "holds values that are no scores of its rows"
            else:
                return values
        except FileNotFoundError:
            return None
        except ValueError as error:
            problem = str(error)
        if path not in self.reported:
            logger.warning("%s %s; its %d rows are scored again.", printable(path), problem, len(rows))
        self.reported.add(path)
        return None

    def find(self) -> dict[tuple[int, int], Scores]:
        """Scores of all rows, otherwise of the finished chunks, by first row and end."""
        found, end = {}, 0
        if (values := self.read(range(self.num_rows))) is not None:
            return {(0, self.num_rows): values}
        for start, stop in [
            (int(file[2]), int(file[3])) for file in entries(self.folder).get(self.key, []) if file[2]
        ]:
            # Parts overlap only if two runs computed them at once, on a file system without working locks
            if start >= end and (values := self.read(range(start, stop))) is not None:
                found[start, stop], end = values, stop
        return found

    def discard(self, difference: str) -> None:
        """Remove scores that are not those of the reference."""
        path = printable(self.path(range(self.num_rows)))
        logger.warning("%s is not of this reference: %s; its rows are scored again.", path, difference)
        for file in entries(self.folder).get(self.key, []):
            (self.folder / file.string).unlink(missing_ok=True)

    def write(self, rows: range, values: Scores) -> None:
        """Store the scores of these rows."""
        header = {
            "key": self.key,
            "rows": [rows.start, rows.stop, self.num_rows],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "description": self.description,
        }
        text = json.dumps(header, default=str)
        metadata = {HEADER: text, CHECKSUM: _checksum(text, values)}
        table = pa.table(dict(zip(REFERENCE_LOGPS, values, strict=True))).replace_schema_metadata(metadata)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="none", use_dictionary=False)
        temporary = self.folder / f"{self.key}.{uuid.uuid4().hex}.tmp"
        write_whole(self.path(rows), buffer.getvalue().to_pybytes(), temporary)

    def finish(self, values: Scores) -> None:
        """Store the scores of all rows, and remove the chunks."""
        self.write(range(self.num_rows), values)
        for file in entries(self.folder)[self.key]:
            if file.string != f"{self.key}.parquet":
                (self.folder / file.string).unlink(missing_ok=True)


def _missing(done: Iterable[tuple[int, int]], num_rows: int, chunk_rows: int) -> list[range]:
    """Rows that no finished part contains, in chunks of at most `chunk_rows`."""
    chunks, start = [], 0
    for begin, stop in [*sorted(done), (num_rows, num_rows)]:
        chunks += [range(first, min(first + chunk_rows, begin)) for first in range(start, begin, chunk_rows)]
        start = stop
    return chunks


def validated(scored: tuple[torch.Tensor, torch.Tensor], rows: range) -> Scores:
    """
    Scores as arrays, half precision as float32.

    Raises:
        ValueError: If there are too few values or non-finite ones.
    """
    half = (torch.float16, torch.bfloat16)
    chosen, rejected = ((x.float() if x.dtype in half else x).detach().cpu().numpy() for x in scored)
    if chosen.shape != (len(rows),) or rejected.shape != (len(rows),):
        raise ValueError(
            f"`score` must return two tensors of shape ({len(rows)},), got {chosen.shape} and {rejected.shape}."
        )
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    if not finite.all():
        non_finite = [rows[index] for index in np.flatnonzero(~finite)]
        raise ValueError(
            f"The reference log-probabilities of rows {non_finite} are not finite and were not stored. Check these "
            "rows for empty or very long answers, or use bf16 or float32 instead of fp16."
        )
    return chosen, rejected


def load_entry(path: Path) -> tuple[dict[str, Any], Scores]:
    """
    Read a file of the cache.

    Args:
        path (`Path`):
            A file whose name [`entries`] returns.

    Returns:
        `tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]`: Header and values.

    Raises:
        ValueError: If header and values are not bit for bit those that were written. The message continues the path.
        OSError: If the file cannot be read.
    """
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError("is not a plain file")  # of which reading may wait for ever
    data = path.read_bytes()
    try:
        # Without Arrow's thread pools, which occasionally abort at exit: https://github.com/apache/arrow/issues/34314
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        text, checksum = (table.schema.metadata[name].decode() for name in (HEADER, CHECKSUM))
        chosen, rejected = (column.to_numpy() for column in table.columns)
    except Exception as error:  # a parser may raise anything on arbitrary bytes
        raise ValueError("is damaged, or was not written by dposhift_trl") from error
    if checksum != _checksum(text, (chosen, rejected)):
        raise ValueError("does not match its checksum")
    header = json.loads(text)
    if not isinstance(header, dict) or not {"key", "rows", "date", "description"} <= set(header):
        raise ValueError("was written by another version of dposhift_trl")
    return header, (chosen, rejected)


def _checksum(text: str, values: Scores) -> str:
    return stable_hash([text, [[str(array.dtype), xxhash.xxh3_128_hexdigest(array.tobytes())] for array in values]])


def entries(folder: Path) -> dict[str, list[re.Match[str]]]:
    """Names of the cache's files in a folder, as matches of `FILE_NAME`, by key."""
    files: dict[str, list[re.Match[str]]] = {}
    for path in sorted(folder.glob("*")):
        if file := FILE_NAME.fullmatch(path.name):
            files.setdefault(file[1], []).append(file)
    return files
