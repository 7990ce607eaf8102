"""The W&B run of a stage."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import wandb
from accelerate import PartialState

from ..artifacts import WANDB_ID, write_whole
from ..environment import hidden, wandb_run_settings
from ..recipe import Recipe
from .errors import RunError
from .processes import say


@contextlib.contextmanager
def wandb_run(name: str, recipe: Recipe) -> Iterator[None]:
    """One W&B run for each stage, continued when the stage is, with its local files in the run folder by default."""
    args = recipe.stages[name]
    if "wandb" not in args.report_to or not PartialState().is_main_process:
        yield
        return
    settings = recipe.wandb
    ours = wandb_run_settings(name, recipe.run_name, recipe.is_named, recipe.output_dir)
    identity = recipe.output_dir / name / WANDB_ID
    if not identity.is_file():
        write_whole(identity, uuid.uuid4().hex[:8])
    Path(ours["dir"]).mkdir(parents=True, exist_ok=True)  # W&B would log to a temporary folder instead
    with hidden("WANDB_MODE", "WANDB_TAGS"):
        mode = settings.mode
        if mode is None:
            mode = "online" if wandb.login(prompt=False) else "offline"
            if mode == "offline":
                say(f"{name}: no W&B login, logging offline to {ours['dir']}/wandb (upload with `wandb sync`)")
        try:
            run = wandb.init(
                project=settings.project or "dposhift_trl",
                entity=settings.entity,
                mode=mode,
                tags=settings.tags or None,
                id=identity.read_text(encoding="utf-8").strip(),
                resume="allow",
                config={"recipe": recipe.resolved},
                **ours,
            )
        except wandb.Error as error:
            raise RunError(
                f"{name}: W&B cannot start: {' '.join(str(error).split()).rstrip('.')}. Run `wandb login`, or set "
                "`wandb.mode: offline`."
            ) from error
    try:
        yield
    finally:
        run.finish()
