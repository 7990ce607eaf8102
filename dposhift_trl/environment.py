"""Environment variables of W&B, which outrank the defaults of this package, and which a recipe outranks."""

import os
from pathlib import Path
from typing import Any


# As transformers reads `WANDB_DISABLED` up to its version 4
TRUE = ("1", "on", "yes", "true")
MODES = ("online", "offline", "shared", "disabled")
DEPRECATED_MODES = {"run": "online", "dryrun": "offline"}


def wandb_settings() -> dict[str, tuple[str, Any]]:
    """
    What the environment says about the keys of the section `wandb`.

    Returns:
        `dict[str, tuple[str, Any]]`: Name and value of the variable, by key. Keys without a variable are left out.

    Raises:
        ValueError: If `WANDB_MODE` is none of W&B's modes.
    """
    found: dict[str, tuple[str, Any]] = {
        key: (variable, value)
        for key, variable in (("project", "WANDB_PROJECT"), ("entity", "WANDB_ENTITY"))
        if (value := os.environ.get(variable))
    }
    if tags := [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]:
        found["tags"] = "WANDB_TAGS", tags
    if os.environ.get("WANDB_DISABLED", "").lower() in TRUE:
        found["mode"] = "WANDB_DISABLED", "disabled"
    elif mode := os.environ.get("WANDB_MODE"):
        found["mode"] = "WANDB_MODE", DEPRECATED_MODES.get(mode, mode)
        if found["mode"][1] not in MODES:
            raise ValueError(
                f"The environment variable WANDB_MODE must be one of {', '.join(MODES)}, got {mode!r}. Unset it, or "
                "set `wandb.mode` in the recipe."
            )
    return found


def wandb_run_settings(stage: str, run_name: str, is_named: bool, folder: Path) -> dict[str, Any]:
    """
    Arguments of `wandb.init` that no key of a recipe sets.

    Args:
        stage (`str`):
            Stage, `sft` or `dpo`.
        run_name (`str`):
            Name of the run.
        is_named (`bool`):
            Whether the recipe itself gives the name.
        folder (`Path`):
            The run folder.
    """
    name = run_name if is_named else os.environ.get("WANDB_NAME") or run_name
    return {
        "name": f"{name}-{stage}",
        "group": os.environ.get("WANDB_RUN_GROUP") or run_name,
        "job_type": os.environ.get("WANDB_JOB_TYPE") or stage,
        # Absolute, since the W&B service has another working directory
        "dir": str(Path(os.environ.get("WANDB_DIR") or folder).resolve()),
    }
