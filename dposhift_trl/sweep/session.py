"""Running a sweep: everything that is not finished, then a table and the comparison of all finished points."""

import collections
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from ..artifacts import FINISHED, LOCK, write_whole
from ..command import handling
from ..console import complain, say
from ..recipe import dump_yaml
from ..report.errors import ReportError
from ..report.recommendation import recommend_lambda
from ..report.run_folder import read_run
from ..report.seeds import seed_groups
from .launch import POLL, Stopped, command_of, last_error, launch, try_lock
from .plan import BASE, RECIPES, Sweep, SweepRun
from .table import make_seed_table, make_table


LOCKS = ".locks"
COMPARISON = "comparison"


def run_sweep(sweep: Sweep, launch_options: Sequence[str] = ()) -> int:
    """
    Run what is not finished, print a table and write the comparison.

    Args:
        sweep ([`Sweep`]):
            Checked sweep.
        launch_options (`Sequence[str]`):
            Options of `accelerate launch`.

    Returns:
        `int`: 0, or 1 if a run failed or a point could not be compared.

    Raises:
        Stopped: If a signal stopped the sweep.
    """
    say(sweep.summary)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with _files_lock(sweep):
        for run in sweep.runs:
            header = f"# Written by the sweep. To run it alone:\n#\n#   {command_of(run.file, launch_options)}\n\n"
            # Atomically, since another command may be reading it
            write_whole(run.file, header + dump_yaml(run.values))
    say(f"One run per point: {command_of(sweep.folder / RECIPES / 'NAME.yaml', launch_options)}")
    received: list[int] = []
    with handling(received.append):  # the current run must end in order
        failed = _Session(sweep, launch_options, received).run()
    if sweep.base is not None and sweep.base.name in failed:
        complain("Stage 1 failed, so no point could run.")
        return 1
    complete = _compare(sweep)
    if failed:
        complain(f"Failed: {', '.join(failed)}. Run the same command again to retry.")
    return 1 if failed or not complete else 0


def _compare(sweep: Sweep) -> bool:
    """Print the table and write the comparison. Returns whether every finished point is in both."""
    from ..report import write_report  # imports matplotlib, which takes seconds

    with _files_lock(sweep):
        # Points of earlier commands, or of other machines, belong to the same comparison
        names = sorted(file.stem for file in (sweep.folder / RECIPES).glob("*.yaml") if file.stem != BASE)
        finished = [sweep.folder / name for name in names if (sweep.folder / name / "dpo" / FINISHED).is_file()]
        if not finished:
            return True
        table, problems = make_table(finished)
        say(*table.split("\n"))
        for problem in problems:
            complain(problem)
        say(*_recommendation(finished), "")
        try:
            page = write_report(finished, sweep.folder / COMPARISON)
        except ReportError as error:
            complain(f"The comparison was not written: {error}")
            return False
        say(f"The comparison is {page}")
    return not problems


class _Session:
    """The runs that one command starts."""

    def __init__(self, sweep: Sweep, launch_options: Sequence[str], received: list[int]):
        self.sweep = sweep
        self.launch_options = launch_options
        self.received = received
        self.seconds: list[float] = []  # of each point that ran here
        self.failed: list[str] = []

    def run(self) -> list[str]:
        """Run stage 1, then the points, those that another command is running last. Returns the names that failed."""
        base, total = self.sweep.base, len(self.sweep.points)
        if base is not None:
            self._run_one(base, "[stage 1]", [], wait=True)
            self.seconds.clear()  # stage 1 does not tell how long a point takes
            if self.failed:
                return self.failed
        queue = collections.deque((point, f"[{number}/{total}]") for number, point in enumerate(self.sweep.points, 1))
        postponed: set[str] = set()
        while queue:
            point, number = queue.popleft()
            later = [other for other, _ in queue]
            try:
                done = self._run_one(point, number, later, wait=point.name in postponed)
            except OSError as error:  # the files of one point do not end the sweep
                done = True
                self.failed.append(point.name)
                complain(f"{number} {point.name}: failed: {error}")
            if not done:
                postponed.add(point.name)
                queue.append((point, number))
        return self.failed

    def _run_one(self, run: SweepRun, number: str, later: Sequence[SweepRun], wait: bool) -> bool:
        """Run a point unless it is finished. Returns `False` if another command is running it and `wait` is false."""
        head = f"{number} {run.name}:"
        with contextlib.ExitStack() as claims:
            if not self._claim(run, head, wait, claims):
                say(f"{head} running in another command, postponed")
                return False
            if run.finished:
                say(f"{head} finished before, skipped")
                return True
            say(f"{head} started{self._time_left([run, *later])}, output in {run.log}")
            began = time.monotonic()
            start = run.log.stat().st_size if run.log.exists() else 0
            code = launch(run, self.launch_options, self.received, head)
            seconds = time.monotonic() - began
        if code == 0:
            self.seconds.append(seconds)
            left = "" if run is self.sweep.base else self._time_left(later)
            say(f"{head} done in {_duration(seconds)}{left}")
        else:
            self.failed.append(run.name)
            with open(run.log, "rb") as stream:
                stream.seek(start)
                error = last_error(stream.read().decode("utf-8", "replace"))
            complain(f"{head} failed after {_duration(seconds)}: {error} ({run.log})")
        return True

    def _claim(self, run: SweepRun, head: str, wait: bool, claims: contextlib.ExitStack) -> bool:
        """Take a run for this command. Returns `False` if another command has it and `wait` is false."""
        # A run's own lock is free between this check and its launch, so sweeps have locks of their own
        among_sweeps, own = FileLock(self.sweep.folder / LOCKS / run.name), FileLock(run.folder / LOCK)
        announced = False
        for lock in (among_sweeps, own) if run.folder.is_dir() else (among_sweeps,):
            while not try_lock(lock):
                if not wait:
                    return False
                self._check_signals(run)
                if not announced:
                    say(f"{head} waiting for another command that is running it")
                announced = True
                time.sleep(POLL)
            if lock is among_sweeps:
                claims.callback(lock.release)
            else:
                lock.release()  # the run takes it itself
        self._check_signals(run)
        return True

    def _check_signals(self, run: SweepRun) -> None:
        if self.received:
            raise Stopped(self.received[0], f"before {run.name}")

    def _time_left(self, runs: Sequence[SweepRun]) -> str:
        count = sum(not run.finished for run in runs)
        if not self.seconds or not count:
            return ""
        return f", about {_duration(sum(self.seconds) / len(self.seconds) * count)} left"


def _recommendation(folders: Sequence[Path]) -> list[str]:
    """The means over seeds, if there are several, and the recommended lambda."""
    groups = seed_groups([read_run(folder) for folder in folders])
    _, reason = recommend_lambda([group.outcome for group in groups])
    return [*make_seed_table(groups), reason]


def _files_lock(sweep: Sweep) -> FileLock:
    """Held while files are written that all sweeps in a folder share."""
    (sweep.folder / LOCKS).mkdir(exist_ok=True)
    return FileLock(sweep.folder / LOCKS / "files")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
