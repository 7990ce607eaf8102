"""
What lambda buys and costs: fixed, scheduled and adaptive, beside DPO and the remedies in use today.

    python benchmarks/displacement.py --data demo --seeds 1 2 3 4 5 --results results.jsonl
    python benchmarks/displacement.py --data hard --seeds 1 2 3 4 5 --results results.jsonl
    python benchmarks/displacement.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pandalm --files FOLDER \
        --results results.jsonl

On the synthetic sets a base is fine-tuned on the chosen answers for each seed, as stage 1 of `recipes/tiny_shift.yaml`
does; a model that is named is trained as it is, on pairs that are split anew for each seed. From there each method
trains for one epoch with the same settings, through the same trainer. The first table holds held-out means over seeds
with 95% intervals, after the last step: mean chosen log-ratio, share of chosen answers that fell, margin (beta = 0.1,
unshifted), accuracy, and for real sets also greedy answers and the accuracy on the other real set; a star marks what
differs from DPO. The second table compares all methods with the best fixed lambda at the same accuracy.

Runs that are in the results file are not repeated, so an interrupted grid goes on where it stopped. The published ones
are in `displacement.jsonl`, which prints the tables at once with `--results benchmarks/displacement.jsonl`.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from displacement_data import FILES, load_pairs
from displacement_losses import (
    Gate,
    Loss,
    acpo,
    beta_dpo,
    by_own_fall,
    by_probability,
    cal_dpo,
    dpo,
    dpo_positive,
    gate_dpo,
    gate_tokens,
    gated_by_ratio,
    on_tokens,
    saturated,
    shifted_per_token,
    simpo,
)
from displacement_table import COLUMNS, Runs, against_best_fixed, table
from transformers import PrinterCallback
from transformers.utils import logging
from trl import SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.data.demo import save_demo_model
from dposhift_trl.generate import GenerationSettings, answer_statistics
from dposhift_trl.generate.questions import Question
from dposhift_trl.generate.sampling import answer_questions


BETA = 0.1
TRANSFER = 40  # pairs of the other real set
BEFORE = "before training"
DPO = "DPO (lambda 1)"
ADAPTIVE = {"lambda_schedule": "adaptive", "lambda_min": 0.25}


@dataclasses.dataclass(frozen=True)
class Method:
    """
    What a run is trained with.

    Args:
        settings (`dict[str, Any]`):
            Settings of `DPOShiftConfig`.
        make_loss (`Callable`, *optional*):
            Returns a loss that replaces the trainer's own.
        gate (`Callable`, *optional*):
            Factor of the gradients of the rejected answers' tokens, with `make_loss`.
        trains (`bool`, *optional*, defaults to `True`):
            Whether the model is trained before it is measured.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    make_loss: Callable[[], Loss] | None = None
    gate: Gate | None = None
    trains: bool = True


def fixed(value: float) -> Method:
    """DPO-Shift with a fixed lambda."""
    return Method({"shift_lambda": value})


def mixed(weight: float) -> Method:
    """DPO with a term of negative log-likelihood per token of the chosen answers."""
    return Method({"shift_lambda": 1.0, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]})


