"""`python -m dposhift_trl` lists the commands, `python -m dposhift_trl COMMAND ...` runs one; so does `dposhift`."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from . import __version__
from .command import begin, call
from .console import complain, say


# Their modules are imported only when a command runs, so that the list appears at once
COMMANDS = {
    "run": "Train from a recipe: supervised fine-tuning on the chosen answers, then DPO-Shift.",
    "sweep": "Run a recipe for every combination of values from one stage 1, and compare the results.",
    "diagnose": "Say what training did to a model that is already there, from preference pairs.",
    "report": "Write one HTML page about a run, or comparing several.",
    "generate": "Generate answers with the SFT model and the final model of a run.",
    "reference": "List or clear the cached log-probabilities of reference models.",
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
        say(*usage().split("\n"))
        return 0
    if name == "--version":
        say(f"dposhift_trl {__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
        complain(f"The command must be one of {', '.join(COMMANDS)}, got {name!r}.{hint}")
        return 2
    return import_module(module_of(name)).main(arguments)


def console() -> int:
    """The process of `dposhift` and `python -m dposhift_trl`."""
    begin()
    return call(main)


def module_of(name: str) -> str:
    """Module whose `main` is a command: the one of this name, or `__main__` if that is a package."""
    spec = find_spec(f"{__package__}.{name}")
    assert spec is not None
    return spec.name if spec.submodule_search_locations is None else f"{spec.name}.__main__"


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
            *(f"  {name:9}  {summary}" for name, summary in COMMANDS.items()),
            "",
            "options:",
            "  --help     List the commands. `dposhift COMMAND --help` shows the arguments of a command.",
            "  --version  Print the version.",
        )
    )


if __name__ == "__main__":
    sys.exit(console())
