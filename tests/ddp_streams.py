"""Run by torchrun: a trainer that has a table evaluates a stream, and prints what it measures."""

import json
import sys

from conftest import make_rows

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer


def evaluate(model, output_dir, **options):
    """Evaluate 16 pairs of a stream, off the reference; their scores are saved too."""
    args = DPOShiftConfig(
        output_dir, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, shift_lambda=0.5, max_steps=2,
        learning_rate=0.1, optim="sgd", save_strategy="no", pad_to_multiple_of=32, prediction_loss_only=True, **options
    )  # fmt: skip
    trainer = DPOShiftTrainer(model, args=args, train_dataset=make_rows(16))
    trainer.train()
    metrics = trainer.evaluate(make_rows(16, seed=1).to_iterable_dataset(num_shards=2))
    stream = trainer._prepare_dataset(
        make_rows(16, seed=1).to_iterable_dataset(), trainer.processing_class, args, "test"
    )
    metrics |= trainer.predict(stream).metrics
    return {name: value for name, value in metrics.items() if "runtime" not in name and "per_second" not in name}


if __name__ == "__main__":
    import torch.distributed as dist

    found = evaluate(*sys.argv[1:], per_device_train_batch_size=4, per_device_eval_batch_size=4)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