METHODS = {
    BEFORE: Method(trains=False),
    DPO: fixed(1.0),
    **{f"fixed {value}": fixed(value) for value in (0.95, 0.9, 0.75, 0.6, 0.5, 0.4, 0.25)},
    "linear_increase 0.75 to 1": Method({"lambda_schedule": "linear_increase"}),
    "linear_decrease 1 to 0.75": Method({"lambda_schedule": "linear_decrease"}),
    "linear_decrease 1 to 0.25": Method({"lambda_schedule": "linear_decrease", "lambda_min": 0.25}),
    "adaptive, target 0 nats": Method({**ADAPTIVE, "lambda_target": 0.0}),
    "adaptive, target -0.5 nats": Method({**ADAPTIVE, "lambda_target": -0.5}),
    "adaptive, half may fall": Method(
        {**ADAPTIVE, "lambda_target": 0.5, "lambda_target_metric": "displacement/chosen_fell"}
    ),
    "DPO + 0.1 sft": mixed(0.1),
    "DPO + 1.0 sft": mixed(1.0),
    "apo_zero": Method({"shift_lambda": 1.0, "loss_type": "apo_zero"}),
    "sigmoid_norm": Method({"shift_lambda": 1.0, "loss_type": "sigmoid_norm"}),
    "DPO-Positive 5": Method(make_loss=lambda: dpo_positive(BETA, 5.0)),
    "Cal-DPO": Method(make_loss=lambda: cal_dpo(BETA)),
    "SimPO 2, 1": Method(make_loss=lambda: simpo(2.0, 1.0)),
    "beta-DPO": Method(make_loss=lambda: beta_dpo(BETA)),
    "ACPO 0.01": Method(make_loss=lambda: acpo(BETA, 0.01)),
    "ACPO 0.05": Method(make_loss=lambda: acpo(BETA, 0.05)),
    "Gate-DPO 5, -2": Method(make_loss=lambda: gate_dpo(BETA, 5.0, -2.0)),
    "Gate-DPO 5, -3": Method(make_loss=lambda: gate_dpo(BETA, 5.0, -3.0)),
    "candidate: gate at -5 nats": Method(make_loss=lambda: gated_by_ratio(BETA, -5.0)),
    "candidate: saturated at 10 nats": Method(make_loss=lambda: saturated(BETA, 10.0)),
    "candidate: saturated at 5 nats": Method(make_loss=lambda: saturated(BETA, 5.0)),
    "candidate: saturated at 2 nats": Method(make_loss=lambda: saturated(BETA, 2.0)),
    "candidate: saturated at 1 nat": Method(make_loss=lambda: saturated(BETA, 1.0)),
    "candidate: 0.75 per token": Method(make_loss=lambda: shifted_per_token(BETA, 0.75)),
    "candidate: by its own fall": Method(make_loss=lambda: by_own_fall(BETA)),
    "candidate: gate by probability": Method(make_loss=lambda: dpo(BETA), gate=by_probability),
    "candidate: 0.5 on shared tokens": Method(make_loss=lambda: dpo(BETA), gate=on_tokens(0.5, 1.0)),
    "candidate: 0.5 on own tokens": Method(make_loss=lambda: dpo(BETA), gate=on_tokens(1.0, 0.5)),
}
# What a real model is trained with, unless methods are named
SHORT = (
    BEFORE, DPO, "fixed 0.95", "fixed 0.75", "fixed 0.5", "adaptive, target -0.5 nats", "DPO + 0.1 sft",
    "DPO + 1.0 sft", "DPO-Positive 5", "ACPO 0.01", "Gate-DPO 5, -2", "candidate: saturated at 2 nats",
)  # fmt: skip


# What changes results, beside seed and method
SETTINGS = ("data", "model", "learning_rate", "batch_size", "bf16", "max_steps", "epochs", "questions")


class OwnLossTrainer(DPOShiftTrainer):
    """The same trainer with a loss of its own in training; what it measures stays the same."""

    own_loss: Loss
    gate: Gate | None = None

    def _shifted_model(self, model, inputs, shift, layout):
        self._scored = super()._shifted_model(model, inputs, shift, layout)
        return self._scored

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scored = self.__dict__.pop("_scored")
        if not self.model.training:
            return result
        if self.gate is None:
            return self.own_loss(scored.scores).mean()
        tokens = torch.where(inputs["completion_mask"] == 1, inputs["input_ids"], -1)[:, 1:]
        return self.own_loss(gate_tokens(scored.scores, self.gate, scored.outputs.log_probs, tokens)).mean()


def settings(folder, seed, **changes):
    return {
        "output_dir": str(folder), "seed": seed, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        "max_grad_norm": 1.0, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "per_device_eval_batch_size": 100,
        **changes,
    }  # fmt: skip


def make_base(folder: Path, data: DatasetDict, seed: int, epochs: float) -> Path:
    """The demo's model after stage 1, made once for each seed."""
    if not (folder / "config.json").is_file():
        save_demo_model(folder / "random")
        args = SFTConfig(
            **settings(folder, seed, learning_rate=3e-3, num_train_epochs=epochs, per_device_train_batch_size=32)
        )
        trainer = ChosenSFTTrainer(str(folder / "random"), args=args, train_dataset=data["train"])
        trainer.train()
        trainer.save_model()
    return folder


def train(method: Method, base: str, data: DatasetDict, seed: int, folder: Path, options: argparse.Namespace) -> Any:
    """A trainer whose model has been trained with a method, on the split `train` of the data."""
    on_gpu = torch.cuda.is_available()
    args = DPOShiftConfig(
        **settings(
            folder, seed, num_train_epochs=1, max_steps=options.max_steps, learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size, use_cpu=not on_gpu, bf16=options.bf16,
            per_device_eval_batch_size=100 if options.model is None else 8,
        ),
        **{"beta": BETA, "save_pair_scores": False, "precompute_ref_log_probs": True, **method.settings},
    )  # fmt: skip
    trainer_class = DPOShiftTrainer if method.make_loss is None else OwnLossTrainer
    trainer = trainer_class(base, args=args, train_dataset=data["train"], eval_dataset=held_out(data))
    if method.make_loss is not None:
        trainer.own_loss, trainer.gate = method.make_loss(), method.gate
    trainer.remove_callback(PrinterCallback)
    if method.trains:
        trainer.train()
    return trainer


def held_out(data: DatasetDict) -> dict[str, Dataset]:
    """All splits but that for training: `test`, and `other`, held-out pairs of another set, if there is one."""
    return {name: split for name, split in data.items() if name != "train"}


