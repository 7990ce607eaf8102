"""
What can be known before the first stage trains: packages, the Hub, and whether model, tokenizer, and rows fit.

Each check asks the library that would fail later, with as little as it takes: the callback or optimizer itself, and a
model without weights, on the `meta` device.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import is_bnb_available
from datasets import Dataset
from huggingface_hub import constants, get_token
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    Trainer,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import is_flytekit_available
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.training_args import OptimizerNames, ParallelMode
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, get_peft_config

from ..artifacts import FINISHED
from ..choices import did_you_mean
from ..columns import CHOSEN_IDS, PROMPT_IDS, REJECTED_IDS
from ..config import DPOShiftConfig
from ..data.audit import AuditedRows
from ..data.errors import one_line
from ..data.origin import origin, origin_text
from ..data.sources import Rows
from ..recipe import Recipe
from ..reference.cache import ReferenceCacheError, default_folder
from ..training.checks import vocabulary_mistake
from ..training.metrics import PairScores, evaluation_metrics, pair_metrics
from .errors import RunError
from .loading import as_trained
from .processes import from_main


HUB_TIMEOUT = 10  # seconds
# Packages of trackers that have another name
TRACKER_PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit",
}


def check_settings(recipe: Recipe) -> None:
    """
    Check what does not depend on the model: trackers, packages, and the Hub.

    Args:
        recipe ([`~recipe.Recipe`]):
            Checked recipe. Stages that are finished are not asked.

    Raises:
        RunError: With one line per mistake.
    """
    mistakes = list(_place_mistakes(str(recipe.model.model_name_or_path))) + [
        f"`{name}.{mistake}" for name, args in _stages_left(recipe).items() for mistake in _setting_mistakes(args)
    ]
    if (recipe.model.load_in_4bit or recipe.model.load_in_8bit) and not is_bnb_available():
        mistakes.append(
            "`model.load_in_4bit` and `load_in_8bit` require bitsandbytes. Run `pip install bitsandbytes`."
        )
    _refuse(mistakes)


def check_model(recipe: Recipe, base: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    Check that the stages can train the model: its kind, its files, its tokenizer, and the settings that depend on it.

    Args:
        recipe ([`~recipe.Recipe`]):
            Checked recipe. Stages that are finished are not asked.
        base (`str`):
            Name or folder of the model that the first stage starts from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Returns:
        `int`, *optional*: Number of positions, if the model looks them up in a table, and so reads no longer rows.

    Raises:
        RunError: With one line per mistake.
    """
    config, is_adapter = _model_config(recipe, base)
    _refuse(list(_kind_mistakes(base, config)))
    model = _model_without_weights(recipe, config)
    mistakes = list(_file_mistakes(base, config, tokenizer, is_adapter))
    vocabulary = as_trained(tokenizer, recipe).get_vocab()
    for name, args in _stages_left(recipe).items():
        mistakes += [f"`{name}.{mistake}" for mistake in _training_mistakes(args, config, model)]
        if args.pad_token is not None and args.pad_token not in vocabulary:
            mistakes.append(
                f"`{name}.pad_token` must be in the tokenizer's vocabulary, got {args.pad_token!r}. Remove it."
            )
    if model is None:
        _refuse(mistakes)
        return None
    positions = table_positions(model)
    adapter = get_peft_config(recipe.model)
    if adapter is not None and not is_adapter:
        mistakes += _adapter_mistakes(model, adapter)
    _refuse(mistakes)
    return positions


