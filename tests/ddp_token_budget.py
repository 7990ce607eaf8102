"""Run by torchrun: a trainer takes steps over all rows, in batches filled by tokens, and prints what it logs."""

import json
import sys

from conftest import make_rows

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer


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
    return sizes, [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    import torch.distributed as dist

    found = train(*sys.argv[1:], max_tokens_per_batch=100, gradient_accumulation_steps=3)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
