"""The two models of a diagnosis: what can be known before their weights are read, and loading them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from trl.trainer.utils import create_model_from_path

from ..artifacts import ArtifactError, read_mapping
from ..identity import ADAPTER_CONFIG, weights_identity
from ..integrity import INDEXES, WEIGHTS, weights_fault
from .settings import DiagnoseError, DiagnoseSettings


LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, UnpicklingError)


@dataclass(frozen=True)
class ModelSource:
    """
    A model that is not loaded yet.

    Args:
        role (`str`):
            `policy` or `reference`, the key that names it.
        place (`str`):
            Hub name or folder.
        base (`str`, *optional*):
            Hub name or folder of the base model, if this is an adapter.
        without_adapter (`bool`, *optional*, defaults to `False`):
            Whether the model is the adapter's base, read with the adapter disabled.
    """

    role: str
    place: str
    base: str | None = None
    without_adapter: bool = False

    @property
    def text(self) -> str:
        """What the model is, in a few words."""
        if self.without_adapter:
            return f"{self.base}, the adapter's base model"
        return self.place if self.base is None else f"{self.place} (adapter of {self.base})"

    @property
    def weights(self) -> str | None:
        """Hash of the weights on disk; `None` of a model from the Hub."""
        place = Path(str(self.base) if self.without_adapter else self.place)
        try:
            return weights_identity(place) if place.is_dir() else None
        except OSError as error:
            raise DiagnoseError(f"`{self.role}` {place} cannot be read: {error}") from error


def find_models(settings: DiagnoseSettings) -> tuple[ModelSource, ModelSource]:
    """
    Policy and reference, once their files have been looked at.

    Raises:
        DiagnoseError: If one of them is no model, or the policy needs a reference.
    """
    policy = _find("policy", settings.policy)
    if settings.reference is not None:
        return policy, _find("reference", settings.reference)
    if policy.base is None:
        raise DiagnoseError(
            f"`reference` must be set unless `policy` is an adapter, got the whole model {policy.place}. Pass "
            "--reference with the model that training started from."
        )
    return policy, ModelSource("reference", policy.place, policy.base, without_adapter=True)


def _find(role: str, place: str) -> ModelSource:
    folder = Path(place).expanduser()
    if not folder.exists():
        if place.startswith(("/", "./", "../", "~")) or place.count("/") > 1:
            raise DiagnoseError(
                f"`{role}` must be a Hub name or a folder, got {place!r}, which does not exist. Correct the path."
            )
        return ModelSource(role, place, _base(role, place))
    if not folder.is_dir():
        raise DiagnoseError(f"`{role}` must be a Hub name or a folder, got {place!r}, a file. Pass its folder.")
    names = ("config.json", ADAPTER_CONFIG)
    if not any((folder / name).is_file() for name in names):
        inner = sorted({path.parent for name in names for path in folder.glob(f"*/{name}")}, key=_last_first)
        hint = f" Did you mean `{inner[0]}`?" if inner else " Pass the folder that the model was saved to."
        raise DiagnoseError(f"`{role}` must be a folder with a {names[0]} or {names[1]}, got {place!r}.{hint}")
    if not any((folder / name).exists() for name in (*WEIGHTS, *INDEXES)):
        raise DiagnoseError(
            f"`{role}` must hold weights that transformers reads, got {place!r} without {WEIGHTS[0]}, its index, or "
            f"{WEIGHTS[1]}. Pass the folder that the model was saved to; merge sharded checkpoints first."
        )
    if (fault := weights_fault(folder)) is not None:
        raise DiagnoseError(f"`{role}` {place!r} is not whole: {fault}. Save or download it again.")
    return ModelSource(role, str(folder), _base(role, str(folder)))


def _last_first(folder: Path) -> tuple[int, int]:
    """The final stage of a run, then its earlier one, then the newest checkpoint."""
    stages = {"dpo": 0, "sft": 1}
    return stages.get(folder.name, 2), -int(next(iter(re.findall(r"\d+$", folder.name)), -1))


def _base(role: str, place: str) -> str | None:
    """Hub name or folder of an adapter's base model."""
    path = Path(place) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        base = read_mapping(path).get("base_model_name_or_path")
    except ArtifactError as error:
        raise DiagnoseError(f"`{role}` {place!r} cannot be read: {error}") from error
    if not isinstance(base, str) or (Path(base).is_absolute() and not Path(base).exists()):
        raise DiagnoseError(
            f"`base_model_name_or_path` in {path} must be the base model of the adapter, got {base!r}, which does not "
            "exist. Write where it is now."
        )
    return base


def load_config(source: ModelSource, trust_remote_code: bool) -> PreTrainedConfig:
    """
    The configuration of a model, of an adapter that of its base.

    Raises:
        DiagnoseError: If it cannot be loaded, or the model is no causal language model.
    """
    place = source.base or source.place
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise DiagnoseError(f"`{source.role}` {place!r} cannot be loaded: {_reason(error)}") from error
    for mistake in _kind_mistakes(source, config):
        raise DiagnoseError(mistake)
    return config


def _kind_mistakes(source: ModelSource, config: PreTrainedConfig) -> Iterator[str]:
    architecture = (config.architectures or [None])[0]
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    if config.is_encoder_decoder or (architecture not in known and not getattr(config, "auto_map", None)):
        yield (
            f"`{source.role}` must be a causal language model, got {source.place!r} ({architecture}). Choose a "
            "decoder-only model with a language modeling head."
        )


def load_tokenizer(source: ModelSource, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, or with an adapter's base; `None` if there is none."""
    for place in dict.fromkeys((source.place, source.base or source.place)):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                place, trust_remote_code=trust_remote_code
            )
        except LOADING_ERRORS as error:
            if "trust_remote_code" in str(error):
                raise DiagnoseError(f"`{source.role}` {place!r} cannot be loaded: {_reason(error)}") from error
            continue
        return tokenizer
    return None


def load_model(source: ModelSource, settings: DiagnoseSettings) -> Any:
    """
    Load a model as [`~trl.DPOTrainer`] loads it, with its adapter if it has one.

    Raises:
        DiagnoseError: If it cannot be loaded.
    """
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    options = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    try:
        if source.base is None:
            return create_model_from_path(source.place, **options)
        return AutoPeftModelForCausalLM.from_pretrained(source.place, **options)
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:
        raise DiagnoseError(f"`{source.role}` {source.place!r} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own. Read the code, and pass --trust-remote-code to run it."
    if isinstance(error, UnpicklingError):
        return "its weights are pickles with code, which is not run. Save it as safetensors."
    return str(error) or type(error).__name__
