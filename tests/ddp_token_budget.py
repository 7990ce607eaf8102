"""
Run by torchrun: a trainer takes steps over all rows, in batches filled by tokens, and prints what it logs, and what
the processes say to a report that the main one cannot write.
"""

import json
import sys
from pathlib import Path

from accelerate.utils import gather_object
from conftest import make_rows

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.report.errors import ReportError


def train(model, output_dir, **options):
    """Three steps over 22 pairs each; the weights are saved, and an evaluation brings the reference back."""
    args = DPOShiftConfig(
        output_dir, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, shift_lambda=0.6, max_steps=3,
        learning_rate=0.1, optim="sgd", max_grad_norm=0.0, logging_steps=1, save_strategy="no", **options
    )  # fmt: skip
    trainer = DPOShiftTrainer(model, args=args, train_dataset=make_rows(22), eval_dataset=make_rows(8, seed=1))
    sizes = [len(batch["dposhift_row_index"]) for batch in trainer.get_train_dataloader()]
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    return trainer, sizes, [entry for entry in trainer.state.log_history if "loss" in entry]


def refused_report(trainer):
    """Each process's error where the report's folder has other files."""
    place = Path(trainer.args.output_dir, "notes")
    if trainer.is_world_process_zero():
        place.mkdir()
        (place / "mine.txt").touch()
    try:
        trainer.report(place)
    except ReportError as error:
        return gather_object([str(error)])
    return gather_object([None])


if __name__ == "__main__":
    import torch.distributed as dist

    trainer, *found = train(*sys.argv[1:], max_tokens_per_batch=100, gradient_accumulation_steps=3)
    errors = refused_report(trainer)
    if dist.get_rank() == 0:
        print(json.dumps([*found, errors]))
    dist.barrier()
    dist.destroy_process_group()
