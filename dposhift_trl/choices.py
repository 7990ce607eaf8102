"""The words that settings may hold, where these are a closed set."""

import contextlib
import dataclasses
import difflib
import io
import types
import typing
from collections.abc import Collection, Iterator
from enum import Enum
from typing import Any


# With `WANDB_MODE=offline`, the import prints that, which the header of each stage says, too
with contextlib.redirect_stdout(io.StringIO()):
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


# What neither the type of a field nor its metadata tells
CHOICES: dict[str, Collection[str]] = {
    "loss_type": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
        *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "report_to": (*INTEGRATION_TO_CALLBACK, "all", "none"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "include_for_metrics": ("inputs", "loss"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "lora_task_type": ("CAUSAL_LM",),
    "bnb_4bit_quant_storage": ("uint8", "float16", "bfloat16", "float32"),
}


def did_you_mean(word: Any, known: Collection[str]) -> str:
    """A question for the nearest known word, to end a message with; empty if none is near."""
    nearest = difflib.get_close_matches(str(word), known, n=1)
    return f" Did you mean `{nearest[0]}`?" if nearest else ""


def choices(field: dataclasses.Field, hint: Any) -> Collection[str]:
    """Words that a field of a dataclass may hold, by its metadata or type; empty if any are accepted."""
    return (
        field.metadata.get("choices")
        or [member.value for cls in _types(hint) if issubclass(cls, Enum) for member in cls]
        or CHOICES.get(field.name, ())
    )


def choice_mistake(known: Collection[str], value: Any) -> str | None:
    """Rule, value and remedy, to follow the name of the setting, if a word, or one of several, is not known."""
    words = value if isinstance(value, list) else [value]
    unknown = [word for word in words if isinstance(word, str) and word not in known]
    if not known or not unknown:
        return None
    return f"must be one of {', '.join(known)}, got {unknown[0]!r}.{did_you_mean(unknown[0], known)}"


def _types(hint: Any) -> Iterator[type]:
    """The classes in a type, without what lists and mappings hold."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for argument in typing.get_args(hint):
            yield from _types(argument)
    elif isinstance(hint, type):
        yield hint
