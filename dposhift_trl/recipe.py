"""Recipes: YAML and overrides, checked and turned into typed sections."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import SafeRepresenter
from trl import ModelConfig, SFTConfig

from .choices import choice_mistake, choices, did_you_mean
from .config import DPOShiftConfig
from .data.config import DataConfig, DataSource
from .data.errors import one_line
from .data.files import folder_conflict
from .data.tokens import Truncation
from .environment import wandb_settings
from .hub import hub_defaults, hub_id_fault
from .ranges import RANGES, range_mistake


MAX_NODES = 20_000  # far above any recipe, far below what nested YAML aliases can expand to
MAX_DEPTH = 50  # far below Python's recursion limit
UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # cannot be written to files, file names or logs
# Acts on a terminal, on which W&B and other libraries print the names of a run
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

# Defaults of the command that differ from TRL's: checkpoints, a limit on their number, and W&B
STAGE_DEFAULTS: dict[str, Any] = {"save_steps": 0.1, "save_total_limit": 2, "report_to": "wandb"}
EVAL_DEFAULTS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 0.1, "eval_on_start": True}

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
# Names from older releases of TRL and transformers
GONE = {
    "warmup_ratio": "Write the ratio as `warmup_steps`, for example `warmup_steps: 0.1`.",
    "max_prompt_length": "Use `max_length`, which limits prompt and answer together.",
    "max_completion_length": "Use `max_length`, which limits prompt and answer together.",
    "max_seq_length": "Use `max_length`.",
    "evaluation_strategy": "Use `eval_strategy`.",
    "torch_dtype": "Use `dtype`.",
    "model_name": "Use `model_name_or_path`.",
}


class RecipeError(ValueError):
    """One or more mistakes in a recipe. Each line of the message is one mistake, written for the user."""

    def __init__(self, *mistakes: str):
        super().__init__("\n".join(map(one_line, mistakes)))


@dataclass
class RecipeModelConfig(ModelConfig):
    """
    The `model` section of a recipe: [`~trl.ModelConfig`] and two more fields.

    Parameters:
        lora_target_modules (`str` or `list[str]`, *optional*):
            List of module names, `all-linear` or a regular expression, as in [`~peft.LoraConfig`].
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run Python code that comes with the model or tokenizer.
        merge_adapter (`bool`, *optional*, defaults to `False`):
            Whether each stage also saves the LoRA adapter merged into the base model, in the folder `merged`.
    """

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
            W&B project. Defaults to `WANDB_PROJECT`, else `dposhift_trl`.
        entity (`str`, *optional*):
            W&B user or team. Defaults to `WANDB_ENTITY`.
        mode (`str`, *optional*):
            `online`, `offline` or `disabled`. Defaults to `WANDB_MODE`, else online if logged in to W&B, else offline.
        tags (`list[str]`, *optional*):
            Tags for the runs of both stages. Defaults to `WANDB_TAGS`.
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
        output_dir (`Path`), seed (`int`), run_name (`str`), report (`bool`):
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
SECTIONS: dict[str, type] = {"model": RecipeModelConfig, "data": DataConfig, "wandb": WandbConfig, **STAGES}
TOP_LEVEL: dict[str, Any] = {"output_dir": str, "seed": int, "run_name": str, "report": bool}


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read a recipe, apply `key=value` overrides and check all of it, before any model or dataset is loaded.

    Args:
        path (`str`):
            YAML 1.2 file.
        overrides (`Sequence[str]`, *optional*):
            Dotted keys with a value in YAML, for example `dpo.lambda_min=0.5`.

    Returns:
        [`Recipe`]: The checked recipe.

    Raises:
        RecipeError: With one line per mistake that names the file, section and key and, for an unknown key, the
            closest valid one.
    """
    values = read_yaml(path)
    apply_overrides(values, overrides, path)
    _check_keys_and_types(values, path)
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
        model=model,
        data=data,
        wandb=_wandb_in_force(wandb, stages),
        stages=stages,
        resolved=resolved,
    )
    _check_combinations(recipe)
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


