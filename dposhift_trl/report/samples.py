"""Answers to a few evaluation prompts over the steps of the stage `dpo`, as a run has saved them."""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ..artifacts import SAMPLES, read_text
from .files import read_file


@dataclass
class Sample:
    """
    A prompt with its answers.

    Args:
        row (`int` or `str`):
            Row of the prompt in the evaluation rows.
        prompt (`str`):
            The prompt as text.
        chosen (`str`, *optional*):
            The chosen answer in the data.
        reference (`str`):
            The reference's answer.
        answers (`list[tuple[str, str]]`):
            The policy's answers, each with the steps at which it gave it.
    """

    row: Any
    prompt: str
    chosen: str | None
    reference: str
    answers: list[tuple[str, str]] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether the policy's last answer differs from the reference's."""
        return self.answers[-1][1] != self.reference


def read_samples(folder: Path, notes: list[str]) -> list[Sample]:
    """
    Read the sample answers of a stage.

    Args:
        folder (`Path`):
            Folder of the stage.
        notes (`list[str]`):
            Notes for the reader of the report. The reason is appended if the file is there and cannot be read.
    """
    path = folder / SAMPLES
    return read_file(path, _read, [], notes, "the sample answers") if path.exists() else []


def _read(path: Path) -> list[Sample]:
    lines = [json.loads(line) for line in read_text(path).split("\n") if line]
    by_row: dict[Any, list[dict[str, Any]]] = {}
    for line in lines:
        by_row.setdefault(line["row"], []).append(line)
    return [
        Sample(
            row,
            str(found[-1]["prompt"]),
            None if found[-1]["chosen"] is None else str(found[-1]["chosen"]),
            str(found[-1]["reference"]),
            [
                (_steps([int(line["step"]) for line in same]), answer)
                for answer, same in ((key, list(group)) for key, group in groupby(found, lambda x: str(x["policy"])))
            ],
        )
        for row, found in by_row.items()
    ]


def _steps(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
