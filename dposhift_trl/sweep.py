"""`python -m dposhift_trl.sweep RECIPE key=value,value ... [-- accelerate options]`: many points from one stage 1."""

import argparse
import collections
import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .artifacts import FINISHED, RECIPE, ArtifactError, read_mapping, write_whole
from .config import DPOShiftConfig
from .recipe import Recipe, RecipeError, changed_keys, dump_yaml, load_recipe
from .report.run_folder import number
from .schedules import LAMBDA_DEFAULTS, LambdaPlan


BASE = "base"
LOCKS = ".locks"
LAMBDA_FIELDS = (*LAMBDA_DEFAULTS, "allow_lambda_above_one")
# What a W&B agent sets for its trial; stage 1, which all trials share, is no trial
WANDB_TRIAL = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID")
COLUMNS = {
    "chosen log-ratio": "eval_displacement/chosen",
    "margin": "eval_rewards/margins",
    "accuracy": "eval_rewards/accuracies",
    "chosen logps": "eval_logps/chosen",
}
LOOK = 0.1  # seconds between two looks at a child or a lock
ECHO = 2.0  # seconds in which a signal may come twice, from a terminal and from an agent that forwards it
EXCEPTION = re.compile(r"^(\[rank\d+\]: ?)?[\w.]+(Error|Exception|Interrupt|Stopped)\b")
LAUNCHER = re.compile(r"CalledProcessError|ChildFailedError")
PROGRESS = re.compile(r"(\d+)/(\d+) \[")


class Stopped(Exception):
    """A signal asked the sweep to stop, and the run under way has ended."""

    def __init__(self, number: int, when: str):
        super().__init__(f"Stopped by {signal.Signals(number).name} {when}; the same command goes on from there.")
        self.code = 128 + number


@dataclass
class Run:
    """
    One run of a sweep, an ordinary run folder.

    Args:
        name (`str`):
            Name of the point, or `base`.
        values (`dict[str, Any]`):
            Its own recipe.
        folder (`Path`), file (`Path`), log (`Path`):
            Where it runs, where its recipe is written, and where its output goes.
        stage (`str`):
            Its one stage, `sft` or `dpo`.
    """

    name: str
    values: dict[str, Any]
    folder: Path
    file: Path
    log: Path
    stage: str

    @property
    def finished(self) -> bool:
        """Whether this very recipe has been run to its end."""
        try:
            saved = read_mapping(self.folder / RECIPE)
        except ArtifactError:
            return False  # the run says what is wrong with it
        same = not changed_keys({**saved, "output_dir": None}, {**self.values, "output_dir": None})
        return same and (self.folder / self.stage / FINISHED).is_file()


