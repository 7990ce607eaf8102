"""Launching one run: its process, the signals that stop it, and what its log says."""

import contextlib
import functools
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from ..artifacts import LOCK
from ..command import end_with_parent
from ..console import complain, rewrite
from .plan import BASE, SweepRun


# What a W&B agent sets for its trial. Stage 1 is shared by all trials, so it must not log to one of them.
WANDB_TRIAL = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID")
POLL = 0.1  # seconds between two looks at a process or a lock
ECHO = 2.0  # seconds within which the same signal may arrive twice, from a terminal and from an agent that forwards it
EXCEPTION = re.compile(r"^(\[rank\d+\]: ?)?[\w.]+(Error|Exception|Interrupt|Stopped)\b")
LAUNCHER = re.compile(r"CalledProcessError|ChildFailedError")
LINE = re.compile(r"^(?:step|eval) +(\d+)/(\d+) ", re.MULTILINE)  # of a run's log
PROGRESS = re.compile(r"(\d+)/(\d+) \[")


class Stopped(Exception):
    """A signal stopped the sweep, and the current run has ended."""

    def __init__(self, number: int, when: str):
        super().__init__(f"Stopped by {signal.Signals(number).name} {when}. Run the same command again to continue.")
        self.code = 128 + number


def command_of(file: Path | str, launch_options: Sequence[str]) -> str:
    """The command that runs one recipe."""
    return shlex.join(["accelerate", "launch", *launch_options, "-m", "dposhift_trl.run", str(file)])


def launch(run: SweepRun, launch_options: Sequence[str], received: list[int], head: str) -> int:
    """
    Run one recipe in a process of its own.

    Args:
        run ([`SweepRun`]):
            The run. Its output is appended to its log.
        launch_options (`Sequence[str]`):
            Options of `accelerate launch`.
        received (`list[int]`):
            Signals that were received, which a handler appends to.
        head (`str`):
            Start of every line that is printed.

    Returns:
        `int`: Exit code of the run.

    Raises:
        Stopped: If a signal was received. The run has then saved a checkpoint, or was killed by a second signal.
    """
    environment = {key: value for key, value in os.environ.items() if run.name != BASE or key not in WANDB_TRIAL}
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *launch_options, "-m", "dposhift_trl.run", str(run.file)
    ]  # fmt: skip
    with open(run.log, "ab") as stream:
        # In a session of its own, so that Ctrl-C reaches only this process, which then ends the run in order
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )  # fmt: skip
        live, shown = sys.stdout.isatty(), 0.0
        while process.poll() is None and not received:
            time.sleep(POLL)
            if live and time.monotonic() > shown + 2:
                shown = time.monotonic()
                rewrite(f"{head} {_progress(run.log)}")
        if live:
            rewrite("")
        if not received or process.poll() == 0:
            return process.returncode
    complain(f"{head} stopping after it has saved a checkpoint; repeat the signal to kill it")
    _stop(process, run, received)
    raise Stopped(received[0], f"during {run.name}")


def _stop(process: subprocess.Popen[bytes], run: SweepRun, received: list[int]) -> None:
    """Ask a run to save and end, and wait for it. A second signal kills it."""
    _send(process.pid, signal.SIGTERM)
    # The launcher may end before the run, which holds the lock of its folder until its end
    lock, asked, count = FileLock(run.folder / LOCK), time.monotonic(), len(received)
    while process.poll() is None or (run.folder.is_dir() and not try_lock(lock)):
        echo = time.monotonic() <= asked + ECHO
        if len(received) > count and not echo:
            _send(process.pid, signal.SIGKILL)
            process.wait()
            break
        count = max(count, len(received)) if echo else count
        time.sleep(POLL)
    lock.release()


def _send(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def try_lock(lock: FileLock) -> bool:
    """Take a lock if it is free. Returns whether it was."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _progress(log: Path) -> str:
    """The training step at the end of a log. With bars, evaluations have some too, with fewer steps."""
    with open(log, "rb") as stream:
        stream.seek(max(log.stat().st_size - 4096, 0))
        text = stream.read().decode("utf-8", "replace")
    bars = LINE.findall(text)[-1:] or PROGRESS.findall(text)
    longest = max((int(total) for _, total in bars), default=0)
    steps = [done for done, total in bars if int(total) == longest]
    return f"step {steps[-1]} of {longest}" if steps else "starting"


def last_error(text: str) -> str:
    """The line of a log that says why the run failed, rather than what its launcher says about that."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if EXCEPTION.match(line) and not LAUNCHER.search(line)]
    if errors:
        return errors[-1]
    if killed := re.search(r"died with <Signals\.(\w+)", text):
        return f"killed by {killed[1]}"
    before = itertools.takewhile(lambda line: not re.match(r"Traceback|[EW]\d{4} ", line), lines)
    messages = [line for line in before if not PROGRESS.search(line) and not LINE.match(line) and line[0] != "{"]
    return messages[-1] if messages else "no output"
