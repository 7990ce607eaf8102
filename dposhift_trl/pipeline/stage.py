"""One stage of a run, from its last checkpoint to the saved model."""

import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from peft import AutoPeftModelForCausalLM
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import get_peft_config, get_quantization_config

from .. import __version__
from ..artifacts import FINISHED, MERGED, write_whole
from ..command import Terminated
from ..config import DPOShiftConfig
from ..data.audit import AuditedRows
from ..recipe import Recipe, dump_yaml
from ..report.verdict import verdict_of
from ..training.checks import check_rows_left
from ..training.model_card import append_recipe_section, log_until
from ..training.sft import ChosenSFTTrainer
from ..training.trainer import DPOShiftTrainer
from .checkpoints import last_complete_checkpoint
from .errors import RunError
from .processes import from_main, say
from .signals import SaveOnSignal
from .tracking import wandb_run


PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "datasets")


def run_stage(
    name: str,
    recipe: Recipe,
    start: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: AuditedRows,
    signals: SaveOnSignal,
) -> None:
    """
    Train a stage, from its last complete checkpoint if there is one, and save the model in the folder of the stage.

    Args:
        name (`str`):
            Stage, `sft` or `dpo`.
        recipe ([`~recipe.Recipe`]):
            Checked recipe.
        start (`str`):
            Name or folder of the model to start from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, saved with the model.
        rows ([`~data.audit.AuditedRows`]):
            Rows to train and evaluate on.
        signals ([`SaveOnSignal`]):
            Stops the stage after a signal.

    Raises:
        RunError: If the trainer cannot be created.
        TrainingStopped: If training stops itself.
        Terminated: If a signal stopped it.
    """
    folder = recipe.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, incomplete = from_main(last_complete_checkpoint(folder))
    for path in incomplete:
        say(f"{name}: {path} is incomplete, skipped")
    say(f"{name}: " + (f"resuming from {checkpoint}" if checkpoint else f"starting from {start}"))
    began = time.monotonic()
    trainer = _make_trainer(name, recipe, start, tokenizer, rows)
    trainer.add_callback(signals)
    if isinstance(trainer, DPOShiftTrainer):
        say(
            f"{name}: "
            + ("reading shared tokens once" if trainer.shares_prompts else "reading both rows of each pair")
            + (", reference scores precomputed" if trainer.precompute_ref_logps else ", reference scored at each step")
        )
    with wandb_run(name, recipe):
        _train(trainer, checkpoint, signals)
        _save(trainer, recipe, name)
    if PartialState().is_main_process:
        if is_peft_model(trainer.model):
            _finish_adapter(trainer, folder, recipe.model.merge_adapter)
        write_whole(folder / FINISHED, json.dumps(_summary(trainer, time.monotonic() - began), indent=2))
    PartialState().wait_for_everyone()
    trainer.accelerator.free_memory()


def _train(trainer: ChosenSFTTrainer | DPOShiftTrainer, checkpoint: Path | None, signals: SaveOnSignal) -> None:
    """Train from a checkpoint, or if it is the last one only load what training would have ended with."""
    args = trainer.args
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
    if checkpoint and state and 0 < state.max_steps <= state.global_step:
        # `train` would take one more step if `max_steps` ends within an epoch
        final = checkpoint
        if args.load_best_model_at_end and state.best_model_checkpoint:
            final = Path(args.output_dir, Path(state.best_model_checkpoint).name)
        if not final.is_dir():
            raise RunError(
                f"`load_best_model_at_end` requires the best checkpoint, got no folder {final}. Restore it, or pass "
                "`load_best_model_at_end=false` for this stage and --accept-changes to save the last weights."
            )
        trainer._load_from_checkpoint(str(final))
        trainer.state = state
        return
    args.eval_on_start = args.eval_on_start and not checkpoint  # it has been logged already
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Terminated:
        if signals.has_begun:
            trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)  # closes the progress bar
        raise


def _save(trainer: ChosenSFTTrainer | DPOShiftTrainer, recipe: Recipe, name: str) -> None:
    args = trainer.args
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card(model_name=f"{recipe.run_name}-{name}", dataset_name=_hub_name(recipe))
    if PartialState().is_main_process:
        append_recipe_section(recipe.output_dir / name, dump_yaml(recipe.resolved))
    if isinstance(args, DPOShiftConfig):
        best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
        verdict = verdict_of(log_until(trainer.state.log_history, best), args.lambda_plan)
        if verdict:
            say(verdict)


def _make_trainer(
    name: str, recipe: Recipe, start: str, tokenizer: PreTrainedTokenizerBase, rows: AuditedRows
) -> ChosenSFTTrainer | DPOShiftTrainer:
    args, model = recipe.stages[name], recipe.model
    init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    quantization = get_quantization_config(model)
    options: dict[str, Any] = {
        "args": args,
        "train_dataset": rows.train,
        "eval_dataset": rows.evaluation if args.eval_strategy != "no" or args.eval_on_start else None,
        "processing_class": tokenizer,
    }
    try:
        if (Path(start) / "adapter_config.json").is_file():
            # Stage 2 trains the adapter of stage 1 further; a frozen copy of it is the reference
            options["model"] = AutoPeftModelForCausalLM.from_pretrained(
                start,
                is_trainable=True,
                trust_remote_code=model.trust_remote_code,
                quantization_config=quantization,
                **init_kwargs,
            )
        else:
            options |= {"model": start, "peft_config": get_peft_config(model), "quantization_config": quantization}
            args.model_init_kwargs = init_kwargs
        trainer = (ChosenSFTTrainer if name == "sft" else DPOShiftTrainer)(**options)
        for split, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
            if dataset is not None:
                check_rows_left(dataset, split, args.max_length)
        return trainer
    except (OSError, ValueError, ImportError) as error:
        raise RunError(f"Stage `{name}` cannot start: {' '.join(str(error).split())}") from error


def _finish_adapter(trainer: ChosenSFTTrainer | DPOShiftTrainer, folder: Path, merge: bool) -> None:
    # The frozen reference adapter is only needed for training; checkpoints keep it
    shutil.rmtree(folder / "ref", ignore_errors=True)
    if merge:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(folder / MERGED)
        trainer.processing_class.save_pretrained(folder / MERGED)


def _summary(trainer: ChosenSFTTrainer | DPOShiftTrainer, seconds: float) -> dict[str, Any]:
    """What `finished.json` records, with the last value of each logged metric."""
    args, metrics = trainer.args, {}
    for entry in trainer.state.log_history:
        metrics.update(entry)
    return {
        "step": trainer.state.global_step,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "metrics": metrics,
        "seconds": round(seconds, 1),
        "processes": args.world_size,
        "device": f"{args.device} ({_hardware(args.device)})",
        # `__version__`, since a clone that is not installed has no metadata
        "versions": {"dposhift_trl": __version__, **{package: version(package) for package in PACKAGES}},
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _hub_name(recipe: Recipe) -> str | None:
    path = recipe.data.path
    return path if path and path != "demo" and not Path(path).exists() else None