@dataclass
class Sweep:
    """
    A checked sweep.

    Args:
        folder (`Path`):
            Where everything lies.
        base ([`Run`] or `None`):
            Stage 1, or `None` for a recipe without one.
        points (`list[Run]`):
            One run of stage 2 each.
        settings (`list[DPOShiftConfig]`):
            Stage 2 of each point.
        repeated (`int`):
            How many combinations of values were left out because another one is the same run.
    """

    folder: Path
    base: Run | None
    points: list[Run]
    settings: list[DPOShiftConfig]
    repeated: int


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a sweep.

    Returns:
        `int`: Exit code: 0 done, 1 a run failed, 2 a mistake in what was asked for, 128 + n stopped by signal n.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.sweep",
        usage="%(prog)s [-h] [--dry-run] RECIPE [key=value,value ...] [-- accelerate options]",
        description="Run stage 1 once, stage 2 for every combination of the values, and compare.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML recipe, for example recipes/tiny_sweep.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value,value",
        help="for example dpo.shift_lambda=1.0,0.95,0.75 dpo.beta=0.1",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the points with steps and lambda, and stop")
    options = parser.parse_intermixed_args(words[:cut])
    # TRL 1.16 reads a deprecated name of transformers 5.23; nothing a user can do
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    try:
        if "LOCAL_RANK" in os.environ:
            raise RecipeError(
                "The sweep starts `accelerate launch` for each point itself. Write `python -m dposhift_trl.sweep ... "
                "-- OPTIONS` instead of `accelerate launch OPTIONS -m dposhift_trl.sweep ...`."
            )
        sweep = plan(options.recipe, options.overrides)
        if options.dry_run:
            describe(sweep)
            return 0
        return run(sweep, words[cut + 1 :])
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"The sweep folder cannot be written: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def plan(path: str, overrides: Sequence[str]) -> Sweep:
    """
    Every combination of the overrides' values, each checked as a recipe, before anything runs.

    Args:
        path (`str`):
            The recipe.
        overrides (`Sequence[str]`):
            As [`~recipe.load_recipe`] takes them, but with several values each, separated by commas that stand
            outside brackets and quotes.

    Returns:
        [`Sweep`]: The checked sweep.

    Raises:
        RecipeError: With one line for each mistake.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if key in axes:
            raise RecipeError(f"{path}: `{key}` is given twice. Write its values in one place, with commas between.")
        axes[key] = [f"{key}{equals}{value}" for value in split_values(text)]
        if len(axes[key]) > 1 and f"{key}=" in axes[key]:
            raise RecipeError(f"{path}: the override {override!r} holds an empty value between its commas.")
    varied = {key for key, values in axes.items() if len(values) > 1}
    recipes: list[tuple[dict[str, str], Recipe]] = []
    mistakes: dict[str, None] = {}
    for combination in itertools.product(*axes.values()):
        try:
            recipe = load_recipe(path, combination)
        except RecipeError as error:
            mistakes.update(dict.fromkeys(str(error).splitlines()))
        else:
            recipes.append((dict(zip(axes, combination, strict=True)), recipe))
            mistakes.update(dict.fromkeys(_sweep_mistakes(recipe, varied)))
    if mistakes:
        raise RecipeError(*mistakes)

    folder = Path(os.path.abspath(recipes[0][1].output_dir))
    base = None
    if "sft" in recipes[0][1].stages:
        # Where points differ in their seed, stage 1 keeps the recipe's own
        single = [values[0] for key, values in axes.items() if key not in varied]
        shared = load_recipe(path, single).resolved if "seed" in varied else recipes[0][1].resolved
        base = _as_run(folder, BASE, {key: value for key, value in shared.items() if key != "dpo"}, "sft")
    points: dict[str, Run] = {}
    settings: list[DPOShiftConfig] = []
    names: set[str] = set()
    for combination_of, recipe in recipes:
        dpo = recipe.stages["dpo"]
        assert isinstance(dpo, DPOShiftConfig)
        values = {key: value for key, value in recipe.resolved.items() if key != "sft"}
        others = {key: value for key, value in recipe.resolved["dpo"].items() if key not in LAMBDA_FIELDS}
        permission = {"allow_lambda_above_one": True} if dpo.lambda_range[1] > 1 else {}
        values["dpo"] = {**dpo.lambda_plan.settings, **permission, **others}
        if base is not None:
            values["model"] = {**values["model"], "model_name_or_path": str(base.folder / base.stage)}
        identity = json.dumps(values, sort_keys=True, default=str)
        if identity in points:
            continue
        name = _point_name(dpo.lambda_plan, combination_of, varied)
        if name in names:
            raise RecipeError(f"{path}: two points have the name `{name}`. Run them in sweeps of their own.")
        names.add(name)
        points[identity] = _as_run(folder, name, values, "dpo")
        settings.append(dpo)
    return Sweep(folder, base, [*points.values()], settings, len(recipes) - len(points))


def split_values(text: str) -> list[str]:
    """The values of an override: its text cut at commas outside brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (depth or not values[-1].strip()):
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth <= 0:
            values.append("")
            continue
        values[-1] += character
    return [value.strip() for value in values]


def _sweep_mistakes(recipe: Recipe, varied: set[str]) -> Iterator[str]:
    path = recipe.source
    if "dpo" not in recipe.stages:
        yield f"{path}: `dpo` is missing. A sweep compares runs of it; write `dpo: {{}}` for the default settings."
    for key in sorted(varied):
        if key in ("output_dir", "run_name"):
            yield f"{path}: `{key}` must have one value in a sweep. Each point gets a folder and a name beneath it."
        elif "sft" in recipe.stages and key != "seed" and key.split(".")[0] != "dpo":
            yield (
                f"{path}: `{key}` must have one value in a sweep with a section `sft`, since stage 1 runs once for "
                "all points. Start a sweep for each value, or leave stage 1 out with `sft=null`."
            )
    if "seed" in varied and "sft" in recipe.stages and recipe.data.eval_size is not None:
        yield (
            f"{path}: `seed` must have one value where `data.eval_size` holds rows out by it, since stage 1 would "
            "have been trained on rows that a point is evaluated on. Name a split as `data.eval_split`."
        )


