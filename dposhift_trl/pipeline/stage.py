"""One stage of a run, from its last checkpoint to the saved model."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import is_peft_model
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # httpx's or httpx2's, which it is built on
from peft import AutoPeftModelForCausalLM
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import get_peft_config, get_quantization_config

from .. import __version__
from ..artifacts import FINISHED, MERGED, STATE, set_earlier_aside, write_whole
from ..command import Terminated
from ..config import DPOShiftConfig
from ..data.audit import AuditedRows
from ..integrity import model_files, weights_fault
from ..recipe import Recipe
from ..report.verdict import Verdict, verdict_of
from ..training.checks import check_rows_left
from ..training.model_card import log_until
from .checkpoints import explaining_load_errors
from .errors import RunError, WriteError
from .header import hardware
from .notes import PackageLogs
from .output import printing
from .processes import say
from .signals import SaveOnSignal
from .tracking import wandb_run
from .trainers import RunDPOShiftTrainer, RunSFTTrainer


PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "datasets")


def run_stage(
    name: str,
    recipe: Recipe,
    start: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: AuditedRows,
    signals: SaveOnSignal,
    checkpoint: Path | None,
) -> Verdict | None:
    """
    Train a stage, from a checkpoint if there is one, and save the model in the folder of the stage.

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
        checkpoint (`Path` or `None`):
            Checkpoint to resume from, from [`~pipeline.resume.resume_point`].

    Returns:
        [`~report.verdict.Verdict`] or `None`: The verdict on the stage `dpo`, if it was evaluated, to be printed.

    Raises:
        RunError: If the trainer cannot be created, or the checkpoint cannot be loaded.
        TrainingStopped: If training stops itself.
        Terminated: If a signal stopped it.
        WriteError: If the model cannot be pushed to the Hub.
    """
    folder = recipe.output_dir / name
    say(f"{name}: " + (f"resuming from {checkpoint}" if checkpoint else f"starting from {start}"))
    if checkpoint is None and PartialState().is_main_process and (place := set_earlier_aside(folder)):
        say(f"{name}: the log and the scores of an earlier training are now in {place}")
    began, launched_as = time.monotonic(), PartialState().distributed_type
    if (deepspeed := recipe.stages[name].deepspeed_plugin) is not None:
        deepspeed.set_deepspeed_weakref()  # which loading a model reads; the settings of the last stage were set last
    with PackageLogs() as logs:
        trainer = _make_trainer(name, recipe, start, tokenizer, rows)
        trainer.add_callback(signals)
        with wandb_run(name, recipe) as tracker, printing(trainer, recipe, rows, logs, tracker):
            with explaining_load_errors(name, checkpoint):
                _train(trainer, checkpoint, signals)
            verdict = _save(trainer, recipe, name)
    if PartialState().is_main_process:
        if recipe.model.merge_adapter and is_peft_model(trainer.model):
            _merge_adapter(recipe, trainer.processing_class, folder)
        write_whole(folder / FINISHED, json.dumps(_summary(trainer, time.monotonic() - began), indent=2))
    PartialState().wait_for_everyone()
    trainer.accelerator.free_memory()
    # As transformers does between two arguments: what the stage set, such as its precision or DeepSpeed plugin, would
    # otherwise hold for the next one. The processes stay connected
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState().distributed_type = launched_as  # which FSDP has renamed
    return verdict


def _train(trainer: RunSFTTrainer | RunDPOShiftTrainer, checkpoint: Path | None, signals: SaveOnSignal) -> None:
    """Train from a checkpoint, or if it is the last one only load what training would have ended with."""
    args = trainer.args
    state = TrainerState.load_from_json(str(checkpoint / STATE)) if checkpoint else None
    best = checkpoint
    if state and args.load_best_model_at_end and state.best_model_checkpoint:
        # The run folder may have been moved
        best = Path(args.output_dir, Path(state.best_model_checkpoint).name)
        if (fault := weights_fault(best)) is not None:
            got = f"{best}, in which {fault}" if best.is_dir() else f"no folder {best}"
            raise RunError(
                f"`load_best_model_at_end` requires the best checkpoint, got {got}. Restore it, or pass "
                "`load_best_model_at_end=false` for this stage and --accept-changes to save the last weights."
            )
        state.best_model_checkpoint = str(best)
    if state and 0 < state.max_steps <= state.global_step:
        # `train` would take one more step if `max_steps` ends within an epoch
        trainer._load_from_checkpoint(str(best))
        trainer.state = state
        return
    args.eval_on_start = args.eval_on_start and not checkpoint  # it has been logged already
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Terminated:
        if signals.has_begun:
            trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)  # closes the progress bar
        raise


def _save(trainer: RunSFTTrainer | RunDPOShiftTrainer, recipe: Recipe, name: str) -> Verdict | None:
    args = trainer.args
    trainer.save_state()
    try:
        trainer.save_model()  # and pushes it with its card, if that was asked for
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise WriteError(
            f"{name}: the model is saved in {args.output_dir}, but not pushed to the Hub: "
            f"{' '.join(str(error).split()).rstrip('.')}. Run the same command again to push it."
        ) from error
    if not args.push_to_hub:
        trainer.create_model_card()
    if isinstance(args, DPOShiftConfig) and args.print_verdict:
        best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
        return verdict_of(log_until(trainer.state.log_history, best), args.lambda_plan)
    return None


def _make_trainer(
    name: str, recipe: Recipe, start: str, tokenizer: PreTrainedTokenizerBase, rows: AuditedRows
) -> RunSFTTrainer | RunDPOShiftTrainer:
    args, model = recipe.stages[name], recipe.model
    init_kwargs = _loading(recipe)
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
        trainer = (RunSFTTrainer if name == "sft" else RunDPOShiftTrainer)(**options)
        trainer.recipe, trainer.stage = recipe, name
        for split, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
            if dataset is not None:
                check_rows_left(dataset, split, args.max_length)
        return trainer
    except UnpicklingError as error:
        raise RunError(
            f"`model.model_name_or_path` must hold weights alone, got pickles with code in {start}, which is not run. "
            "Use a model that is saved as safetensors."
        ) from error
    except (OSError, ValueError, ImportError, HTTPError) as error:
        raise RunError(f"Stage `{name}` cannot start: {' '.join(str(error).split())}") from error


def _merge_adapter(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """
    Save the model of a folder with its adapter merged.

    The main process merges what was saved, since weights in memory may be divided among processes.
    """
    unset_hf_deepspeed_config()  # with ZeRO-3, which would divide the weights of any model that is loaded
    model = AutoPeftModelForCausalLM.from_pretrained(
        folder, trust_remote_code=recipe.model.trust_remote_code, **_loading(recipe)
    )
    model.merge_and_unload().save_pretrained(folder / MERGED)
    tokenizer.save_pretrained(folder / MERGED)


def _loading(recipe: Recipe) -> dict[str, Any]:
    """What a base model is loaded with."""
    model = recipe.model
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }


def _summary(trainer: RunSFTTrainer | RunDPOShiftTrainer, seconds: float) -> dict[str, Any]:
    """What `finished.json` records, with the last value of each logged metric."""
    args, metrics = trainer.args, {}
    for entry in trainer.state.log_history:
        metrics.update(entry)
    return {
        "step": trainer.state.global_step,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "files": model_files(Path(args.output_dir)),
        "metrics": metrics,
        "seconds": round(seconds, 1),
        "processes": args.world_size,
        "device": f"{args.device} ({hardware(args.device)})",
        # `__version__`, since a clone that is not installed has no metadata
        "versions": {"dposhift_trl": __version__, **{package: version(package) for package in PACKAGES}},
    }