class _Representer(SafeRepresenter):
    """Writes text so that it is read back unchanged: line breaks and zero-width characters need double quotes."""

    def represent_str(self, data: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def dump_yaml(values: dict[str, Any]) -> str:
    """Format plain values as YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.width = sys.maxsize  # folded lines are not always read back unchanged
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()


def parse_yaml(text: str) -> Any:
    """Parse YAML 1.2, in which `1e-6` is a number and `no` is a string."""
    return YAML(typ="safe", pure=True).load(text)


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys that differ between two resolved recipes."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    keys = sorted({*old, *new}, key=str)
    absent = object()
    return [
        change
        for key in keys
        for change in changed_keys(old.get(key, absent), new.get(key, absent), f"{prefix}.{key}".lstrip("."))
    ]


def read_yaml(path: str) -> dict[str, Any]:
    """
    Read a YAML file that contains a mapping.

    Raises:
        RecipeError: If there is no such file, or it contains anything else.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: file not found.{_nearest_file(path)}") from None
    except YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply.") from None
    except Exception as error:  # the YAML library does not check some conversions
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        found = "an empty file" if values is None else f"a {type(values).__name__}"
        raise RecipeError(f"{path}: must contain a mapping of sections, got {found}.")
    _check_size(values, path)
    return _unshared(values)


def _unshared(values: Any) -> Any:
    """A copy without shared values, so that an override of one section does not change an alias of it."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _nearest_file(path: str) -> str:
    names = [entry.name for entry in Path(path).parent.glob("*.y*ml")]
    nearest = difflib.get_close_matches(Path(path).name, names, n=1)
    return f" Did you mean `{Path(path).parent / nearest[0]}`?" if nearest else ""


def _check_size(values: Any, path: str) -> None:
    """Check the number of values and their depth."""
    stack, count, deepest = [(values, 0)], 0, 0
    while stack:
        value, depth = stack.pop()
        count, deepest = count + 1, max(deepest, depth)
        if count > MAX_NODES:
            raise RecipeError(f"{path}: must not contain more than {MAX_NODES} values with aliases expanded.")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        stack.extend((item, depth + 1) for item in inner)
    if deepest > MAX_DEPTH:
        raise RecipeError(f"{path}: nested too deeply.")


def _unwritable(value: Any, key: str = "") -> Iterator[str]:
    """Mistakes for values that could not be saved in the run folder and read back."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unwritable(name, key) if isinstance(name, str) else ()
            yield from _unwritable(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unwritable(inner, f"{key}[{index}]")
    elif isinstance(value, str) and UNWRITABLE.search(value):
        yield f"`{key}` must not contain NUL characters or lone surrogates, got {value!r}. Remove them."
    elif isinstance(value, str) and key in ("output_dir", "run_name") and CONTROL.search(value):
        yield f"`{key}` must not contain control characters, got {value!r}. Remove them."
    elif isinstance(value, (bytes, set, tuple)):
        yield f"`{key}` must consist of mappings, lists, strings and numbers, got {value!r}."
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield f"`{key}` must be an integer with at most 63 bits, got one with {value.bit_length()}."


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], path: str) -> None:
    """
    Set the values of `key=value` overrides in those of a recipe.

    Raises:
        RecipeError: If an override cannot be read, or the values cannot be saved and read back.
    """
    for override in overrides:
        _apply_override(values, override, path)
    _check_size(values, path)
    unwritable = [f"{path}: {mistake}" for mistake in _unwritable(values)]
    if unwritable:
        raise RecipeError(*unwritable)


def _apply_override(values: dict[str, Any], override: str, path: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"{path}: overrides must have the form key=value, got {override!r}. Write for example "
            "`dpo.lambda_min=0.5`."
        )
    try:
        value = parse_yaml(text) if text else None
    except Exception as error:  # the YAML library does not check some conversions
        raise RecipeError(f"{path}: the value of the override {override!r} is not valid YAML: {error}") from None
    node = values
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise RecipeError(f"{path}: the override {override!r} sets a key in `{part}`, which is not a mapping.")
    node[parts[-1]] = value