def _point_name(plan: LambdaPlan, overrides: dict[str, str], varied: set[str]) -> str:
    lambdas: list[Any]
    if plan.adaptive:
        lambdas = ["adaptive", plan.low, plan.high, plan.metric.removeprefix("displacement/"), plan.target]
    elif plan.schedule == "fixed":
        lambdas = ["fixed", plan.start]
    elif isinstance(plan.schedule, str):
        lambdas = [plan.schedule, plan.start, plan.end]
    else:
        lambdas = ["knots", *itertools.chain(*plan.schedule)]
    parts = ["-".join(map(str, lambdas))]
    for key, override in overrides.items():
        field = key.removeprefix("dpo.")
        if field not in LAMBDA_FIELDS and (field != key or key in varied):
            parts.append(f"{field}-{override.partition('=')[2]}")
    return "_".join(map(_file_name, parts))[:200]


def _file_name(text: str, limit: int = 48) -> str:
    """Text that any disk takes as a file's name; what had to be changed is marked by a hash."""
    safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
    if safe == text and len(text) <= limit:
        return text
    return f"{safe[:limit].strip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _as_run(folder: Path, name: str, values: dict[str, Any], stage: str) -> Run:
    own = {"output_dir": str(folder / name), "run_name": f"{values['run_name']}-{name}"}
    return Run(
        name, {**values, **own}, folder / name, folder / "recipes" / f"{name}.yaml", folder / f"{name}.log", stage
    )


def describe(sweep: Sweep) -> None:
    """Print the points with lambda at the start, middle and end, and their steps."""
    _introduce(sweep)
    for point, dpo in zip(sweep.points, sweep.settings, strict=True):
        plan = dpo.lambda_plan
        values = ", ".join(f"{plan.at(progress):.4g}" for progress in (0, 0.5, 1)) if not plan.adaptive else ""
        moves = plan.text if plan.adaptive else f"{values} (start, middle, end)"
        length = f"steps: {dpo.max_steps}" if dpo.max_steps > 0 else f"epochs: {dpo.num_train_epochs:g}"
        print(f"{point.name}: lambda {moves}, {length}{', finished' * point.finished}")


def _introduce(sweep: Sweep) -> None:
    count = f"{len(sweep.points)} point{'s' * (len(sweep.points) > 1)}"
    once = f"; {sweep.repeated} more combinations are the same runs and left out" if sweep.repeated else ""
    stage_1 = "" if sweep.base is None else ", from one stage 1"
    print(f"{sweep.folder}: {count}{stage_1}{once}", flush=True)


def run(sweep: Sweep, launch_options: Sequence[str] = ()) -> int:
    """
    Run what is not finished, print a table and write the comparison.

    Args:
        sweep ([`Sweep`]):
            Checked sweep.
        launch_options (`Sequence[str]`):
            Options of `accelerate launch`.

    Returns:
        `int`: 0, or 1 if a run failed or nothing could be compared.

    Raises:
        Stopped: If a signal asked to stop.
    """
    _introduce(sweep)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    launch = ["accelerate", "launch", *launch_options, "-m", "dposhift_trl.run"]
    with _short_lock(sweep):
        for each in [*([sweep.base] if sweep.base else []), *sweep.points]:
            command = shlex.join([*launch, str(each.file)])
            text = f"# Written by the sweep; the command of this run alone:\n#\n#   {command}\n\n"
            # Whole at any moment, as a run of another command may be reading it
            write_whole(each.file, text + dump_yaml(each.values))
    print(f"Each is a run of its own: {shlex.join(launch)} {sweep.folder / 'recipes'}/NAME.yaml", flush=True)
    with _signals() as received:
        failed = _Session(sweep, launch_options, received).run()
    if sweep.base is not None and sweep.base.name in failed:
        print("Stage 1 failed, so that no point could run.", file=sys.stderr)
        return 1
    code = 1 if failed else 0
    with _short_lock(sweep):
        # Points of earlier commands, or of other machines, belong to the same comparison
        files = (sweep.folder / "recipes").glob("*.yaml")
        finished = [
            sweep.folder / file.stem
            for file in sorted(files)
            if file.stem != BASE and (sweep.folder / file.stem / "dpo" / FINISHED).is_file()
        ]
        if finished:
            table, problems = _table(finished)
            print(table)
            for problem in problems:
                print(problem, file=sys.stderr)
            code = max(code, 1 if problems else 0, _compare(finished, sweep.folder / "comparison"))
    if failed:
        print(f"Failed: {', '.join(failed)}. The same command tries them again.", file=sys.stderr)
    return code