def check_lengths(recipe: Recipe, rows: dict[str, AuditedRows], positions: int | None) -> None:
    """
    Check that no row that is trained or evaluated on is longer than the positions of the model, and that the rows make
    a batch.

    Args:
        recipe ([`~recipe.Recipe`]):
            Checked recipe.
        rows (`dict[str, AuditedRows]`):
            Rows by stage.
        positions (`int`, *optional*):
            Number of positions, as of [`check_model`].

    Raises:
        RunError: With one line per stage and split that has such rows.
    """
    mistakes = []
    for name, args in _stages_left(recipe).items():
        if name not in rows:
            continue
        mistakes += [f"`{name}.{mistake}" for mistake in _batch_mistakes(args, rows[name].train)]
        if positions is None or (args.max_length is not None and args.max_length <= positions):
            continue
        remedy = f"Set `{name}.max_length: {positions}`."
        length = "null" if args.max_length is None else args.max_length
        # The other strategies number the positions of each row anew
        packed = isinstance(args, SFTConfig) and args.packing and args.packing_strategy == "wrapped"
        for split, dataset in (("train", rows[name].train), ("eval", rows[name].evaluation)):
            if packed or (dataset is not None and not isinstance(dataset, Dataset)):
                setting = "`packing_strategy: wrapped`" if packed else "`data.streaming`"
                mistakes.append(
                    f"`{name}.max_length` must be at most {positions}, the positions of the model, with {setting}, "
                    f"got {length}. {remedy}"
                )
                break
            if dataset is None:
                continue
            answers = (CHOSEN_IDS, REJECTED_IDS) if name == "dpo" else (CHOSEN_IDS,)
            lengths = [min(length, args.max_length or length) for length in _lengths(dataset, answers)]
            beyond = [index for index, length in enumerate(lengths) if length > positions]
            if beyond:
                first = origin_text(origin(dataset[beyond[0]], split, recipe.data), recipe.data)
                mistakes.append(
                    f"`{name}.max_length` must be at most {positions}, the positions of the model, got "
                    f"{length}: {len(beyond)} {split} rows have more tokens, the longest one "
                    f"{max(lengths)}, the first one is {first}. {remedy}"
                )
    _refuse(mistakes)


def _stages_left(recipe: Recipe) -> dict[str, SFTConfig | DPOShiftConfig]:
    return {
        name: args
        for name, args in recipe.stages.items()
        if not from_main((recipe.output_dir / name / FINISHED).is_file())
    }


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        raise RunError(*dict.fromkeys(mistakes))


def _sentence(error: Exception) -> str:
    return f"{str(error).strip().rstrip('.') or type(error).__name__}."


def _place_mistakes(model: str) -> Iterator[str]:
    looks_like_a_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_like_a_path and not Path(model).exists():
        yield (
            f"`model.model_name_or_path` must be a Hub name or a folder, got {model!r}, which does not exist. Correct "
            "the path."
        )


# Settings. Each mistake goes on after "`stage."


def _setting_mistakes(args: SFTConfig | DPOShiftConfig) -> Iterator[str]:
    yield from _tracker_mistakes(args.report_to)
    if args.use_liger_kernel and not is_liger_kernel_available():
        yield "use_liger_kernel` requires liger-kernel, got True. Run `pip install liger-kernel`, or remove it."
    if args.torch_compile_backend is not None and args.torch_compile_backend not in torch.compiler.list_backends(()):
        known = ", ".join(torch.compiler.list_backends(()))
        yield f"torch_compile_backend` must be one of {known}, got {args.torch_compile_backend!r}."
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if launched not in ("no", own := "fp16" if args.fp16 else "bf16" if args.bf16 else "no"):
        yield (
            f"bf16` and `fp16` must agree with the launcher's `mixed_precision`, which is {launched}, got {own}. "
            + (f"Write `{launched}: true`, or pass" if launched in ("bf16", "fp16") else "Pass")
            + " `--mixed_precision no` to `accelerate launch`."
        )
    if args.fp16 and args.device.type == "cpu":
        yield "fp16` requires a GPU, got True. Set `bf16: true` to train in half precision on a CPU."
    if args.activation_offloading and args.device.type == "cpu":
        yield "activation_offloading` requires a GPU, got True. Remove it to train on a CPU."
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        yield f"fsdp` requires several processes, got {args.fsdp!r} with one. Start with `accelerate launch`."
    if isinstance(args, SFTConfig) and args.packing and args.max_length is None:
        yield "max_length` must be set with `packing`, got null. Write for example `max_length: 1024`."
    if isinstance(args, SFTConfig) and args.padding_free and not args.packing and args.max_length is not None:
        yield (
            f"padding_free` without `packing` does not truncate, got `max_length: {args.max_length}`. Set it to null, "
            "or set `packing: true`."
        )
    if isinstance(args, DPOShiftConfig) and args.precompute_ref_log_probs is not False:
        try:
            default_folder()
        except ReferenceCacheError as error:
            yield f"precompute_ref_log_probs` needs a folder: {error}"
    metric, metrics = (args.metric_for_best_model or "loss").removeprefix("eval_"), _evaluation_metrics(args)
    if metric not in metrics:
        yield (
            f"metric_for_best_model` must be one of {', '.join(metrics)}, got {args.metric_for_best_model!r}."
            f"{did_you_mean(metric, metrics)}"
        )
    if args.push_to_hub and (fault := from_main(_hub_fault(args.hub_token))):
        yield f"push_to_hub` {fault}"


