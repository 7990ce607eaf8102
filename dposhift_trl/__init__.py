"""DPO-Shift for TRL: DPO whose rejected log-ratio is scaled by a scheduled lambda."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_HOME = {
    "DPOShiftConfig": "config",
    "DPOShiftTrainer": "training.trainer",
    "ChosenSFTTrainer": "training.sft",
    "LambdaScheduleCallback": "training.callbacks",
    "make_lambda_schedule": "schedules",
    "dpo_shift_loss": "losses",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from .config import DPOShiftConfig as DPOShiftConfig
    from .losses import dpo_shift_loss as dpo_shift_loss
    from .schedules import make_lambda_schedule as make_lambda_schedule
    from .training.callbacks import LambdaScheduleCallback as LambdaScheduleCallback
    from .training.sft import ChosenSFTTrainer as ChosenSFTTrainer
    from .training.trainer import DPOShiftTrainer as DPOShiftTrainer


def __getattr__(name: str) -> Any:
    # Public names are imported on first use: torch and trl take seconds
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
