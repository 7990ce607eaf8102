"""`--dry-run`: what a recipe would do, without training."""

import math
import tempfile
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig

from ..config import DPOShiftConfig
from ..data.sources import Rows, load_preferences
from ..recipe import Recipe, dump_yaml
from ..schedules import LambdaPlan
from ..training.batching import make_token_sampler, without_lost_rows
from ..training.checks import check_rows_left
from .errors import RunError
from .loading import base_model, check_rows, findings, legend, load_rows, load_tokenizer
from .notes import recipe_notes
from .preflight import check_lengths, check_model, check_settings
from .processes import from_main, say, say_wrapped


def describe(recipe: Recipe) -> None:
    """Print the resolved recipe, the optimizer steps of each stage, and lambda at the start, middle and end."""
    say(*dump_yaml(recipe.resolved).split("\n"))
    check_settings(recipe)
    say_wrapped(*recipe_notes(recipe))
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            base = base_model(recipe, Path(from_main(folder)))
            tokenizer = load_tokenizer(recipe, base)
        except RunError as error:  # without a tokenizer, the rows are read, but neither tokenized nor counted
            say_wrapped(f"The rows cannot be counted: {error}")
            load_preferences(recipe.data, recipe.seed)
        else:
            positions = check_model(recipe, base, tokenizer)
            rows = load_rows(recipe, tokenizer)
            audits = findings(rows)
            for split, audit in audits.items():
                say_wrapped(f"{split}: {audit}")
            if (meaning := legend(audits)) is not None:
                say_wrapped(meaning)
            check_rows(rows)
            check_lengths(recipe, rows, positions)
        PartialState().wait_for_everyone()  # until nobody needs the main process's folder
    for name, args in recipe.stages.items():
        try:
            steps = _optimizer_steps(args, rows[name].train if name in rows else None)
        except ValueError as error:
            raise RunError(f"Stage `{name}` cannot start: {error}") from error
        say(f"{name}: {steps or 'unknown number of'} optimizer steps")
        if isinstance(args, DPOShiftConfig):
            say(f"lambda: {_lambda_text(args.lambda_plan)}")


def _lambda_text(plan: LambdaPlan) -> str:
    if plan.adaptive:
        return f"{plan.low:.4g} to {plan.high:.4g}, adapted during training"
    low, high = plan.range
    if low == high:
        return f"{low:.4g} throughout"
    values = map(plan.at, (0.0, 0.5, 1.0))
    return "{:.4g} at the start, {:.4g} in the middle, {:.4g} at the end".format(*values)


def _optimizer_steps(args: SFTConfig | DPOShiftConfig, rows: Rows | None) -> int | None:
    """Number of optimizer steps, or `None` if it is only known once the rows are read or packed."""
    if args.max_steps > 0:
        return args.max_steps
    if not isinstance(rows, Dataset) or (isinstance(args, SFTConfig) and args.packing):
        return None
    trained_on = without_lost_rows(rows, args.max_length, args.truncation_mode)
    check_rows_left(trained_on, "train", args.max_length)
    sampler = None
    if isinstance(args, DPOShiftConfig):
        sampler = make_token_sampler(trained_on, args, PartialState(), shares_prompts=True)
    if sampler is not None:
        batches = len(sampler)
    else:
        round_off = math.floor if args.dataloader_drop_last else math.ceil
        batches = round_off(len(trained_on) / (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))
