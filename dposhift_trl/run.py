"""`python -m dposhift_trl.run RECIPE [key=value ...]`: recipe -> stages -> artifacts."""

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import wandb
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from filelock import FileLock, Timeout
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, get_peft_config, get_quantization_config

from . import __version__
from .artifacts import AUDIT, EVAL_ROWS, FINISHED, LOCK, MERGED, RECIPE, REPORT, WANDB_ID, write_whole
from .columns import PREFERENCE_COLUMNS, ROW_INDEX, SAVED_ROW_INDEX, with_row_index
from .config import DPOShiftConfig
from .data.audit import SplitAudit, audit_preferences
from .data.demo import save_demo_model
from .data.sources import DataError, Rows, load_preferences, reading_rows, use_plain_chat_template
from .recipe import Recipe, RecipeError, changed_keys, dump_yaml, load_recipe, parse_yaml
from .report.run_folder import ReportError
from .report.verdict import verdict_of
from .schedules import ADAPTIVE, make_lambda_schedule
from .training.model_card import append_recipe_section, log_until
from .training.sft import ChosenSFTTrainer
from .training.trainer import DPOShiftTrainer, TrainingStopped, check_rows_left


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
# safetensors and torch.save give no errno
DISK_WORDS = (
    "I/O error",
    "No space left",
    "File too large",
    "PytorchStreamWriter failed",
    "iostream error",
    "unexpected pos",
)
PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "datasets")


class RunError(RuntimeError):
    """A run that cannot start or go on; the message is for the user."""


class WriteError(RuntimeError):
    """The disk took no more; the message is for the user."""


class Terminated(BaseException):
    """SIGTERM came, and what there was to save is saved; as an `Exception` it would stop at whoever handles those."""


class SaveOnSigterm(TrainerCallback):
    """At SIGTERM, finish the optimizer step, save a checkpoint and stop; every process, if it came to one."""

    def __init__(self):
        self.received = False
        self.in_training = False
        self.stopped_at = None
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, signum, frame):
        if not self.in_training:
            raise Terminated("ended by SIGTERM outside of training; the same command goes on from what is saved")
        self.received = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_training = True

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(int(self.received), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        if received.item() and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.in_training = False


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a recipe.

    Returns:
        `int`: Exit code: 0 done, 1 stopped during training, 2 a mistake in what was asked for, 143 ended by SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.run", description="Fine-tune on the chosen answers, then train by DPO-Shift."
    )
    parser.add_argument("recipe", help="YAML recipe, for example recipes/tiny_shift.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dpo.lambda_min=0.5 seed=7")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe, steps and lambda, and stop")
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on in a run folder that another recipe has begun"
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack letters that a recipe has
    options = parser.parse_intermixed_args(argv)
    # TRL 1.16 reads a deprecated name of transformers 5.23 at every forward; nothing a user can do
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.dry_run:
            describe(recipe)
        else:
            run(recipe, accept_changes=options.accept_changes)
    except (RecipeError, DataError, RunError, ReportError) as error:
        _complain(error)
        return 2
    except (TrainingStopped, WriteError) as error:
        _complain(error)
        return 1
    except Terminated as error:
        _complain(error)
        return 128 + signal.SIGTERM
    return 0


def _complain(error: BaseException) -> None:
    if PartialState().is_main_process:
        print(error, file=sys.stderr)


def _say(message: str) -> None:
    if PartialState().is_main_process:
        print(message, flush=True)


def describe(recipe: Recipe) -> None:
    """Print the resolved recipe, the optimizer steps of each stage, and lambda at the start, middle and end."""
    _say(dump_yaml(recipe.resolved))
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = _load_tokenizer(recipe, _base_model(recipe, Path(folder)))
            train, _, audits = _load_data(recipe, tokenizer)
        for split, audit in audits.items():
            _say(f"{split}: {audit}")
        rows = None if recipe.data.streaming else len(train)
    except (DataError, RunError) as error:
        rows = None
        _say(f"rows unknown: {error}")
    for name, args in recipe.stages.items():
        steps = _optimizer_steps(args, rows)
        _say(f"{name}: {steps if steps is not None else 'unknown number of'} optimizer steps")
        if isinstance(args, DPOShiftConfig) and args.lambda_schedule == ADAPTIVE:
            _say("lambda: {:.4g} to {:.4g}, found in training".format(*args.lambda_range))
        elif isinstance(args, DPOShiftConfig):
            schedule = make_lambda_schedule(args)
            _say(
                "lambda: {:.4g} at the start, {:.4g} in the middle, {:.4g} at the end".format(
                    *map(schedule, (0, 0.5, 1))
                )
            )


