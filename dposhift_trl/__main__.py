"""`python -m dposhift_trl` lists the commands, `python -m dposhift_trl COMMAND ...` runs one; so does `dposhift`."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__


# Module and summary. A module is imported only when its command runs, so that the list appears at once.
COMMANDS = {
    "run": ("run", "Train from a recipe: supervised fine-tuning on the chosen answers, then DPO-Shift."),
    "sweep": ("sweep", "Run a recipe for every combination of values from one stage 1, and compare the results."),
    "report": ("report.__main__", "Write one HTML page about a run, or comparing several."),
    "generate": ("generate", "Generate answers with the SFT model and the final model of a run."),
    "reference": ("reference.__main__", "List or clear the cached log-probabilities of reference models."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    List the commands, or run one.

    Args:
        argv (`Sequence[str]`, *optional*):
            The command and its arguments, `sys.argv[1:]` by default.

    Returns:
        `int`: Exit code: 0 done, 2 an unknown command, otherwise the command's own.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"dposhift_trl {__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
        print(f"The command must be one of {', '.join(COMMANDS)}, got {name!r}.{hint}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    return import_module(f".{module}", __package__).main(arguments)


def usage() -> str:
    """The commands, one line each, and how to get help for one."""
    return "\n".join(
        (
            f"dposhift_trl {__version__}: DPO-Shift for TRL",
            "",
            "usage: dposhift COMMAND ...",
            "   or: python -m dposhift_trl COMMAND ...",
            "   or: accelerate launch -m dposhift_trl run ...",
            "",
            "commands:",
            *(f"  {name:9}  {summary}" for name, (_, summary) in COMMANDS.items()),
            "",
            "options:",
            "  --help     List the commands. `dposhift COMMAND --help` shows the arguments of a command.",
            "  --version  Print the version.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
