"""
Stages of the demo through stock TRL, for `demo.py`: what a user without this package would write.

    python benchmarks/stock_stage.py STAGES.json

The file holds a list of stages, taken one after the other in this process, each with `stage` ("sft" or "dpo"), `model`
(a folder) and `args` (those of `SFTConfig` or `DPOConfig`). For each a line is printed: the seconds from loading the
model to having saved it, and the last evaluation's loss.
"""

import json
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dposhift_trl.data.demo import demo_dataset


def run_stage(stage, model, args):
    """Seconds of a stage, and the loss of its last evaluation."""
    rows = demo_dataset()
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = time.monotonic()
    if stage == "sft":
        rows = rows.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
        trainer_class, args = SFTTrainer, SFTConfig(**args)
    else:
        trainer_class, args = DPOTrainer, DPOConfig(**args)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    seconds = time.monotonic() - start
    return seconds, [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]


def main():
    for settings in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(*run_stage(**settings), flush=True)


if __name__ == "__main__":
    main()
