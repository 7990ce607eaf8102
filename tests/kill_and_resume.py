"""
Kill the command with SIGKILL at random moments, run it again until it ends, and compare with a run left alone.

    python tests/kill_and_resume.py --kills 20 --seed 0

The recipe is short, with both stages, in a temporary folder. Weights must be equal bit for bit, log histories in every
step and value, and each attempt must end with our signal or exit code 0.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from conftest import make_rows, save_tiny_model
from ruamel.yaml import YAML
from safetensors.torch import load_file


STAGES = ("sft", "dpo")
STEPS, EVAL_STEPS, SAVE_STEPS = 18, 2, 3
# Phase that a kill waits for: relative frequency, and maximum delay in seconds
AIMS = {
    "checkpoint": (8, 0.01),
    "evaluation": (2, 0.2),
    "step": (3, 0.05),
    "data": (2, 0.3),
    "loading": (1, 1.0),
    "saving": (3, 0.05),
    "between": (2, 0.5),
    "": (2, 20.0),
}
# Clocks; TRL restarts its token count after a resume
NOT_COMPARED = re.compile(r"(train_|eval_)?(runtime|.*_per_second|num_tokens)")


def write_recipe(folder: Path) -> Path:
    """A recipe with both stages on a tiny model that takes a few seconds."""
    make_rows(120).to_json(folder / "rows.jsonl")
    stage = {
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 1,
        "max_steps": STEPS, "logging_steps": 1, "eval_steps": EVAL_STEPS, "save_steps": SAVE_STEPS,
    }  # fmt: skip
    recipe = {
        "output_dir": "set by each run",
        "report": False,
        "model": {"model_name_or_path": save_tiny_model(folder / "gpt2")},
        "data": {"path": str(folder / "rows.jsonl"), "eval_size": 40},
        "sft": stage,
        "dpo": {**stage, "lambda_schedule": "linear_decrease"},
    }
    YAML(typ="safe").dump(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def changed(path: Path) -> float:
    """Modification time; 0 if the file has been deleted in the meantime, as the oldest checkpoints are."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class Attempt:
    """One run of the command, in its own process group."""

    def __init__(self, recipe: Path, run: Path):
        self.run, self.began, self.claimed = run, time.time(), False
        self.stdout, self.stderr = (run.with_name(f"{run.name}.{name}") for name in ("out", "err"))
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
            "HF_DATASETS_CACHE": str(run.with_name(f"{run.name}.cache")),
        }  # fmt: skip
        with self.stdout.open("w") as stdout, self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dposhift_trl.run", str(recipe), f"output_dir={run}"],
                env=environment, stdout=stdout, stderr=stderr, start_new_session=True,
            )  # fmt: skip

    def kill_at(self, aim: str, entries: int, delay: float) -> bool:
        """Kill some time after the phase `aim` has been entered `entries` times. Returns whether that happened."""
        before = None
        while self.process.poll() is None:
            phase = self.phase()
            entries -= aim in phase and phase != before
            if entries <= 0:
                time.sleep(delay)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                return self.process.wait() == -signal.SIGKILL
            before = phase
            time.sleep(0.002)
        return False

    def phase(self) -> str:
        """Where the command is, or was when it was killed, judging by its files and output."""
        output = self.stdout.read_text()
        starts = list(re.finditer(r"^(sft|dpo): (?:starting|resuming) from (.*)$", output, flags=re.MULTILINE))
        if not starts:
            self.claimed = self.claimed or self._holds_the_lock()
            return "data and audit" if self.claimed else "imports"
        stage, origin = starts[-1].groups()
        folder = self.run / stage
        if (folder / "finished.json").is_file():
            return "between the stages" if stage == STAGES[0] else "after the end"
        if any(changed(path) >= self.began and not is_whole(path) for path in folder.glob("checkpoint-*")):
            return f"{stage}, checkpoint"
        logged = re.findall(r"^\{'(eval_)?loss'", output[starts[-1].end() :], flags=re.MULTILINE)
        step = logged.count("") + int(re.search(r"/checkpoint-(\d+)$|$", origin)[1] or 0)
        if step == STEPS and is_whole(folder / f"checkpoint-{STEPS}"):
            return f"{stage}, saving"
        if not logged:
            return f"{stage}, loading"
        return f"{stage}, " + ("evaluation" if logged[-1] == "" and step % EVAL_STEPS == 0 else "step")

    def _holds_the_lock(self) -> bool:
        with contextlib.suppress(OSError):  # Linux only; files may be closed while they are listed
            opened = [os.readlink(entry) for entry in os.scandir(f"/proc/{self.process.pid}/fd")]
            return str(self.run / ".lock") in opened
        return False


