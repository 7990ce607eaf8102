"""
Time of the whole demo, and of a sweep of four values of lambda, against the same work through stock TRL.

    python benchmarks/demo.py

Ours is `python -m dposhift_trl.run recipes/tiny_shift.yaml` at lambda = 1, in a new folder and with an empty reference
cache. Stock is `stock_stage.py`: `trl.SFTTrainer`, then `trl.DPOTrainer`, in one process too, with the same data,
settings, evaluations and checkpoints; neither logs to W&B. Stage 2 is timed from loading the model to having
saved it, whole runs from start to end of the process, imports and all. The sweep is stage 1 once and stage 2 at four
values of lambda, each a process of its own, ours with a cached reference; stock, which has no lambda, runs its DPO
four times. Each is run once, so leave the machine alone meanwhile. The losses of the last evaluation, which must be
equal but for rounding, are printed below the table.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trl import DPOConfig

from dposhift_trl.data.demo import save_demo_model
from dposhift_trl.recipe import load_recipe


HERE = Path(__file__).parent
RECIPE = str(HERE.parent / "recipes" / "tiny_shift.yaml")
LAMBDAS = (1.0, 0.95, 0.85, 0.75)
STOCK_FIELDS = {field.name for field in dataclasses.fields(DPOConfig)}


def timed(*command):
    """Seconds of a process of Python, and its last line of output."""
    start = time.monotonic()
    run = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return time.monotonic() - start, run.stdout.strip().splitlines()[-1]


def run_ours(folder, overrides):
    """Seconds of a run, those of its stage 2, and the loss of its last evaluation."""
    seconds, _ = timed("-m", "dposhift_trl.run", RECIPE, f"output_dir={folder}", *overrides)
    finished = json.loads((folder / "dpo" / "finished.json").read_text(encoding="utf-8"))
    return seconds, finished["seconds"], finished["metrics"]["eval_loss"]


def run_stock(folder, stages, overrides):
    """
    Seconds of a process that takes these stages, each with the folder of its model; those of the last one, and the
    loss of its last evaluation.
    """
    recipe = load_recipe(RECIPE, [f"output_dir={folder}", "dpo.shift_lambda=1.0", *overrides])
    settings = []
    for stage, model in stages.items():
        args = {name: x for name, x in recipe.resolved[stage].items() if name in STOCK_FIELDS or stage == "sft"}
        args |= {"output_dir": str(folder / stage), "seed": recipe.seed, "metric_for_best_model": "loss"}
        settings.append({"stage": stage, "model": str(model), "args": args})
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(settings), encoding="utf-8")
    seconds, line = timed(str(HERE / "stock_stage.py"), str(file))
    inner, loss = map(float, line.split())
    return seconds, inner, loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--limit-steps",
        type=int,
        help="steps of each stage, to try this; a run that does not see each row does not precompute the reference",
    )
    options = parser.parse_args()
    overrides = ["sft.report_to=none", "dpo.report_to=none"]
    if options.limit_steps is not None:
        overrides += [f"{stage}.max_steps={options.limit_steps}" for stage in ("sft", "dpo")]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["DPOSHIFT_CACHE"] = str(root / "cache")
        save_demo_model(root / "base")
        ours = [run_ours(root / "ours", [*overrides, f"dpo.shift_lambda={LAMBDAS[0]}"])]
        alone = [override for override in overrides if override.startswith("dpo.")] + ["sft=null"]
        alone.append(f"model.model_name_or_path={root / 'ours' / 'sft'}")
        for number, shift_lambda in enumerate(LAMBDAS[1:]):
            ours.append(run_ours(root / f"ours-{number}", [*alone, f"dpo.shift_lambda={shift_lambda}"]))
        sft = root / "stock" / "sft"
        stock = [run_stock(root / "stock", {"sft": root / "base", "dpo": sft}, overrides)]
        stock += [run_stock(root / f"stock-{number}", {"dpo": sft}, overrides) for number, _ in enumerate(LAMBDAS[1:])]
    rows = {
        "stage 2 of the demo": (stock[0][1], ours[0][1]),
        "stage 2, reference cached by an earlier run": (stock[1][1], ours[1][1]),
        "the whole demo": (stock[0][0], ours[0][0]),
        "a sweep of four": tuple(sum(run[0] for run in runs) for runs in (stock, ours)),
    }
    print("| work | seconds, stock | ours | times faster |\n| --- | --- | --- | --- |")
    for name, (theirs, own) in rows.items():
        print(f"| {name} | {theirs:.1f} | {own:.1f} | {theirs / own:.2f} |")
    print(f"<!-- loss of the last evaluation: stock {stock[0][2]:.6f}, ours {ours[0][2]:.6f} -->")


if __name__ == "__main__":
    main()
