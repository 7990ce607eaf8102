"""`python -m dposhift_trl.report RUN_DIR [RUN_DIR ...]`: one self-contained page, and its figures as files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .page import write_report
from .run_folder import ReportError


def main(argv: Sequence[str] | None = None) -> int:
    """
    Write a report.

    Returns:
        `int`: Exit code: 0 done, 2 a mistake in what was asked for.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.report", description="Write one HTML page about a run, or about several compared."
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="folder of a run, for example runs/tiny_shift")
    parser.add_argument(
        "--output", metavar="DIR", help="default: RUN_DIR/report for one run, ./comparison for several"
    )
    options = parser.parse_args(argv)
    folders = [Path(folder) for folder in options.folders]
    default = folders[0] / "report" if len(folders) == 1 else Path("comparison")
    try:
        page = write_report(folders, Path(options.output) if options.output else default)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"The report is {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
