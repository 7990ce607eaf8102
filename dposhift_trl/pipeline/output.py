"""What a stage prints from its start to its end, put together."""

import contextlib
from collections.abc import Iterator

from transformers.utils import logging

from ..artifacts import SAMPLES
from ..config import DPOShiftConfig
from ..data.audit import AuditedRows
from ..recipe import Recipe
from .header import StageHeader, lambda_line, scoring_line
from .notes import PackageLogs
from .progress import ProgressLines, replace_printer
from .samples import SampleAnswers, why_no_samples
from .trainers import RunDPOShiftTrainer, RunSFTTrainer


@contextlib.contextmanager
def printing(
    trainer: RunSFTTrainer | RunDPOShiftTrainer,
    recipe: Recipe,
    rows: AuditedRows,
    logs: PackageLogs,
    tracker: str | None,
) -> Iterator[None]:
    """
    Print the header of a stage and its logs inside the `with` block, in place of what transformers prints.

    Args:
        trainer ([`ChosenSFTTrainer`] or [`DPOShiftTrainer`]):
            The trainer of the stage.
        recipe ([`~recipe.Recipe`]):
            Checked recipe.
        rows ([`~data.audit.AuditedRows`]):
            Rows of the stage.
        logs ([`PackageLogs`]):
            What the package has logged since the trainer was created.
        tracker (`str`, *optional*):
            Where metrics go with W&B.
    """
    args = trainer.args
    lines: dict[str, str] = {}
    if isinstance(args, DPOShiftConfig) and isinstance(trainer, RunDPOShiftTrainer):
        lines |= {"lambda": lambda_line(args), "scoring": scoring_line(trainer, logs.why_not_shared)}
        reason = why_no_samples(trainer, recipe.sample_prompts)
        if reason is None:
            trainer.add_callback(SampleAnswers(trainer, recipe.sample_prompts))
            lines["samples"] = (
                f"answers to {recipe.sample_prompts} prompts at each evaluation, in {trainer.stage}/{SAMPLES}"
            )
        else:
            lines["samples"] = f"none ({reason})"
    others = [name for name in args.report_to if name != "wandb"]
    lines["metrics"] = "; ".join(filter(None, [tracker, *others])) or "none"
    trainer.add_callback(StageHeader(trainer, rows.audits, lines))
    progress = None
    if recipe.logging_format == "lines":
        varies = isinstance(args, DPOShiftConfig) and len(set(args.lambda_range)) == 2
        progress = ProgressLines(trainer.stage, varies)
        replace_printer(trainer, progress)
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one for each checkpoint
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
        if progress is not None:
            progress.close()  # after an error or a signal