def measure(trainer: DPOShiftTrainer, questions: int) -> dict[str, float]:
    """Held-out metrics of a trained model, on the other set as well if there is one, and of its greedy answers."""
    metrics = trainer.evaluate()
    found = {name: metrics[f"eval_test_{name}"] for name in COLUMNS if f"eval_test_{name}" in metrics}
    if "eval_other_loss" in metrics:
        found["transfer/accuracies"] = metrics["eval_other_rewards/accuracies"]
    if not trainer.state.global_step:  # the reference itself, whose log-ratios are 0
        found = {"perplexity/chosen": found["perplexity/chosen"]}
    if isinstance(trainer, OwnLossTrainer):
        found.pop("shift/lambda", None)
    if questions:
        found |= greedy_statistics(trainer, questions)
    return found


def greedy_statistics(trainer: DPOShiftTrainer, count: int) -> dict[str, float]:
    """Length, repetition and emptiness of the model's greedy answers to held-out prompts."""
    prompts = list({json.dumps(prompt): prompt for prompt in trainer.eval_dataset["test"]["prompt"]}.values())[:count]
    asked = [Question(index, prompt[-1]["content"], prompt) for index, prompt in enumerate(prompts)]
    sampling = GenerationSettings(limit=count, max_new_tokens=160)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    answers = [turns[0] for turns in answer_questions(model, trainer.processing_class, asked, sampling, "greedy")]
    found = answer_statistics([a.tokens or () for a in answers], [a.text for a in answers], [a.cut for a in answers])
    return {f"greedy/{name}": float(found[name] or 0.0) for name in ("mean_tokens", "repetition", "empty")}


def known_results(path: Path | None, used: dict[str, Any]) -> dict[tuple[int, str], dict[str, float]]:
    """Metrics by seed and method of the runs in the results file, if there is one, on the same data."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    lines = [line for line in lines if line["settings"]["data"] == used["data"]]
    for line in lines:
        if line["settings"] != used:
            sys.exit(
                f"{path} has runs with other settings, {line['settings']}: choose another --results than for {used}"
            )
    return {(line["seed"], line["method"]): line["metrics"] for line in lines}


def tables(results: dict[str, Runs]) -> list[str]:
    """Means of each method, and for several seeds its differences from the best fixed lambda."""
    if DPO not in results or len(results[DPO]) < 2:
        return [table(results, DPO)]
    fixed = [name for name in METHODS if name.startswith(("fixed", DPO))]
    return [table(results, DPO), against_best_fixed(results, fixed)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("demo", "hard", *FILES), default="demo")
    parser.add_argument("--files", type=Path, default=Path(), help="folder with the files of the real sets")
    parser.add_argument("--model", help="Hub name or folder, required for the real sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--results", type=Path, help="JSON lines; runs in it are not repeated")
    parser.add_argument("--learning-rate", type=float, help="of stage 2: 1e-4 for the demo's model, else 5e-5")
    parser.add_argument("--batch-size", type=int, default=None, help="16 for the demo's model, else 4")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--questions", type=int, default=32, help="greedy answers of a real model")
    parser.add_argument("--max-steps", type=int, default=-1, help="of stage 2, to try it out")
    parser.add_argument("--epochs", type=float, default=4, help="of stage 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    if (options.data in FILES) != (options.model is not None):
        parser.error("--model is required for the real sets, and only for these")
    real = options.model is not None
    options.methods = options.methods or list(SHORT if real else [name for name in METHODS if METHODS[name].trains])
    options.learning_rate = options.learning_rate or (5e-5 if real else 1e-4)
    options.batch_size = options.batch_size or (4 if real else 16)
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    disable_progress_bars()
    work = Path(tempfile.mkdtemp())
    os.environ["DPOSHIFT_CACHE"] = str(work / "cache")
    used = {name: getattr(options, name) for name in SETTINGS}
    known = known_results(options.results, used)
    results: dict[str, Runs] = {name: [] for name in options.methods}
    for seed in options.seeds:
        data = None
        for name in options.methods:
            found = known.get((seed, name))
            if found is None:
                if data is None:
                    data = load_pairs(options.data, options.files, options.model, seed)
                    for other in set(FILES) - {options.data} if options.model else ():
                        data["other"] = load_pairs(other, options.files, options.model, seed)["test"]
                        data["other"] = data["other"].select(range(TRANSFER))
                base = options.model or str(make_base(work / f"base-{seed}", data, seed, options.epochs))
                trainer = train(METHODS[name], base, data, seed, work / "run", options)
                found = measure(trainer, options.questions if options.model else 0)
                if options.results:
                    metrics = {key: float(f"{value:.6g}") for key, value in found.items()}
                    line = {"settings": used, "seed": seed, "method": name, "metrics": metrics}
                    with options.results.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            results[name].append(found)
            print(f"seed {seed}, {name}: {found}", file=sys.stderr, flush=True)
    seeds = " ".join(map(str, options.seeds))
    print(f"\n{options.data}, seeds {seeds}, held-out means ± half of a 95% interval\n")
    print("\n\n".join(tables(results)))


if __name__ == "__main__":
    main()