def key_mistakes(values: dict[str, Any], top_level: dict[str, Any], sections: dict[str, type], path: str) -> list[str]:
    """
    Mistakes in the keys of a recipe and in the types and ranges of their values, one line each.

    Args:
        values (`dict[str, Any]`):
            The recipe. Single values for lists become lists.
        top_level (`dict[str, Any]`):
            Types of the keys without a section.
        sections (`dict[str, type]`):
            Dataclasses of the sections.
        path (`str`):
            What the messages call the recipe.
    """
    mistakes = []
    for key, value in values.items():
        if key not in sections and key not in top_level:
            mistakes.append(f"{path}: unknown key `{key}`.{did_you_mean(key, [*top_level, *sections])}")
        elif key in top_level:
            mistakes += _value_mistakes({key: value}, {key: _Accepted(top_level[key], as_list=False)}, "", path)
        elif value is not None and not isinstance(value, dict):
            mistakes.append(f"{path}: section `{key}` must be a mapping, got {value!r}.")
        elif value is not None:
            mistakes += _section_mistakes(key, value, sections[key], path)
    return mistakes


def _check_keys_and_types(values: dict[str, Any], path: str) -> None:
    mistakes = key_mistakes(values, TOP_LEVEL, SECTIONS, path)
    for name in ("output_dir", "model", "data"):
        if not values.get(name):
            mistakes.append(f"{path}: `{name}` is missing. Every recipe needs `output_dir`, `model` and `data`.")
    if not any(values.get(stage) is not None for stage in STAGES):
        mistakes.append(
            f"{path}: `sft` and `dpo` are missing. Add one or both; `dpo: {{}}` uses the default settings."
        )
    if mistakes:
        raise RecipeError(*mistakes)


def _section_mistakes(section: str, values: dict[str, Any], cls: type, path: str) -> list[str]:
    hints = typing.get_type_hints(cls)
    fields = {
        f.name: _Accepted(WIDER_TYPES.get(f.name, hints[f.name]), words=choices(f, hints[f.name]))
        for f in dataclasses.fields(cls)
        if f.init
    }
    mistakes = []
    known = {}
    for key, value in values.items():
        where = f"{path}: `{section}.{key}`"
        if section in STAGES and key in DECIDED_ELSEWHERE:
            mistakes.append(f"{where} cannot be set here: {DECIDED_ELSEWHERE[key]}.")
        elif key not in fields:
            advice = f" {GONE[key]}" if key in GONE else did_you_mean(key, list(fields))
            mistakes.append(f"{path}: unknown key `{section}.{key}`.{advice}")
        else:
            known[key] = value
    mistakes += _value_mistakes(known, fields, f"{section}.", path)
    values.update(known)
    if section == "data" and isinstance(values.get("mixture"), list):
        for index, source in enumerate(values["mixture"]):
            if isinstance(source, dict):
                mistakes += _section_mistakes(f"data.mixture[{index}]", source, DataSource, path)
    return mistakes


class _Accepted(NamedTuple):
    """What a key takes: a type, one value for a list of one as on TRL's command line, and words if not all."""

    hint: Any
    as_list: bool = True
    words: Collection[str] = ()


def _value_mistakes(values: dict[str, Any], fields: dict[str, _Accepted], prefix: str, path: str) -> list[str]:
    mistakes = []
    for key, value in values.items():
        hint, as_list, words = fields[key]
        candidates = [value, [value]] if as_list and not isinstance(value, (list, dict)) else [value]
        if not any(_fits(candidate, hint) for candidate in candidates):
            mistakes.append(f"{path}: `{prefix}{key}` must be {_describe(hint)}, got {value!r}.")
            continue
        if not _fits(value, hint):
            values[key] = candidates[-1]
        mistake = range_mistake(key, value) if key in RANGES else choice_mistake(words, value)
        if mistake:
            mistakes.append(f"{path}: `{prefix}{key}` {mistake}")
    return mistakes


def _fits(value: Any, hint: Any) -> bool:
    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        pydantic.TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else config).validate_python(value)
    except pydantic.ValidationError:
        return False
    return True


