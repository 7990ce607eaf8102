"""
Run by torchrun: FSDP2 and DeepSpeed ZeRO on CPU processes over gloo.

    torchrun --standalone --nproc_per_node 2 tests/sharded.py MODE JOBS.json
    torchrun --standalone --nproc_per_node 2 tests/sharded.py MODE -m dposhift_trl.run recipes/tiny_shift.yaml

Accelerate shards over accelerators only. Here it takes the processes for such, with the CPU as their device; wrapping,
collectives, and checkpoints are the real ones. RMSNorm is one operation, as on a GPU.

MODE is a key of `MODES`, or `launched` if `accelerate launch --config_file` has set the environment. JOBS.json is a
list of trainings with the fields of [`Job`]. They run one after another, since starting the processes takes longer
than a training, and each leaves `result_<rank>.json` in its folder. With `-m` a module runs instead.
"""

import dataclasses
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any


# What `accelerate launch` sets for the launch files in recipes/accelerate
MODES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    },
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


def take_cpus_for_accelerators(mode: str) -> None:
    """Must be called before the first `TrainingArguments`, which need `use_cpu=True`."""
    os.environ.update(MODES.get(mode, {}))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if not deepspeed and os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate import DistributedType, PartialState

    # Accelerate leaves this to itself only with accelerators
    if deepspeed:
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed import init_distributed

        init_distributed("gloo", auto_mpi_discovery=False)
    else:
        from torch.distributed import init_process_group

        init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


@dataclasses.dataclass
class Job:
    """
    A training, and what is evaluated after it.

    Args:
        folder (`str`):
            Output folder.
        model (`str`):
            Folder of the model.
        trainer (`str`, *optional*):
            Qualified name of the trainer. That of its config has `Config` for `Trainer`.
        settings (`dict`, *optional*):
            Settings of the trainer.
        environment (`dict[str, str]`, *optional*):
            Environment variables of this job.
        lora (`dict`, *optional*):
            Settings of `LoraConfig`.
        adapted (`bool`, *optional*, defaults to `False`):
            Whether the model that is passed has the adapter already, so that a frozen copy of it is the reference.
        given (`bool`, *optional*, defaults to `False`):
            Whether the model and a reference are loaded and passed.
        rows, eval_rows, unseen_rows (`int`, *optional*):
            Numbers of rows: to train, to evaluate after training, and those that the trainer gets only then.
        stream (`bool`, *optional*, defaults to `False`):
            Whether the rows to train on are an iterable dataset.
        resume (`str`, *optional*):
            Checkpoint to resume from.
    """

    folder: str
    model: str
    trainer: str = "dposhift_trl.DPOShiftTrainer"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    lora: dict[str, Any] | None = None
    adapted: bool = False
    given: bool = False
    rows: int = 32
    eval_rows: int = 13
    unseen_rows: int = 0
    stream: bool = False
    resume: str | None = None


SETTINGS = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "logging_steps": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2,
    "save_strategy": "no", "max_steps": 4, "seed": 3,
    "adam_epsilon": 1e-4,  # so that gradients that are 0 but for rounding do not become steps
}  # fmt: skip


def train(job: Job) -> dict[str, Any]:
    """What was trained, and what it logged."""
    import torch
    from conftest import make_rows
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from dposhift_trl.scoring.hooks import hooks_of
    from dposhift_trl.scoring.operations import RMS_NORMS

    RMS_NORMS["cpu"] = RMS_NORMS["cuda"]
    os.environ.update(job.environment)
    trainer_class = _named(job.trainer)
    config = {"ChosenSFTTrainer": "trl.SFTConfig"}.get(
        trainer_class.__name__, job.trainer.replace("Trainer", "Config")
    )
    args = _named(config)(output_dir=job.folder, **SETTINGS | job.settings)
    options: dict[str, Any] = {"model": job.model, "args": args}
    adapter = None if job.lora is None else LoraConfig(task_type="CAUSAL_LM", **job.lora)
    if job.given or job.adapted:
        options["model"] = AutoModelForCausalLM.from_pretrained(job.model)
    if job.given:
        options["ref_model"] = AutoModelForCausalLM.from_pretrained(job.model)
    if job.adapted:
        torch.manual_seed(0)
        options["model"] = get_peft_model(options["model"], adapter)
    elif adapter:
        options["peft_config"] = adapter
    rows = make_rows(job.rows)
    options["train_dataset"] = rows.to_iterable_dataset() if job.stream else rows
    if job.eval_rows:
        options["eval_dataset"] = make_rows(job.eval_rows, seed=1)
    trainer = trainer_class(**options)
    shares = getattr(trainer, "shares_prompts", None)
    if shares:  # what the check at the start has used
        hooks_of(trainer.accelerator.unwrap_model(trainer.model)).operations.clear()
    trainer.train(resume_from_checkpoint=job.resume)
    metrics = trainer.evaluate() if job.eval_rows else {}
    if job.unseen_rows:
        metrics |= trainer.evaluate(make_rows(job.unseen_rows, seed=2), metric_key_prefix="unseen")
    trainer.save_model()
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "parameter": type(next(trainer.model.parameters())).__name__,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "shares_prompts": shares,
        "operations": sorted(hooks_of(trainer.accelerator.unwrap_model(trainer.model)).operations) if shares else [],
        "precomputed": getattr(trainer, "precompute_ref_logps", None),
        "reference": getattr(getattr(getattr(trainer, "_references", None), "scorer", None), "fingerprint", None),
        "loaded_with": trainer.args.model_init_kwargs,
        "logs": trainer.state.log_history,
        "metrics": metrics,
    }


def _named(name: str) -> Any:
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)


def main() -> None:
    mode, jobs, *module = sys.argv[1:]
    take_cpus_for_accelerators(mode)
    if jobs == "-m":
        sys.argv = module
        runpy.run_module(module[0], run_name="__main__", alter_sys=True)
        return
    import torch.distributed as dist

    for fields in json.loads(Path(jobs).read_text()):
        job = Job(**fields)
        try:
            result = train(job)
        except Exception:
            result = {"error": traceback.format_exc()}
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        path = Path(job.folder, f"result_{os.environ['RANK']}.json")
        path.write_text(json.dumps(result, indent=1, default=str))
        if "error" in result:
            print(result["error"], file=sys.stderr, flush=True)
            os._exit(1)  # without waiting for the other process, which may be in a collective
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
