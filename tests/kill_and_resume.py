"""
Disturb the command at random moments, run it again until it ends, and compare with a run left alone.

    python tests/kill_and_resume.py --kills 60 --seed 0
    python tests/kill_and_resume.py --kills 10 --only term disk --of sweep

The faults: `kill` (of a sweep all processes, or only the first), `int`, `term` and `hup` send a signal; `pause` stops
all processes, then continues or kills them; `disk` fills the disk until the command has ended; `move` kills, and
renames the folder. The recipe is short, with both stages, as a run of all weights or of LoRA, or as a sweep of two
points.

Weights must be equal bit for bit, and logs in every step and value. No process may be left behind, and each attempt
must end as its fault says, without a traceback. The disk is a small tmpfs of our own, which needs Linux's `unshare`.
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

import psutil
import torch
from conftest import make_rows, save_tiny_model
from ruamel.yaml import YAML
from safetensors.torch import load_file


STAGES = ("sft", "dpo")
STEPS, EVAL_STEPS, SAVE_STEPS = 18, 2, 3
SUBJECTS = {
    "full": ["dposhift_trl.run"],
    "lora": [
        "dposhift_trl.run", "model.use_peft=true", "model.lora_target_modules=[c_attn]", "model.merge_adapter=true"
    ],
    "sweep": ["dposhift_trl.sweep", "dpo.lambda_schedule=fixed", "dpo.shift_lambda=1.0,0.5"],
}  # fmt: skip
SIGNALS = {"int": signal.SIGINT, "term": signal.SIGTERM, "hup": signal.SIGHUP}
FAULTS = ("kill", *SIGNALS, "pause", "disk", "move")
# Phase that a fault waits for: relative frequency, and maximum delay in seconds, by default the length of a run
AIMS = {
    "checkpoint": (8, 0.01),
    "evaluation": (2, 0.2),
    "step": (3, 0.05),
    "data": (2, 0.3),
    "loading": (1, 1.0),
    "saving": (3, 0.05),
    "between": (2, 0.5),
    "": (3, None),
}
CLOCKS = re.compile(r"(train_|eval_)?(runtime|.*_per_second)")
ON_SMALL_DISK = "KILL_AND_RESUME_DISK"  # set in the process that has a mount of its own


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
        "sample_prompts": 0,
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

    def __init__(self, subject: str, recipe: Path, run: Path, logs: Path):
        self.run, self.began, self.claimed, self.is_sweep = run, time.time(), False, subject == "sweep"
        self.stdout, self.stderr = (logs / f"{run.name}.{name}" for name in ("out", "err"))
        module, *overrides = SUBJECTS[subject]
        caches = run.with_name(f"{run.name.split('-moved')[0]}.cache")
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
            "HF_DATASETS_CACHE": str(caches / "datasets"), "DPOSHIFT_CACHE": str(caches / "reference"),
        }  # fmt: skip
        with self.stdout.open("w") as stdout, self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(recipe), *overrides, f"output_dir={run}"],
                env=environment, stdout=stdout, stderr=stderr, start_new_session=True,
            )  # fmt: skip

    def reach(self, aim: str, entries: int, delay: float) -> bool:
        """Wait some time after the phase `aim` has been entered `entries` times. Returns whether the command runs."""
        before = None
        while self.process.poll() is None:
            phase = self.phase()
            entries -= aim in phase and phase != before
            if entries <= 0:
                time.sleep(delay)
                return self.process.poll() is None
            before = phase
            time.sleep(0.002)
        return False

    def tree(self) -> list[psutil.Process]:
        """The command and all that it has started."""
        try:
            command = psutil.Process(self.process.pid)
            return [command, *command.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self, started: list[psutil.Process]) -> list[str]:
        """Wait until the command and what it has started have ended. Returns what is wrong."""
        self.process.wait()
        _, left = psutil.wait_procs([process for process in started if process.pid != self.process.pid], timeout=120)
        for process in left:
            process.kill()
        return [f"left behind: {len(left)} processes"] if left else []

    def phase(self) -> str:
        """Where the command is, or was when it ended, judging by its files and output."""
        if not self.is_sweep:
            return self._phase(self.run, self.stdout.read_text())
        logs = sorted(self.run.glob("*.log"), key=changed)
        if not logs or changed(logs[-1]) < self.began:
            return "sweep, imports"
        return f"sweep, {logs[-1].stem}, " + self._phase(
            self.run / logs[-1].stem, logs[-1].read_text(errors="replace")
        )

    def _phase(self, run: Path, output: str) -> str:
        starts = list(re.finditer(r"^(sft|dpo): (?:starting|resuming) from (.*)$", output, flags=re.MULTILINE))
        if not starts:
            self.claimed = self.claimed or self._holds_the_lock()
            return "data and audit" if self.claimed else "imports"
        stage, origin = starts[-1].groups()
        folder = run / stage
        if (folder / "finished.json").is_file():
            return "between the stages" if stage == STAGES[0] else "after the end"
        if any(changed(path) >= self.began and not is_whole(path) for path in folder.glob("checkpoint-*")):
            return f"{stage}, checkpoint"
        logged = re.findall(r"^(step|eval) ", output[starts[-1].end() :], flags=re.MULTILINE)
        step = logged.count("step") + int(re.search(r"/checkpoint-(\d+)$|$", origin)[1] or 0)
        if step == STEPS and is_whole(folder / f"checkpoint-{STEPS}"):
            return f"{stage}, saving"
        if not logged:
            return f"{stage}, loading"
        return f"{stage}, " + ("evaluation" if logged[-1] == "step" and step % EVAL_STEPS == 0 else "step")

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


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextlib.contextmanager
def full(disk: Path):
    """Fill the disk inside the `with` block."""
    filler = disk / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(2**16)):
                pass
        yield
    finally:
        filler.unlink()


def inflict(fault: str, attempt: Attempt, disk: Path, rng: random.Random) -> tuple[bool, list[str]]:
    """Whether the attempt is to go on, and what was wrong with its end."""
    started = attempt.tree()
    if fault == "pause":
        send(started, signal.SIGSTOP)
        time.sleep(rng.uniform(0.1, 1.0))
        if rng.random() < 0.5:
            send(started, signal.SIGCONT)
            return True, []
        fault = "kill"
        send(started, signal.SIGKILL)
    elif fault in SIGNALS:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(attempt.process.pid, SIGNALS[fault])
    elif fault != "disk":
        send(started[:1] if attempt.is_sweep and rng.random() < 0.5 else started, signal.SIGKILL)
    with full(disk) if fault == "disk" else contextlib.nullcontext():
        wrong = attempt.end(started)
    code, number = attempt.process.returncode, SIGNALS.get(fault, signal.SIGKILL)
    # 0 if it ended before; -number if the signal came before the command handled it; 1 and 2 are errors of one line
    codes = {0, 1, 2} if fault == "disk" else {0, -number, 128 + number}
    stderr = attempt.stderr.read_text()
    if code not in codes:
        wrong.append(f"ended with {code}")
    if "Traceback" in stderr or (code > 0 and not stderr.strip()):
        wrong.append("no message of one line")
    if code == 128 + number and not re.search(rf"[Ss]topped by {number.name}", stderr):
        wrong.append("does not name the signal")
    return False, [f"{text}, stderr: {stderr[-2000:]}" for text in wrong]


def differences(left: Path, right: Path) -> list[str]:
    """Differences between two finished runs or sweeps."""
    ends, other_ends = (sorted(path.relative_to(run) for path in run.rglob("finished.json")) for run in (left, right))
    if ends != other_ends or not ends:
        return [f"finished: {[*map(str, ends)]}, {[*map(str, other_ends)]}"]
    found = []
    for stage in (end.parent for end in ends):
        weights, others = (all_weights(run / stage) for run in (left, right))
        unequal = [name for name in weights.keys() & others.keys() if not torch.equal(weights[name], others[name])]
        if unequal or weights.keys() != others.keys() or not weights:
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


def all_weights(stage: Path) -> dict[str, torch.Tensor]:
    """The weights of a stage's model, or adapter and merged model, by file and name."""
    files = [path for pattern in ("*.safetensors", "merged/*.safetensors") for path in stage.glob(pattern)]
    return {f"{file.relative_to(stage)}: {name}": x for file in files for name, x in load_file(file).items()}


