"""Runs that differ only in their seed, as one."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .files import number
from .findings import Estimate, finite
from .recommendation import Outcome, mean_over_seeds
from .run_folder import Run


OF_ONE_RUN = ("seed", "output_dir", "run_name", "wandb")  # keys of a recipe that tell runs of one setting apart
SHARES = ("displacement/chosen_fell", "rewards/accuracies")


@dataclass(frozen=True)
class SeedGroup:
    """
    Runs whose recipes differ only in their seed, or one run.

    Args:
        name (`str`):
            What the names of the runs have in common.
        runs (`tuple[Run, ...]`):
            The runs.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def lambda_text(self) -> str:
        """How lambda changed, in a few words."""
        return self.runs[0].lambda_text

    @property
    def outcome(self) -> Outcome:
        """What the recommendation needs to know, of one run or over the seeds."""
        if len(self.runs) == 1:
            return self.runs[0].outcome
        return Outcome.over_seeds(self.name, {_seed(run): run.outcome for run in self.runs})

    def mean(self, metric: str) -> Estimate:
        """Mean of a metric of the last evaluations over the seeds, with its 95% interval by Student's t."""
        return mean_over_seeds([Estimate(finite(run.last, metric)) for run in self.runs], metric in SHARES)


def seed_groups(runs: Sequence[Run]) -> list[SeedGroup]:
    """
    Group runs by what their recipes have in common besides the seed, in the order of the first run of each.

    No two groups have the same name.
    """
    groups: dict[str, list[Run]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(_setting(run) or f"run {index}", []).append(run)
    found: list[list[Run]] = []
    for members in groups.values():
        found += [members] if _are_seeds(members) else [[run] for run in members]
    names = [_common_name(members) if len(members) > 1 else members[0].name for members in found]
    return [
        SeedGroup(name if names.count(name) == 1 else members[0].name, tuple(members))
        for name, members in zip(names, found, strict=True)
    ]


def _are_seeds(runs: Sequence[Run]) -> bool:
    """Whether runs with one setting show how much a seed matters: none is there twice, and they do not end alike."""
    if len(runs) == 1:
        return False
    ends = {run.last.get("displacement/chosen") for run in runs}  # alike if `dpo.data_seed` sets the order of pairs
    return len({_seed(run) for run in runs}) == len(runs) and (len(ends) > 1 or None in ends)


def _common_name(runs: Sequence[Run]) -> str:
    return re.sub(r"_seed-\d+(?=_|$)", "", runs[0].name)


def _seed(run: Run) -> int:
    return int(number((run.settings or {}).get("seed")))


def _setting(run: Run) -> str | None:
    """The recipe without what belongs to one run alone; `None` if it has no seed."""
    if not isinstance((run.settings or {}).get("seed"), int):
        return None
    recipe = {key: value for key, value in (run.settings or {}).items() if key not in OF_ONE_RUN}
    data = recipe.get("data")
    if isinstance(data, dict) and data.get("eval_size") is not None and not data.get("streaming"):
        # Runs with other rows held out are no seeds of one setting
        recipe["data"] = {**data, "seed": _seed(run) if data.get("seed") is None else data["seed"]}
    return json.dumps(recipe, sort_keys=True, default=str)
