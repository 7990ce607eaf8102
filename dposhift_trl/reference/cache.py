"""
The frozen reference's log-probabilities on disk: computed once, shared by every run for which they hold.

`python -m dposhift_trl.reference list` shows what is stored, `clear` removes it.
"""

import contextlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
from .fingerprint import stable_hash


logger = logging.getLogger(__name__)

HEADER, CHECKSUM = b"dposhift_trl", b"dposhift_trl.checksum"
# <key>.parquet, <key>.<first row>-<end>.parquet while that is made, <key>.<random>.tmp while a file is written
FILE_NAME = re.compile(r"([0-9a-f]{32})(?:\.parquet|\.(\d{9,})-(\d{9,})\.parquet|\.[0-9a-f]{32}\.tmp)")
POLL_SECONDS = 20  # far below the time limit of a collective, on which the other processes wait

Scores = tuple[np.ndarray, np.ndarray]


class ReferenceCacheError(OSError):
    """The cache folder cannot be read or written; the message names it and the remedy."""


def default_folder() -> Path:
    """`DPOSHIFT_CACHE` where that is set, else `dposhift_trl/reference` in the Hugging Face home (`HF_HOME`)."""
    return Path(os.environ.get("DPOSHIFT_CACHE") or Path(HF_HOME, "dposhift_trl", "reference")).expanduser()


def cached_reference_logps(
    key: str,
    num_rows: int,
    score: Callable[[range], tuple[torch.Tensor, torch.Tensor]],
    *,
    description: dict[str, Any],
    columns: tuple[str, str] = REFERENCE_LOGPS,
    folder: str | Path | None = None,
    chunk_rows: int = 1024,
) -> Scores:
    """
    Read the reference's log-probabilities from disk, after scoring whatever is not there yet.

    They lie in `<key>.parquet`; until all are known, each finished chunk lies beside it, and an interrupted
    computation goes on from there. A file appears whole or not at all and holds a checksum: a damaged one is scored
    again. Of several runs one computes while the others wait; one that dies makes way.

    Every process of a run calls this alike; the main one alone touches the disk.

    Args:
        key (`str`):
            Result of [`reference_key`].
        num_rows (`int`):
            Rows of the data set.
        score (`Callable`):
            Takes a range of rows and returns the log-probabilities of their chosen and of their rejected answers, in
            nats, each of shape `(len(rows),)`. Every process calls it with the same ranges and gets all values.
        description (`dict`):
            What a person wants to know of the file, such as the model's path; stored in it, without effect.
        columns (`tuple[str, str]`, *optional*):
            Names of the two values in the file, where they are others than the log-probabilities.
        folder (`str` or `Path`, *optional*):
            Defaults to [`default_folder`].
        chunk_rows (`int`, *optional*, defaults to `1024`):
            Rows scored between two writes, the most that an interruption loses.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Log-probabilities of the chosen and of the rejected answers, in nats, bit for
            bit as scored; half precision comes back as float32. Shape: `(num_rows,)` each.

    Raises:
        ReferenceCacheError: On every process, if the folder cannot be read or written.
        ValueError: If processes of one run pass different keys, or `score` returns too few values or non-finite ones.
    """
    if len(set(gather_object([key]))) > 1:
        raise ValueError("`key` must be the same on every process: they hold different references or rows.")
    store, all_rows = _Store(Path(folder or default_folder()), key, num_rows, description, columns), range(num_rows)
    if (values := store.on_main(store.read, all_rows)) is not None:
        return values
    lock, seconds = filelock.FileLock(store.folder / f"{key}.lock"), 0
    try:
        while not store.on_main(store.acquire, lock, seconds):
            seconds = POLL_SECONDS
        if (values := store.on_main(store.read, all_rows)) is not None:
            return values
        parts = store.on_main(store.read_parts)
        for rows in _missing(parts, num_rows, chunk_rows):
            parts[rows.start, rows.stop] = _checked(score(rows), rows)
            store.on_main(store.write, rows, parts[rows.start, rows.stop])
        chosen, rejected = zip(*(parts[bounds] for bounds in sorted(parts)), strict=True)
        values = np.concatenate(chosen), np.concatenate(rejected)
        store.on_main(store.finish, values)
        return values
    finally:
        lock.release()


