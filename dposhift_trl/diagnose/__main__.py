"""`python -m dposhift_trl.diagnose`: what training did to a model that is already there, on preference pairs."""

if __name__ == "__main__":
    from ..command import begin

    begin()  # before the imports, which take seconds

import argparse
import os
import sys
from collections.abc import Sequence

from ..artifacts import REPORT
from ..command import call
from ..console import complain, ignore_warnings, say, wrapped
from ..data.errors import DataError
from ..launcher import launcher_mistakes
from ..recipe import RecipeError
from ..report.run_folder import ReportError
from .settings import DiagnoseError, load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """
    Diagnose a model.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments of the command, `sys.argv[1:]` by default.

    Returns:
        `int`: Exit code: 0 for success, 2 for an invalid argument, model, or data.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.diagnose",
        description="Score preference pairs with a trained model and its reference, without training, and say how "
        "likely the chosen answers still are.",
        epilog="Each option is a key of a recipe: `--output` is `output_dir`, and `--data` and `--split` are "
        "`data.path` and `data.train_split`.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "recipe",
        nargs="*",
        default=[],
        metavar="RECIPE | key=value",
        help="YAML recipe without stages, and keys that the options do not cover, for example data.eval_split=test",
    )
    parser.add_argument("--policy", metavar="MODEL", help="trained model or adapter: a folder or a Hub name")
    parser.add_argument(
        "--reference", metavar="MODEL", help="model that training started from (default: an adapter's base model)"
    )
    parser.add_argument("--data", metavar="DATA", help="preference pairs: a file, a folder, a Hub name")
    parser.add_argument("--split", help="split of the pairs (default: `data.eval_split` of a recipe, otherwise train)")
    parser.add_argument("--output", metavar="DIR", dest="output_dir", help="folder to write to (default: a new one)")
    parser.add_argument("--limit", type=int, help="maximum number of pairs; the first ones (default: all)")
    parser.add_argument("--max-length", type=int, help="maximum length of prompt and answer (default: 1024)")
    parser.add_argument("--batch-size", type=int, help="number of pairs scored at once (default: 8)")
    parser.add_argument("--beta", type=float, help="beta of the training, for the rewards (default: 0.1)")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16, float16, auto (default: float32)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with a model or tokenizer"
    )
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace another diagnosis in DIR")
    flags = vars(parser.parse_intermixed_args(argv))
    words, overwrite = flags.pop("recipe"), flags.pop("overwrite")
    overrides = [word for word in words if "=" in word]
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        parser.error(f"one recipe at most, got {' and '.join(recipes)}")
    if mistakes := launcher_mistakes():
        complain(*mistakes)
        return 2
    if (processes := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        if os.environ["RANK"] == "0":
            complain(f"A diagnosis runs in one process, got {processes}. Start it with `python -m` alone.")
        return 2
    ignore_warnings()
    try:
        settings = load_settings(recipes[0] if recipes else None, overrides, flags)
        from .diagnosis import diagnose  # torch and trl take seconds to import

        found = diagnose(settings, overwrite)
        say("", *wrapped(found.verdict.headline), "", *wrapped(str(found.verdict)))
        from ..report import write_report  # imports matplotlib

        say("", f"The report is {write_report([found.folder], found.folder / REPORT)}")
    except (RecipeError, DataError, DiagnoseError, ReportError) as error:
        complain(*str(error).split("\n"))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(call(main))
