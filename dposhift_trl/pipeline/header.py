"""The header of a stage: what it is about to do, and on what."""

import os
import platform
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import DPOShiftConfig
from ..data.audit import SplitAudit
from ..launcher import lone_process
from .processes import say_wrapped
from .trainers import RunDPOShiftTrainer, RunSFTTrainer


NAME = 11  # characters of the longest name of a line, with what separates it from its text


class StageHeader(TrainerCallback):
    """
    Prints the header when training begins, which is when the number of steps is known.

    Args:
        trainer ([`ChosenSFTTrainer`] or [`DPOShiftTrainer`]):
            The trainer of the stage.
        audits (`dict[str, SplitAudit]`):
            What the audit has kept, by split.
        lines (`dict[str, str]`):
            Further lines, by name.
    """

    def __init__(
        self,
        trainer: RunSFTTrainer | RunDPOShiftTrainer,
        audits: Mapping[str, SplitAudit],
        lines: Mapping[str, str],
    ):
        self.trainer, self.audits, self.lines = trainer, audits, lines

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        lines = {
            "rows": _rows(self.audits),
            "steps": _steps(args, state),
            "device": _device(self.trainer),
            **self.lines,
        }
        for name, text in lines.items():
            say_wrapped(f"  {name:<{NAME - 2}}{text}", indent=NAME)
        for remedy in (lone_process(), _idle_cores(args)):
            if remedy is not None:
                say_wrapped(remedy)


def _rows(audits: Mapping[str, SplitAudit]) -> str:
    counts = {
        split: "an unknown number" if audit.rows is None else f"{audit.kept} of {audit.rows}"
        for split, audit in audits.items()
    }
    return "; ".join(
        f"{count} for {'evaluation' if split == 'eval' else 'training'}" for split, count in counts.items()
    )


def _steps(args: TrainingArguments, state: TrainerState) -> str:
    tokens = getattr(args, "max_tokens_per_batch", None)
    if tokens:
        size = f"at most {tokens * args.gradient_accumulation_steps * args.world_size} tokens each"
    else:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        size = f"{rows} {'pairs' if isinstance(args, DPOShiftConfig) else 'answers'} each"
    left = f", {state.max_steps - state.global_step} of them left" if state.global_step else ""
    return f"{state.max_steps}, {size}{left}"


def _device(trainer: RunSFTTrainer | RunDPOShiftTrainer) -> str:
    processes, device = trainer.args.world_size, trainer.args.device
    place = f"{device.type} ({hardware(device)})"
    weights = str(trainer.model.dtype).removeprefix("torch.")
    mixed = trainer.accelerator.mixed_precision
    precision = weights if mixed == "no" else f"{weights} weights, {mixed} arithmetic"
    return f"{place}, {processes} process{'es' * (processes != 1)}, {precision}"


def _idle_cores(args: TrainingArguments) -> str | None:
    """How to use all cores of a CPU, of which `accelerate launch` gives one to each process."""
    cores = usable_cores()
    share = cores // args.world_size
    if args.device.type != "cpu" or torch.get_num_threads() > 1 or share < 2:
        return None
    return (
        f"Each process computes on one of {cores} cores. To use them all, start with "
        f"`accelerate launch --num_cpu_threads_per_process {share}`."
    )


def scoring_line(trainer: RunDPOShiftTrainer, why_not_shared: str | None) -> str:
    """How the stage `dpo` scores pairs: shared tokens, and the reference."""
    if trainer.shares_prompts:
        tokens = "shared tokens read once"
    else:
        reason = why_not_shared or ("as set" if trainer.args.shared_prompt is False else "")
        tokens = "both rows of each pair read" + (f" ({reason})" if reason else "")
    return f"{tokens}; reference " + ("precomputed" if trainer.precompute_ref_logps else "scored at each step")


def lambda_line(args: DPOShiftConfig) -> str:
    """Lambda over the run, and beta."""
    plan = args.lambda_plan
    name = plan.schedule if isinstance(plan.schedule, str) else "knots"
    return f"{plan.text}{'' if plan.adaptive else f' ({name})'}, beta {args.beta:g}"


def hardware(device: torch.device) -> str:
    """Name of an accelerator, or the kind and number of CPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {usable_cores()} cores"


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
