"""What a trainer's evaluations show: told when they are done, on request, and as a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import broadcast_object_list
from transformers import Trainer

from ..artifacts import REPORT, STATE, ArtifactError, read_mapping
from ..config import DPOShiftConfig
from ..console import say, wrapped
from ..report.errors import ReportError
from ..report.verdict import Verdict, verdict_of
from .model_card import log_until
from .settings import LambdaInForce


# The first columns of the table that notebooks show
FIRST_COLUMNS = (
    "displacement/chosen",
    "displacement/chosen_fell",
    "displacement/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "shift/lambda",
)


class Verdicts(Trainer):
    """Trainer that prints the verdict on its evaluations after `train` and `evaluate`, and writes its report."""

    prints_verdict: ClassVar[bool] = True  # unless the settings say otherwise; a command prints it by itself

    @property
    def lambda_in_force(self) -> LambdaInForce | None:
        """What sets lambda, or set it in training; `None` if nothing does."""
        return None

    def verdict(self) -> Verdict | None:
        """
        Say what the last evaluation shows: whether the chosen answers became less likely, and what to try.

        With `load_best_model_at_end`, it is the evaluation of the best checkpoint, unless the loaded model was
        evaluated again after training.

        Returns:
            [`~report.verdict.Verdict`] or `None`: `None` if there was no evaluation under the prefix `eval`.
        """
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        in_force = self.lambda_in_force
        return verdict_of(log_until(self.state.log_history, best), in_force.plan if in_force else None)

    def report(self, path: str | Path | None = None) -> Path:
        """
        Write the page about this training, `report.html` with its figures, and save the log that it shows.

        Args:
            path (`str` or `Path`, *optional*):
                Folder to write to. Defaults to `report` in `output_dir`.

        Returns:
            `Path`: The page, which the main process writes.

        Raises:
            ReportError: If there is nothing to show, or the folder contains other files. On the other processes,
                whatever stops the main process.
            ValueError: If `output_dir` holds the log of another training.
        """
        from ..report.page import PAGE, write_report  # imports matplotlib, which takes seconds

        folder = Path(self.args.output_dir)
        destination = folder / REPORT if path is None else Path(path)
        fault: Exception | None = None
        if self.is_world_process_zero():
            try:
                check_own_log(folder, self.state.log_history)
                self.save_state()
                write_report([folder], destination)
            except Exception as error:  # raised once the other processes, which wait here, know of it
                fault = error
        (message,) = broadcast_object_list([fault and str(fault)])
        if fault is not None:
            raise fault
        if message is not None:
            raise ReportError(message)
        return destination / PAGE

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        """Prints the verdict at the end."""
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._print_verdict()
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Prints the verdict, except during training."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not self.is_in_train and metric_key_prefix == "eval":
            self._print_verdict()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Leaves the metrics that matter first, the order in which notebooks show those of an evaluation."""
        super().log(logs, start_time)
        ordered = in_order(logs)
        logs.clear()
        logs.update(ordered)

    def _print_verdict(self) -> None:
        wanted = isinstance(self.args, DPOShiftConfig) and self.args.print_verdict
        if self.prints_verdict and wanted and self.is_world_process_zero() and (verdict := self.verdict()) is not None:
            say(verdict.headline, *wrapped(str(verdict)))


def in_order(logs: Mapping[str, float]) -> dict[str, float]:
    """
    Logged metrics, those that matter first, the loss last.

    transformers takes what precedes the last `_loss` for the prefix of an evaluation, and leaves out how long it took
    only under that prefix.
    """

    def place(name: str) -> int:
        found = (index for index, column in enumerate(FIRST_COLUMNS) if name.endswith(column))
        return next(found, len(FIRST_COLUMNS) + name.endswith("_loss") - name.endswith("_dpo_loss"))

    return {name: logs[name] for name in sorted(logs, key=place)}


def check_own_log(folder: Path, log_history: Sequence[Mapping[str, Any]]) -> None:
    """
    Check that the log that a trainer would save in a folder replaces none of another training.

    Raises:
        ValueError: If the log there is not the start of its own.
    """
    try:
        earlier = read_mapping(folder / STATE).get("log_history") if (folder / STATE).exists() else []
    except ArtifactError:
        return
    # As text, since a NaN is not equal to itself
    if isinstance(earlier, list) and _as_text(earlier) != _as_text(log_history[: len(earlier)]):
        raise ValueError(
            f"`output_dir` must not hold the log of another training, got {folder}. Pass another `output_dir`, or "
            f"write its report by `python -m dposhift_trl.report {folder}`."
        )


def _as_text(log_history: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(log_history, sort_keys=True)
