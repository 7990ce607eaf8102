"""`python -m dposhift_trl.sweep RECIPE key=value,value ... [-- accelerate options]`: many runs from one stage 1."""

if __name__ == "__main__":
    from ..command import begin

    begin()  # before the imports, which take seconds

import argparse
import os
import sys
from collections.abc import Sequence

from ..command import call
from ..console import complain, ignore_warnings, say
from ..launcher import launcher_mistakes
from ..recipe import RecipeError
from .launch import Stopped
from .plan import Sweep, plan
from .session import run_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a sweep.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments of the command, `sys.argv[1:]` by default.

    Returns:
        `int`: Exit code: 0 for success, 1 if a run failed or a point could not be compared, 2 for an invalid argument
        or recipe, 128 + n if signal n stopped the sweep.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.sweep",
        usage="%(prog)s [-h] [--dry-run] [--seeds N] RECIPE [key=value,value ...] [-- accelerate options]",
        description="Run stage 1 once and stage 2 for every combination of the values, and compare the results.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML recipe, for example recipes/tiny_sweep.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value,value",
        help="for example dpo.shift_lambda=1.0,0.95,0.75 dpo.beta=0.1",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the points with their steps and lambda, and run nothing"
    )
    parser.add_argument(
        "--seeds",
        type=_number_of_seeds,
        default=1,
        metavar="N",
        help="run every point with N seeds, the recipe's and those that follow it, from one stage 1, and compare "
        "means over them (default: 1)",
    )
    options = parser.parse_intermixed_args(words[:end])
    ignore_warnings()
    try:
        if "LOCAL_RANK" in os.environ:
            raise RecipeError(
                "The sweep runs `accelerate launch` for each point. Write `python -m dposhift_trl.sweep ... -- "
                "OPTIONS` instead of `accelerate launch OPTIONS -m dposhift_trl.sweep ...`."
            )
        if mistakes := launcher_mistakes():
            raise RecipeError(*mistakes)
        sweep = plan(options.recipe, options.overrides, options.seeds)
        if options.dry_run:
            print_points(sweep)
            return 0
        return run_sweep(sweep, words[end + 1 :])
    except RecipeError as error:
        complain(*str(error).split("\n"))
        return 2
    except OSError as error:
        complain(f"The sweep folder cannot be written: {error}")
        return 2
    except Stopped as error:
        complain(error)
        return error.code


def _number_of_seeds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}. Write for example 3.")
    return int(text)


def print_points(sweep: Sweep) -> None:
    """Print each point with lambda at the start, middle and end, and its number of steps or epochs."""
    say(sweep.summary)
    for point, dpo in zip(sweep.points, sweep.settings, strict=True):
        lambdas = dpo.lambda_plan.text
        if not dpo.lambda_plan.adaptive:
            values = ", ".join(f"{dpo.lambda_plan.at(progress):.4g}" for progress in (0, 0.5, 1))
            lambdas = f"{values} (start, middle, end)"
        length = f"steps: {dpo.max_steps}" if dpo.max_steps > 0 else f"epochs: {dpo.num_train_epochs:g}"
        say(f"{point.name}: lambda {lambdas}, {length}{', finished' if point.finished else ''}")


if __name__ == "__main__":
    sys.exit(call(main))
