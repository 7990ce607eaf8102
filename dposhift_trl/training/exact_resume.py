"""What a trainer does about resuming that [`~transformers.Trainer`] leaves out."""

import os
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from .checks import warn_of_inexact_resume


class ExactResume(Trainer):
    """Trainer that resumes iterable datasets where they were, and warns of checkpoints that lack state."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Warns if the checkpoint lacks state, which transformers passes over silently."""
        warn_of_inexact_resume(checkpoint, self.args)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Resumes an iterable dataset in the pass that the checkpoint was saved in, not always in the first."""
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        return resume_position(self, resume_from_checkpoint, position)


def resume_position(trainer: Trainer, checkpoint: Any, position: tuple[int, int]) -> tuple[int, int]:
    """
    The pass over the training rows to resume in, and the number of its batches that were trained on.

    An iterable dataset has no length, so the Trainer takes all of training for one pass. If the rows were exhausted
    before the checkpoint, it skips batches of the first pass, and repeats the later one from its start. The epoch in
    the checkpoint tells both: its integer part is the pass, its fraction the share of all batches.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        checkpoint (`str`, *optional*):
            Checkpoint to resume from.
        position (`tuple[int, int]`):
            Position that the Trainer has found.
    """
    path = os.path.join(checkpoint or "", TRAINER_STATE_NAME)
    skips = checkpoint is not None and os.path.isfile(path) and not trainer.args.ignore_data_skip
    if not skips or has_length(trainer.train_dataset):
        return position
    state = TrainerState.load_from_json(path)
    epoch = state.epoch or 0.0
    batches = state.max_steps * trainer.args.gradient_accumulation_steps
    return int(epoch), round((epoch - int(epoch)) * batches)
