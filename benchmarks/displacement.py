"""
What lambda buys and costs: fixed, scheduled and adaptive, beside DPO and the remedies in use today.

    python benchmarks/displacement.py --data demo --seeds 1 2 3
    python benchmarks/displacement.py --data hard --seeds 1 2 3

Two sets of pairs, both offline: `demo`, the built-in one; `hard`, its near misses only, with a fifth of the training
pairs turned round, so that the preference can be learnt only in part. For each seed a base is fine-tuned on the
chosen answers, as stage 1 of `recipes/tiny_shift.yaml` does; from it each method trains for one epoch with the
settings of its stage 2, through the same trainer. The table holds held-out means over seeds with 95 % intervals (t),
after the last step: mean chosen log-ratio, share of chosen answers that fell, margin (beta = 0.1, unshifted) and
accuracy.

DPO-Positive (https://huggingface.co/papers/2402.13228) and Cal-DPO (https://huggingface.co/papers/2412.14516) are
written here, from their formulas, and nowhere else.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, disable_progress_bars
from scipy import stats
from transformers.utils import logging
from trl import SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.data.demo import FAMILIES, _pick, _scene, demo_dataset, save_demo_model


BETA = 0.1
COLUMNS = {
    "displacement/chosen": "chosen log-ratio, nats",
    "displacement/chosen_fell": "fell",
    "displacement/rejected": "rejected log-ratio, nats",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "shift/lambda": "lambda at the end",
}
ADAPTIVE = {"lambda_schedule": "adaptive", "lambda_min": 0.25}
METHODS = {
    "DPO (lambda 1)": {"shift_lambda": 1.0},
    **{f"fixed {value}": {"shift_lambda": value} for value in (0.95, 0.9, 0.75, 0.6, 0.5, 0.4, 0.25)},
    "linear_increase 0.75 to 1": {"lambda_schedule": "linear_increase"},
    "linear_decrease 1 to 0.75": {"lambda_schedule": "linear_decrease"},
    "linear_decrease 1 to 0.25": {"lambda_schedule": "linear_decrease", "lambda_min": 0.25},
    "adaptive, target 0 nats": {**ADAPTIVE, "lambda_target": 0.0},
    "adaptive, target -0.5 nats": {**ADAPTIVE, "lambda_target": -0.5},
    "adaptive, target -1 nat": {**ADAPTIVE, "lambda_target": -1.0},
    "adaptive, half may fall": {**ADAPTIVE, "lambda_target": 0.5, "lambda_target_metric": "displacement/chosen_fell"},
    "DPO + 0.1 sft": {"shift_lambda": 1.0, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    "DPO + 1.0 sft": {"shift_lambda": 1.0, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
    "DPO-Positive 5": {"shift_lambda": 1.0, "remedy": "dpop"},
    "Cal-DPO": {"shift_lambda": 1.0, "remedy": "cal"},
}


class RemedyTrainer(DPOShiftTrainer):
    """The same trainer with another loss of the same two log-ratios."""

    remedy = ""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._seam_is_checked = True  # the loss is not TRL's

    def _loss_of(self, scored, return_outputs=False):
        result = super()._loss_of(scored, return_outputs)
        chosen, rejected = scored.scores.chosen_logratios, scored.scores.rejected_logratios
        if self.remedy == "dpop":
            loss = -F.logsigmoid(self.beta * (chosen - rejected - 5 * (-chosen).clamp(min=0)))
        else:
            loss = -F.logsigmoid(chosen - rejected)
            loss = loss + (chosen - 0.5 / self.beta) ** 2 + (rejected + 0.5 / self.beta) ** 2
        return (loss.mean(), result[1]) if return_outputs else loss.mean()


def hard_dataset() -> DatasetDict:
    """Near misses only; a fifth of the training pairs turned round."""
    rng, rows = Random(7), {}
    while len(rows) < 2700:
        family = _pick(rng, FAMILIES, 1)[0]
        prompt, answer = _pick(rng, family.prompts, 1)[0], _pick(rng, family.answers, 1)[0]
        scene = vars(_scene(rng))
        right, wrong = (
            answer.format(**scene, answer=f(argparse.Namespace(**scene))) for f in (family.right, family.wrong)
        )
        rows.setdefault(prompt.format(**scene), (f" {right}", f" {wrong}"))
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in rows.items() if c != r]
    train = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if index % 5 == 0 else row
        for index, row in enumerate(pairs[:2400])
    ]
    return DatasetDict(train=Dataset.from_list(train), test=Dataset.from_list(pairs[2400:]))


def settings(folder, seed, **changes):
    return {
        "output_dir": str(folder), "seed": seed, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        "max_grad_norm": 1.0, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "per_device_eval_batch_size": 100,
        **changes,
    }  # fmt: skip


def make_base(folder: Path, data: DatasetDict, seed: int, epochs: float) -> None:
    if (folder / "config.json").is_file():
        return
    save_demo_model(folder / "random")
    args = SFTConfig(
        **settings(folder, seed, learning_rate=3e-3, num_train_epochs=epochs, per_device_train_batch_size=32)
    )
    trainer = ChosenSFTTrainer(str(folder / "random"), args=args, train_dataset=data["train"])
    trainer.train()
    trainer.save_model()


def measure(base: Path, folder: Path, data: DatasetDict, seed: int, method: dict, max_steps: int) -> dict[str, float]:
    changes = dict(method)
    trainer_class = RemedyTrainer if "remedy" in changes else DPOShiftTrainer
    RemedyTrainer.remedy = changes.pop("remedy", "")
    args = DPOShiftConfig(
        **settings(folder, seed, learning_rate=1e-4, num_train_epochs=1, per_device_train_batch_size=16),
        **{"beta": BETA, "save_pair_scores": False, "max_steps": max_steps, **changes},
    )
    trainer = trainer_class(str(base), args=args, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train()
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("demo", "hard"), default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--results", type=Path, help="JSON lines; runs in it are not repeated")
    parser.add_argument("--max-steps", type=int, default=-1, help="of stage 2, to try it out")
    parser.add_argument("--epochs", type=float, default=4, help="of stage 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    disable_progress_bars()
    work = Path(tempfile.mkdtemp())
    os.environ["DPOSHIFT_CACHE"] = str(work / "cache")
    data = demo_dataset() if args.data == "demo" else hard_dataset()
    results: dict[str, list[dict]] = {name: [] for name in args.methods}
    known = (
        [json.loads(line) for line in args.results.read_text().splitlines()]
        if args.results and args.results.exists()
        else []
    )
    for seed in args.seeds:
        for name in args.methods:
            found = [x["metrics"] for x in known if (x["data"], x["seed"], x["method"]) == (args.data, seed, name)]
            if not found:
                make_base(work / f"base-{seed}", data, seed, args.epochs)
                found = [measure(work / f"base-{seed}", work / "run", data, seed, METHODS[name], args.max_steps)]
                if args.results:
                    line = {"data": args.data, "seed": seed, "method": name, "metrics": found[0]}
                    with args.results.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            results[name].append(found[0])
            print(f"seed {seed}, {name}: {found[0]}", file=sys.stderr, flush=True)
    print(f"\n{args.data}, seeds {' '.join(map(str, args.seeds))}, held-out means +- half of a 95 % interval\n")
    print("| method | " + " | ".join(COLUMNS.values()) + " |")
    print("| --- |" + " --- |" * len(COLUMNS))
    for name, runs in results.items():
        cells = []
        for column in COLUMNS:
            values = torch.tensor([run[column] for run in runs], dtype=torch.float64)
            half = stats.t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{values.mean():.3f} +- {half:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
