"""The files of a run folder: their names, and how they are written, whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


# In the run folder
RECIPE = "recipe.yaml"
AUDIT = "audit.json"
EVAL_ROWS = "eval_rows.parquet"
REPORT = "report"
GENERATIONS = "generations"
LOCK = ".lock"

# In the folder of a stage
FINISHED = "finished.json"
STATE = "trainer_state.json"
PAIRS = "pairs"  # <prefix>-<step>.parquet, the scores that an evaluation gave each pair
WANDB_ID = "wandb_id"
MERGED = "merged"

# In the folders `generations` and `report`
STATISTICS = "statistics.json"
SIDE_BY_SIDE = "side_by_side.jsonl"
PAGE = "report.html"
FIGURES = "figures"


def write_whole(path: Path, content: str | bytes | pa.Table, temporary: Path | None = None) -> None:
    """
    Write a file so that it is there whole or not at all, also if the process is killed or the disk is full.

    Args:
        path (`Path`):
            The file; an earlier one is replaced.
        content (`str`, `bytes` or `pyarrow.Table`):
            Text, written as UTF-8; bytes; or a table, written as Parquet.
        temporary (`Path`, *optional*):
            File in the same folder that is written first, `<name>.tmp` by default. Pass a name of its own where
            several processes may write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            _write(file, content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: Any, content: str | bytes | pa.Table) -> None:
    if isinstance(content, pa.Table):
        pq.write_table(content, file)
    else:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
