"""The trainers of a run: wherever they write a model card, on disk or to the Hub, it holds the recipe."""

from pathlib import Path

from trl.trainer.base_trainer import _BaseTrainer

from ..recipe import Recipe, dump_yaml
from ..training.model_card import append_recipe_section
from ..training.sft import ChosenSFTTrainer
from ..training.trainer import DPOShiftTrainer
from .tracking import without_url_warning


class _OfRun(_BaseTrainer):
    recipe: Recipe
    stage: str

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Names the run, not its folder, and adds the recipe: what is pushed during training has it too."""
        name = self.hub_model_id or f"{self.recipe.run_name}-{self.stage}"
        with without_url_warning():
            super().create_model_card(name.split("/")[-1], dataset_name or _hub_dataset(self.recipe), tags)
        if self.is_world_process_zero():
            append_recipe_section(Path(self.args.output_dir), dump_yaml(self.recipe.resolved))


class RunSFTTrainer(_OfRun, ChosenSFTTrainer):
    """Stage 1 of a run."""


class RunDPOShiftTrainer(_OfRun, DPOShiftTrainer):
    """Stage 2 of a run, which prints the verdict once the model is saved."""

    prints_verdict = False


def _hub_dataset(recipe: Recipe) -> str | None:
    path = recipe.data.path
    return path if path and path != "demo" and not Path(path).exists() else None
