"""The sections of a recipe: their keys, their types, and their defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl import ModelConfig, SFTConfig

from ..config import DPOShiftConfig
from ..data.config import DataConfig
from ..data.tokens import Truncation


# Defaults of the command that differ from TRL's: checkpoints, a limit on their number, and W&B
STAGE_DEFAULTS: dict[str, Any] = {"save_steps": 0.1, "save_total_limit": 2, "report_to": "wandb"}
# Those where there are evaluation rows. The checkpoint with the best value is kept in addition to the newest ones
EVAL_DEFAULTS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 0.1, "eval_on_start": True}
BEST_METRIC = {"sft": "loss", "dpo": "dpo_loss"}

# Fields that accept more than they are annotated with, since `TrlParser` must understand the annotation
WIDER_TYPES: dict[str, Any] = {
    "lambda_schedule": str | list[list[float]],
    "shared_prompt": str | bool,
    "precompute_ref_log_probs": str | bool,
}

# Stage fields that are set in another part of the recipe
DECIDED_ELSEWHERE = {
    "output_dir": "set it at the top level; each stage writes to a subfolder",
    "seed": "set it at the top level; it applies to both stages",
    "run_name": "set it at the top level; each stage appends its name",
    "model_init_kwargs": "use the section `model`",
    "trust_remote_code": "use `model.trust_remote_code`",
    "resume_from_checkpoint": "remove it; running the same command again resumes automatically",
    "hub_token": "run `hf auth login` or set the environment variable HF_TOKEN; a recipe is copied to the model card",
    "enable_jit_checkpoint": "remove it; the command saves a checkpoint at SIGTERM itself",
}
# Names from older releases of TRL and transformers, and from other trainers
OTHER_NAMES = {
    "warmup_ratio": "Write the ratio as `warmup_steps`, for example `warmup_steps: 0.1`.",
    "max_prompt_length": "Use `max_length`, which limits prompt and answer together.",
    "max_completion_length": "Use `max_length`, which limits prompt and answer together.",
    "max_seq_length": "Use `max_length`.",
    "evaluation_strategy": "Use `eval_strategy`.",
    "torch_dtype": "Use `dtype`.",
    "model_name": "Use `model_name_or_path`.",
    "lr": "Use `learning_rate`.",
    "batch_size": "Use `per_device_train_batch_size` and `per_device_eval_batch_size`.",
    "micro_batch_size": "Use `per_device_train_batch_size`.",
    "epochs": "Use `num_train_epochs`.",
    "num_epochs": "Use `num_train_epochs`.",
    "cutoff_len": "Use `max_length`.",
    "grad_clip": "Use `max_grad_norm`.",
    "pref_beta": "Use `beta`.",
    "lambda": "Use `shift_lambda` for a fixed value, or `lambda_schedule`.",
}


@dataclass
class TopLevel:
    """
    The top level of a recipe, beside its sections.

    Parameters:
        output_dir (`str`):
            Run folder, in which each stage has a folder.
        seed (`int`, *optional*, defaults to `42`):
            Seed of both stages, and of the choice of rows unless `data.seed` is set.
        run_name (`str`, *optional*):
            Name of the run in trackers, by default that of `output_dir`. Each stage appends its own.
        report (`bool`, *optional*, defaults to `True`):
            Whether to write the report, an HTML page, at the end of the run.
        logging_format (`str`, *optional*, defaults to `"lines"`):
            How logs are printed: `lines`, one short line each, or `dict`, with every metric as transformers does.
        sample_prompts (`int`, *optional*, defaults to `8`):
            Number of evaluation prompts that policy and reference answer at each evaluation of the stage `dpo`. `0`
            for none.
    """

    output_dir: str
    seed: int = 42
    run_name: str | None = None
    report: bool = True
    logging_format: Literal["lines", "dict"] = "lines"
    sample_prompts: int = 8


@dataclass
class RecipeModelConfig(ModelConfig):
    """
    The `model` section of a recipe: [`~trl.ModelConfig`] and two more fields.

    Parameters:
        model_name_or_path (`str`):
            Hub name or local folder of the model that the first stage starts from. `demo` is the built-in model.
        lora_target_modules (`str` or `list[str]`, *optional*):
            List of module names, `all-linear` or a regular expression, as in [`~peft.LoraConfig`].
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run Python code that comes with the model or tokenizer.
        merge_adapter (`bool`, *optional*, defaults to `False`):
            Whether each stage also saves the LoRA adapter merged into the base model, in the folder `merged`.
    """

    model_name_or_path: str | None = None
    lora_target_modules: str | list[str] | None = None
    trust_remote_code: bool = False
    merge_adapter: bool = False

    def __post_init__(self) -> None:
        targets = self.lora_target_modules
        super().__post_init__()
        self.lora_target_modules = (
            targets  # TRL turns a list of one into a string, which PEFT reads as a regular expression
        )
        if not self.model_name_or_path:
            raise ValueError("`model_name_or_path` must be set. Write a Hub name, a local folder, or `demo`.")
        for name in ("merge_adapter", "load_in_8bit", "load_in_4bit"):
            if getattr(self, name) and not self.use_peft:
                raise ValueError(f"`{name}` requires LoRA, got True with `use_peft: false`. Set `use_peft: true`.")


@dataclass
class WandbConfig:
    """
    The `wandb` section of a recipe.

    Parameters:
        project (`str`, *optional*):
            W&B project, by default `WANDB_PROJECT`, else `dposhift_trl`.
        entity (`str`, *optional*):
            W&B user or team, by default `WANDB_ENTITY`.
        mode (`str`, *optional*):
            Whether the runs are uploaded: `online`, `offline` or `disabled`, by default `WANDB_MODE`, else online if
            logged in to W&B, else offline.
        tags (`list[str]`, *optional*):
            Tags for the runs of both stages, by default `WANDB_TAGS`.
    """

    project: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.project is not None and (len(self.project) > 128 or set(self.project) & set("/\\#?%:")):
            raise ValueError(
                f"`project` must be at most 128 characters without / \\ # ? % :, got {self.project!r}. Write for "
                "example `dposhift_trl`."
            )
        modes = ("online", "offline", "shared", "disabled")
        if self.mode not in (*modes, None):
            raise ValueError(
                f"`mode` must be one of {', '.join(modes)}, got {self.mode!r}. Write for example `offline`."
            )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise ValueError(f"Each of `tags` must have 1 to 64 characters, got {tag!r}. Change or remove it.")


@dataclass
class Recipe:
    """
    A checked recipe.

    Args:
        source (`str`):
            Path of the YAML file.
        output_dir (`Path`), seed (`int`), run_name (`str`), report (`bool`), logging_format (`str`), \
        sample_prompts (`int`):
            Values of its top level.
        model ([`RecipeModelConfig`]), data ([`~data.DataConfig`]), wandb ([`WandbConfig`]):
            Its sections; `wandb` with what it leaves open from the environment.
        stages (`dict[str, SFTConfig or DPOShiftConfig]`):
            Settings of the stages to run, in order, by name: `sft`, `dpo`.
        resolved (`dict[str, Any]`):
            The recipe as plain values, with overrides and defaults of the command filled in.
    """

    source: str
    output_dir: Path
    seed: int
    run_name: str
    report: bool
    logging_format: str
    sample_prompts: int
    model: RecipeModelConfig
    data: DataConfig
    wandb: WandbConfig
    stages: dict[str, SFTConfig | DPOShiftConfig]
    resolved: dict[str, Any]

    @property
    def is_named(self) -> bool:
        """Whether `run_name` is the recipe's own, and not the name of its folder."""
        return self.run_name != self.output_dir.name

    @property
    def truncations(self) -> dict[str, Truncation]:
        """How each stage truncates rows, by name."""
        return {name: Truncation.from_args(args) for name, args in self.stages.items()}


STAGES: dict[str, type] = {"sft": SFTConfig, "dpo": DPOShiftConfig}
SECTIONS: dict[str, type] = {"model": RecipeModelConfig, "data": DataConfig, **STAGES, "wandb": WandbConfig}