def _describe(hint: Any) -> str:
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_describe(argument) for argument in arguments]
        return " or ".join(dict.fromkeys(parts))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list or hint is list:
        return f"a list of {_plural(arguments[0])}" if arguments else "a list"
    if origin is dict or hint is dict:
        return f"a mapping to {_plural(arguments[1])}" if arguments and arguments[1] is not Any else "a mapping"
    return words.get(hint, "a string")


def _plural(hint: Any) -> str:
    return re.sub(r"^an? (\w+)", r"\1s", _describe(hint))


def _with_defaults(values: dict[str, Any], path: str) -> dict[str, Any]:
    resolved: dict[str, Any] = {
        "output_dir": os.path.expanduser(values["output_dir"]),  # as TRL does
        "seed": values.get("seed", 42),
        "run_name": values.get("run_name") or Path(values["output_dir"]).name or Path(path).stem,
        "report": values.get("report", True),
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
            # The checkpoint with the best value is kept in addition to the newest ones
            stage["metric_for_best_model"] = "dpo_loss" if name == "dpo" else "loss"
            stage["greater_is_better"] = False
        resolved[name] = stage
    resolved["wandb"] = dict(values.get("wandb") or {})
    return resolved


def build_section(cls: type, values: dict[str, Any], section: str, path: str) -> Any:
    """The dataclass of a section. Its own checks raise a [`RecipeError`]."""
    try:
        # `TrainingArguments` prints advice
        with contextlib.redirect_stdout(io.StringIO()):
            return cls(**values)
    except Exception as error:  # the checks in transformers read files, divide and look up names
        raise RecipeError(f"{path}: section `{section}`: {str(error) or type(error).__name__}") from None


def _check_combinations(recipe: Recipe) -> None:
    path, mistakes = recipe.source, []
    for source in recipe.data.sources:
        conflict = folder_conflict(source, recipe.output_dir)
        if conflict is not None:
            mistakes.append(f"{path}: `output_dir` must be apart from the data, got {recipe.output_dir}: {conflict}.")
    for name, stage in recipe.stages.items():
        if recipe.data.streaming and stage.max_steps <= 0:
            mistakes.append(
                f"{path}: `{name}.max_steps` must be set with `data.streaming`, since the number of rows is unknown. "
                f"Write for example `{name}.max_steps: 1000`."
            )
        evaluates = stage.eval_strategy != "no" or stage.eval_on_start
        if evaluates and not recipe.data.has_eval:
            mistakes.append(
                f"{path}: evaluation in stage `{name}` requires evaluation rows, got none. Set `data.eval_split` or "
                f"`data.eval_size`, or remove `{name}.eval_strategy` and `{name}.eval_on_start`."
            )
        if stage.padding_free and name == "dpo":
            mistakes.append(
                f"{path}: `dpo.padding_free` is not supported, got True: `DPOTrainer` ignores it. Remove it."
            )
    pushed = {name: stage.hub_model_id for name, stage in recipe.stages.items() if stage.push_to_hub}
    for name, hub_model_id in pushed.items():
        if (fault := hub_id_fault(hub_model_id)) is not None:
            mistakes.append(
                f"{path}: `{name}.hub_model_id` must be the name of a repository, got {hub_model_id!r}: {fault}. "
                "Write for example `user/model`, or leave it out."
            )
    if len(set(pushed.values())) < len(pushed):
        mistakes.append(
            f"{path}: `hub_model_id` must differ in `sft` and `dpo`, got {recipe.stages['dpo'].hub_model_id!r} in "
            "both, where the second stage would replace the first. Leave it out in one of them."
        )
    dpo = recipe.stages.get("dpo")
    if isinstance(dpo, DPOShiftConfig) and dpo.precompute_ref_log_probs is True and recipe.data.streaming:
        mistakes.append(
            f"{path}: `dpo.precompute_ref_log_probs: true` is not supported with `data.streaming`. Remove one of them."
        )
    if isinstance(dpo, DPOShiftConfig) and dpo.sync_ref_model and recipe.model.use_peft:
        mistakes.append(
            f"{path}: `dpo.sync_ref_model` is not supported with `model.use_peft`, which has no reference model to "
            "update. Remove one of them."
        )
    if mistakes:
        raise RecipeError(*mistakes)
