"""The W&B run of a stage."""

import contextlib
import io
import uuid
from collections.abc import Iterator
from pathlib import Path

import wandb
from accelerate import PartialState

from ..artifacts import WANDB_ID, write_whole
from ..environment import hidden, wandb_run_settings
from ..recipe import Recipe
from .errors import RunError


@contextlib.contextmanager
def wandb_run(name: str, recipe: Recipe) -> Iterator[str | None]:
    """
    One W&B run for each stage, continued when the stage is, with its local files in the run folder by default.

    Yields:
        `str`, *optional*: Where its metrics go. `None` if the stage does not report to W&B.
    """
    args = recipe.stages[name]
    if "wandb" not in args.report_to or not PartialState().is_main_process:
        yield None
        return
    settings = recipe.wandb
    ours = wandb_run_settings(name, recipe.run_name, recipe.is_named, recipe.output_dir)
    identity = recipe.output_dir / name / WANDB_ID
    if not identity.is_file():
        write_whole(identity, uuid.uuid4().hex[:8])
    Path(ours["dir"]).mkdir(parents=True, exist_ok=True)  # W&B would log to a temporary folder instead
    project = settings.project or "dposhift_trl"
    with hidden("WANDB_MODE", "WANDB_TAGS"):
        mode = settings.mode or ("online" if wandb.login(prompt=False) else "offline")
        # What W&B says of an offline run, the header of the stage says; errors are raised
        offline = contextlib.redirect_stderr(io.StringIO()) if mode == "offline" else contextlib.nullcontext()
        try:
            with offline:
                run = wandb.init(
                    project=project,
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
    if mode == "offline":
        reason = ", no login" if settings.mode is None else ""
        place = f"(offline{reason}), {ours['dir']}/wandb; upload with `wandb sync`"
    else:
        place = str(run.url)
    try:
        yield f"W&B project {project} {place}"
    finally:
        run.finish()


@contextlib.contextmanager
def without_url_warning() -> Iterator[None]:
    """Hide W&B's warning that an offline run has no URL, which TRL asks for whenever it writes a model card."""
    offline = wandb.run is not None and wandb.run.offline
    with contextlib.redirect_stderr(io.StringIO()) if offline else contextlib.nullcontext():
        yield
