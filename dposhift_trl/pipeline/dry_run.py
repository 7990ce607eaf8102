"""`--dry-run`: what a recipe would do, without training."""

import math
import tempfile
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from ..config import DPOShiftConfig
from ..data.errors import DataError
from ..data.sources import Rows
from ..recipe import Recipe, dump_yaml
from ..schedules import ADAPTIVE, make_lambda_schedule
from .errors import RunError
from .loading import base_model, findings, load_rows, load_tokenizer
from .processes import say


def describe(recipe: Recipe) -> None:
    """Print the resolved recipe, the optimizer steps of each stage, and lambda at the start, middle and end."""
    say(dump_yaml(recipe.resolved))
    rows: dict[str, Rows] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = load_tokenizer(recipe, base_model(recipe, Path(folder)))
            audited = load_rows(recipe, tokenizer)
        for split, audit in findings(audited).items():
            say(f"{split}: {audit}")
        rows = {name: stage_rows.train for name, stage_rows in audited.items()}
    except (DataError, RunError) as error:
        say(f"rows unknown: {error}")
    for name, args in recipe.stages.items():
        steps = _optimizer_steps(args, rows.get(name))
        say(f"{name}: {steps if steps is not None else 'unknown number of'} optimizer steps")
        if isinstance(args, DPOShiftConfig) and args.lambda_schedule == ADAPTIVE:
            say("lambda: {:.4g} to {:.4g}, adapted during training".format(*args.lambda_range))
        elif isinstance(args, DPOShiftConfig):
            schedule = make_lambda_schedule(args)
            say(
                "lambda: {:.4g} at the start, {:.4g} in the middle, {:.4g} at the end".format(
                    *map(schedule, (0, 0.5, 1))
                )
            )


def _optimizer_steps(args: SFTConfig | DPOShiftConfig, rows: Rows | None) -> int | None:
    if args.max_steps > 0:
        return args.max_steps
    if not isinstance(rows, Dataset):
        return None
    batches = math.ceil(len(rows) / (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))
