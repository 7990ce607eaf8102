"""Hashes of everything that determines reference log-probabilities: the weights, the rows and how they are scored."""

import contextlib
import functools
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from accelerate.utils import gather_object, is_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module as torch_module

from ..columns import TOKEN_COLUMNS


if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 2  # part of every key; increase it if the meaning of a score or the layout of the files changes

# Settings of a model or an adapter that saving or training may change without changing the model's outputs
IRRELEVANT_SETTINGS = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout"),
    *("peft_version", "revision", "task_type"),
}


# Numbers that a module holds for training, or changes when it is used; the last two are DeepSpeed's
IRRELEVANT_NUMBERS = re.compile(r"^_|^p$|drop|^max_seq_len_cached$|^ds_|^applied_pre_backward_ref_cnt$")


# Packages whose hooks and forwards change no score, or are described by the key
KNOWN = {"accelerate", "bitsandbytes", "deepspeed", "dposhift_trl", "peft", "torch", "transformers", "trl"}


def reference_fingerprint(model: torch.nn.Module, adapter: str | None = None) -> str:
    """
    Hash the configuration of a reference, its weights and their dtypes, its code, and the active adapter.

    The code is the source of every module's class, except for PyTorch's, and the numbers that each module holds, such
    as the epsilon of a norm. What it calls in other files is not included; see [`~scorer.ReferenceScorer`].

    A model without PEFT has the same fingerprint as a PEFT model with disabled adapters. Tied weights are read once.
    Persistent buffers are included, since quantized weights store their scales there. Other buffers are not: they
    follow from the configuration, and some of them (dynamic rotary embeddings) change when the model is used.

    All processes must call this function, because the weights may be sharded (FSDP2, ZeRO-3). One tensor is gathered
    at a time.

    Args:
        model (`torch.nn.Module`):
            The reference, not wrapped for training.
        adapter (`str`, *optional*):
            Name of the active PEFT adapter. `None` if adapters are disabled.

    Returns:
        `str`: 32 hexadecimal digits, the same on every process.

    Raises:
        ValueError: On every process, if on any of them the model has no such adapter, an adapter is merged into the
            weights, or weights are not in memory.
    """
    try:
        outcome: Any = stable_hash(_description(model, adapter))
    except ValueError as error:
        outcome = error
    outcomes = gather_object([outcome])
    for outcome in outcomes:
        if isinstance(outcome, ValueError):
            raise outcome
    # With tensor parallelism, each process has its own slice of some weights
    return stable_hash(sorted(set(outcomes)))


def _description(model: Any, adapter: str | None) -> list[Any]:
    adapters: dict[str, Any] = model.peft_config if is_peft_model(model) else {}
    if adapter is not None and adapter not in adapters:
        raise ValueError(f"`adapter` must be one of {sorted(adapters)} or None, got {adapter!r}.")
    base: Any = model
    wrappers: dict[str, str] = {}
    if adapters:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict

        base = model.get_base_model()
        for name, module in base.named_modules():
            if getattr(module, "merged", False):
                raise ValueError(
                    f"`model` must not have adapters merged into its weights, got one in {name!r}. Call "
                    "`model.unmerge_adapter()`, or pass the result of `model.merge_and_unload()`."
                )
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                wrappers[name] = "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
    state = {
        bare: value
        for name, value in base.state_dict(keep_vars=True).items()
        if (bare := _bare_name(name, wrappers)) is not None
    }
    modules = {
        bare: module
        for name, module in base.named_modules()
        if name not in wrappers and (bare := _bare_name(name, wrappers)) is not None
    }
    description = [_relevant_settings(base.config.to_dict()), _digests(state), *_code(modules)]
    if adapter is not None:
        # `save_embedding_layers=False`, because looking up whether the embeddings were resized would query the Hub
        whole = model.state_dict(keep_vars=True)
        state = get_peft_model_state_dict(model, whole, adapter, save_embedding_layers=False)
        description += [_relevant_settings(adapters[adapter].to_dict()), _digests(state)]
    return description