@dataclass
class _Store:
    """The files of one key."""

    folder: Path
    key: str
    num_rows: int
    description: dict[str, Any]
    columns: tuple[str, str] = REFERENCE_LOGPS

    def on_main(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call on the main process; what it returns or raises reaches every process, so that none waits in vain."""
        outcome: list[Any] = [None, None]
        if PartialState().is_main_process:
            try:
                outcome[0] = function(*args)
            except BaseException as fault:  # a signal too must reach all
                outcome[1] = fault
        result, error = broadcast_object_list(outcome)
        if isinstance(error, OSError):
            raise ReferenceCacheError(
                f"The reference's log-probabilities cannot be kept in {self.folder}: {error}. Free space or grant "
                "access there, or set `DPOSHIFT_CACHE` to another folder."
            ) from error
        if error is not None:
            raise error
        return result

    def path(self, rows: range) -> Path:
        part = "" if len(rows) == self.num_rows else f".{rows.start:09d}-{rows.stop:09d}"
        return self.folder / f"{self.key}{part}.parquet"

    def acquire(self, lock: filelock.BaseFileLock, seconds: float) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=seconds)
            return True
        if not seconds:
            logger.warning("Another run computes %s; waiting for it.", self.path(range(self.num_rows)))
        return False

    def read(self, rows: range) -> Scores | None:
        path = self.path(rows)
        try:
            header, values = load_entry(path)
            if (header["key"], header["rows"]) == (self.key, [rows.start, rows.stop, self.num_rows]):
                return values
            fault = "belongs to another key or other rows"
        except FileNotFoundError:
            return None
        except ValueError as error:
            fault = str(error)
        logger.warning("%s %s; its %d rows are scored again.", path, fault, len(rows))
        return None

    def read_parts(self) -> dict[tuple[int, int], Scores]:
        found, end = {}, 0
        for start, stop in [
            (int(name[2]), int(name[3])) for name in entries(self.folder).get(self.key, []) if name[2]
        ]:
            # Parts overlap only where the file system's locks failed to keep two runs apart
            if start >= end and (values := self.read(range(start, stop))) is not None:
                found[start, stop], end = values, stop
        return found

    def write(self, rows: range, values: Scores) -> None:
        header = {
            "key": self.key,
            "rows": [rows.start, rows.stop, self.num_rows],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "description": self.description,
        }
        text = json.dumps(header, default=str)
        metadata = {HEADER: text, CHECKSUM: _checksum(text, values)}
        table = pa.table(dict(zip(self.columns, values, strict=True))).replace_schema_metadata(metadata)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="none", use_dictionary=False)
        temporary = self.folder / f"{self.key}.{uuid.uuid4().hex}.tmp"
        write_whole(self.path(rows), buffer.getvalue().to_pybytes(), temporary)

    def finish(self, values: Scores) -> None:
        self.write(range(self.num_rows), values)
        for name in entries(self.folder)[self.key]:
            if name.string != f"{self.key}.parquet":
                (self.folder / name.string).unlink(missing_ok=True)


def _missing(done: Iterable[tuple[int, int]], num_rows: int, chunk_rows: int) -> list[range]:
    """Chunks of the rows that no finished part holds, whatever chunks those were made in."""
    chunks, start = [], 0
    for begin, stop in [*sorted(done), (num_rows, num_rows)]:
        chunks += [range(first, min(first + chunk_rows, begin)) for first in range(start, begin, chunk_rows)]
        start = stop
    return chunks


def _checked(scored: tuple[torch.Tensor, torch.Tensor], rows: range) -> Scores:
    half = (torch.float16, torch.bfloat16)
    chosen, rejected = ((x.float() if x.dtype in half else x).detach().cpu().numpy() for x in scored)
    if chosen.shape != (len(rows),) or rejected.shape != (len(rows),):
        raise ValueError(f"`score` must return {len(rows)} values twice, got {chosen.shape} and {rejected.shape}.")
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    if not finite.all():
        bad = [rows[place] for place in np.flatnonzero(~finite)]
        raise ValueError(f"The reference's log-probabilities of rows {bad} are not finite, and were not kept.")
    return chosen, rejected


def load_entry(path: Path) -> tuple[dict[str, Any], Scores]:
    """Header and values of a file; a `ValueError` if they are not, bit for bit, what was written."""
    data = path.read_bytes()
    try:
        # Without Arrow's thread pools, which now and then abort at exit: https://github.com/apache/arrow/issues/34314
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        text, checksum = (table.schema.metadata[name].decode() for name in (HEADER, CHECKSUM))
        chosen, rejected = (column.to_numpy() for column in table.columns)
    except Exception as error:  # whatever a parser makes of stray bytes
        raise ValueError("is damaged, or no file of ours") from error
    if checksum != _checksum(text, (chosen, rejected)):
        raise ValueError("does not match its checksum")
    return json.loads(text), (chosen, rejected)


def _checksum(text: str, values: Scores) -> str:
    return stable_hash([text, [[str(array.dtype), xxhash.xxh3_128_hexdigest(array.tobytes())] for array in values]])


def entries(folder: Path) -> dict[str, list[re.Match[str]]]:
    """Names of the files in the folder that are named as ours, by key."""
    entries: dict[str, list[re.Match[str]]] = {}
    for path in sorted(folder.glob("*")):
        if name := FILE_NAME.fullmatch(path.name):
            entries.setdefault(name[1], []).append(name)
    return entries
