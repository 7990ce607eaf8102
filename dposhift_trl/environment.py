"""Environment variables of W&B, which outrank the defaults of this package, and which a recipe outranks."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# As transformers reads `WANDB_DISABLED` up to its version 4
TRUE = ("1", "on", "yes", "true")
DEPRECATED_MODES = {"run": "online", "dryrun": "offline"}


def wandb_settings() -> dict[str, tuple[str, Any]]:
    """
    What the environment says about the keys of the section `wandb`.

    Returns:
        `dict[str, tuple[str, Any]]`: Name and value of the variable, by key. Keys without a variable are left out.
    """
    found: dict[str, tuple[str, Any]] = {
        key: (variable, value)
        for key, variable in (("project", "WANDB_PROJECT"), ("entity", "WANDB_ENTITY"), ("mode", "WANDB_MODE"))
        if (value := os.environ.get(variable))
    }
    if tags := [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]:
        found["tags"] = "WANDB_TAGS", tags
    if os.environ.get("WANDB_DISABLED", "").lower() in TRUE:
        found["mode"] = "WANDB_DISABLED", "disabled"
    elif "mode" in found:
        variable, mode = found["mode"]
        found["mode"] = variable, DEPRECATED_MODES.get(mode, mode)
    return found


@contextlib.contextmanager
def hidden(*variables: str) -> Iterator[None]:
    """Hide variables inside the `with` block. W&B does not start with an empty or unknown mode, or an empty tag."""
    values = {variable: os.environ.pop(variable) for variable in variables if variable in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


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
        # The run prints the last metrics and the place of its files itself
        "settings": {"quiet": (os.environ.get("WANDB_QUIET") or "true").lower() in TRUE},
    }
