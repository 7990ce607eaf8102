"""The scores of each pair since the last log, and what is logged and saved of them."""

from pathlib import Path

import torch

from ..artifacts import PAIRS, write_whole
from .metrics import PairScores, evaluation_metrics, pair_metrics


class PairRecorder:
    """
    Collects the scores of pairs batch by batch, in training and in evaluation.

    Args:
        beta (`float`):
            Factor from log-ratio to reward, per nat.
    """

    def __init__(self, beta: float):
        self.beta = beta
        self._batches: dict[str, list[tuple[int, torch.Tensor]]] = {"train": [], "eval": []}

    def add(self, mode: str, step: int, matrix: torch.Tensor) -> None:
        """
        Record a batch.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            step (`int`):
                Optimizer steps completed.
            matrix (`torch.Tensor`):
                Scores of all processes, as of [`~metrics.PairScores.as_matrix`].
        """
        self._batches[mode].append((step, matrix))

    def clear(self, mode: str) -> None:
        """Forget the batches of a mode."""
        self._batches[mode].clear()

    def first_non_finite(self, mode: str, newest: bool = False) -> tuple[int, PairScores] | None:
        """
        Step and scores of the first recorded batch with a value that is not finite, or `None`; waits for the device.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            newest (`bool`, *optional*, defaults to `False`):
                Whether to look at the newest batch only.
        """
        batches = self._batches[mode][-1:] if newest else self._batches[mode]
        if not batches or torch.isfinite(torch.cat([matrix for _, matrix in batches])).all():
            return None
        step, matrix = next((step, matrix) for step, matrix in batches if not torch.isfinite(matrix).all())
        return step, PairScores.from_matrices([matrix])

    def take_metrics(self, mode: str, table: Path | None = None) -> dict[str, float]:
        """
        Metrics of the recorded pairs, which are then forgotten; none if there are no pairs.

        Args:
            mode (`str`):
                `"train"` or `"eval"`, which adds quantiles and intervals.
            table (`Path`, *optional*):
                Parquet file to save the scores to.

        Returns:
            `dict[str, float]`: One number per name.
        """
        if not self._batches[mode]:
            return {}
        scores = PairScores.from_matrices([matrix for _, matrix in self._batches[mode]])
        self.clear(mode)
        if table is not None:
            write_whole(table, scores.as_table())
        return pair_metrics(scores, self.beta) | (evaluation_metrics(scores, self.beta) if mode == "eval" else {})


def table_path(output_dir: str, prefix: str, step: int) -> Path:
    """File of the scores that an evaluation gave its pairs: `pairs/<prefix>-<step>.parquet` in the output folder."""
    return Path(output_dir) / PAIRS / f"{prefix.replace('/', '_')}-{step:06d}.parquet"