def _tracker_mistakes(trackers: list[str]) -> Iterator[str]:
    available = {*get_available_reporting_integrations(), *(["flyte"] if is_flytekit_available() else [])}
    for tracker in sorted(set(trackers) - available):
        if tracker == "kubeflow":
            yield "report_to` must not contain 'kubeflow' outside of a job of Kubeflow Trainer. Remove it."
            continue
        yield (
            f"report_to` requires the package of {tracker!r}, which is not installed. Run "
            f"`pip install {TRACKER_PACKAGES.get(tracker, tracker)}`, or remove it."
        )


def _evaluation_metrics(args: SFTConfig | DPOShiftConfig) -> list[str]:
    """Metrics that an evaluation logs."""
    metrics = ["loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"]
    metrics += ["runtime", "samples_per_second", "steps_per_second"]
    if isinstance(args, DPOShiftConfig):
        scores = PairScores(*torch.ones(len(dataclasses.fields(PairScores)), 2).unbind())
        metrics += ["logits/chosen", "logits/rejected", *pair_metrics(scores, 1.0), *evaluation_metrics(scores, 1.0)]
    return metrics


def _hub_fault(token: str | None) -> str | None:
    """Why nothing can be pushed to the Hub, asked on the main process only, which is the one that pushes."""
    if not PartialState().is_main_process:
        return None
    if constants.HF_HUB_OFFLINE:
        return "requires the Hub, got `HF_HUB_OFFLINE=1`. Unset it, or remove `push_to_hub`."
    token = token or get_token()
    if token is None:
        return "requires a login to the Hub, got none. Run `hf auth login`, or remove `push_to_hub`."
    try:
        headers = build_hf_headers(token=token)
        url = f"{constants.ENDPOINT}/api/whoami-v2"
        hf_raise_for_status(get_session().get(url, headers=headers, timeout=HUB_TIMEOUT))
    except Exception as error:  # the HTTP library differs between versions of huggingface_hub
        remedy = "Check the network and `hf auth whoami`, or remove `push_to_hub`."
        return f"cannot reach the Hub: {_sentence(error)} {remedy}"
    return None


# Model


def _model_config(recipe: Recipe, base: str) -> tuple[PreTrainedConfig, bool]:
    """The configuration of the model, or of the one that an adapter is for, and whether it is an adapter."""
    options: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code}
    if not (Path(base) / "adapter_config.json").is_file():
        try:
            return AutoConfig.from_pretrained(base, revision=recipe.model.model_revision, **options), False
        except (OSError, ValueError) as error:
            raise RunError(f"`model.model_name_or_path` {base!r} cannot be loaded: {error}") from None
    try:
        of = PeftConfig.from_pretrained(base).base_model_name_or_path
        return AutoConfig.from_pretrained(of, **options), True
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            one_line(
                f"`model.model_name_or_path` {base!r} is an adapter whose base model cannot be loaded: "
                f"{_sentence(error)} Write its place as `base_model_name_or_path` into the `adapter_config.json`."
            )
        ) from None


def _kind_mistakes(base: str, config: PreTrainedConfig) -> Iterator[str]:
    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not config.architectures and usual is not None:
        yield (
            f"`model.model_name_or_path` {base!r}: its `config.json` must name the class of the model, got none. If "
            f'it is a {usual}, add `"architectures": ["{usual}"]`.'
        )
        return
    architecture = (config.architectures or [None])[0]
    known = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }
    remote = getattr(config, "auto_map", None)
    if config.is_encoder_decoder or (architecture not in known and not remote):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "another kind of model"
        yield (
            f"`model.model_name_or_path` must be a causal language model, got {base!r}, {kind} ({architecture}). "
            "Choose a decoder-only model."
        )


