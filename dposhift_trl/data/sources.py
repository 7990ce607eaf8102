"""Preference rows, loaded from the Hub, from files or from the built-in demo."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from ..columns import FILE_ROW, FILE_SOURCE
from .config import KEPT_COLUMNS, ROW_ID, DataConfig, DataSource
from .demo import demo_dataset
from .errors import DataError, reading_rows


Rows: TypeAlias = Dataset | IterableDataset


@reading_rows()
def load_preferences(config: DataConfig, seed: int) -> tuple[Rows, Rows | None]:
    """
    Load training and evaluation rows with the columns `prompt` (unless implicit), `chosen` and `rejected`.

    Args:
        config ([`DataConfig`]):
            Sources, splits and columns.
        seed (`int`):
            Seed for sampling from a mixture and for choosing the held-out rows.

    Returns:
        `tuple[Dataset or IterableDataset, Dataset or IterableDataset or None]`: Training and evaluation rows.

    Raises:
        DataError: If a source cannot be read, has no such split or column, or does not match the rest of a mixture.
    """
    sources = config.sources
    train = _numbered([_load_split(source, source.train_split, config.streaming) for source in sources])
    if len(sources) > 1:
        total = sum(source.weight for source in sources)
        weights = [source.weight / total for source in sources]
        rows = _mixed(sources, train, lambda parts: interleave_datasets(parts, weights, seed=seed))
    else:
        rows = train[0]
    evaluated = [source for source in sources if source.eval_split is not None]
    evaluation = _numbered([_load_split(source, str(source.eval_split), config.streaming) for source in evaluated])
    eval_rows = _mixed(evaluated, evaluation, concatenate_datasets) if evaluation else None
    if config.eval_size is not None:
        rows, eval_rows = _hold_out(rows, config.eval_size, seed)
    return _first(rows, config.max_train_rows), _first(eval_rows, config.max_eval_rows)


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


def _load_split(source: DataSource, split: str, streaming: bool) -> Rows:
    try:
        rows = _read(source, split, streaming)
        names = column_names(rows)
    except Exception as error:  # every reader raises its own errors
        reason = f"{error}{': ' if error.__cause__ else ''}{error.__cause__ or ''}"
        raise DataError(f"`data.path` {source.path!r}, split {split!r}, cannot be read: {reason}") from error
    if not names:
        raise DataError(f"`data.path` {source.path!r}, split {split!r}, has no rows.")
    renames = source.columns or {}
    for name, source_name in renames.items():
        if source_name not in names:
            raise DataError(
                f"`data.columns` must map to columns of {source.path!r}, got {source_name!r} for {name}. Its columns "
                f"are {', '.join(names)}."
            )
    source_names = {name: name for name in KEPT_COLUMNS if name in names and name not in renames.values()} | renames
    missing = [name for name in ("chosen", "rejected") if name not in source_names]
    if missing:
        raise DataError(
            f"{source.path!r} must have a column {missing[0]!r}, got the columns {', '.join(names)}. Map the name, "
            f"for example `data.columns: {{{missing[0]}: {names[0]}}}`."
        )
    if "prompt" not in source_names and "conversations" in names:
        first: dict[str, Any] = next(iter(rows), {})
        # ShareGPT's prompt. Answers that are lists of messages contain it themselves
        if not isinstance(first.get(source_names["chosen"]), list):
            source_names["prompt"] = "conversations"
    rows = rows.select_columns(list(source_names.values()))
    new_names = {source_name: name for name, source_name in source_names.items() if name != source_name}
    if new_names and isinstance(rows, IterableDataset):
        # `rename_columns` cannot swap two columns of an iterable dataset
        return rows.map(
            lambda row: {name: row[source_name] for name, source_name in source_names.items()},
            remove_columns=list(new_names),
        )
    return rows.rename_columns(new_names) if new_names else rows


def column_names(rows: Rows) -> list[str]:
    """Column names; for an iterable dataset that does not know them, the names in its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def _mixed(sources: list[DataSource], rows: list[Rows], mix: Callable[[list[Rows]], Rows]) -> Rows:
    with_prompt = [source.path for source, part in zip(sources, rows, strict=True) if "prompt" in column_names(part)]
    if with_prompt and len(with_prompt) < len(sources):
        raise DataError(
            "Either all sources of `data.mixture` must have a column 'prompt' or none, got it only in "
            f"{', '.join(map(str, with_prompt))}. Add it to the others."
        )
    if len(rows) > 1:  # ids of different types cannot be mixed, and source and number of a row name it as well
        rows = [part.remove_columns([name for name in column_names(part) if name == ROW_ID]) for part in rows]
    try:
        return mix(rows)
    except (ValueError, TypeError) as error:
        raise DataError(f"The sources of `data.mixture` cannot be mixed: {error}") from error


def _read(source: DataSource, split: str, streaming: bool) -> Rows:
    assert source.path
    if source.path == "demo":
        demo = demo_dataset()
        if split not in demo:
            raise ValueError(f"its splits are {', '.join(demo)}")
        return demo[split].to_iterable_dataset() if streaming else demo[split]
    path = Path(source.path)
    builder = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if builder is not None and (path.is_file() or not path.exists()):
        if not path.is_file():
            raise FileNotFoundError("the file does not exist")
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        if split != "train":
            raise ValueError("a file has only the split 'train'; to hold out rows, set `data.eval_size`")
        return load_dataset(builder, data_files=str(path), split="train", streaming=streaming)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"its splits are {', '.join(saved)}")
            saved = saved[split]
        elif split not in ("train", str(saved.split)):
            raise ValueError("it has no splits; to hold out rows, set `data.eval_size`")
        return saved.to_iterable_dataset() if streaming else saved
    if path.is_file():
        raise ValueError("file names must end in .jsonl, .json, .csv or .parquet")
    return load_dataset(
        source.path,
        source.name,
        revision=source.revision,
        data_files=source.data_files,
        split=split,
        streaming=streaming,
    )
