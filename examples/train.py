"""
DPO-Shift in a plain script: one model, one dataset, and what training did to the chosen answers.

    python examples/train.py
    python examples/train.py --model path/to/model --data prefs.jsonl --shift-lambda 0.75 --output-dir runs/mine
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer


def load_pairs(data: str, rows: int, held_out: int) -> tuple[Dataset, Dataset]:
    """The first pairs of a file, a folder, or a dataset on the Hub: those to train on, and those to evaluate on."""
    source = ("json", {"data_files": data}) if Path(data).is_file() else (data, {})
    pairs = load_dataset(source[0], split="train", **source[1])
    pairs = pairs.select(range(min(rows + held_out, len(pairs))))
    split = pairs.train_test_split(test_size=held_out, seed=0)
    return split["train"], split["test"]


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="trl-lib/ultrafeedback_binarized", help="file, folder, or name on the Hub")
    parser.add_argument("--rows", type=int, default=1000, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=100, help="pairs to evaluate on")
    parser.add_argument("--shift-lambda", type=float, default=0.95, help="1 is DPO")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--output-dir", default="runs/script")
    options = parser.parse_args()

    train_rows, eval_rows = load_pairs(options.data, options.rows, options.held_out)
    args = DPOShiftConfig(
        options.output_dir,
        shift_lambda=options.shift_lambda,
        beta=0.1,
        learning_rate=options.learning_rate,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_length=1024,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        eval_strategy="steps",
        eval_steps=0.25,
        eval_on_start=True,
        report_to="none",
    )
    trainer = DPOShiftTrainer(options.model, args=args, train_dataset=train_rows, eval_dataset=eval_rows)
    trainer.train()  # prints the verdict at the end
    trainer.save_model()
    print(f"The report is {trainer.report()}")


if __name__ == "__main__":
    main()
