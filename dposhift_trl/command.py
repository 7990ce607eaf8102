"""A command as a process: its standard streams, its signals, and the launcher that it ends with."""

import contextlib
import ctypes
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from .console import complain


# What asks a command to stop: Ctrl-C, a cluster or `kill`, a closed terminal. Windows has no SIGHUP.
SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]
# Names of `accelerate launch` and `torchrun` on a command line
LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.accelerate_cli",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
}
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Terminated(BaseException):
    """
    A signal ended the command. Not an `Exception`, so that no library handles it.

    Args:
        number (`int`):
            The signal.
        message (`str`):
            What the user is told.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


def begin() -> None:
    """
    Prepare a process of its own for a command. Must be called before the imports that take seconds.

    The reader of its output may go away (`| head`), a standard stream may be closed, Ctrl-C during the imports prints
    no traceback, and a process that a launcher started does not outlive it.
    """
    os.environ.setdefault("TQDM_LEAVE", "")  # read when tqdm is imported: a progress bar that is full disappears
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the number, which the next file would otherwise get
            os.set_inheritable(descriptor, True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _forgiving(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _forgiving(sys.stderr, 2)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.getppid()
    if _is_launcher(parent):
        end_with_parent(parent)
        if parent == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun handles the signal
            complain(
                "`accelerate launch` is process 1 of this container, which ignores SIGTERM, so `docker stop` kills "
                "the run without saving. To run one process, write `python -m` instead of `accelerate launch -m`."
            )


def call(main: Callable[[], int]) -> int:
    """Run a command's `main`, which a signal that it does not handle itself ends with one line."""
    try:
        with handling(_terminate):
            return main()
    except Terminated as error:
        complain(error)
        return error.code


@contextlib.contextmanager
def handling(act: Callable[[int], None]) -> Iterator[None]:
    """
    Handle the signals that ask to stop inside the `with` block.

    Signals that are ignored stay so, as SIGHUP under `nohup` or SIGINT in the background of a script. Forked workers,
    for example of a data loader, get Ctrl-C too; their parent decides when they end.

    Args:
        act (`Callable[[int], None]`):
            Called with the signal.
    """
    process, earlier = os.getpid(), {}

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            act(number)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            earlier[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            # None is a handler that was not installed from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def end_with_parent(parent: int) -> None:
    """
    Send SIGTERM to this process when its parent ends. On Linux only; elsewhere it does nothing.

    Args:
        parent (`int`):
            Process id of the parent, which may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process: int) -> bool:
    """
    Whether a process is a launcher, judging by its command line: `python .../accelerate launch`, `python -m ...`.

    A launcher waits for what it has launched, so its end is not normal. The end of any other parent is: of a shell
    with a run under `nohup`, or of a terminal with a run in `tmux`. The launchers' environment variables do not tell,
    since they are inherited.
    """
    try:
        python, *words = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return Path(python).name.startswith("python") and any(Path(word).name in LAUNCHERS for word in words[:3])


def _terminate(number: int) -> None:
    raise Terminated(number, f"Stopped by {signal.Signals(number).name}. Run the same command again.")


class _ForgivingFile(io.FileIO):
    """A file that drops what it cannot write, since a run is worth more than its console."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _forgiving(stream: TextIO | None, descriptor: int) -> TextIO:
    """A standard stream that outlives its reader. It escapes the characters that the terminal lacks."""
    file = _ForgivingFile(descriptor, "w", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", errors="backslashreplace")
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