def _optimizer_steps(args: SFTConfig | DPOShiftConfig, rows: int | None) -> int | None:
    if args.max_steps > 0:
        return args.max_steps
    if rows is None:
        return None
    batches = math.ceil(rows / (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def run(recipe: Recipe, accept_changes: bool = False) -> None:
    """
    Run the stages of a recipe, each unless it is finished, from its last complete checkpoint if it was interrupted.

    Args:
        recipe ([`~recipe.Recipe`]):
            Checked recipe.
        accept_changes (`bool`, *optional*, defaults to `False`):
            Whether to go on in a folder that another recipe has begun.

    Raises:
        RunError: If the folder holds another recipe's run or is in use, or a model cannot be loaded.
        DataError: If the data cannot be read or trained on.
        TrainingStopped: If training stops itself.
    """
    with _claimed(recipe, accept_changes):
        sigterm = SaveOnSigterm()
        set_seed(recipe.seed)
        base = _base_model(recipe, recipe.output_dir / "base")
        tokenizer = _load_tokenizer(recipe, base)
        train, evaluation, audits = _load_data(recipe, tokenizer)
        if PartialState().is_main_process:
            findings = {split: dataclasses.asdict(audit) for split, audit in audits.items()}
            write_whole(recipe.output_dir / AUDIT, json.dumps(findings, indent=2, ensure_ascii=False))
            if not (recipe.output_dir / "dpo" / FINISHED).is_file():
                _save_evaluated_rows(evaluation, recipe.output_dir / EVAL_ROWS)
        for split, audit in audits.items():
            _say(f"{split}: {audit}")
        start = base
        for name in recipe.stages:
            folder = recipe.output_dir / name
            if _from_main((folder / FINISHED).is_file()):
                _say(f"{name}: finished before, skipped ({folder})")
            else:
                with _explained(name, folder), reading_rows():
                    _run_stage(name, recipe, start, tokenizer, train, evaluation, sigterm)
            start = str(folder)
        if recipe.report and PartialState().is_main_process:
            from .report.page import write_report  # draws, and takes seconds to import

            _say(f"The report is {write_report([recipe.output_dir], recipe.output_dir / REPORT)}")
        _say(f"The model is in {start}")


@contextlib.contextmanager
def _claimed(recipe: Recipe, accept_changes: bool):
    """The run folder, made or found fit to go on in, for this command alone."""
    state, folder = PartialState(), recipe.output_dir
    if state.is_main_process:
        problem = None
        lock = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK, blocking=False)
            lock.acquire()
            problem = _refusal(recipe, accept_changes)
        except Timeout:
            problem = f"{folder}: another command is running in this folder."
        except (OSError, ValueError) as error:
            problem = f"`output_dir` {folder} cannot be written: {error}"
    else:
        problem, lock = None, None
    problem = _from_main(problem)
    if problem is not None:
        raise RunError(problem)
    try:
        _check_shared(folder)
        yield
    finally:
        if lock is not None:
            lock.release()


def _refusal(recipe: Recipe, accept_changes: bool) -> str | None:
    """Why the run folder is not fit for this recipe, or None once the recipe lies in it."""
    folder, saved = recipe.output_dir, recipe.output_dir / RECIPE
    if not saved.is_file():
        others = [entry.name for entry in folder.iterdir() if entry.name != LOCK]
        if others:
            return f"`output_dir` {folder} holds other files ({others[0]}) and no run of ours. Choose a new folder."
    else:
        earlier = parse_yaml(saved.read_text(encoding="utf-8"))
        ignored = {"output_dir": None}
        changes = changed_keys({**earlier, **ignored}, {**recipe.resolved, **ignored})
        if not changes:
            return None
        trained = [*folder.glob(f"*/{FINISHED}"), *folder.glob("*/checkpoint-*")]
        if trained and not accept_changes:
            return (
                f"{folder} holds a run of another recipe; they differ in {', '.join(changes)}. Choose a new "
                "`output_dir`, or pass --accept-changes to go on here: finished stages stay as they are."
            )
        number = 1 + len(list(folder.glob("recipe.*.yaml")))
        shutil.copy(saved, folder / f"recipe.{number}.yaml")
    write_whole(saved, dump_yaml(recipe.resolved))
    return None


def _check_shared(folder: Path) -> None:
    """Every machine must see the same run folder: what the main process saves there, each process loads."""
    if PartialState().num_processes == 1:
        return
    token, note = _from_main(uuid.uuid4().hex), folder / LOCK
    if PartialState().is_main_process:
        note.write_text(token)
    PartialState().wait_for_everyone()
    deadline = time.monotonic() + 10  # a network's disk may show a new file late
    while not (seen := note.is_file() and note.read_text() == token) and time.monotonic() < deadline:
        time.sleep(0.5)
    everyone = [None] * PartialState().num_processes
    torch.distributed.all_gather_object(everyone, seen)
    if not all(everyone):
        raise RunError(
            f"`output_dir` {folder} is not the same folder on every machine. Choose one on a disk that they share."
        )


def _from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if PartialState().num_processes > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        value = box[0]
    return value


def _base_model(recipe: Recipe, demo_folder: Path) -> str:
    if recipe.model.model_name_or_path != "demo":
        return str(recipe.model.model_name_or_path)
    if PartialState().is_main_process and not (demo_folder / "config.json").is_file():
        unfinished = demo_folder.with_name(demo_folder.name + ".tmp")
        save_demo_model(str(unfinished))
        unfinished.replace(demo_folder)
    PartialState().wait_for_everyone()
    # Absolute, since an adapter remembers where its base lies
    return str(demo_folder.resolve())


def _load_tokenizer(recipe: Recipe, base: str) -> PreTrainedTokenizerBase:
    model = recipe.model
    folder = Path(base)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise RunError(
            "`model.model_name_or_path` must be a Hub name or a folder with a `config.json`, got the folder "
            f"{base!r}, which has none. Write the folder that the model was saved in."
        )
    try:
        return AutoTokenizer.from_pretrained(
            base, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"`model.model_name_or_path` {base!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from None


def _load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, Rows | None, dict[str, SplitAudit]]:
    train, evaluation = load_preferences(recipe.data, recipe.seed)
    use_plain_chat_template(train, tokenizer)
    return audit_preferences(train, evaluation, recipe.data, tokenizer, recipe.max_length)


@contextlib.contextmanager
def _explained(name: str, folder: Path):
    """A disk that takes no more, in one line; each library has its own way of saying so."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in DISK_ERRORS
        full |= not isinstance(error, OSError) and any(words in str(error) for words in DISK_WORDS)
        if not full:
            raise
        kept = last_complete_checkpoint(folder)[0]
        raise WriteError(
            f"{name}: cannot write under {folder}: {' '.join(str(error).split())}. "
            + (f"Checkpoint {kept} is whole" if kept else "Nothing was saved yet")
            + "; make room and run the same command again."
        ) from error


def _run_stage(
    name: str,
    recipe: Recipe,
    start: str,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    evaluation: Rows | None,
    sigterm: SaveOnSigterm,
) -> None:
    args, folder = recipe.stages[name], recipe.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, partial = _from_main(last_complete_checkpoint(folder))
    for path in partial:
        _say(f"{name}: {path} is incomplete, passed over")
    _say(f"{name}: " + (f"going on from {checkpoint}" if checkpoint else f"starting from {start}"))
    began = time.monotonic()
    trainer = _make_trainer(name, recipe, start, tokenizer, train, evaluation)
    trainer.add_callback(sigterm)
    if isinstance(trainer, DPOShiftTrainer):
        _say(
            f"{name}: "
            + ("reading shared tokens once" if trainer.shares_prompts else "reading both rows of each pair")
            + (", the reference scored beforehand" if trainer.precompute_ref_logps else ", the reference at each step")
        )
    with _wandb_run(name, recipe):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
        if checkpoint and state and 0 < state.max_steps <= state.global_step:
            # Only saving was left to do; `train` would take one step more where `max_steps` ends inside an epoch
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
        else:
            args.eval_on_start = args.eval_on_start and not checkpoint  # it stands in the log already
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if sigterm.stopped_at is not None:
            raise Terminated(
                f"{name}: SIGTERM, saved at step {sigterm.stopped_at}; the same command goes on from there"
            )
        trainer.save_state()
        trainer.save_model()
        trainer.create_model_card(model_name=f"{recipe.run_name}-{name}", dataset_name=_hub_name(recipe))
        if PartialState().is_main_process:
            append_recipe_section(folder, dump_yaml(recipe.resolved))
        if isinstance(args, DPOShiftConfig) and (
            paragraph := verdict_of(
                log_until(
                    trainer.state.log_history,
                    trainer.state.best_model_checkpoint if args.load_best_model_at_end else None,
                ),
                args.lambda_plan,
            )
        ):
            _say(paragraph)
    if PartialState().is_main_process:
        if is_peft_model(trainer.model):
            _finish_adapter(trainer, folder, recipe.model.merge_adapter)
        metrics: dict[str, Any] = {}
        for entry in trainer.state.log_history:
            metrics.update(entry)
        finished = {
            "step": trainer.state.global_step,
            "best_checkpoint": trainer.state.best_model_checkpoint,
            "metrics": metrics,
            "seconds": round(time.monotonic() - began, 1),
            "processes": args.world_size,
            "device": f"{args.device} ({_hardware(args.device)})",
            # Our own without metadata, which a clone that is not installed lacks
            "versions": {"dposhift_trl": __version__, **{package: version(package) for package in PACKAGES}},
        }
        write_whole(folder / FINISHED, json.dumps(finished, indent=2))
    PartialState().wait_for_everyone()
    trainer.accelerator.free_memory()


def _make_trainer(
    name: str, recipe: Recipe, start: str, tokenizer: PreTrainedTokenizerBase, train: Rows, evaluation: Rows | None
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
        "train_dataset": train,
        "eval_dataset": evaluation if args.eval_strategy != "no" or args.eval_on_start else None,
        "processing_class": tokenizer,
    }
    try:
        if (Path(start) / "adapter_config.json").is_file():
            # The adapter of stage 1 goes on; its frozen copy is the reference
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
        for split, rows in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
            if rows is not None:
                check_rows_left(rows, split, args.max_length)
        return trainer
    except (OSError, ValueError, ImportError) as error:
        raise RunError(f"stage `{name}` cannot start: {' '.join(str(error).split())}") from error


def _finish_adapter(trainer: ChosenSFTTrainer | DPOShiftTrainer, folder: Path, merge: bool) -> None:
    # The frozen reference adapter belongs to training; checkpoints keep it
    shutil.rmtree(folder / "ref", ignore_errors=True)
    if merge:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(folder / MERGED)
        trainer.processing_class.save_pretrained(folder / MERGED)


def last_complete_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """
    The newest checkpoint that was written to its end, and the newer ones that were not.

    The trainer's state is the last file of a checkpoint, so that one that parses closes it.
    """
    checkpoints = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    partial: list[Path] = []
    for step in sorted(checkpoints, reverse=True):
        try:
            state = json.loads((checkpoints[step] / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if state["global_step"] == step:
                return checkpoints[step], partial
        except (OSError, ValueError, KeyError, TypeError):
            pass
        partial.append(checkpoints[step])
    return None, partial


@contextlib.contextmanager
def _wandb_run(name: str, recipe: Recipe):
    """One W&B run a stage, its files under the run folder, gone on with when the stage is."""
    args = recipe.stages[name]
    if "wandb" not in args.report_to or not PartialState().is_main_process:
        yield
        return
    settings = recipe.wandb
    mode = settings.mode
    if mode is None:
        mode = "online" if wandb.login(prompt=False) else "offline"
        if mode == "offline":
            _say(
                f"{name}: no W&B login, logging offline under {recipe.output_dir / 'wandb'} (`wandb sync` uploads it)"
            )
    identity = recipe.output_dir / name / WANDB_ID
    if not identity.is_file():
        write_whole(identity, uuid.uuid4().hex[:8])
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=mode,
        tags=settings.tags or None,
        dir=str(recipe.output_dir.resolve()),  # its service has a working directory of its own
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


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _hub_name(recipe: Recipe) -> str | None:
    path = recipe.data.path
    return path if path and path != "demo" and not Path(path).exists() else None


def _save_evaluated_rows(rows: Rows | None, path: Path) -> None:
    """The evaluated rows as text, with the `row_index` by which an evaluation's scores name them."""
    if isinstance(rows, Dataset):
        rows = with_row_index(rows)
        names = [name for name in (*PREFERENCE_COLUMNS, ROW_INDEX) if name in rows.column_names]
        texts = rows.select_columns(names).rename_column(ROW_INDEX, SAVED_ROW_INDEX)
        write_whole(path, texts.with_format("arrow")[:])


if __name__ == "__main__":
    sys.exit(main())