def reference_key(
    dataset: "Dataset",
    fingerprint: str,
    *,
    max_length: int | None,
    truncation_mode: str,
    ld_alpha: float | None,
    precision: str,
) -> str:
    """
    Hash everything that determines the reference log-probabilities of a dataset, and nothing else.

    The key does not depend on lambda, beta, the learning rate, the output folder, the batch size, padding or other
    columns of the dataset.

    Args:
        dataset (`Dataset`):
            Tokenized rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        fingerprint (`str`):
            Fingerprint of the reference, from [`reference_fingerprint`].
        max_length (`int`, *optional*):
            Maximum length of prompt and answer together; longer rows are truncated.
        truncation_mode (`str`):
            End to keep when truncating, `"keep_start"` or `"keep_end"`. Ignored if `max_length` is `None`.
        ld_alpha (`float`, *optional*):
            Weight of the tokens beyond the length of the shorter answer; see [`~losses.sequence_logps`].
        precision (`str`):
            Everything that determines rounding except the dtypes of the weights, such as the autocast dtype.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digests = {column: (xxhash.xxh3_128(), xxhash.xxh3_128()) for column in TOKEN_COLUMNS}
    for table in dataset.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        for column, (lengths, ids) in digests.items():
            lengths.update(pc.list_value_length(table[column]).cast(pa.int64()).to_numpy().tobytes())
            ids.update(pc.list_flatten(table[column]).cast(pa.int64()).to_numpy().tobytes())
    return stable_hash(
        {
            "format": FORMAT,
            "rows": {column: [digest.hexdigest() for digest in pair] for column, pair in digests.items()},
            "fingerprint": fingerprint,
            "max_length": max_length,
            "truncation_mode": None if max_length is None else truncation_mode,
            "ld_alpha": None if ld_alpha is None else float(ld_alpha),
            "precision": precision,
        }
    )


def stable_hash(value: Any) -> str:
    """Hash plain values. The hash is the same in every process and does not depend on the order of keys and sets."""
    text = json.dumps(value, sort_keys=True, default=lambda x: sorted(map(str, x)) if isinstance(x, set) else str(x))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _relevant_settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(name): _relevant_settings(inner) for name, inner in value.items() if name not in IRRELEVANT_SETTINGS
        }
    return value


def _bare_name(name: str, wrappers: dict[str, str]) -> str | None:
    """Name of a tensor in the model without PEFT, or `None` for a tensor of an adapter."""
    parts, bare = name.split("."), []
    for depth, part in enumerate(parts):
        inner = wrappers.get(".".join(parts[:depth]))
        if inner is None:
            bare.append(part)
        elif part != inner:
            return None
    return ".".join(bare)


def _code(modules: dict[str, torch.nn.Module]) -> list[Any]:
    """Class and numbers of each module, and the sources of the classes."""
    described = [
        [
            name,
            next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule)).__qualname__,
            {
                key: x
                for key, x in vars(module).items()
                if type(x) in (int, float) and not IRRELEVANT_NUMBERS.search(key)
            },
        ]
        for name, module in sorted(modules.items())
    ]
    classes = {cls for module in modules.values() for cls in type(module).__mro__}
    return [described, sorted({digest for cls in classes if (digest := source_digest(cls)) is not None})]


def source_digest(cls: type) -> str | None:
    """Hash of the file that a class is defined in; `None` for PyTorch's classes, and for a class without a file."""
    if cls.__module__.partition(".")[0] in ("builtins", "torch"):
        return None
    try:
        return xxhash.xxh3_128_hexdigest(Path(inspect.getfile(cls)).read_bytes())
    except (TypeError, OSError):
        return None


def cache_obstacle(model: torch.nn.Module) -> str | None:
    """
    Why the scores of a reference depend on more than its fingerprint, or `None` if they do not.

    Args:
        model (`torch.nn.Module`):
            The reference, not wrapped for training. Hooks and forwards of the libraries that train it are known.
    """
    hooks: list[Any] = [*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()]
    for name, module in model.named_modules():
        hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks += [vars(module)["forward"]] if "forward" in vars(module) else []
        if foreign := next((hook for hook in hooks if _origin(hook) not in KNOWN), None):
            what = getattr(foreign, "__qualname__", type(foreign).__qualname__)
            return f"`{name or type(module).__name__}` runs a hook or a forward of its own, `{what}`"
        for cls in type(module).__mro__:
            if cls.__module__.partition(".")[0] not in ("builtins", "torch") and source_digest(cls) is None:
                return f"the source of `{cls.__qualname__}` is not in a file"
        hooks.clear()
    return None


def _origin(function: Any) -> str:
    """The top-level package that a hook or a forward was written in, whatever it says that it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    module = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return str(module).partition(".")[0]


def _digests(state: dict[str, Any]) -> list[Any]:
    known: dict[int, Any] = {}
    for value in state.values():
        if id(value) not in known:
            known[id(value)] = _digest(value)
    return [[name, known[id(state[name])]] for name in sorted(state)]


def _digest(value: Any) -> list[Any]:
    """Shape, dtype and hash of the bytes of a tensor, which is read in pieces from any device."""
    if not torch.is_tensor(value):
        return [xxhash.xxh3_128_hexdigest(pickle.dumps(value))]
    gathered: Any = contextlib.nullcontext()
    if hasattr(value, "ds_id"):  # ZeRO-3
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([value])
    with gathered, torch.no_grad():
        if hasattr(value, "full_tensor"):  # FSDP2
            value = value.full_tensor()
        if value.is_meta:
            raise ValueError(
                "`model` must have its weights in memory, got weights on the meta device. Load the model without "
                "offloading."
            )
        form = [list(value.shape), str(value.dtype)]
        if hasattr(value, "__tensor_flatten__"):  # torchao: a wrapper around plain tensors
            names, context = value.__tensor_flatten__()
            return [*form, context, [[name, _digest(getattr(value, name))] for name in names]]
        digest = xxhash.xxh3_128()
        for piece in value.detach().reshape(-1).view(torch.uint8).split(1 << 26):
            digest.update(piece.cpu().numpy())
        return [*form, digest.hexdigest()]
