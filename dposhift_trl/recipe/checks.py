"""What is wrong with a recipe before its sections are built, and with sections that do not go together."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from ..choices import choice_mistake, did_you_mean
from ..config import DPOShiftConfig
from ..data.files import folder_conflict
from ..hub import hub_id_fault
from ..ranges import RANGES, range_mistake
from .errors import RecipeError
from .hints import describe, fits
from .keys import MIXTURE, TOP_LEVEL, RecipeKey, keys_by_name
from .sections import DECIDED_ELSEWHERE, OTHER_NAMES, SECTIONS, STAGES, Recipe


UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # cannot be written to files, file names or logs
# Acts on a terminal, on which W&B and other libraries print the names of a run
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


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


def check_writable(values: dict[str, Any], path: str) -> None:
    """
    Check that all values can be saved in the run folder and read back.

    Raises:
        RecipeError: With one line per mistake.
    """
    if mistakes := [f"{path}: {mistake}" for mistake in _unwritable(values)]:
        raise RecipeError(*mistakes)


def check_keys_and_types(values: dict[str, Any], path: str) -> None:
    """
    Check that each key is known and its value of the right type, one of its words and in its range.

    A single value where only a list is accepted becomes a list of one, as on TRL's command line.

    Raises:
        RecipeError: With one line per mistake.
    """
    mistakes = key_mistakes(values, keys_by_name(TOP_LEVEL), SECTIONS, path)
    for name in ("output_dir", "model", "data"):
        if not values.get(name):
            mistakes.append(f"{path}: `{name}` is missing. Every recipe needs `output_dir`, `model` and `data`.")
    if not any(values.get(stage) is not None for stage in STAGES):
        mistakes.append(
            f"{path}: `sft` and `dpo` are missing. Add one or both; `dpo: {{}}` uses the default settings."
        )
    if mistakes:
        raise RecipeError(*mistakes)


def key_mistakes(
    values: dict[str, Any], top_level: dict[str, RecipeKey], sections: Collection[str], path: str
) -> list[str]:
    """
    Mistakes in the keys of a recipe and in their values, one line each. Single values for lists become lists.

    Args:
        values (`dict[str, Any]`):
            The recipe.
        top_level (`dict[str, RecipeKey]`):
            Its keys that are in no section, by name.
        sections (`Collection[str]`):
            Names of its sections.
        path (`str`):
            What the messages call it.
    """
    mistakes = []
    for key, value in values.items():
        if key in top_level:
            mistakes += _value_mistakes({key: value}, top_level, path)
        elif key not in sections:
            homes = [f"`{section}.{key}`" for section in sections if key in keys_by_name(section)]
            advice = f" Write {' or '.join(homes)}." if homes else did_you_mean(key, [*top_level, *sections])
            mistakes.append(f"{path}: unknown key `{key}`.{advice}")
        elif value is not None and not isinstance(value, dict):
            mistakes.append(f"{path}: section `{key}` must be a mapping, got {value!r}.")
        elif value is not None:
            mistakes += _section_mistakes(key, value, keys_by_name(key), path)
    return mistakes


def _section_mistakes(section: str, values: dict[str, Any], keys: dict[str, RecipeKey], path: str) -> list[str]:
    mistakes = []
    known = {}
    for key, value in values.items():
        if section in STAGES and key in DECIDED_ELSEWHERE:
            mistakes.append(f"{path}: `{section}.{key}` cannot be set here: {DECIDED_ELSEWHERE[key]}.")
        elif key not in keys:
            advice = f" {OTHER_NAMES[key]}" if key in OTHER_NAMES else did_you_mean(key, list(keys))
            mistakes.append(f"{path}: unknown key `{section}.{key}`.{advice}")
        else:
            known[key] = value
    mistakes += _value_mistakes(known, keys, path, f"{section}.")
    values.update(known)
    if section == "data" and isinstance(values.get("mixture"), list):
        for index, source in enumerate(values["mixture"]):
            if isinstance(source, dict):
                mistakes += _section_mistakes(f"data.mixture[{index}]", source, keys_by_name(MIXTURE), path)
    return mistakes


def _value_mistakes(values: dict[str, Any], keys: dict[str, RecipeKey], path: str, prefix: str = "") -> list[str]:
    mistakes = []
    for name, value in values.items():
        key = keys[name]
        candidates = [value] if isinstance(value, (list, dict)) else [value, [value]]
        fitting = [candidate for candidate in candidates if fits(candidate, key.hint)]
        if not fitting:
            got = "null. Write a value, or remove the key" if value is None else repr(value)
            mistakes.append(f"{path}: `{prefix}{name}` must be {describe(key.hint)}, got {got}.")
            continue
        values[name] = fitting[0]
        mistake = range_mistake(name, value) if name in RANGES else choice_mistake(key.words, value)
        if mistake:
            mistakes.append(f"{path}: `{prefix}{name}` {mistake}")
    return mistakes


def check_combinations(recipe: Recipe) -> None:
    """
    Check that the sections go together.

    Raises:
        RecipeError: With one line per mistake.
    """
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
