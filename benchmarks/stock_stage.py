"""
One stage of the demo through stock TRL, for `demo.py`: what a user without this package would write.

    python benchmarks/stock_stage.py STAGE.json

The file holds `stage` ("sft" or "dpo"), `model` (a folder) and `args` (those of `SFTConfig` or `DPOConfig`). The last
line printed is the seconds from loading the model to having saved it, and the last evaluation's loss.
"""

import json
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dposhift_trl.demo import demo_dataset


def main():
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = demo_dataset()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    start = time.monotonic()
    if settings["stage"] == "sft":
        rows = rows.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
        trainer_class, args = SFTTrainer, SFTConfig(**settings["args"])
    else:
        trainer_class, args = DPOTrainer, DPOConfig(**settings["args"])
    trainer = trainer_class(
        model=settings["model"],
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    seconds = time.monotonic() - start
    loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    print(seconds, loss)


if __name__ == "__main__":
    main()
