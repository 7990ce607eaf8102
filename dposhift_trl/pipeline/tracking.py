"""The W&B run of a stage."""

import contextlib
import uuid
from collections.abc import Iterator

import wandb
from accelerate import PartialState

from ..artifacts import WANDB_ID, write_whole
from ..recipe import Recipe
from .processes import say


@contextlib.contextmanager
def wandb_run(name: str, recipe: Recipe) -> Iterator[None]:
    """One W&B run for each stage, continued when the stage is, with its local files in the run folder."""
    args = recipe.stages[name]
    if "wandb" not in args.report_to or not PartialState().is_main_process:
        yield
        return
    settings = recipe.wandb
    mode = settings.mode
    if mode is None:
        mode = "online" if wandb.login(prompt=False) else "offline"
        if mode == "offline":
            say(f"{name}: no W&B login, logging offline to {recipe.output_dir / 'wandb'} (upload with `wandb sync`)")
    identity = recipe.output_dir / name / WANDB_ID
    if not identity.is_file():
        write_whole(identity, uuid.uuid4().hex[:8])
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=mode,
        tags=settings.tags or None,
        dir=str(recipe.output_dir.resolve()),  # the W&B service has another working directory
        id=identity.read_text(encoding="utf-8").strip(),
        resume="allow",
        group=recipe.run_name,
        job_type=name,
        name=args.run_name,
        config={"recipe": recipe.resolved},
    )
    try:
        yield
    finally:
        run.finish()
