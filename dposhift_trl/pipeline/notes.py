"""What users should know, in one line each: keys of a recipe without effect, and what the package logs."""

import logging
import re
from collections.abc import Iterator
from typing import Any

from ..config import DPOShiftConfig
from ..console import complain, wrapped
from ..recipe import Recipe
from ..schedules import settings_without_effect
from .prospects import why_no_verdict


PACKAGE = __name__.split(".")[0]
RANK = re.compile(r"^\[RANK \d+\] ")  # which Accelerate puts before each message
UNSHARED = "shared_prompt is off: "  # how `training/sharing.py` starts its reason


def recipe_notes(recipe: Recipe) -> Iterator[str]:
    """Keys that a recipe sets to no effect, and what it lacks for a verdict."""
    dpo = recipe.stages.get("dpo")
    if isinstance(dpo, DPOShiftConfig):
        schedule = dpo.lambda_schedule
        for key in settings_without_effect(schedule, recipe.resolved["dpo"]):
            yield f"`dpo.{key}` has no effect with `lambda_schedule: {schedule}`. Remove it, or change the schedule."
    if not recipe.model.use_peft:
        for key in recipe.resolved["model"]:
            if key.startswith("lora_"):
                yield f"`model.{key}` has no effect with `use_peft: false`. Remove it, or set `use_peft: true`."
    if (reason := why_no_verdict(recipe)) is not None:
        yield reason


class PackageLogs(logging.Handler):
    """
    Prints the warnings of this package as lines of the run, each one once.

    Attributes:
        messages (`list[str]`):
            What was printed.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = RANK.sub("", record.getMessage())
        if message not in self.messages:
            self.messages.append(message)
            complain(*wrapped(message))

    @property
    def why_not_shared(self) -> str | None:
        """Why shared tokens are not read once, if that was logged."""
        reasons = [message.removeprefix(UNSHARED) for message in self.messages if message.startswith(UNSHARED)]
        return reasons[-1] if reasons else None

    def __enter__(self) -> "PackageLogs":
        logging.getLogger(PACKAGE).addHandler(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        logging.getLogger(PACKAGE).removeHandler(self)
