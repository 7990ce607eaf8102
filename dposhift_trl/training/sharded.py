"""What FSDP2 and DeepSpeed change for a trainer, where Trainer and TRL leave it wrong or undone."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from trl.models import prepare_deepspeed, prepare_fsdp

from ..scoring.support import causal_lm_of


class Sharded(Trainer):
    """Trainer whose models FSDP2 or DeepSpeed may divide among processes."""

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed divides the model among processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def flattens_weights(self) -> bool:
        """Whether FSDP1 keeps the weights of several modules as one tensor, so that nothing else can read them."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None and plugin.fsdp_version == 1

    def create_accelerator_and_postprocess(self) -> None:
        """Called before TRL loads the reference, which it would place with `device_map="auto"` under FSDP."""
        super().create_accelerator_and_postprocess()
        check_parallelism(self.accelerator)
        keep_scores_unrounded(self.accelerator)
        # TRL makes checkpointing reentrant for adapters under ZeRO-3, by a name that transformers 5.24 no longer reads
        if self.args.gradient_checkpointing_kwargs and not getattr(self.args, "activation_checkpointing_kwargs", True):
            self.args.activation_checkpointing_kwargs = self.args.gradient_checkpointing_kwargs
        if self.is_fsdp_enabled:
            self.args.model_init_kwargs = {**(self.args.model_init_kwargs or {}), "device_map": None}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """
        Makes the weights of the LM head whole before FSDP2 runs the model.

        TRL's fused head reads them without calling their module. If they are a group of their own, TRL gathers them
        itself, and each process would keep the gradient of its own rows.
        """
        head = causal_lm_of(self.accelerator.unwrap_model(self.model)).get_output_embeddings()
        if not isinstance(head, FSDPModule):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        head.unshard()
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:  # otherwise FSDP2 does so after the backward pass
            head.reshard()
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a whole model also with `SHARDED_STATE_DICT`, with which Trainer saves none; checkpoints stay so."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or _internal_call:
            if output_dir is not None:  # a best checkpoint that has no folder yet is not noted as such
                Path(output_dir).mkdir(parents=True, exist_ok=True)
            return super().save_model(output_dir, _internal_call)
        before = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(before)


def check_parallelism(accelerator: Accelerator) -> None:
    """
    Check that no sequence is divided among processes, which [`~trl.DPOTrainer`] does not support.

    Raises:
        ValueError: If context or sequence parallelism is on.
    """
    parallelism = accelerator.parallelism_config
    for name, kind in (("cp_size", "context"), ("sp_size", "sequence")):
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise ValueError(
                f"`parallelism_config.{name}` must be 1, got {size}: {kind} parallelism is not supported with DPO. "
                "Set it to 1; to save memory, lower `max_length` or shard the model over more processes."
            )


def keep_scores_unrounded(accelerator: Accelerator) -> None:
    """
    Let FSDP2 return a model's outputs in the dtype in which they were computed.

    By default it rounds them to the dtype of mixed precision. In bfloat16 the log-probability of an answer is off by
    up to half a nat, so that the loss would not start at log 2.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


@contextlib.contextmanager
def runnable(model: Any, accelerator: Accelerator, *, shards: bool) -> Iterator[Any]:
    """
    A model that can be run before training, in an engine of its own under DeepSpeed, which ends with the context.

    Args:
        model (`torch.nn.Module`):
            The policy, not wrapped for training. With ZeRO-3 each process holds a part of its weights.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.
        shards (`bool`):
            Whether DeepSpeed is on.
    """
    if not shards:
        yield model
        return
    engine = prepare_deepspeed(model, accelerator)
    try:
        yield engine
    finally:
        engine.destroy()


def divided(reference: Any, accelerator: Accelerator) -> Any:
    """A reference that was just loaded, as [`~trl.DPOTrainer`] divides it among processes."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(reference, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(reference, accelerator)
    return reference
