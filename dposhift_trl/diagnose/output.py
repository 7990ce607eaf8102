"""
The folder that a diagnosis is written to, `diagnosis/<policy>` by default.

- `recipe.yaml`: the settings. `python -m dposhift_trl.diagnose DIR/recipe.yaml` diagnoses again.
- `diagnosis.json`: what was scored, and the metrics that [`DPOShiftTrainer`] logs for the same policy,
  reference, and pairs. Lambda is unknown, so those of the shift are left out.
- `audit.json`, `eval_rows.parquet`, `pairs/` with `eval-000000.parquet`, `report/`: as in a run folder.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..artifacts import (
    AUDIT,
    DIAGNOSIS,
    EVAL_ROWS,
    PAIRS,
    RECIPE,
    REPORT,
    TOKENS,
    UNFINISHED,
    ArtifactError,
    read_mapping,
    whole_files,
    write_whole,
)
from ..data.audit import AuditedRows
from ..pipeline.run_folder import save_evaluated_rows
from ..recipe import dump_yaml
from ..reference.fingerprint import reference_key
from ..training.metrics import PairScores
from ..training.recorder import row_ids, table_path
from .models import ModelSource
from .settings import DiagnoseError, DiagnoseSettings


HOME = "diagnosis"
WRITTEN = (RECIPE, DIAGNOSIS, AUDIT, EVAL_ROWS, PAIRS, REPORT)
# What does not change a score
FREE = {"output_dir", "batch_size"}


def describe(settings: DiagnoseSettings, models: Sequence[ModelSource], rows: Dataset) -> dict[str, Any]:
    """What the numbers of a diagnosis depend on, for comparison with a later call."""
    values = {name: value for name, value in settings.resolved.items() if name not in FREE}
    tokens = reference_key(
        rows, "", max_length=None, truncation_mode=settings.truncation.mode, ld_alpha=None, precision=""
    )
    return {**values, "weights": {source.role: source.weights for source in models}, "tokens": tokens}


def check_folder(settings: DiagnoseSettings) -> None:
    """
    Check the folder that was asked for, before anything is read.

    Raises:
        DiagnoseError: If it contains other files.
    """
    if settings.output_dir is None:
        return
    folder = Path(settings.output_dir).expanduser()
    if (others := _others(folder)) is not None:
        raise DiagnoseError(f"`output_dir` {folder} {others}. Choose a new folder.")


def choose_folder(settings: DiagnoseSettings, described: dict[str, Any], overwrite: bool) -> Path:
    """
    The folder to write to: the one asked for, or the first in `diagnosis` that is free or holds this diagnosis.

    Raises:
        DiagnoseError: If the folder asked for contains a diagnosis with other settings, or of other weights or pairs,
            and `overwrite` is `False`.
    """
    if settings.output_dir is not None:
        folder = Path(settings.output_dir).expanduser()
        if (changes := _changes(folder, described)) and not overwrite:
            raise DiagnoseError(
                f"`output_dir` {folder} contains another diagnosis: {', '.join(changes)} changed. Choose a new "
                "folder, or pass --overwrite."
            )
        return folder
    place = Path(settings.policy)
    name = "-".join(part for part in place.parts[-2:] if part not in ("..", place.anchor)) or "policy"
    folders = (Path(HOME, name + suffix) for suffix in ("", *(f"-{number}" for number in range(2, 10_000))))
    return next(x for x in folders if _others(x) is None and (overwrite or not _changes(x, described)))


def _others(folder: Path) -> str | None:
    """What in a folder is of no diagnosis."""
    try:
        names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    known = (*WRITTEN, UNFINISHED) if DIAGNOSIS in names else (UNFINISHED,)
    others = sorted((name for name in names if name not in known), key=lambda name: (name.startswith("."), name))
    return f"contains other files ({others[0]})" if others else None


def _changes(folder: Path, described: dict[str, Any]) -> list[str]:
    """What differs between the diagnosis in a folder and another one."""
    try:
        earlier = read_mapping(folder / DIAGNOSIS).get("settings")
    except ArtifactError:
        return []
    earlier = earlier if isinstance(earlier, dict) else {}
    return sorted(key for key in {*earlier, *described} if earlier.get(key) != described.get(key))


def save(
    folder: Path,
    settings: DiagnoseSettings,
    audited: AuditedRows,
    scores: PairScores,
    tokens: pa.Table | None,
    content: dict[str, Any],
) -> None:
    """
    Write the files of a diagnosis together: an interruption leaves those that were there.

    Args:
        folder (`Path`):
            Folder from [`choose_folder`].
        settings ([`DiagnoseSettings`]):
            The settings.
        audited ([`~data.audit.AuditedRows`]):
            The pairs, as `train`, and what the audit found.
        scores ([`~training.metrics.PairScores`]):
            Scores of the pairs.
        tokens (`pyarrow.Table`, *optional*):
            Scores of the tokens of some pairs.
        content (`dict[str, Any]`):
            Content of `diagnosis.json`.

    Raises:
        DiagnoseError: If the folder cannot be written.
    """
    found = {split: dataclasses.asdict(audit) for split, audit in audited.audits.items()}
    try:
        with whole_files(folder) as unfinished:
            table = table_path(str(unfinished), "eval", 0)
            known = scores.as_table(row_ids(audited.train)).drop_columns(["shift_lambda"])  # there is no lambda
            write_whole(table, known)
            if tokens is not None:
                write_whole(table.parent / TOKENS / table.name, tokens)
            (folder / PAIRS / TOKENS / table.name).unlink(missing_ok=True)  # of an earlier diagnosis
            save_evaluated_rows(audited.train, unfinished / EVAL_ROWS)
            write_whole(unfinished / AUDIT, _json(found))
            write_whole(unfinished / RECIPE, dump_yaml({**settings.resolved, "output_dir": str(folder)}))
            write_whole(unfinished / DIAGNOSIS, _json(content))
    except OSError as error:
        raise DiagnoseError(f"`output_dir` {folder} cannot be written: {error.strerror or error}") from error


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
