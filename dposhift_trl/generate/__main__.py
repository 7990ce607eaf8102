"""`python -m dposhift_trl.generate RUN_DIR`: answers of a run's first and final model, for reading and for a judge."""

if __name__ == "__main__":
    from ..command import begin

    begin()  # before the imports, which take seconds

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artifacts import GENERATIONS, PAGE, REPORT
from ..command import call
from ..console import complain, say
from ..report.errors import ReportError
from .answers import generate_answers
from .settings import GenerateError, GenerationSettings


def main(argv: Sequence[str] | None = None) -> int:
    """
    Generate answers with the models of a run.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments of the command, `sys.argv[1:]` by default.

    Returns:
        `int`: Exit code: 0 for success, 2 for an invalid argument or run.
    """
    defaults = GenerationSettings()
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.generate",
        description="Generate answers with the first and the final model of a run, for reading and for a judge.",
    )
    parser.add_argument("run_dir", help="run folder, for example runs/tiny_shift")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines with `prompt`, AlpacaEval's `instruction` or MT-Bench's `turns`, or text with one prompt per "
        "line (default: the run's evaluation rows)",
    )
    parser.add_argument(
        "--limit", type=int, default=defaults.limit, help="maximum number of questions (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        help="maximum length of an answer, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        help="number of answers generated at once (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="temperature of the sampled answers (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p", type=float, default=defaults.top_p, help="top-p of the sampled answers (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="seed of the sampled answers (default: %(default)s)"
    )
    parser.add_argument("--device", help="for example cpu (default: an accelerator if there is one)")
    parser.add_argument("--output", metavar="DIR", help=f"folder to write to (default: RUN_DIR/{GENERATIONS})")
    parser.add_argument(
        "--overwrite", action="store_true", help="write even if the folder contains other files or answers"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with a model or tokenizer; the recipe in the run folder cannot allow it",
    )
    parser.add_argument("--no-report", action="store_true", help=f"do not update an existing RUN_DIR/{REPORT}")
    options = parser.parse_args(argv)
    try:
        settings = GenerationSettings(
            **{field.name: getattr(options, field.name) for field in dataclasses.fields(GenerationSettings)}
        )
        report = generate_answers(
            options.run_dir,
            options.prompts,
            settings,
            options.output,
            options.overwrite,
            options.device,
            options.trust_remote_code,
        )
    except GenerateError as error:
        complain(error)
        return 2
    say(*format_table(report).split("\n"))
    if not options.no_report and options.output is None:
        _update_report(Path(options.run_dir))
    return 0


def _update_report(folder: Path) -> None:
    """Write the run's report again, now with the answers, if it has one."""
    if not (folder / REPORT / PAGE).is_file():
        return
    from ..report import write_report  # imports matplotlib, which takes seconds

    try:
        say(f"The report is {write_report([folder], folder / REPORT)}")
    except ReportError as error:
        complain(f"The report was not updated: {error}")


def format_table(report: dict[str, Any]) -> str:
    """The statistics as a table for a terminal, one line per model and mode."""
    rows = {
        f"{name} {mode}": report["statistics"][name][mode] for name in report["models"] for mode in report["modes"]
    }
    if report["chosen"] is not None:
        rows["chosen"] = report["chosen"]
    columns = list(next(iter(rows.values())))
    lines = [" " * 14 + "".join(f"{column:>14}" for column in columns)]
    for name, row in rows.items():
        cells = ["-" if row[c] is None else str(row[c]) if c == "count" else f"{row[c]:.3f}" for c in columns]
        lines.append(f"{name:<14}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(call(main))
