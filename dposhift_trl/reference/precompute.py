"""Whether the reference is scored before training, and how a reference that was freed is loaded again."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..config import DPOShiftConfig
from ..scoring import PREFIX
from .fingerprint import reference_fingerprint


def precomputes_reference(args: DPOShiftConfig, train_dataset: Any, eval_dataset: Any, *, draws_noise: bool) -> bool:
    """
    Whether to score every row by the reference before training.

    If `args.precompute_ref_log_probs` is `None`, it is done if the scores are sure to stay true and are worth it: the
    data is map-style, the reference neither moves nor draws dropout, the run sees each row at least once, and stock
    DPO's arithmetic was not asked for with `shared_prompt=False`.

    Args:
        args ([`DPOShiftConfig`]):
            Settings of the run.
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, a dictionary of them, or `None`):
            The rows.
        draws_noise (`bool`):
            Whether the reference scores with dropout.
    """
    if args.precompute_ref_log_probs is not None:
        return bool(args.precompute_ref_log_probs)
    sets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
    map_style = all(isinstance(rows, Dataset) for rows in sets if rows is not None)
    if not map_style or args.sync_ref_model or draws_noise or args.shared_prompt is False:
        return False
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.num_train_epochs >= 1 if args.max_steps <= 0 else args.max_steps * batch >= len(train_dataset)


def reference_loader(
    policy: Any,
    args: DPOShiftConfig,
    dtype: torch.dtype,
    fingerprint: str,
    prepare: Callable[[Any], None],
    quantization_config: Any = None,
) -> Callable[[], Any]:
    """
    A function that loads the reference of a policy as [`~trl.DPOTrainer`] does.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            The policy, whose config names the folder or Hub repository.
        args ([`DPOShiftConfig`]):
            Settings of the run.
        dtype (`torch.dtype`):
            Of the reference's weights.
        fingerprint (`str`):
            Of the reference that was freed, as of [`reference_fingerprint`].
        prepare (`Callable`):
            What else makes the loaded model score as the freed one did.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Of the reference that was freed.

    Returns:
        `Callable[[], PreTrainedModel]`: Raises a `ValueError` if the same reference cannot be loaded any more.
    """

    def load() -> Any:
        config, fault = policy.config, "the weights there are not those that training began with"
        options = {
            "dtype": dtype,
            "attn_implementation": config._attn_implementation.removeprefix(PREFIX),
            "trust_remote_code": args.trust_remote_code,
            **(args.model_init_kwargs or {}),
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
            **({"device_map": None} if args.world_size > 1 else {}),
        }
        try:
            reference = create_model_from_path(get_config_model_id(config), **options)
            same = reference_fingerprint(reference) == fingerprint
        except (OSError, ValueError) as error:
            same, fault = False, " ".join(str(error).split()).rstrip(".")
        if not same:
            raise ValueError(
                "`eval_dataset` must be passed to the trainer if the reference can no longer be loaded from "
                f"{get_config_model_id(config)!r}: {fault}. Pass these rows to `DPOShiftTrainer`, or set "
                "`precompute_ref_log_probs=False`."
            )
        prepare(reference)
        return reference

    return load
