"""Which columns of a source are trained on, and what becomes of the others."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset

from .config import KEPT_COLUMNS, ROW_ID, DataSource
from .errors import DataError


logger = logging.getLogger(__name__)

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
# Columns that TRL and processors of multimodal models read. The command trains on text alone
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Column names; for an iterable dataset that does not know them, the names in its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def holds_ids(rows: Dataset | IterableDataset, column: str) -> bool:
    """Whether a column holds ids: text or integers."""
    feature = (rows.features or {}).get(column)
    if feature is None:
        first: dict[str, Any] = next(iter(rows), {})
        return isinstance(first.get(column), (str, int))
    return getattr(feature, "dtype", None) in ("string", "large_string", *INTEGERS)


def select_columns(rows: Dataset | IterableDataset, source: DataSource) -> Dataset | IterableDataset:
    """
    Rename the columns of a source and keep those that are trained on. A line names the text that is not read.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Rows as they are read.
        source ([`DataSource`]):
            Their source, with the names of its columns.

    Raises:
        DataError: If a column is missing, or a row contains an image, a video or audio.
    """
    names = column_names(rows)
    renames = source.columns or {}
    for name, source_name in renames.items():
        if source_name not in names:
            raise DataError(
                f"`data.columns` must map to columns of {source.path!r}, got {source_name!r} for {name}. Its columns "
                f"are {', '.join(names)}."
            )
    source_names = {name: name for name in KEPT_COLUMNS if name in names and name not in renames.values()} | renames
    if ROW_ID in source_names and not holds_ids(rows, source_names[ROW_ID]):
        if ROW_ID in renames:
            raise DataError(
                f"`data.columns` must map `id` to text or integers, got {renames[ROW_ID]!r} of {source.path!r}, which "
                "holds others. Remove it, or map another column."
            )
        del source_names[ROW_ID]
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
    rows = _without_media(rows, [name for name in MEDIA_COLUMNS if name in names], source)
    _report_unread(rows, [name for name in names if name not in (*source_names.values(), *MEDIA_COLUMNS)], source)
    rows = rows.select_columns(list(source_names.values()))
    new_names = {source_name: name for name, source_name in source_names.items() if name != source_name}
    if new_names and isinstance(rows, IterableDataset):
        # `rename_columns` cannot swap two columns of an iterable dataset
        return rows.map(
            lambda row: {name: row[source_name] for name, source_name in source_names.items()},
            remove_columns=list(new_names),
        )
    return rows.rename_columns(new_names) if new_names else rows


def _without_media(rows: Dataset | IterableDataset, media: list[str], source: DataSource) -> Dataset | IterableDataset:
    """The rows, if none contains an image, video or audio; rows of a stream are checked as they are read."""

    def check(row: dict[str, Any]) -> dict[str, Any]:
        for name in media:
            if _holds_anything(row[name]):
                raise DataError(
                    f"The rows of {source.path!r} must be text, got the column {name!r}, which is not empty. Remove "
                    "it to train on the text alone. To train on images, pass the rows and a vision-language model to "
                    "`DPOShiftTrainer`."
                )
        return row

    if media and isinstance(rows, IterableDataset):
        return rows.map(check)
    for name in media:
        for values in _undecoded(rows, name):
            for value in values:
                check({**dict.fromkeys(media), name: value})
    return rows


def _report_unread(rows: Dataset | IterableDataset, names: list[str], source: DataSource) -> None:
    """Name the columns of text that are left out, since a system prompt may be among them."""
    if isinstance(rows, Dataset):
        samples = {name: next(_undecoded(rows, name), []) for name in names}
    else:
        first = list(islice(rows, 100)) if names else []
        samples = {name: [row.get(name) for row in first] for name in names}
    text = [name for name, values in samples.items() if _has_words(values)]
    if text and PartialState().is_main_process:
        logger.warning(
            "%s: not trained on: %s. What the model should see has to be in the prompt.", source.path, ", ".join(text)
        )


def _undecoded(rows: Dataset, name: str) -> Iterator[list[Any]]:
    """Values of a column, a thousand rows at a time. Images and audio stay as they are stored."""
    for batch in rows.select_columns([name]).with_format("arrow").iter(1000):
        yield batch[name].to_pylist()


def _has_words(value: Any) -> bool:
    """Whether text is in a value: more than one word, unlike ids, labels, and numbers."""
    if isinstance(value, (list, tuple)):
        return any(map(_has_words, value))
    if isinstance(value, dict):
        return any(map(_has_words, value.values()))
    return isinstance(value, str) and len(value.split()) > 1


def _holds_anything(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_anything, value))
    if isinstance(value, dict):
        return any(map(_holds_anything, value.values()))
    return value is not None and value not in ("", b"")
