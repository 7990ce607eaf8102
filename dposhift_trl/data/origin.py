"""Where a row comes from: its number in its source, counted from 0, and its id."""

from collections.abc import Mapping
from typing import Any

from ..columns import FILE_ROW, FILE_SOURCE, ROW_INDEX
from .config import ROW_ID, DataConfig
from .tokens import shorten


# Names in saved files
ROW, SOURCE = "row", "source"


def origin(row: Mapping[str, Any], split: str, config: DataConfig) -> dict[str, Any]:
    """
    Where a map-style row comes from.

    Args:
        row (`Mapping[str, Any]`):
            Row of [`load_preferences`], or of the audit.
        split (`str`):
            `train` or `eval`.
        config ([`DataConfig`]):
            Its sources.

    Returns:
        `dict[str, Any]`: Its number as `row`, the path of its `source` if there are several, and its `id` if it has
        one.
    """
    found = {ROW: row.get(FILE_ROW, row[ROW_INDEX])}
    if config.mixture is not None and FILE_SOURCE in row:
        found[SOURCE] = sources_of(split, config)[row[FILE_SOURCE]]
    if row.get(ROW_ID) is not None:
        found[ROW_ID] = row[ROW_ID] if isinstance(row[ROW_ID], int) else shorten(row[ROW_ID])
    return found


def sources_of(split: str, config: DataConfig) -> list[str]:
    """Paths of the sources of a split, which `FILE_SOURCE` counts."""
    evaluated = [source for source in config.sources if source.eval_split is not None]
    return [str(source.path) for source in (evaluated if split == "eval" and evaluated else config.sources)]


def origin_text(found: Mapping[str, Any], config: DataConfig) -> str:
    """Where a row comes from, in words: `row 3 of prefs.jsonl, id abc`."""
    identity = f", id {found[ROW_ID]}" if ROW_ID in found else ""
    return f"row {found[ROW]} of {found.get(SOURCE, config.path)}{identity}"
