"""Reading one file of a run: its content, or a default and a note about what is wrong with it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..artifacts import ArtifactError, check_file


Content = TypeVar("Content")
Default = TypeVar("Default")


def read_file(
    path: Path, reader: Callable[[Path], Content], default: Default, notes: list[str], what: str
) -> Content | Default:
    """
    Read a file that may be missing or broken.

    Args:
        path (`Path`):
            The file.
        reader (`Callable[[Path], Content]`):
            Function that reads it.
        default (`Default`):
            Returned if the file cannot be read.
        notes (`list[str]`):
            Notes for the reader of the report. The reason is appended if the file cannot be read.
        what (`str`):
            What the report does not show without the file.
    """
    try:
        if not path.exists():
            raise ArtifactError(path, "is missing")
        check_file(path)
        return reader(path)
    except ArtifactError as error:
        reason = error.reason
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        reason = f"cannot be read ({type(error).__name__})"
    notes.append(f"{path.name} {reason}, so {what} cannot be shown.")
    return default


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of numbers in a Parquet file, in float64. Null becomes NaN. Ids may be text, and are left out."""
    table = pq.read_table(path)
    numeric = [field.name for field in table.schema if not pa.types.is_string(field.type)]
    return {name: np.asarray(table[name].to_pylist(), dtype=float) for name in numeric}


def number(value: Any) -> float:
    """The value as a float, NaN if it is not a number."""
    return float(value) if isinstance(value, int | float) else math.nan
