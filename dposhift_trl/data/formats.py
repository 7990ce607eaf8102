"""Formats of files of rows: known by their names, read as they are named, never more of them than allowed."""

import bz2
import functools
import gzip
import hashlib
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import fsspec
import pandas as pd
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value, load_dataset_builder
from datasets.data_files import DataFilesList
from datasets.download import StreamingDownloadManager
from fsspec.spec import AbstractFileSystem

from .errors import DataError


BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SEPARATORS = {".tsv": "\t"}
TEXT_BUILDERS = ("json", "csv")
# Suffix that the file gets in addresses; the library asks for a name that it knows
SUFFIXES = {"json": "jsonl", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}

EXPANDERS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(path, compression="zstd")),
}
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError)

GIB = 2**30
ENDINGS = ".jsonl, .json, .csv, .tsv (each also with .gz, .bz2, .xz or .zst), .parquet or .arrow"


class FileFormat(NamedTuple):
    """The builder of `datasets` that reads a file, and the separator of its cells."""

    builder: str
    separator: str | None = None


def format_of(path: Path) -> FileFormat | None:
    """The format that the end of a file name tells, in any case: `rows.jsonl`, `ROWS.CSV`, `rows.tsv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in EXPANDERS
    suffix = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    builder = BUILDERS.get(suffix)
    if builder is None or (compressed and builder not in TEXT_BUILDERS):
        return None
    return FileFormat(builder, SEPARATORS.get(suffix))


def check_regular(path: Path) -> None:
    """
    Check that a path is a file that can be read from start to end more than once.

    Raises:
        ValueError: If it is anything else; to open a FIFO would wait for a writer.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"it must be a file, got {kind}. Write the rows to a file")


def digest(path: Path) -> str:
    """Digest of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def read_files(
    files: dict[str, list[Path]],
    split: str,
    file_format: FileFormat,
    streaming: bool,
    max_expanded_gib: float,
    options: dict[str, Any] | None = None,
) -> Dataset | IterableDataset:
    """
    Read files of one format with the builders of `datasets`.

    The library's cache knows a file by its content, not by its time of change. Cells of CSV files are text.

    Args:
        files (`dict[str, list[Path]]`):
            Files by split, in order. A name is never a pattern.
        split (`str`):
            Split, or an expression of splits such as `train[:10%]`.
        file_format ([`FileFormat`]):
            Format of all of the files.
        streaming (`bool`):
            Whether to read the files while rows are asked for.
        max_expanded_gib (`float`):
            Largest size of an expanded file, in GiB.
        options (`dict[str, Any]`, *optional*):
            Settings of the builder.

    Raises:
        DataError: If a compressed file expands to more than that, or is broken.
    """
    addresses: dict[str, DataFilesList] = {}
    for name, paths in files.items():
        for path in paths:
            check_regular(path)
        urls = [_LocalFile.url(path, int(max_expanded_gib * GIB), file_format.builder) for path in paths]
        addresses[name] = DataFilesList(urls, [("",) if streaming else (digest(path),) for path in paths])
    options = options or {}
    if file_format.builder == "csv":
        separator = options.get("sep") or options.get("delimiter") or file_format.separator or ","
        options = {**options, "sep": separator, "delimiter": None}
        options |= text_cells((url for urls in addresses.values() for url in urls), separator)
    builder = load_dataset_builder(file_format.builder, data_files=addresses, **options)
    if streaming:
        rows: IterableDataset = builder.as_streaming_dataset(split)
        return rows
    # A manager that downloads nothing: files are read where they are, and expanded as they are read
    builder.download_and_prepare(dl_manager=StreamingDownloadManager())
    return builder.as_dataset(split)


def text_cells(urls: Iterable[str], separator: str) -> dict[str, Any]:
    """Settings with which the CSV builder reads each cell as text: `None`, `NA` and `12` stay what they are."""
    first: list[str] | None = None
    for url in urls:
        with fsspec.open(url, "rb", compression="infer") as file:
            head = pd.read_csv(file, sep=separator, dtype=str, na_filter=False, nrows=1)
        names = list(head.columns)
        other = next((mark for mark in ";\t|," if mark in names[0] and mark != separator), None)
        if len(names) == 1 and other is not None:
            raise ValueError(
                f"its cells must be separated by {separator!r}, got the header {names[0]!r} with {other!r}. Save it "
                "with commas as `.csv`, or with tabs as `.tsv`"
            )
        if any("\0" in name for name in names):
            raise ValueError("the names of its columns must not contain NUL characters. Rename them")
        if not isinstance(head.index, pd.RangeIndex):
            raise ValueError(
                f"the first row must have at most {len(names)} cells, as the header has, got more. Quote cells with "
                "a separator in them"
            )
        first = first or names
        if set(names) != set(first):
            raise ValueError(
                f"its files must have the same columns, got {', '.join(first)} and {', '.join(names)}. Name the "
                "files to read in `data_files`"
            )
    features = Features({name: Value("string") for name in first or []})
    return {"features": features, "keep_default_na": False, "na_filter": False}


class _LocalFile(AbstractFileSystem):
    """
    Local files under addresses in which no character of the file name has a meaning.

    The library reads names as patterns, chains of archives or URLs, and expands compressed files without a bound.
    Here an address holds the bound and the quoted name.
    """

    protocol = "dposhift"

    @classmethod
    def url(cls, path: Path, max_expanded: int, builder: str) -> str:
        """The address of a file."""
        name = quote(os.fsencode(path.absolute()), safe="")
        return f"{cls.protocol}://{max_expanded}/{name}/rows.{SUFFIXES[builder]}"

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        _, local = self._parse(path)
        return {"name": path, "size": local.stat().st_size, "type": "file"}

    def _parse(self, path: str) -> tuple[int, Path]:
        max_expanded, name, _ = self._strip_protocol(path).split("/")
        return int(max_expanded), Path(os.fsdecode(unquote_to_bytes(name)))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> IO[bytes]:
        max_expanded, local = self._parse(path)
        expand = EXPANDERS.get(local.suffix.lower())
        if expand is None:
            return open(local, "rb")
        status = local.stat()
        _check_expanded(str(local), max_expanded, (status.st_mtime_ns, status.st_size, status.st_ino))
        return expand(str(local))


fsspec.register_implementation(_LocalFile.protocol, _LocalFile)


@functools.cache
def _check_expanded(path: str, max_expanded: int, version: tuple[int, ...]) -> None:
    """Expand a file into nothing, up to the bound, before a reader takes a whole row of it into memory."""
    size = 0
    try:
        with EXPANDERS[Path(path).suffix.lower()](path) as file:
            while chunk := file.read(2**20):
                size += len(chunk)
                if size > max_expanded:
                    raise DataError(
                        f"{path} must expand to at most `data.max_expanded_gib` ({max_expanded / GIB:g}), got more. "
                        "Raise it if the file is meant to be that large."
                    )
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path} cannot be expanded: {error or type(error).__name__}. Compress it again.") from error
