"""`python -m dposhift_trl.report RUN_DIR [RUN_DIR ...]`: write one self-contained HTML page and its figures."""

if __name__ == "__main__":
    from ..command import begin

    begin()  # before the imports, which take seconds

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ..artifacts import REPORT
from ..command import call
from ..console import complain, say
from .errors import ReportError
from .page import write_report
from .run_folder import read_run


def main(argv: Sequence[str] | None = None) -> int:
    """
    Write a report.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments of the command, `sys.argv[1:]` by default.

    Returns:
        `int`: Exit code: 0 for success, 2 for an invalid argument.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.report", description="Write one HTML page about a run, or comparing several."
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="RUN_DIR",
        help="run folder, for example runs/tiny_shift, output folder of a stock DPOTrainer (TRL, LLaMA-Factory, "
        "axolotl), or folder with pairs/",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help=f"report folder (RUN_DIR/{REPORT} for one run, ./comparison for several)",
    )
    parser.add_argument(
        "--beta",
        type=_beta,
        metavar="BETA",
        help="beta of runs of a stock DPOTrainer, whose rewards are divided by it (read from a text file in the "
        "folder, such as training_args.yaml, if one names it)",
    )
    options = parser.parse_args(argv)
    folders = [Path(folder) for folder in options.folders]
    default = folders[0] / REPORT if len(folders) == 1 else Path("comparison")
    try:
        page = write_report(folders, Path(options.output) if options.output else default, options.beta)
    except ReportError as error:
        complain(error)
        return 2
    if len(folders) == 1:
        say(read_run(folders[0], options.beta).verdict.headline)
    say(f"The report is {page}")
    return 0


def _beta(text: str) -> float:
    try:
        beta = float(text)
    except ValueError:
        beta = math.nan
    if not 0 < beta < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}. Write for example 0.1.")
    return beta


if __name__ == "__main__":
    sys.exit(call(main))
