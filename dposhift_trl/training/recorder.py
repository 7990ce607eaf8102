"""Collects the scores of pairs between logs, and turns them into logged metrics and saved tables."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..artifacts import PAIRS, write_whole
from ..columns import ROW_INDEX
from ..data.config import ROW_ID
from ..data.selection import holds_ids
from .metrics import PairScores, evaluation_metrics, pair_metrics


class PairRecorder:
    """
    Collects the scores of pairs batch by batch, in training and in evaluation.

    Args:
        beta (`float`):
            Inverse temperature of the implicit reward, per nat.
    """

    def __init__(self, beta: float):
        self.beta = beta
        self._batches: dict[str, list[tuple[int, torch.Tensor]]] = {"train": [], "eval": []}

    def add(self, mode: str, step: int, matrix: torch.Tensor) -> None:
        """
        Record the scores of a batch.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            step (`int`):
                Number of completed optimizer steps.
            matrix (`torch.Tensor`):
                Scores from all processes; see [`~metrics.PairScores.as_matrix`].
        """
        self._batches[mode].append((step, matrix))

    def clear(self, mode: str) -> None:
        """Discard the recorded batches of a mode."""
        self._batches[mode].clear()

    def first_non_finite(self, mode: str, newest: bool = False) -> tuple[int, PairScores] | None:
        """
        Step and scores of the first recorded batch with a non-finite value, or `None`. Synchronizes with the device.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            newest (`bool`, *optional*, defaults to `False`):
                Whether to check only the newest batch.
        """
        batches = self._batches[mode][-1:] if newest else self._batches[mode]
        if not batches or torch.isfinite(torch.cat([matrix for _, matrix in batches])).all():
            return None
        step, matrix = next((step, matrix) for step, matrix in batches if not torch.isfinite(matrix).all())
        return step, PairScores.from_matrices([matrix])

    def take_metrics(self, mode: str, table: Path | None = None, rows: Any = None) -> dict[str, float]:
        """
        Compute the metrics of the recorded pairs, then discard the pairs. Empty if no pairs were recorded.

        Args:
            mode (`str`):
                `"train"` or `"eval"`. `"eval"` adds quantiles and confidence intervals.
            table (`Path`, *optional*):
                Parquet file in which the scores are saved.
            rows (`Dataset`, *optional*):
                Rows that were scored, for their column `id`, which is saved beside the scores.

        Returns:
            `dict[str, float]`: Metrics by name.
        """
        if not self._batches[mode]:
            return {}
        scores = PairScores.from_matrices([matrix for _, matrix in self._batches[mode]])
        self.clear(mode)
        if table is not None:
            write_whole(table, scores.as_table(row_ids(rows)))
        return pair_metrics(scores, self.beta) | (evaluation_metrics(scores, self.beta) if mode == "eval" else {})


def table_path(output_dir: str, prefix: str, step: int) -> Path:
    """File in which an evaluation saves the scores of its pairs: `pairs/<prefix>-<step>.parquet` in `output_dir`."""
    return Path(output_dir) / PAIRS / f"{prefix.replace('/', '_')}-{step:06d}.parquet"


def row_ids(rows: Any) -> dict[int, Any]:
    """Ids of rows by their number; none unless there is a column `id` of text or integers."""
    if not isinstance(rows, Dataset) or not {ROW_INDEX, ROW_ID} <= set(rows.column_names):
        return {}
    return dict(zip(rows[ROW_INDEX], rows[ROW_ID], strict=True)) if holds_ids(rows, ROW_ID) else {}
