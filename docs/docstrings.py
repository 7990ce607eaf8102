"""Extension of Griffe: docstrings in TRL's format, which the Hub's doc-builder reads, as Markdown."""

import re
from typing import Any

from griffe import Extension, Object


PUBLIC = {
    "DPOShiftConfig": "dposhift_trl.config.DPOShiftConfig",
    "DPOShiftTrainer": "dposhift_trl.training.trainer.DPOShiftTrainer",
    "ChosenSFTTrainer": "dposhift_trl.training.sft.ChosenSFTTrainer",
    "LambdaScheduleCallback": "dposhift_trl.training.callbacks.LambdaScheduleCallback",
    "make_lambda_schedule": "dposhift_trl.schedules.make_lambda_schedule",
    "dpo_shift_loss": "dposhift_trl.losses.dpo_shift_loss",
}


def as_markdown(docstring: str) -> str:
    r"""
    Turn `\\( x \\)` into `$x$`, ``[`Name`]`` into a link if it is on the page and otherwise into code, and
    ``name (`type`, *optional*):`` into `name (type):`.
    """
    docstring = re.sub(r"\\\\\((.*?)\\\\\)", lambda formula: f"${formula[1].strip()}$", docstring, flags=re.DOTALL)

    def link(name: re.Match[str]) -> str:
        shown = name[2].rsplit(".", 1)[-1] if name[1] else name[2]  # `~` hides the module
        path = PUBLIC.get(shown)
        return f"[`{shown}`][{path}]" if path else f"`{shown}`"

    docstring = re.sub(r"\[`(~?)([\w.]+)`\](?!\()", link, docstring)
    return re.sub(r"^( +\w+ )\((`.*?)(?:, \*optional\*.*?)?\):$", _plain_type, docstring, flags=re.MULTILINE)


def _plain_type(argument: re.Match[str]) -> str:
    """The type alone; the signature has the default."""
    types = re.sub(r"\[?`([^`]+)`\]?(?:\[[\w.]+\])?", r"\1", argument[2])
    return f"{argument[1]}({types}):"


class TRLDocstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
