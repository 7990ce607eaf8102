"""Where training on an iterable dataset resumes."""

import os
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length


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
