"""The plan of a sweep: every combination of values as a checked recipe, one point for those with the same effect."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import RECIPE, ArtifactError, read_mapping
from ..config import DPOShiftConfig
from ..integrity import stage_fault
from ..pipeline.run_folder import recipe_changes
from ..recipe import Recipe, RecipeError, load_recipe
from ..schedules import LAMBDA_DEFAULTS


BASE = "base"
RECIPES = "recipes"
LAMBDA_FIELDS = (*LAMBDA_DEFAULTS, "allow_lambda_above_one")


@dataclass
class SweepRun:
    """
    One run of a sweep, with an ordinary run folder.

    Args:
        name (`str`):
            Name of the point, or `base` for stage 1.
        values (`dict[str, Any]`):
            Its recipe.
        folder (`Path`), file (`Path`), log (`Path`):
            Its run folder, the file of its recipe, and the file of its output.
        stage (`str`):
            Its only stage, `sft` or `dpo`.
    """

    name: str
    values: dict[str, Any]
    folder: Path
    file: Path
    log: Path
    stage: str

    @classmethod
    def in_folder(cls, folder: Path, name: str, values: dict[str, Any], stage: str) -> "SweepRun":
        """A run in the folder of a sweep."""
        values = {**values, "output_dir": str(folder / name), "run_name": f"{values['run_name']}-{name}"}
        return cls(name, values, folder / name, folder / RECIPES / f"{name}.yaml", folder / f"{name}.log", stage)

    @property
    def finished(self) -> bool:
        """Whether the run folder contains a finished run of this recipe, and its model."""
        try:
            changes = recipe_changes(read_mapping(self.folder / RECIPE), self.values)
            return not changes and stage_fault(self.folder / self.stage) is None
        except ArtifactError:
            return False  # if a file is broken, the run says so


@dataclass
class Sweep:
    """
    A checked sweep.

    Args:
        folder (`Path`):
            Folder of all runs.
        base ([`SweepRun`] or `None`):
            Stage 1, or `None` if the recipe has none.
        points (`list[SweepRun]`):
            The runs of stage 2.
        settings (`list[DPOShiftConfig]`):
            Stage 2 of each point.
        duplicates (`int`):
            Number of combinations that were left out because another one has the same effect.
    """

    folder: Path
    base: SweepRun | None
    points: list[SweepRun]
    settings: list[DPOShiftConfig]
    duplicates: int

    @property
    def runs(self) -> list[SweepRun]:
        """Stage 1, if there is one, and the points."""
        return [*([self.base] if self.base else []), *self.points]

    @property
    def summary(self) -> str:
        """The sweep in one line."""
        points = f"{len(self.points)} point{'s' if len(self.points) > 1 else ''}"
        stage_1 = "" if self.base is None else " from one stage 1"
        s = "s" if self.duplicates > 1 else ""
        left_out = f"; {self.duplicates} combination{s} with the same effect left out" if self.duplicates else ""
        return f"{self.folder}: {points}{stage_1}{left_out}"


def plan(path: str, overrides: Sequence[str], seeds: int = 1) -> Sweep:
    """
    Check every combination of the overrides' values as a recipe, before anything runs.

    Seeds are those of stage 2: all points start from the one stage 1 and are evaluated on the same rows, so that their
    chosen log-ratios can be compared seed by seed.

    Args:
        path (`str`):
            The recipe.
        overrides (`Sequence[str]`):
            Overrides as [`~recipe.load_recipe`] takes them, but each with one or more values, separated by commas.
            Commas inside brackets and quotes do not separate.
        seeds (`int`, *optional*, defaults to `1`):
            Number of seeds: the recipe's and those that follow it. More than 1 is the same as these values of `seed`.

    Returns:
        [`Sweep`]: The checked sweep.

    Raises:
        RecipeError: With one line per mistake.
    """
    axes, own_seed = _with_seeds(path, _read_axes(path, overrides), seeds)
    varied = {key for key, values in axes.items() if len(values) > 1}
    recipes: list[tuple[dict[str, str], Recipe]] = []
    mistakes: dict[str, None] = {}  # in order, each once
    for combination in itertools.product(*axes.values()):
        try:
            recipe = load_recipe(path, combination)
        except RecipeError as error:
            mistakes.update(dict.fromkeys(str(error).splitlines()))
        else:
            recipes.append((dict(zip(axes, combination, strict=True)), recipe))
            mistakes.update(dict.fromkeys(_mistakes(recipe, varied)))
    if mistakes:
        raise RecipeError(*mistakes)

    if "seed" in varied and own_seed is None:  # the recipe by itself has none
        own_seed = recipes[0][1].seed
    folder = Path(os.path.abspath(recipes[0][1].output_dir))
    base = None
    if "sft" in recipes[0][1].stages:
        # If the points differ in their seed, stage 1 keeps the recipe's
        single = [values[0] for key, values in axes.items() if key not in varied]
        shared = (
            load_recipe(path, [*single, f"seed={own_seed}"]).resolved if "seed" in varied else recipes[0][1].resolved
        )
        values = {key: value for key, value in shared.items() if key != "dpo"}
        base = SweepRun.in_folder(folder, BASE, values, "sft")
    points: dict[str, SweepRun] = {}
    settings: list[DPOShiftConfig] = []
    for combination_of_point, recipe in recipes:
        dpo = recipe.stages["dpo"]
        assert isinstance(dpo, DPOShiftConfig)
        values = _point_recipe(recipe, dpo, base, own_seed)
        identity = json.dumps(values, sort_keys=True, default=str)
        if identity in points:
            continue
        name = _point_name(dpo, combination_of_point, varied - {"seed"} if recipe.seed == own_seed else varied)
        if name in {point.name for point in points.values()}:
            raise RecipeError(f"{path}: two points have the name `{name}`. Run them in separate sweeps.")
        points[identity] = SweepRun.in_folder(folder, name, values, "dpo")
        settings.append(dpo)
    return Sweep(folder, base, [*points.values()], settings, len(recipes) - len(points))


def _read_axes(path: str, overrides: Sequence[str]) -> dict[str, list[str]]:
    """The overrides with one value each, by key."""
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if key in axes:
            raise RecipeError(
                f"{path}: `{key}` is given twice. Write all its values in one override, separated by commas."
            )
        axes[key] = [f"{key}{equals}{value}" for value in split_values(text)]
        if len(axes[key]) > 1 and f"{key}=" in axes[key]:
            raise RecipeError(f"{path}: the override {override!r} has an empty value. Remove a comma or write `null`.")
    return axes


def _with_seeds(path: str, axes: dict[str, list[str]], seeds: int) -> tuple[dict[str, list[str]], int | None]:
    """
    The overrides with as many values of `seed`, and the seed of stage 1 if the points have several.

    The names of points with that seed do not say it, so that a sweep with more seeds continues one without.
    """
    given = axes.get("seed", [])
    if seeds > 1 and len(given) > 1:
        raise RecipeError(
            f"{path}: `seed` must have one value with `--seeds`, which counts from it, got {len(given)}."
        )
    if max(seeds, len(given)) == 1:
        return axes, None
    others = [values[0] for key, values in axes.items() if key != "seed"]
    try:
        own_seed = load_recipe(path, [*others, *(given if seeds > 1 else [])]).seed
    except RecipeError:  # the checks of all points name every mistake
        return axes, None
    return axes | ({"seed": [f"seed={own_seed + number}" for number in range(seeds)]} if seeds > 1 else {}), own_seed


def split_values(text: str) -> list[str]:
    """The values of an override, separated by commas outside brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (depth or not values[-1].strip()):
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth <= 0:
            values.append("")
            continue
        values[-1] += character
    return [value.strip() for value in values]


