"""Preference rows, loaded from the Hub, from files or from the built-in demo."""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    IterableDataset,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset_builder,
    load_from_disk,
)
from datasets.fingerprint import Hasher
from datasets.packaged_modules.csv.csv import CsvConfig

from ..columns import FILE_ROW, FILE_SOURCE, with_row_index
from .config import ROW_ID, DataConfig, DataSource
from .demo import demo_dataset
from .errors import DataError, reading_rows, reason
from .files import files_of_folder, is_saved, local_path, named_files
from .formats import BUILDERS, ENDINGS, FileFormat, check_regular, digest, format_of, read_files, text_cells
from .selection import column_names, select_columns


Rows: TypeAlias = Dataset | IterableDataset


@reading_rows()
def load_preferences(config: DataConfig, seed: int) -> tuple[Rows, Rows | None]:
    """
    Load training and evaluation rows with the columns `prompt` (unless implicit), `chosen` and `rejected`.

    Args:
        config ([`DataConfig`]):
            Sources, splits and columns.
        seed (`int`):
            Seed that shuffles a stream and, unless `config` has its own, samples from a mixture and chooses the
            held-out rows.

    Returns:
        `tuple[Dataset or IterableDataset, Dataset or IterableDataset or None]`: Training and evaluation rows.

    Raises:
        DataError: If a source cannot be read, has no such split or column, or does not match the rest of a mixture.
    """
    sources, split_seed = config.sources, seed if config.seed is None else config.seed
    train = _numbered([_load_split(source, source.train_split, config) for source in sources])
    if len(sources) > 1:
        total = sum(source.weight for source in sources)
        weights = [source.weight / total for source in sources]
        rows = _mixed(sources, train, lambda parts: interleave_datasets(parts, weights, seed=split_seed))
    else:
        rows = train[0]
    evaluated = [source for source in sources if source.eval_split is not None]
    evaluation = _numbered([_load_split(source, str(source.eval_split), config) for source in evaluated])
    eval_rows = _mixed(evaluated, evaluation, concatenate_datasets) if evaluation else None
    rows = with_row_index(rows)  # before rows are held out and shuffled, so that the numbers are the files'
    if config.eval_size is not None:
        rows, eval_rows = _hold_out(rows, config.eval_size, split_seed)
    rows, eval_rows = _first(rows, config.max_train_rows), _first(eval_rows, config.max_eval_rows)
    if isinstance(rows, IterableDataset) and config.rows_in_buffer:
        # Rows of several files are not interleaved, which would number the rows of each of them from 0
        rows = rows.shuffle(seed, buffer_size=config.rows_in_buffer, max_buffer_input_shards=1)
    return rows, eval_rows


def _numbered(parts: list[Rows]) -> list[Rows]:
    """Map-style rows with their number in their source, and that of the source, by which the audit names them."""
    return [
        part
        if isinstance(part, IterableDataset)
        else part.add_column(FILE_ROW, range(len(part))).add_column(FILE_SOURCE, [source] * len(part))
        for source, part in enumerate(parts)
    ]


def _first(rows: Rows | None, count: int | None) -> Rows | None:
    if rows is None or count is None:
        return rows
    return rows.take(count) if isinstance(rows, IterableDataset) else rows.select(range(min(count, len(rows))))


def _hold_out(rows: Rows, size: int | float, seed: int) -> tuple[Rows, Rows]:
    if isinstance(rows, IterableDataset):
        if next(iter(rows.skip(int(size))), None) is None:
            raise DataError(
                f"`data.eval_size` must be less than the number of training rows, got {size}. Write a smaller number."
            )
        return rows.skip(int(size)), rows.take(int(size))
    count = len(rows)
    if (size if isinstance(size, int) else math.ceil(size * count)) >= count:
        raise DataError(
            f"`data.eval_size` must be less than the {count} training rows, got {size}. "
            + (f"Write for example `eval_size: {math.ceil(count / 10)}`." if count > 1 else "Remove it.")
        )
    split = rows.train_test_split(test_size=size, seed=seed)
    return split["train"], split["test"]


def _load_split(source: DataSource, split: str, config: DataConfig) -> Rows:
    try:
        rows = _read(source, split, config)
        names = column_names(rows)
    except DataError:
        raise
    except Exception as error:  # every reader raises its own errors
        if "corresponds to no data" in str(error):  # of a file of blank lines, or of a header alone
            raise DataError(f"`data.path` {source.path!r}, split {split!r}, has no rows.") from error
        raise DataError(f"`data.path` {source.path!r}, split {split!r}, cannot be read: {reason(error)}") from error
    if not names or (isinstance(rows, IterableDataset) and next(iter(rows), None) is None):
        raise DataError(f"`data.path` {source.path!r}, split {split!r}, has no rows.")
    return select_columns(rows, source)