class _Session:
    """What one command runs of a sweep, and what it remembers on the way."""

    def __init__(self, sweep: Sweep, launch_options: Sequence[str], received: list[int]):
        self.sweep = sweep
        self.launch_options = launch_options
        self.received = received
        self.seconds: list[float] = []  # of each point run here
        self.failed: list[str] = []

    def run(self) -> list[str]:
        """Run stage 1, then the points; those that another command has under way last. Returns what failed."""
        base, total = self.sweep.base, len(self.sweep.points)
        if base is not None:
            self._run_one(base, "[stage 1]", [], wait=True)
            self.seconds.clear()  # stage 1 tells nothing of how long a point takes
        queue = collections.deque((point, f"[{number}/{total}]") for number, point in enumerate(self.sweep.points, 1))
        left_for_later: set[str] = set()
        while queue and not (base is not None and base.name in self.failed):
            point, number = queue.popleft()
            later = [other for other, _ in queue]
            if not self._run_one(point, number, later, wait=point.name in left_for_later):
                left_for_later.add(point.name)
                queue.append((point, number))
        return self.failed

    def _run_one(self, each: Run, number: str, later: Sequence[Run], wait: bool) -> bool:
        """Whether it is settled; it is not while another command runs it and we are not to wait for that."""
        head = f"{number} {each.name}:"
        with contextlib.ExitStack() as claims:
            if not self._claim(each, head, wait, claims):
                print(f"{head} under way in another command, left for later", flush=True)
                return False
            if each.finished:
                print(f"{head} finished before, skipped", flush=True)
                return True
            print(f"{head} started{self._time_left([each, *later])}, output in {each.log}", flush=True)
            began = time.monotonic()
            start = each.log.stat().st_size if each.log.exists() else 0
            code = _launch(each, self.launch_options, self.received, head)
            seconds = time.monotonic() - began
        if code == 0:
            self.seconds.append(seconds)
            left = "" if each is self.sweep.base else self._time_left(later)
            print(f"{head} done in {_duration(seconds)}{left}", flush=True)
        else:
            self.failed.append(each.name)
            with open(each.log, "rb") as stream:
                stream.seek(start)
                error = last_error(stream.read().decode("utf-8", "replace"))
            print(f"{head} failed after {_duration(seconds)}: {error} ({each.log})", file=sys.stderr, flush=True)
        return True

    def _claim(self, each: Run, head: str, wait: bool, claims: contextlib.ExitStack) -> bool:
        # A run's own lock is free between our look at it and the launch, so sweeps have one among themselves
        among_sweeps, own = FileLock(self.sweep.folder / LOCKS / each.name), FileLock(each.folder / ".lock")
        said = False
        for lock in (among_sweeps, own) if each.folder.is_dir() else (among_sweeps,):
            while not _try(lock):
                if not wait:
                    return False
                self._check_signals(each)
                if not said:
                    print(f"{head} waiting for another command that is running it", flush=True)
                said = True
                time.sleep(LOOK)
            if lock is among_sweeps:
                claims.callback(lock.release)
            else:
                lock.release()  # the run is to take it itself
        self._check_signals(each)
        return True

    def _check_signals(self, each: Run) -> None:
        if self.received:
            raise Stopped(self.received[0], f"before {each.name}")

    def _time_left(self, runs: Sequence[Run]) -> str:
        count = sum(not each.finished for each in runs)
        if not self.seconds or not count:
            return ""
        return f", about {_duration(sum(self.seconds) / len(self.seconds) * count)} left"


