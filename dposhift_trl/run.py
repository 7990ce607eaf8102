"""`python -m dposhift_trl.run RECIPE [key=value ...]`: train the stages of a recipe."""

if __name__ == "__main__":
    from .command import begin

    begin()  # before the imports, which take seconds

import argparse
import dataclasses
import json
import shutil
import signal
import sys
from collections.abc import Sequence

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, set_seed

from . import console
from .artifacts import AUDIT, EVAL_ROWS, FINISHED, REPORT, write_whole
from .choices import did_you_mean
from .command import Terminated, call
from .data.audit import AuditedRows
from .data.errors import DataError, reading_rows
from .data.origin import sources_of
from .launcher import launcher_mistakes
from .pipeline.checkpoints import explaining_disk_errors
from .pipeline.checkpoints import last_complete_checkpoint as last_complete_checkpoint
from .pipeline.dry_run import describe
from .pipeline.errors import RUN_AGAIN, RunError, WriteError
from .pipeline.loading import base_model, check_rows, findings, legend, load_rows, load_tokenizer
from .pipeline.next_steps import write_next_steps
from .pipeline.notes import recipe_notes
from .pipeline.preflight import check_lengths, check_model, check_settings
from .pipeline.processes import complain, say, say_wrapped
from .pipeline.resume import is_finished, resume_point
from .pipeline.run_folder import claimed, save_evaluated_rows
from .pipeline.signals import saving_on_signals
from .pipeline.stage import run_stage
from .pipeline.start import row_fingerprints, stage_start
from .recipe import Recipe, RecipeError, load_recipe
from .recipe.listing import ALL, LISTED, key_lines
from .recipe.schema import schema_text
from .report.errors import ReportError
from .training.checks import TrainingStopped


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a recipe.

    Args:
        argv (`Sequence[str]`, *optional*):
            Command-line arguments; by default those of the process.

    Returns:
        `int`: Exit code: 0 finished, 1 stopped during training, 2 invalid recipe, data or run folder, 128 + n stopped
        by signal n: 130 by Ctrl-C, 143 by SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.run",
        description="Supervised fine-tuning on the chosen answers, then training with DPO-Shift.",
    )
    parser.add_argument("recipe", nargs="?", help="YAML recipe, for example recipes/tiny_shift.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dpo.shift_lambda=0.9 seed=7")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe, the optimizer steps and lambda, then exit"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue in a run folder that was started with a different recipe, model or data",
    )
    parser.add_argument(
        "--keys",
        nargs="?",
        const=ALL,
        metavar="SECTION",
        help=f"list the keys of a recipe, or those of one section ({', '.join(LISTED)}), then exit",
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of recipes, for editors, then exit"
    )
    options = parser.parse_intermixed_args(argv)
    if options.keys is not None or options.schema:
        return _describe_recipes(options.keys)
    if options.recipe is None:
        parser.error("the following arguments are required: recipe")
    if mistakes := launcher_mistakes():
        console.complain(*mistakes)
        return 2
    console.ignore_warnings()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.dry_run:
            describe(recipe)
        else:
            run(recipe, accept_changes=options.accept_changes)
    except (RecipeError, DataError, RunError, ReportError) as error:
        complain(error)
        return 2
    except (TrainingStopped, WriteError) as error:
        complain(error)
        return 1
    except Terminated as error:
        complain(error)
        return error.code
    return 0


def _describe_recipes(section: str | None) -> int:
    """Print the keys of a section, or without one the schema of recipes."""
    if section is None:
        console.say(*schema_text().split("\n"))
        return 0
    if section not in (ALL, *LISTED):
        console.complain(
            f"`--keys` must be one of {', '.join(LISTED)}, or without a section list all, got {section!r}."
            f"{did_you_mean(section, LISTED)}"
        )
        return 2
    console.say(*key_lines(section, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    return 0


def run(recipe: Recipe, accept_changes: bool = False) -> None:
    """
    Run the stages of a recipe. Finished stages are skipped; an interrupted one resumes from its last checkpoint.

    Args:
        recipe ([`~recipe.Recipe`]):
            Checked recipe.
        accept_changes (`bool`, *optional*, defaults to `False`):
            Whether to continue in a run folder that was started with a different recipe, model or data.

    Raises:
        RunError: If the run folder cannot be used, or a model cannot be loaded.
        DataError: If the data cannot be read or trained on.
        TrainingStopped: If training stops itself.
        WriteError: If the disk is full.
        Terminated: If a signal stopped it.
    """
    claim = claimed(recipe, accept_changes)
    with claim, saving_on_signals() as signals, explaining_disk_errors(recipe.output_dir):
        set_seed(recipe.seed)
        check_settings(recipe)
        say_wrapped(*recipe_notes(recipe))
        start = base = base_model(recipe, recipe.output_dir / "base")
        tokenizer = load_tokenizer(recipe, start)
        positions = check_model(recipe, start, tokenizer)
        rows = _audited_rows(recipe, tokenizer, positions)
        # Before a trainer changes the tokenizer
        hashes = row_fingerprints(rows, tokenizer) if PartialState().is_main_process else {}
        *_, last_stage = recipe.stages
        verdict = None
        for name, args in recipe.stages.items():
            folder = recipe.output_dir / name
            origin = stage_start(start, base, recipe.model.model_revision, hashes.get(name, {}))
            if is_finished(name, folder, origin):
                if name != last_stage:
                    tokenizer = load_tokenizer(recipe, str(folder))  # which the stage may have changed
            else:
                checkpoint = resume_point(name, folder, args, origin, accept_changes)
                with explaining_disk_errors(folder, name), reading_rows():
                    verdict = run_stage(name, recipe, start, tokenizer, rows[name], signals, checkpoint)
                if name != last_stage and (received := signals.received_anywhere(args)):
                    stopped = f"stopped by {signal.Signals(received).name}"
                    raise Terminated(received, f"{name}: finished, then {stopped}. {RUN_AGAIN}")
            start = str(folder)
        try:
            if recipe.report and PartialState().is_main_process:
                from .report.page import write_report  # imports matplotlib, which takes seconds

                say(f"The report is {write_report([recipe.output_dir], recipe.output_dir / REPORT)}")
            say(f"The model is in {start}")
            if PartialState().is_main_process:
                say(f"Commands that use it are in {write_next_steps(recipe, base, tokenizer)}")
        finally:
            if verdict is not None:
                say("")
                say_wrapped(verdict.headline)
                say("")
                say_wrapped(verdict.paragraph)


def _audited_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> dict[str, AuditedRows]:
    """The rows of each stage, once they have been checked. What the audit found is saved in any case."""
    rows = load_rows(recipe, tokenizer)
    audits = findings(rows)
    if PartialState().is_main_process:
        found = {split: dataclasses.asdict(audit) for split, audit in audits.items()}
        write_whole(recipe.output_dir / AUDIT, json.dumps(found, indent=2, ensure_ascii=False))
    check_rows(rows)
    check_lengths(recipe, rows, positions)
    if PartialState().is_main_process and not (recipe.output_dir / "dpo" / FINISHED).is_file():
        *_, last = rows.values()
        save_evaluated_rows(last.evaluation, recipe.output_dir / EVAL_ROWS, sources_of("eval", recipe.data))
    for split, audit in audits.items():
        say_wrapped(f"{split}: {audit}")
    if (meaning := legend(audits)) is not None:
        say_wrapped(meaning)
    return rows


if __name__ == "__main__":
    sys.exit(call(main))
