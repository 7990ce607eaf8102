"""Greedy answers of policy and reference to a few evaluation prompts, at each evaluation of the stage `dpo`."""

import contextlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import wandb
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..artifacts import SAMPLES, ArtifactError, read_text, write_whole
from ..columns import ROW_INDEX, SAVED_ROW_INDEX
from ..generate.questions import Question, row_question, select_questions
from ..generate.sampling import answer_questions, positions
from ..generate.settings import GenerationSettings
from .processes import say_wrapped
from .trainers import RunDPOShiftTrainer


MAX_NEW_TOKENS = 64
COLUMNS = ("step", "row", "prompt", "chosen", "reference", "policy")


class SampleAnswers(TrainerCallback):
    """
    Writes the greedy answers of policy and reference to the first evaluation prompts to `samples.jsonl`.

    Before the first step the policy is the reference, so its answers then are those of both. A resumed stage reads
    them from the file, in which it replaces the lines of steps that it takes again. An error ends the samples, and
    never the training.

    Args:
        trainer ([`DPOShiftTrainer`]):
            The trainer of the stage.
        count (`int`):
            Number of prompts.
    """

    def __init__(self, trainer: RunDPOShiftTrainer, count: int):
        self.trainer, self.path = trainer, Path(trainer.args.output_dir) / SAMPLES
        self.settings = GenerationSettings(limit=count, max_new_tokens=MAX_NEW_TOKENS, batch_size=count)
        self.questions: list[Question] = []
        self.reference: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not PartialState().is_main_process:
            return
        with self._off_after_an_error():
            rows = enumerate(islice(self.trainer.eval_dataset, self.settings.limit))
            questions = [row_question({**row, SAVED_ROW_INDEX: row.get(ROW_INDEX, i)}, i) for i, row in rows]
            questions, _ = select_questions(questions, self._tokenizer, positions(self._policy))
            self.reference = self._of_reference(questions, state.global_step)
            self.questions = questions
            if state.global_step == 0:
                self._write(state, args, self.reference)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.questions and state.global_step > 0:
            with self._off_after_an_error():
                self._write(state, args, self._answers(self.questions))

    def _of_reference(self, questions: list[Question], step: int) -> list[str]:
        if step == 0:
            return self._answers(questions)
        saved = self._saved(before=step)[: len(questions)]
        if [line["prompt"] for line in saved] != [question.instruction for question in questions]:
            raise ValueError(f"{self.path} does not hold the answers of the reference to these prompts")
        return [line["reference"] for line in saved]

    def _write(self, state: TrainerState, args: TrainingArguments, policy: list[str]) -> None:
        lines = [
            dict(zip(COLUMNS, (state.global_step, q.question_id, q.instruction, q.chosen, *both), strict=True))
            for q, *both in zip(self.questions, self.reference, policy, strict=True)
        ]
        lines = [*self._saved(before=state.global_step), *lines]
        write_whole(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        if wandb.run is not None and "wandb" in args.report_to:
            table = wandb.Table(list(COLUMNS), [[line[name] for name in COLUMNS] for line in lines])
            wandb.run.log({"samples": table, "train/global_step": state.global_step})

    @property
    def _policy(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def _tokenizer(self) -> Any:
        return self.trainer.processing_class

    def _answers(self, questions: list[Question]) -> list[str]:
        policy = self._policy
        training = policy.training
        policy.eval()
        try:
            with self.trainer.accelerator.autocast():
                answers = answer_questions(policy, self._tokenizer, questions, self.settings, "greedy")
        finally:
            policy.train(training)
        return [turns[0].text for turns in answers]

    def _saved(self, before: int) -> list[dict[str, Any]]:
        """The lines of earlier steps."""
        if not self.path.exists():
            return []
        try:
            lines = [json.loads(line) for line in read_text(self.path).split("\n") if line]
            return [line for line in lines if line["step"] < before]
        except (ArtifactError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error

    @contextlib.contextmanager
    def _off_after_an_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any model's own code
            self.questions = []
            say_wrapped(f"No more sample answers: {' '.join(str(error).split()) or type(error).__name__}")


def why_no_samples(trainer: RunDPOShiftTrainer, count: int) -> str | None:
    """Why a stage writes no sample answers; `None` if it does."""
    args = trainer.args
    reasons = {
        "as set": count == 0,
        "nothing is evaluated": args.eval_strategy == "no" and not args.eval_on_start,
        "the model is sharded": trainer.is_sharded,
        "the model reads images": trainer._is_vision_dataset,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