def _launch(each: Run, launch_options: Sequence[str], received: list[int], head: str) -> int:
    environment = {key: value for key, value in os.environ.items() if each.name != BASE or key not in WANDB_TRIAL}
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *launch_options, "-m", "dposhift_trl.run", str(each.file)
    ]  # fmt: skip
    with open(each.log, "ab") as stream:
        # A session of its own, so that a Ctrl-C comes to us alone and we end the run as it can be gone on with
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        live, shown = sys.stdout.isatty(), 0.0
        while process.poll() is None and not received:
            time.sleep(LOOK)
            if live and time.monotonic() > shown + 2:
                shown = time.monotonic()
                print(f"\r\033[K{head} {_progress(each.log)}", end="", flush=True)
        if live:
            print("\r\033[K", end="", flush=True)
        if not received or process.poll() == 0:
            return process.returncode
    print(f"{head} stopping, once its checkpoint is saved; again to end it at once", file=sys.stderr, flush=True)
    _send(process.pid, signal.SIGTERM)
    # The launcher may end before the run, which holds the lock of its folder to its end
    lock, asked, heard = FileLock(each.folder / ".lock"), time.monotonic(), len(received)
    while process.poll() is None or (each.folder.is_dir() and not _try(lock)):
        if len(received) > heard and time.monotonic() > asked + ECHO:
            _send(process.pid, signal.SIGKILL)
            process.wait()
            break
        heard = max(heard, len(received)) if time.monotonic() <= asked + ECHO else heard
        time.sleep(LOOK)
    lock.release()
    raise Stopped(received[0], f"during {each.name}")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked to stop, remembered instead of acted on, as the runs have to be ended in order."""
    received: list[int] = []
    earlier = {}
    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if which == signal.SIGHUP and signal.getsignal(which) == signal.SIG_IGN:
            continue  # under nohup
        earlier[which] = signal.signal(which, lambda which, frame: received.append(which))
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _send(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _try(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _short_lock(sweep: Sweep) -> FileLock:
    """Held while files that all sweeps in a folder share are written."""
    (sweep.folder / LOCKS).mkdir(exist_ok=True)
    return FileLock(sweep.folder / LOCKS / "files")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _progress(log: Path) -> str:
    """The steps that the end of a log tells of; evaluation has a bar of its own, with fewer of them."""
    with open(log, "rb") as stream:
        stream.seek(max(log.stat().st_size - 4096, 0))
        bars = PROGRESS.findall(stream.read().decode("utf-8", "replace"))
    longest = max((int(total) for _, total in bars), default=0)
    steps = [done for done, total in bars if int(total) == longest]
    return f"step {steps[-1]} of {longest}" if steps else "starting"


def last_error(text: str) -> str:
    """The line of a log that says why the run failed, and not what its launcher said of that."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if EXCEPTION.match(line) and not LAUNCHER.search(line)]
    if errors:
        return errors[-1]
    if killed := re.search(r"died with <Signals\.(\w+)", text):
        return f"killed by {killed[1]}"
    quiet = itertools.takewhile(lambda line: not re.match(r"Traceback|[EW]\d{4} ", line), lines)
    told = [line for line in quiet if not PROGRESS.search(line) and not line.startswith("{")]
    return told[-1] if told else "no output"


def _table(folders: Sequence[Path]) -> tuple[str, list[str]]:
    """The last evaluation of each point, highest chosen log-ratio first, and one line for each unreadable point."""
    rows: list[tuple[float, list[str]]] = []
    problems = []
    for folder in folders:
        try:
            rows.append(_row(folder))
        except ArtifactError as error:
            problems.append(f"{folder.name} is not in the table: {error}")
    lines = [["point", "lambda", *COLUMNS, "seconds"], *(cells for _, cells in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(["", *text, ""]), problems


def _row(folder: Path) -> tuple[float, list[str]]:
    """Sort key and cells of one point."""
    finished = read_mapping(folder / "dpo" / FINISHED)
    metrics = finished.get("metrics")
    if not isinstance(metrics, dict):
        raise ArtifactError(folder / "dpo" / FINISHED, f"must hold a mapping `metrics`, got {metrics!r}")
    recipe = read_mapping(folder / RECIPE)
    try:
        plan = LambdaPlan.of(recipe.get("dpo", {}))
    except (TypeError, ValueError) as error:
        raise ArtifactError(folder / RECIPE, f"has no valid section `dpo`: {error}") from None
    values = [number(metrics.get(key)) for key in COLUMNS.values()]
    cells = [f"{value:.4g}" if math.isfinite(value) else "-" for value in values]
    seconds = number(finished.get("seconds"))
    order = -values[0] if math.isfinite(values[0]) else math.inf
    return order, [folder.name, plan.text, *cells, f"{seconds:.0f}" if math.isfinite(seconds) else "-"]


def _compare(folders: Sequence[Path], destination: Path) -> int:
    try:
        page = importlib.import_module(".report.page", __package__).write_report(folders, destination)
    except (ImportError, ValueError) as error:
        print(f"No comparison was written: {error}", file=sys.stderr)
        return 1
    print(f"The comparison is in {page}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