def _mistakes(recipe: Recipe, varied: set[str]) -> Iterator[str]:
    path = recipe.source
    if "dpo" not in recipe.stages:
        yield f"{path}: `dpo` is missing. A sweep compares runs of it. Write `dpo: {{}}` for the default settings."
    elif recipe.stages["dpo"].push_to_hub and recipe.resolved["dpo"].get("hub_model_id"):
        yield (
            f"{path}: `dpo.hub_model_id` is not supported in a sweep, whose points would replace each other there, "
            f"got {recipe.resolved['dpo']['hub_model_id']!r}. Leave it out; each point is pushed under its own name."
        )
    for key in sorted(varied):
        if key in ("output_dir", "run_name"):
            yield f"{path}: `{key}` must have one value in a sweep. Each point gets its own folder and name below it."
        elif "sft" in recipe.stages and key != "seed" and key.split(".")[0] != "dpo":
            yield (
                f"{path}: `{key}` must have one value in a sweep with an `sft` section, since stage 1 runs once for "
                "all points. Run one sweep per value, or skip stage 1 with `sft=null`."
            )


def _point_recipe(recipe: Recipe, dpo: DPOShiftConfig, base: SweepRun | None, own_seed: int | None) -> dict[str, Any]:
    """
    The recipe of a point: stage 2 alone, starting from stage 1.

    It has only the lambda settings with an effect, so its folder fits every sweep that contains the point. Points with
    other seeds hold out the same rows, which stage 1 was not trained on either.
    """
    values = {key: value for key, value in recipe.resolved.items() if key != "sft"}
    others = {key: value for key, value in values["dpo"].items() if key not in LAMBDA_FIELDS}
    permission = {"allow_lambda_above_one": True} if dpo.lambda_range[1] > 1 else {}
    values["dpo"] = {**dpo.lambda_plan.settings, **permission, **others}
    data = recipe.data
    if own_seed not in (None, recipe.seed) and data.eval_size is not None and data.seed is None and not data.streaming:
        values["data"] = {**values["data"], "seed": own_seed}
    if base is not None:
        values["model"] = {**values["model"], "model_name_or_path": str(base.folder / base.stage)}
    return values


def _point_name(dpo: DPOShiftConfig, overrides: dict[str, str], varied: set[str]) -> str:
    """A name that tells points apart and does not depend on the other points of the sweep."""
    parts = [dpo.lambda_plan.slug]
    for key, override in overrides.items():
        field = key.removeprefix("dpo.")
        if field not in LAMBDA_FIELDS and (field != key or key in varied):
            parts.append(f"{field}-{override.partition('=')[2]}")
    return "_".join(map(_file_name, parts))[:200]


def _file_name(text: str, limit: int = 48) -> str:
    """Text that is safe as a file name. If it had to be changed, it ends in a hash of the original."""
    safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
    if safe == text and len(text) <= limit:
        return text
    return f"{safe[:limit].strip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
