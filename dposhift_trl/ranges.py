"""The numbers that settings may hold: one table, for every section of a recipe and for `DPOShiftConfig`."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


# Training computes in float32 at best: smaller numbers become 0 in it, and larger ones infinite
SMALLEST, LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
# Below this share, float32 rounds the rejected log-ratio away when it is subtracted from the chosen one
SMALLEST_LAMBDA = 1e-7


class Rule(NamedTuple):
    """
    A set of numbers: in words, which follow "must be", as a test, as keywords of a JSON schema, and as the number of
    bits of its integers.
    """

    words: str
    holds: Callable[[Any], bool]
    schema: dict[str, Any]
    bits: int = 31


BETWEEN_0_AND_1 = {"exclusiveMinimum": 0, "exclusiveMaximum": 1}
WHOLE_NUMBER = {"minimum": 1, "multipleOf": 1}

ANY = Rule("finite", lambda x: abs(x) < math.inf, {})
NON_NEGATIVE = Rule("finite and at least 0", lambda x: 0 <= x < math.inf, {"minimum": 0})
POSITIVE = Rule("finite and greater than 0", lambda x: 0 < x < math.inf, {"exclusiveMinimum": 0})
COUNT = Rule("at least 1", lambda x: x >= 1, {"minimum": 1})
COUNT_OR_NONE = Rule("at least 0", lambda x: x >= 0, {"minimum": 0})
SHARE = Rule("at least 0 and at most 1", lambda x: 0 <= x <= 1, {"minimum": 0, "maximum": 1})
PROPER_SHARE = Rule("at least 0 and less than 1", lambda x: 0 <= x < 1, {"minimum": 0, "exclusiveMaximum": 1})
STEPS = Rule(
    "a number of steps, or a share of them between 0 and 1",
    lambda x: 0 < x < 1 or (x >= 1 and x % 1 == 0),
    {"anyOf": [BETWEEN_0_AND_1, WHOLE_NUMBER]},
)
SEED = Rule("at least 0 and less than 2**32", lambda x: 0 <= x < 2**32, {"minimum": 0, "maximum": 2**32 - 1}, bits=32)
ROWS = COUNT._replace(bits=63)
LAMBDA = Rule("finite and at least 1e-7", lambda x: SMALLEST_LAMBDA <= x < math.inf, {"minimum": SMALLEST_LAMBDA})


@dataclass(frozen=True)
class Range:
    """
    What one setting may hold.

    Args:
        rule ([`Rule`]):
            The numbers that are accepted. Each number of a list must be one.
        advice (`str`):
            What to write instead.
    """

    rule: Rule
    advice: str


def _write(rule: Rule, **examples: float | list[float]) -> dict[str, Range]:
    """Ranges of settings that share a rule, each with a value to write instead."""
    return {name: Range(rule, f"Write for example `{name}: {value}`.") for name, value in examples.items()}


RANGES: dict[str, Range] = {
    # How much is read, and how often
    **_write(COUNT, per_device_train_batch_size=8, per_device_eval_batch_size=8, gradient_accumulation_steps=1),
    **_write(COUNT, eval_accumulation_steps=10, torch_empty_cache_steps=10, precompute_ref_batch_size=8),
    **_write(COUNT, max_length=1024, ref_model_sync_steps=512),
    **_write(COUNT, dataset_num_proc=1, dataloader_prefetch_factor=2, ddp_bucket_cap_mb=25, ddp_timeout=1800),
    **_write(COUNT_OR_NONE, dataloader_num_workers=0, sample_prompts=8),
    **_write(POSITIVE, num_train_epochs=1),
    **_write(STEPS, logging_steps=10, eval_steps=0.1, save_steps=0.1),
    **_write(NON_NEGATIVE, eval_delay=0),
    "warmup_steps": Range(
        Rule(
            "0, a number of steps, or a share of them between 0 and 1",
            lambda x: x == 0 or STEPS.holds(x),
            {"anyOf": [{"const": 0}, BETWEEN_0_AND_1, WHOLE_NUMBER]},
        ),
        "Write for example `warmup_steps: 0.1`.",
    ),
    "max_steps": Range(
        Rule(
            "at least 1, or -1 to train for `num_train_epochs`",
            lambda x: x == -1 or x >= 1,
            {"anyOf": [{"const": -1}, {"minimum": 1}]},
        ),
        "Write for example `max_steps: 1000`.",
    ),
    "pad_to_multiple_of": Range(
        Rule("at least 1 and at most 65536", lambda x: 1 <= x <= 2**16, {"minimum": 1, "maximum": 2**16}),
        "Write for example `pad_to_multiple_of: 8`.",
    ),
    "save_total_limit": Range(COUNT, "Write null to keep all checkpoints."),
    "max_tokens_per_batch": Range(
        Rule("a positive integer", lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1, WHOLE_NUMBER),
        "Write for example `max_tokens_per_batch: 4096`, or remove it.",
    ),
    # Optimizer
    **_write(NON_NEGATIVE, learning_rate=1e-6, weight_decay=0.0, max_grad_norm=1.0, neftune_noise_alpha=5),
    **_write(PROPER_SHARE, adam_beta1=0.9, adam_beta2=0.999),
    **_write(POSITIVE, adam_epsilon=1e-8),
    # Loss
    **_write(POSITIVE, beta=0.1, discopop_tau=0.05),
    **_write(ANY, f_alpha_divergence_coef=0.5, lambda_target=0.0),
    **_write(NON_NEGATIVE, loss_weights=[1.0, 0.1], router_aux_loss_coef=0.001),
    **_write(SHARE, ld_alpha=0.5, ref_model_mixup_alpha=0.6),
    **_write(PROPER_SHARE, label_smoothing_factor=0.1),
    "label_smoothing": Range(
        Rule("at least 0 and less than 0.5", lambda x: 0 <= x < 0.5, {"minimum": 0, "exclusiveMaximum": 0.5}),
        "It is the share of pairs that are labeled the wrong way round; from 0.5 on, the rejected answers would be "
        "the better ones. Write for example `label_smoothing: 0.1`.",
    ),
    **dict.fromkeys(
        ("shift_lambda", "lambda_min", "lambda_max"),
        Range(
            LAMBDA,
            "At 0, the loss ignores the rejected answers, and below 1e-7 float32 rounds them away; the paper uses 0.5 "
            "to 1.",
        ),
    ),
    # LoRA
    **_write(COUNT, lora_r=16, lora_alpha=32),
    **_write(PROPER_SHARE, lora_dropout=0.05),
    # Data
    "weight": Range(POSITIVE, "To exclude the source, remove it."),
    "eval_size": Range(
        Rule(
            "a positive number of rows or a share between 0 and 1",
            lambda x: 0 < x < 1 if isinstance(x, float) else x >= 1,
            {"anyOf": [BETWEEN_0_AND_1, WHOLE_NUMBER]},
            bits=63,
        ),
        "Write for example `eval_size: 0.05`.",
    ),
    **dict.fromkeys(("max_train_rows", "max_eval_rows"), Range(ROWS, "Remove it to use all rows.")),
    "shuffle_buffer": Range(
        COUNT_OR_NONE, "Write for example `shuffle_buffer: 1000`, or 0 to train in the order of the files."
    ),
    **_write(POSITIVE, max_expanded_gib=4),
    "min_rows_kept": Range(
        Rule("greater than 0 and at most 1", lambda x: 0 < x <= 1, {"exclusiveMinimum": 0, "maximum": 1}),
        "Write for example 0.5 to stop if the audit drops more than half of a split.",
    ),
    # Processes
    "local_rank": Range(Rule("at least -1", lambda x: x >= -1, {"minimum": -1}), "Remove it; the launcher sets it."),
    **_write(SEED, seed=42, data_seed=42),
}


def range_mistake(name: str, value: Any) -> str | None:
    """
    What is wrong with the number, or one of the numbers, of a setting.

    Args:
        name (`str`):
            Setting, one of `RANGES`.
        value (`Any`):
            Its value. What is not a number has no range.

    Returns:
        `str`, *optional*: Rule, value and remedy, to follow the name of the setting.

    Example:

    ```python
    >>> range_mistake("beta", 0)
    'must be finite and greater than 0, got 0. Write for example `beta: 0.1`.'
    ```
    """
    allowed = RANGES[name]
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if not allowed.rule.holds(number):
            return f"must be {allowed.rule.words}, got {number!r}. {allowed.advice}"
        if isinstance(number, int) and number.bit_length() > allowed.rule.bits:
            return f"must be less than 2**{allowed.rule.bits}, got {number!r}. {allowed.advice}"
        if number and not SMALLEST <= abs(number) <= LARGEST:
            held = "a number that float32 can hold, 0 or from 1.2e-38 to 3.4e38 in size"
            return f"must be {held}, got {number!r}. {allowed.advice}"
    return None


def check_ranges(settings: Any) -> None:
    """
    Check every number of a dataclass.

    Raises:
        ValueError: With one line for each number that is out of range.
    """
    found = {
        field.name: range_mistake(field.name, getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if field.name in RANGES
    }
    mistakes = [f"`{name}` {mistake}" for name, mistake in found.items() if mistake]
    if mistakes:
        raise ValueError("\n".join(mistakes))