def history(folder: Path) -> list[dict]:
    """The log without clocks and without the final summary, which only covers the last attempt."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = [entry for entry in entries if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if not CLOCKS.fullmatch(key)} for entry in kept]


class Soak:
    """
    Runs that are disturbed, in a folder that may be a disk of its own.

    Args:
        disk (`Path`):
            Folder of the runs.
        logs (`Path`):
            Folder of their output, on another disk if faults fill the first one.
        seed (`int`):
            Seed of all choices.
    """

    def __init__(self, disk: Path, logs: Path, seed: int):
        self.disk, self.logs, self.rng = disk, logs, random.Random(seed)
        self.recipe = write_recipe(disk)
        self.phases: Counter = Counter()  # by fault and phase
        self.wrong: list[str] = []
        self.wholes: dict[str, tuple[Path, float]] = {}  # by subject: an undisturbed run, and its seconds

    def whole(self, subject: str) -> tuple[Path, float]:
        if subject not in self.wholes:
            began, run = time.monotonic(), self.disk / f"whole-{subject}"
            attempt = Attempt(subject, self.recipe, run, self.logs)
            if attempt.process.wait() != 0:
                raise RuntimeError(f"the undisturbed run ended with an error: {attempt.stderr.read_text()[-2000:]}")
            self.wholes[subject] = run, time.monotonic() - began
        return self.wholes[subject]

    def disturb(self, subject: str, number: int, faults: list[str]) -> None:
        """Run the command again and again, each time with the next fault, then compare."""
        expected, seconds = self.whole(subject)
        run, moved, disturbed, wrong = self.disk / f"run-{number}-{subject}", 0, False, []
        attempt = None
        while not wrong:
            attempt = attempt or Attempt(subject, self.recipe, run, self.logs)
            aim = self.rng.choices(list(AIMS), [often for often, _ in AIMS.values()])[0] if subject != "sweep" else ""
            entries = self.rng.randint(1, 4) if aim in ("checkpoint", "evaluation", "step") else 1
            delay = self.rng.uniform(0, AIMS[aim][1] or seconds)
            if not faults:
                if attempt.process.wait() != 0:
                    wrong = [f"ended with {attempt.process.returncode}: {attempt.stderr.read_text()[-2000:]}"]
                break
            if not attempt.reach(aim, entries, delay):
                if attempt.process.returncode != 0:
                    wrong = [f"ended with {attempt.process.returncode}: {attempt.stderr.read_text()[-2000:]}"]
                if disturbed:
                    break  # the remaining faults are for the next run
                attempt = None
                shutil.rmtree(run, ignore_errors=True)
                continue
            fault, phase, disturbed = faults.pop(0), attempt.phase(), True
            goes_on, wrong = inflict(fault, attempt, self.disk, self.rng)
            self.phases[f"{fault}: {phase}"] += 1
            print(f"{run.name}: {fault} in: {phase}, ended with {attempt.process.returncode}", flush=True)
            if fault == "move" and run.is_dir():
                moved += 1
                run = run.rename(self.disk / f"run-{number}-{subject}-moved-{moved}")
            attempt = attempt if goes_on else None
        wrong = wrong or differences(run, expected)
        self.wrong += [f"{run.name}: {text}" for text in wrong]
        print(
            f"{run.name}: " + ("equal to the undisturbed run" if not wrong else "\n".join(["WRONG", *wrong])),
            flush=True,
        )
        if not wrong:
            shutil.rmtree(run)


def kill_and_resume(
    disk: Path,
    logs: Path,
    kills: int,
    seed: int,
    faults: tuple[str, ...] = FAULTS,
    subjects: tuple[str, ...] = (*SUBJECTS,),
) -> tuple[Counter, list[str]]:
    """What was done in which phase, and everything that went wrong."""
    soak = Soak(disk, logs, seed)
    # Each fault and each subject in turn, so that none is left to chance
    deck = [faults[index % len(faults)] for index in range(kills)]
    soak.rng.shuffle(deck)
    number = 0
    while deck:
        hand = [deck.pop() for _ in range(min(soak.rng.randint(2, 6), len(deck)))]
        soak.disturb(subjects[number % len(subjects)], number := number + 1, hand)
        deck += hand  # that the run has ended before
    return soak.phases, soak.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="total number of faults, over as many runs as needed")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for the moments, which also depend on the speed of the machine"
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS, help="faults")
    parser.add_argument("--of", nargs="+", choices=SUBJECTS, default=[*SUBJECTS], help="subjects")
    options = parser.parse_args()
    if "disk" in options.only and ON_SMALL_DISK not in os.environ:
        # A mount of its own, which needs no root and ends with the process
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, ON_SMALL_DISK: "1"})
    folder = Path(tempfile.mkdtemp(prefix="kill_and_resume-"))
    disk = folder / "disk"
    disk.mkdir()
    if ON_SMALL_DISK in os.environ:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk], check=True)
    began = time.monotonic()
    phases, wrong = kill_and_resume(disk, folder, options.kills, options.seed, tuple(options.only), tuple(options.of))
    for phase, count in sorted(phases.items()):
        print(f"{count:4d}  {phase}")
    print(f"{phases.total()} faults in {time.monotonic() - began:.0f} s, {len(wrong)} went wrong")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if wrong:
        shutil.copytree(disk, folder / "kept", symlinks=True)
        print(f"The runs are kept in {folder / 'kept'}, their output in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)  # the mount itself ends with this process
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