def is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False


def differences(left: Path, right: Path) -> list[str]:
    """Differences between two finished runs."""
    found = []
    for stage in STAGES:
        weights, others = (load_file(run / stage / "model.safetensors") for run in (left, right))
        unequal = [name for name in weights if not torch.equal(weights[name], others[name])]
        if unequal or weights.keys() != others.keys():
            found.append(f"{stage}: {len(unequal)} of {len(weights)} tensors differ")
        logs, other_logs = (history(run / stage) for run in (left, right))
        if [entry["step"] for entry in logs] != [entry["step"] for entry in other_logs]:
            found.append(f"{stage}: steps logged: {[e['step'] for e in logs]}, {[e['step'] for e in other_logs]}")
        else:
            found += [f"{stage}: logged: {a}, {b}" for a, b in zip(logs, other_logs, strict=True) if a != b]
        best, other_best = (json.loads((run / stage / "finished.json").read_text()) for run in (left, right))
        names = [Path(str(end["best_checkpoint"])).name for end in (best, other_best)]
        if names[0] != names[1]:
            found.append(f"{stage}: best checkpoints {names}")
    return found


def history(folder: Path) -> list[dict]:
    """The log without clocks and without the final summary, which only covers the last attempt."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = [entry for entry in entries if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if not NOT_COMPARED.fullmatch(key)} for entry in kept]


def kill_and_resume(folder: Path, kills: int, seed: int) -> tuple[Counter, list[str]]:
    """Phases in which the command was killed, and everything that went wrong."""
    rng = random.Random(seed)
    recipe = write_recipe(folder)
    whole = Attempt(recipe, folder / "whole")
    if whole.process.wait() != 0:
        return Counter(), [f"the uninterrupted run ended with {whole.process.returncode}: {whole.stderr.read_text()}"]
    phases: Counter = Counter()
    faults: list[str] = []
    runs = 0
    while phases.total() < kills:
        runs += 1
        run = folder / f"run-{runs}"
        left = min(rng.randint(2, 8), kills - phases.total())
        while True:
            attempt = Attempt(recipe, run)
            aim = rng.choices(list(AIMS), [often for often, _ in AIMS.values()])[0]
            entries, delay = rng.randint(1, 4) if aim in ("checkpoint", "evaluation", "step") else 1, AIMS[aim][1]
            if left and attempt.kill_at(aim, entries, rng.uniform(0, delay)):
                left -= 1
                phases[attempt.phase()] += 1
                print(f"run {runs}: killed in: {attempt.phase()}", flush=True)
            elif attempt.process.wait() == 0:
                break
            else:
                faults.append(f"{run} ended with {attempt.process.returncode}: {attempt.stderr.read_text()[-2000:]}")
                return phases, faults
        unequal = differences(run, folder / "whole")
        faults += [f"{run}: {fault}" for fault in unequal]
        print(f"run {runs}: ended, " + ("UNEQUAL" if unequal else "equal to the uninterrupted run"), flush=True)
    return phases, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="total number of kills, over as many runs as needed")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for the moments, which also depend on the speed of the machine"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_and_resume-"))
    began = time.monotonic()
    phases, faults = kill_and_resume(folder, options.kills, options.seed)
    for phase, count in sorted(phases.items()):
        print(f"{count:4d}  {phase}")
    print(f"{phases.total()} kills in {time.monotonic() - began:.0f} s, {len(faults)} faults")
    print(*faults, sep="\n", end="")
    if faults:
        print(f"The runs are kept in {folder}")
    else:
        shutil.rmtree(folder)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
