"""The settings in force: those that a trainer reads once, what sets lambda, and the metric of the best checkpoint."""

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import TrainingArguments

from ..config import DPOShiftConfig
from ..schedules import LambdaPlan
from .callbacks import SAMPLES, AdaptiveLambdaCallback, LambdaScheduleCallback


logger = get_logger(__name__)

# Settings of [`DPOShiftConfig`] that are looked up whenever they are needed, so that a change takes effect
READ_LATER = {
    "allow_lambda_above_one",
    "discopop_tau",
    "precompute_ref_batch_size",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "print_verdict",
    "save_pair_scores",
}
# All others that are not transformers' own are read once, when the trainer is created
READ_ONCE = {field.name for field in fields(DPOShiftConfig)} - {f.name for f in fields(TrainingArguments)} - READ_LATER


def settings_read(args: DPOShiftConfig) -> DPOShiftConfig:
    """A copy of the settings as they are now, which later changes do not reach."""
    read = copy.copy(args)
    for name in READ_ONCE:
        setattr(read, name, copy.deepcopy(getattr(args, name)))
    return read


def check_unchanged(args: DPOShiftConfig, read: DPOShiftConfig) -> None:
    """
    Check that no setting was changed after the trainer had read it.

    Args:
        args ([`DPOShiftConfig`]):
            The settings now.
        read ([`DPOShiftConfig`]):
            The settings that are in force, as [`settings_read`] has copied them.

    Raises:
        ValueError: If a setting differs that would have no effect any more.
    """
    for name in sorted(READ_ONCE):
        now, in_force = getattr(args, name), getattr(read, name)
        if now != in_force:
            raise ValueError(
                f"`args.{name}` must not change after the trainer was created, which read {in_force!r}, got {now!r}. "
                "Pass the new value to `DPOShiftConfig` and create another trainer."
            )


@dataclass(frozen=True)
class LambdaInForce:
    """
    What sets lambda.

    Args:
        schedule (`str`):
            `lambda_schedule`, or a description of the function that was passed in a callback.
        plan ([`~schedules.LambdaPlan`], *optional*):
            What the settings say about lambda. `None` if they are not in force.
        range (`tuple[float, float]`, *optional*):
            Smallest and largest lambda over the run. `None` if it is not known before training.
    """

    schedule: str
    plan: LambdaPlan | None
    range: tuple[float, float] | None

    @classmethod
    def of(cls, args: DPOShiftConfig, callback: LambdaScheduleCallback) -> "LambdaInForce":
        """The settings if the callback does what they say, else the function that the callback holds."""
        plan = args.lambda_plan
        if type(callback) is AdaptiveLambdaCallback and plan.adaptive:
            return cls(str(args.lambda_schedule), plan, plan.range)
        hooks = ("on_train_begin", "on_step_begin", "on_step_end")
        if any(getattr(type(callback), hook) is not getattr(LambdaScheduleCallback, hook) for hook in hooks):
            return cls(f"`{type(callback).__name__}`, given in code", None, None)
        values = [float(callback.schedule(progress)) for progress in SAMPLES]
        if not plan.adaptive and values == [plan.function(progress) for progress in SAMPLES]:
            return cls(str(args.lambda_schedule), plan, plan.range)
        return cls("a function of progress, given in code", None, (min(values), max(values)))

    @property
    def settings(self) -> dict[str, Any]:
        """The lambda settings of [`DPOShiftConfig`] to report in place of those that are not in force."""
        if self.plan is not None:
            return {}
        low, high = self.range or (None, None)
        return {"lambda_schedule": self.schedule, "shift_lambda": None, "lambda_min": low, "lambda_max": high}


def name_best_metric(args: TrainingArguments, eval_dataset: Any) -> None:
    """
    Complete the name of the metric of the best checkpoint if there are several evaluation sets.

    Each metric then carries the name of its set. A metric that names none is taken as that of the first set.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Settings, of which `metric_for_best_model` is set.
        eval_dataset (`Dataset`, `IterableDataset`, a dictionary of them, or `None`):
            The evaluation sets.
    """
    metric = args.metric_for_best_model
    if metric is None or not isinstance(eval_dataset, dict) or not eval_dataset:
        return
    metric = metric.removeprefix("eval_")
    if any(metric.startswith(f"{name}_") for name in eval_dataset):
        return
    first = next(iter(eval_dataset))
    args.metric_for_best_model = f"eval_{first}_{metric}"
    logger.warning(
        f"The best checkpoint is chosen by {args.metric_for_best_model}, of the first of {len(eval_dataset)} "
        f"evaluation sets. To choose by another one, set `metric_for_best_model`."
    )


def warn_of_slow_precision(dtype: torch.dtype, accelerator: Accelerator) -> None:
    """
    Log that a CPU without instructions for bfloat16 is slower in it than in float32.

    Args:
        dtype (`torch.dtype`):
            Dtype of the weights.
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator, with the device and the precision of the arithmetic.
    """
    in_bfloat16 = accelerator.mixed_precision == "bf16" or dtype == torch.bfloat16
    if accelerator.device.type != "cpu" or not in_bfloat16:
        return
    if not hasattr(torch.cpu, "get_capabilities"):  # a release of torch that cannot tell
        return
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        logger.warning(
            "This CPU has no instructions for bfloat16, which is about 3 times slower on it than float32. Set "
            "`bf16=False`."
        )