def _mixed(sources: list[DataSource], rows: list[Rows], mix: Callable[[list[Rows]], Rows]) -> Rows:
    with_prompt = [source.path for source, part in zip(sources, rows, strict=True) if "prompt" in column_names(part)]
    if with_prompt and len(with_prompt) < len(sources):
        raise DataError(
            "Either all sources of `data.mixture` must have a column 'prompt' or none, got it only in "
            f"{', '.join(map(str, with_prompt))}. Add it to the others."
        )
    if len(rows) > 1:
        rows = _with_ids_alike(rows)
    try:
        return mix(rows)
    except (ValueError, TypeError) as error:
        raise DataError(f"The sources of `data.mixture` cannot be mixed: {error}") from error


def _with_ids_alike(rows: list[Rows]) -> list[Rows]:
    """Ids of a mixture as text, since those of another source may be; none unless all sources have them."""
    named = [ROW_ID in column_names(part) for part in rows]
    if all(named) and all(isinstance(part, Dataset) for part in rows):
        return [part.cast_column(ROW_ID, Value("string")) for part in rows]
    return [part.remove_columns(ROW_ID) if has else part for part, has in zip(rows, named, strict=True)]


def _read(source: DataSource, split: str, config: DataConfig) -> Rows:
    assert source.path
    if source.path == "demo":
        demo = demo_dataset()
        _check_split(split, demo)
        return demo[split].to_iterable_dataset() if config.streaming else demo[split]
    path, builders = local_path(source.path), set(BUILDERS.values())
    if is_saved(path):
        return _read_saved(path, split, config.streaming)
    options: dict[str, Any] = {}
    if source.path in builders and source.data_files is not None and "://" not in str(source.data_files):
        files = named_files(Path(), source.data_files)
        formats = {format_of(path) for paths in files.values() for path in paths}
        named = formats.pop() if len(formats) == 1 else None
        file_format = named if named and named.builder == source.path else FileFormat(source.path)
    elif path.is_dir():
        files, file_format, options = files_of_folder(path, source.name, source.data_files)
    elif path.exists() or (format_of(path) and "://" not in source.path):
        files, file_format = {"train": [path]}, _format_of_file(path, source)
        if split != "train":
            raise ValueError("a file has only the split 'train'; to hold out rows, set `data.eval_size`")
    else:
        return _read_remote(source, split, config.streaming)
    asked = {name: paths for name, paths in files.items() if name in re.split(r"\W+", split)}
    if not asked and split != "all":
        raise ValueError(f"its splits are {', '.join(files)}")
    return read_files(asked or files, split, file_format, config.streaming, config.max_expanded_gib, options)


def _format_of_file(path: Path, source: DataSource) -> FileFormat:
    if not path.exists():
        raise FileNotFoundError("the file does not exist")
    check_regular(path)
    file_format = format_of(path)
    if file_format is None:
        raise ValueError(f"file names must end in {ENDINGS}")
    if source.data_files is not None:
        raise ValueError(f"`data_files` is for folders and Hub datasets, got {source.data_files!r} with a file")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    return file_format


def _read_saved(path: Path, split: str, streaming: bool) -> Rows:
    if "::" in str(path.absolute()):
        raise ValueError("a saved dataset must not have '::' in its path. Rename the folder")
    saved = load_from_disk(str(path.absolute()))
    if isinstance(saved, DatasetDict):
        _check_split(split, saved)
        saved = saved[split]
    elif split not in ("train", str(saved.split)):
        raise ValueError("it has no splits; to hold out rows, set `data.eval_size`")
    if streaming:
        return saved.to_iterable_dataset()
    # The fingerprint that is saved with the rows, under which results are cached, stays when the files are edited
    content = [digest(Path(file["filename"])) for file in saved.cache_files]
    return Dataset(
        saved.data, info=saved.info, split=saved.split, fingerprint=Hasher.hash((saved._fingerprint, content))
    )


def _check_split(split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise ValueError(f"its splits are {', '.join(splits)}")


def _read_remote(source: DataSource, split: str, streaming: bool) -> Rows:
    assert source.path

    def make_builder(**options: Any) -> DatasetBuilder:
        return load_dataset_builder(
            source.path, source.name, revision=source.revision, data_files=source.data_files, **options
        )

    builder = make_builder()
    if isinstance(builder.config, CsvConfig):
        first = next(iter(builder.config.data_files.values()))[:1]
        builder = make_builder(**text_cells(first, builder.config.sep))
    if streaming:
        rows: IterableDataset = builder.as_streaming_dataset(split)
        return rows
    builder.download_and_prepare()
    return builder.as_dataset(split)
