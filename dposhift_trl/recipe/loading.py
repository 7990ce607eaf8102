"""From a file and overrides to a checked recipe."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.config import DataConfig
from ..environment import wandb_settings
from ..hub import hub_defaults
from .checks import check_combinations, check_keys_and_types, check_writable
from .errors import RecipeError
from .sections import (
    BEST_METRIC,
    EVAL_DEFAULTS,
    STAGE_DEFAULTS,
    STAGES,
    Recipe,
    RecipeModelConfig,
    TopLevel,
    WandbConfig,
)
from .yaml import apply_override, check_size, read_yaml


def read_values(path: str | None, overrides: Sequence[str] = (), name: str | None = None) -> dict[str, Any]:
    """
    Read a recipe as plain values, and apply `key=value` overrides. Its keys are not checked.

    Args:
        path (`str`, *optional*):
            YAML 1.2 file. Without it, there is nothing but the overrides.
        overrides (`Sequence[str]`, *optional*):
            Dotted keys with a value in YAML.
        name (`str`, *optional*):
            What messages call the recipe. Defaults to `path`.

    Raises:
        RecipeError: If the file or an override cannot be read, or its values could not be saved and read back.
    """
    name, values = name or str(path), {} if path is None else read_yaml(path)
    for override in overrides:
        apply_override(values, override, name)
    check_size(values, name)
    check_writable(values, name)
    return values


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read a recipe, apply `key=value` overrides and check all of it, before any model or dataset is loaded.

    Args:
        path (`str`):
            YAML 1.2 file.
        overrides (`Sequence[str]`, *optional*):
            Dotted keys with a value in YAML, for example `dpo.shift_lambda=0.9`.

    Returns:
        [`Recipe`]: The checked recipe.

    Raises:
        RecipeError: With one line per mistake that names the file, section and key and, for an unknown key, the
            closest valid one.
    """
    values = read_values(path, overrides)
    check_keys_and_types(values, path)
    resolved = _with_defaults(values, path)
    data: DataConfig = build_section(DataConfig, resolved["data"], "data", path)
    model = build_section(RecipeModelConfig, resolved["model"], "model", path)
    wandb = build_section(WandbConfig, resolved["wandb"], "wandb", path)
    stages = {}
    mistakes = []
    for name, stage in STAGES.items():
        if name not in resolved:
            continue
        decided = {
            "output_dir": str(Path(resolved["output_dir"]) / name),
            "seed": resolved["seed"],
            "run_name": f"{resolved['run_name']}-{name}",
            "trust_remote_code": model.trust_remote_code,
        }
        try:
            hub = hub_defaults(decided["run_name"], resolved[name])
            stages[name] = build_section(stage, {**resolved[name], **decided, **hub}, name, path)
        except RecipeError as error:
            mistakes.append(str(error))
    if mistakes:
        raise RecipeError(*mistakes)
    recipe = Recipe(
        source=path,
        output_dir=Path(resolved["output_dir"]),
        seed=resolved["seed"],
        run_name=resolved["run_name"],
        report=resolved["report"],
        logging_format=resolved["logging_format"],
        sample_prompts=resolved["sample_prompts"],
        model=model,
        data=data,
        wandb=_wandb_in_force(wandb, stages),
        stages=stages,
        resolved=resolved,
    )
    check_combinations(recipe)
    return recipe


def _wandb_in_force(section: WandbConfig, stages: dict[str, Any]) -> WandbConfig:
    """The section with what it leaves open from the environment. Stages do not report to W&B if it is disabled."""
    if not any("wandb" in stage.report_to for stage in stages.values()):
        return section
    for key, (variable, value) in wandb_settings().items():
        if not getattr(section, key):
            try:
                section = dataclasses.replace(section, **{key: value})
            except ValueError as error:
                raise RecipeError(f"The environment variable {variable} cannot be used: {error}") from None
    if section.mode == "disabled":
        for stage in stages.values():
            stage.report_to = [tracker for tracker in stage.report_to if tracker != "wandb"]
    return section


def _with_defaults(values: dict[str, Any], path: str) -> dict[str, Any]:
    resolved: dict[str, Any] = {
        "output_dir": os.path.expanduser(values["output_dir"]),  # as TRL does
        "seed": values.get("seed", TopLevel.seed),
        "run_name": values.get("run_name") or Path(values["output_dir"]).name or Path(path).stem,
        "report": values.get("report", TopLevel.report),
        "logging_format": values.get("logging_format", TopLevel.logging_format),
        "sample_prompts": values.get("sample_prompts", TopLevel.sample_prompts),
        "model": dict(values["model"]),
        "data": dict(values["data"]),
    }
    sources = [values["data"], *(values["data"].get("mixture") or [])]
    has_eval = any(isinstance(source, dict) and source.get("eval_split") for source in sources) or values["data"].get(
        "eval_size"
    )
    for name in STAGES:
        if values.get(name) is None:
            continue
        stage = {**STAGE_DEFAULTS, **(EVAL_DEFAULTS if has_eval else {}), **values[name]}
        if stage.get("eval_strategy", "no") == "no":
            stage = {key: value for key, value in stage.items() if key in values[name] or key not in EVAL_DEFAULTS}
        elif not stage.get("metric_for_best_model"):
            stage["metric_for_best_model"] = BEST_METRIC[name]
            stage["greater_is_better"] = False
        resolved[name] = stage
    resolved["wandb"] = {key: value for key, value in (values.get("wandb") or {}).items() if value is not None}
    return resolved


def build_section(cls: type, values: dict[str, Any], section: str, path: str) -> Any:
    """
    The dataclass of a section.

    Raises:
        RecipeError: If its own checks refuse a value.
    """
    try:
        # `TrainingArguments` prints advice
        with contextlib.redirect_stdout(io.StringIO()):
            return cls(**values)
    except Exception as error:  # the checks in transformers read files, divide and look up names
        text = str(error) or type(error).__name__
        if "support bf16" in text:  # transformers names neither the key nor its default
            text = (
                "`bf16`, true unless set, requires a GPU with bfloat16. Write `bf16: false`, or `use_cpu: true` to "
                "train in bfloat16 on the CPU."
            )
        raise RecipeError(f"{path}: section `{section}`: {text}") from None
