"""What FSDP2 and ZeRO change for a trainer: how a model is loaded, in which dtype it answers, and what is refused."""

import dataclasses
from typing import Any

from accelerate import Accelerator


def check_parallelism(accelerator: Accelerator) -> None:
    """
    Check that no sequence is divided among processes, which [`~trl.DPOTrainer`] does not support.

    Raises:
        ValueError: If context or sequence parallelism is on.
    """
    parallelism = accelerator.parallelism_config
    for name in ("cp_size", "sp_size"):
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise ValueError(
                f"`parallelism_config.{name}` must be 1, got {size}: `DPOTrainer` does not divide sequences among "
                "processes. Set it to 1, and lower `max_length` or shard the model further to save memory."
            )


def keep_scores_unrounded(accelerator: Accelerator) -> None:
    """
    Let FSDP2 return a model's outputs in the dtype in which they were computed.

    By default it rounds them to the dtype of mixed precision. In bfloat16 the log-probability of an answer is off by up
    to half a nat, so that the loss would not start at log 2.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
