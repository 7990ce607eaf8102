"""The models and the tokenizer of a run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME
from trl import get_quantization_config

from ..artifacts import FINISHED, RECIPE, ArtifactError, read_mapping
from ..console import say
from ..identity import weights_identity
from ..recipe import STAGES, RecipeModelConfig
from .settings import GenerateError


BASE = "base"
LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class FinishedRun:
    """
    A run whose stages are finished.

    Args:
        folder (`Path`), name (`str`):
            Run folder and `run_name`.
        model ([`~recipe.RecipeModelConfig`]):
            The recipe's section `model`.
        models (`tuple[str, str]`):
            Names of the first and the final model: `base`, `sft` or `dpo`.
    """

    folder: Path
    name: str
    model: RecipeModelConfig
    models: tuple[str, str]

    def path(self, name: str) -> str:
        """Folder or Hub name of a model."""
        if name != BASE:
            return str(self.folder / name)
        start = str(self.model.model_name_or_path)
        return str(self.folder / BASE) if start == "demo" else start

    @property
    def weights(self) -> dict[str, str]:
        """Which weights the models have, by name; of a model from the Hub its name and revision."""
        return {name: self._weights(Path(self.path(name))) for name in self.models}

    def _weights(self, path: Path) -> str:
        try:
            found = weights_identity(path)
        except OSError as error:
            raise GenerateError(f"The weights in {path} cannot be read: {error}") from error
        return found or f"{path}@{self.model.model_revision}"


def read_finished_run(folder: Path, trust_remote_code: bool = False) -> FinishedRun:
    """
    Read which models a run has.

    Args:
        folder (`Path`):
            Run folder, which may come from a stranger.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run Python code that comes with a model. The run's own recipe cannot allow it.

    Raises:
        GenerateError: If the folder contains no run, or a stage is not finished.
    """
    if not folder.is_dir():
        raise GenerateError(f"The run folder must be a folder, got {folder}, which does not exist.")
    path = folder / RECIPE
    if not path.exists():
        raise GenerateError(f"{folder} contains no {RECIPE}. Pass the `output_dir` of a run.")
    try:
        values = read_mapping(path)
        # Not the whole recipe, since its training settings may not suit this machine
        model = RecipeModelConfig(**{**values["model"], "trust_remote_code": trust_remote_code})
        stages = [name for name in STAGES if values.get(name) is not None]
        run_name = str(values["run_name"])
    except ArtifactError as error:
        raise GenerateError(f"{error} Pass the `output_dir` of a run.") from error
    except KeyError as error:
        raise GenerateError(f"{path} has no `{error.args[0]}`. Pass the `output_dir` of a run.") from error
    except (OSError, ValueError, TypeError) as error:
        raise GenerateError(f"{path} has no valid section `model`: {error}") from error
    for name in stages:
        if not (folder / name / FINISHED).is_file():
            raise GenerateError(f"{folder}: stage `{name}` is not finished. Run the recipe again to continue it.")
    if not stages:
        raise GenerateError(f"{path} has no stage {' or '.join(STAGES)}.")
    first, final = [BASE, *stages][-2:]
    return FinishedRun(folder, run_name, model, (first, final))


def load_tokenizer(run: FinishedRun) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the final stage, which has the chat template that training may have added."""
    path = run.path(run.models[-1])
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=run.model.trust_remote_code)
    except LOADING_ERRORS as error:
        raise GenerateError(f"The tokenizer in {path} cannot be loaded: {_reason(error)}") from error


def select_device(name: str | None) -> torch.device:
    """The named device, or by default an accelerator if there is one."""
    try:
        if name is not None:
            device = torch.device(name)
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GenerateError(f"`device` must be a device of this machine, got {name!r}: {error}") from error
    if torch.accelerator.is_available():
        return torch.device(str(torch.accelerator.current_accelerator()))
    return torch.device("cpu")


def load_model(run: FinishedRun, name: str, device: torch.device) -> PreTrainedModel:
    """
    Load a model of a run in evaluation mode.

    Weights in the run folder must be safetensors. If the run names a model elsewhere, a line says which.
    """
    path, recipe = run.path(name), run.model
    quantization = get_quantization_config(recipe) if device.type == "cuda" else None
    attention = recipe.attn_implementation
    if device.type != "cuda" or ("/" in str(attention) and not recipe.trust_remote_code):
        attention = None  # FlashAttention runs only on GPUs; kernels from the Hub are code
    options = {
        "dtype": recipe.dtype or "auto",
        "trust_remote_code": recipe.trust_remote_code,
        "quantization_config": quantization,
        "attn_implementation": attention,
    }
    try:
        adapter = Path(path) / ADAPTER_CONFIG_NAME
        if adapter.exists():
            start = read_mapping(adapter).get("base_model_name_or_path")
            if not (Path(path) / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
                raise OSError(f"an adapter must be saved as {ADAPTER_SAFE_WEIGHTS_NAME}, got no such file")
            say(f"{name}: an adapter of {start}, which its {ADAPTER_CONFIG_NAME} names")
            model = AutoPeftModelForCausalLM.from_pretrained(path, **options)
        elif Path(path).parent == run.folder:
            model = AutoModelForCausalLM.from_pretrained(path, **options, use_safetensors=True)
        else:
            say(f"{name}: {path}, which the run's {RECIPE} names")
            model = AutoModelForCausalLM.from_pretrained(path, **options, revision=recipe.model_revision)
        return (model if quantization else model.to(device)).eval()
    except LOADING_ERRORS as error:
        raise GenerateError(f"The model `{name}` in {path} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own. Read the code, and pass --trust-remote-code to run it."
    return str(error)
