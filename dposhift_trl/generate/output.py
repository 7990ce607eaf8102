"""
The files that generated answers are written to.

All files are UTF-8 and written atomically, to `RUN_DIR/generations` by default. The two models are named by their
stage, `sft` and `dpo`; `base` replaces a stage that the recipe does not have.

`statistics.json`, written last:

- `settings`: what the answers depend on: `prompts` (name of the file, or null for the evaluation rows), `questions` (a
  digest of them), `limit`, `max_new_tokens`, `temperature`, `top_p`, `seed`.
- `models`: names of the two models, the earlier one first. `modes`: `["greedy", "sampled"]`.
- `weights`: `weights[model]` is a hash of the weights that answered, or the name and revision of a model from the Hub.
- `questions`: number of questions that were asked. `left_out`: number of others, by reason: `empty` (a prompt without
  tokens), `too_long` (a prompt that fills the model's positions).
- `statistics`: `statistics[model][mode]` is the output of [`answer_statistics`]. Each turn has one answer.
- `chosen`: the same statistics of the chosen answers, or null if there are none. Chosen answers are never cut, so
  compare lengths together with `cut`.

`side_by_side.jsonl`, one line per question:

- `question_id`: the id in the file. By default the index of the row in the evaluation rows or of the prompt in the
  file, from 0.
- `category`: category in MT-Bench, or null.
- `prompt`: text or a conversation. `follow_ups`: later turns of the user, usually none.
- `answers`: `answers[model][mode]` is a list of texts, one per turn.
- `chosen`: the chosen answer, or null.

For each model and mode, `<model>-<mode>` followed by

- `.alpaca_eval.json`: a list of `instruction`, `output`, `generator` of the first turn, which
  `alpaca_eval --model_outputs` reads. `.jsonl` has the same content, one object per line, which it does not read.
- `.mt_bench.jsonl`: answers in FastChat's format. For its judge, copy the file to
  `data/mt_bench/model_answer/<model_id>.jsonl`.

Generated answers have no special tokens and no white space at both ends.
"""

import dataclasses
import hashlib
import itertools
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts import FINISHED, SIDE_BY_SIDE, STATISTICS, ArtifactError, read_mapping, write_whole
from ..recipe import STAGES
from .models import FinishedRun
from .questions import Question
from .sampling import Answer
from .settings import MODES, GenerateError, GenerationSettings


ANSWER_FILES = (".jsonl", ".alpaca_eval.json", ".mt_bench.jsonl")
Answers = dict[str, dict[str, list[list[Answer]]]]  # by model and mode, one list of turns per question


def describe_settings(
    settings: GenerationSettings, prompts: str | Path | None, questions: list[Question]
) -> dict[str, Any]:
    """What the answers depend on, for comparison with a later call."""
    texts = [dataclasses.asdict(question) for question in questions]
    for question in texts:
        if not question["template_inputs"]:
            del question["template_inputs"]
    text = json.dumps(texts, default=str)
    described = {
        "prompts": None if prompts is None else Path(prompts).name,
        "questions": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        **dataclasses.asdict(settings),
    }
    del described["batch_size"]
    return described


def prepare_destination(
    destination: Path, weights: Mapping[str, str], described: dict[str, Any], overwrite: bool
) -> None:
    """
    Create the folder.

    Args:
        destination (`Path`):
            The folder.
        weights (`Mapping[str, str]`):
            Which weights will answer, by the name of the model.
        described (`dict[str, Any]`):
            The settings, from [`describe_settings`].
        overwrite (`bool`):
            Whether other files are kept and other answers replaced.

    Raises:
        GenerateError: If it cannot be written, or if `overwrite` is `False` and it contains other files, or answers
            with other settings or of other weights.
    """
    try:
        destination.mkdir(parents=True, exist_ok=True)
        names = sorted(entry.name for entry in destination.iterdir())
        written = {f"{model}-{mode}{end}" for model in weights for mode in MODES for end in ANSWER_FILES}
        written |= {STATISTICS, SIDE_BY_SIDE}
        others = [name for name in names if name.removesuffix(".tmp") not in written]
        if others and not overwrite:
            raise GenerateError(
                f"`--output` {destination} contains other files ({others[0]}). Choose a new folder, or pass "
                "--overwrite."
            )
        if STATISTICS in names and not overwrite:
            earlier, answered = (_earlier(destination / STATISTICS, part) for part in ("settings", "weights"))
            changes = sorted(key for key in {*earlier, *described} if earlier.get(key) != described.get(key))
            retrained = [name for name in weights if answered.get(name) != weights[name]]
            if changes or retrained:
                what = f"with other settings: {', '.join(changes)}" if changes else ""
                what = what or f"of other weights than `{'` and `'.join(retrained)}` now has"
                raise GenerateError(
                    f"`--output` {destination} contains answers {what}. Choose a new folder, or pass --overwrite."
                )
    except OSError as error:
        raise GenerateError(f"`--output` {destination} cannot be written: {error}") from error


def _earlier(path: Path, part: str) -> dict[str, Any]:
    try:
        found = read_mapping(path).get(part)
    except ArtifactError:
        found = None
    return found if isinstance(found, dict) else {}


def save_answers(
    destination: Path, run: FinishedRun, questions: list[Question], answers: Answers, report: dict[str, Any]
) -> None:
    """
    Write all files.

    Args:
        destination (`Path`):
            Folder to write to.
        run ([`FinishedRun`]):
            The run.
        questions (`list[Question]`):
            The questions.
        answers (`dict[str, dict[str, list[list[Answer]]]]`):
            Answers by model and mode.
        report (`dict[str, Any]`):
            Content of `statistics.json`.

    Raises:
        GenerateError: If the folder cannot be written.
    """
    try:
        # An interruption must not leave statistics that do not belong to the answers
        (destination / STATISTICS).unlink(missing_ok=True)
        for name, mode in itertools.product(run.models, MODES):
            generator, texts = f"{run.name}-{name}-{mode}", [_texts(turns) for turns in answers[name][mode]]
            # The time at which the model was finished, so that the same answers give the same file
            stamp = (run.folder / (name if name in STAGES else run.models[-1]) / FINISHED).stat().st_mtime
            alpaca = [
                {"instruction": question.instruction, "output": turns[0], "generator": generator}
                for question, turns in zip(questions, texts, strict=True)
            ]
            mt_bench = [
                {
                    "question_id": question.question_id,
                    "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{generator}/{question.question_id}/{turns}").hex,
                    "model_id": generator,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": stamp,
                }
                for question, turns in zip(questions, texts, strict=True)
            ]
            stem = f"{name}-{mode}"
            write_whole(destination / f"{stem}.alpaca_eval.json", _pretty(alpaca))
            write_whole(destination / f"{stem}.jsonl", _lines(alpaca))
            write_whole(destination / f"{stem}.mt_bench.jsonl", _lines(mt_bench))
        side_by_side = [
            {
                "question_id": question.question_id,
                "category": question.category,
                "prompt": question.prompt,
                "follow_ups": list(question.follow_ups),
                "answers": {name: {mode: _texts(answers[name][mode][index]) for mode in MODES} for name in run.models},
                "chosen": question.chosen,
            }
            for index, question in enumerate(questions)
        ]
        write_whole(destination / SIDE_BY_SIDE, _lines(side_by_side))
        write_whole(destination / STATISTICS, _pretty(report))
    except OSError as error:
        raise GenerateError(f"`--output` {destination} cannot be written: {error}") from error


def _texts(turns: list[Answer]) -> list[str]:
    return [answer.text for answer in turns]


def _pretty(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _lines(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