def _model_without_weights(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel | None:
    """The model on the `meta` device; `None` if its code does not support that."""
    settings = recipe.model
    is_causal = (config.architectures or [None])[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    reads_images = not is_causal and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(
                config,
                attn_implementation=settings.attn_implementation,
                trust_remote_code=settings.trust_remote_code,
            )
    except (ImportError, ValueError) as error:
        if settings.attn_implementation is None:
            raise RunError(f"The model cannot be created: {error}") from None
        raise RunError(
            one_line(
                f"`model.attn_implementation` cannot be {settings.attn_implementation!r} here: {_sentence(error)} "
                "Remove it to use the default."
            )
        ) from None
    except (RuntimeError, NotImplementedError):
        return None


def _file_mistakes(
    base: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, is_adapter: bool
) -> Iterator[str]:
    # PEFT resizes the embedding of an adapter's base model to its tokenizer
    if not is_adapter and (mistake := vocabulary_mistake(tokenizer, config)):
        yield f"`model.model_name_or_path` {base!r}: {mistake}"
    try:
        generation = GenerationConfig.from_pretrained(config._name_or_path)
    except OSError:
        return  # it is made from the model's configuration
    generation.pad_token_id = tokenizer.pad_token_id  # as TRL does; what has changed is saved only if it is valid
    try:
        with tempfile.TemporaryDirectory() as folder:
            generation.save_pretrained(folder)
    except ValueError as error:
        yield (
            f"`model.model_name_or_path` {base!r}: its `generation_config.json` cannot be saved with a checkpoint: "
            f"{_sentence(error)} Correct the file."
        )


def _training_mistakes(
    args: SFTConfig | DPOShiftConfig, config: PreTrainedConfig, model: PreTrainedModel | None
) -> Iterator[str]:
    """Mistakes of a stage with this model. Each goes on after "`stage."."""
    if args.gradient_checkpointing and model is not None and not model.supports_gradient_checkpointing:
        yield (
            f"gradient_checkpointing` must be false with this model, {type(model).__name__}, which does not support "
            "it, got True. Set it to false."
        )
    if args.router_aux_loss_coef and not hasattr(config.get_text_config(), "output_router_logits"):
        yield (
            "router_aux_loss_coef` requires a mixture of experts, which the model is not, got "
            f"{args.router_aux_loss_coef}. Remove it."
        )
    optim = OptimizerNames(args.optim).value
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except Exception as error:  # every optimizer checks for its package and its arguments in its own way
        yield (
            f"optim` cannot be {optim!r} here: {_sentence(error)} "
            + ("Check `optim_args`." if args.optim_args else "Choose another, for example `optim: adamw_torch`.")
        )
        return
    if {"params", "model", "optimizer_dict"} & set(options):
        return  # made of the model's own parameters
    try:
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
    except Exception as error:
        yield f"optim` cannot be {optim!r} here: {_sentence(error)} Check `optim_args`."
        return
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except Exception as error:
        scheduler = SchedulerType(args.lr_scheduler_type).value
        yield f"lr_scheduler_type` cannot be {scheduler!r} here: {_sentence(error)} Check `lr_scheduler_kwargs`."


def table_positions(model: PreTrainedModel) -> int | None:
    """Number of positions, if they are looked up in a table; rotary and relative ones have no end."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    ]
    # Some tables have up to two rows more, for padding
    return positions if positions and any(positions <= size <= positions + 2 for size in tables) else None


def _adapter_mistakes(model: PreTrainedModel, adapter: LoraConfig) -> Iterator[str]:
    targets = adapter.target_modules
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter)
    except (ValueError, TypeError, ImportError) as error:
        yield f"`model.lora_target_modules` {targets!r} do not fit the model: {_sentence(error)}"
        return
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        yield (
            "`model.lora_target_modules` must not include the LM head, whose adapter TRL's loss would not train, got "
            f"{targets!r}. Name the other modules."
        )


# Rows


def _batch_mistakes(args: SFTConfig | DPOShiftConfig, rows: Rows) -> Iterator[str]:
    """Mistakes of a stage with so few rows. Each goes on after "`stage."."""
    if not args.dataloader_drop_last or not isinstance(rows, Dataset):
        return
    by_tokens = args.packing if isinstance(args, SFTConfig) else args.max_tokens_per_batch
    batch = args.train_batch_size * args.world_size
    if not by_tokens and len(rows) < batch:
        yield (
            f"dataloader_drop_last` must be false with fewer train rows than a batch of {batch}, got True with "
            f"{len(rows)}. Remove it, or lower `per_device_train_batch_size`."
        )


def _lengths(rows: Dataset, answers: tuple[str, ...]) -> list[int]:
    """Tokens of the prompt and the longest of the answers, of each row."""
    table = rows.select_columns([PROMPT_IDS, *answers]).with_format("arrow")[:]
    prompt, *found = (pc.list_value_length(table[name]).to_numpy() for name in (PROMPT_IDS, *answers))
    lengths: list[int] = (prompt + np.maximum.reduce(found)).tolist()
    return lengths
