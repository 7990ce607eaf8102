"""Whether to score the reference before training, and how to load a freed reference again."""

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
    Whether to score every row with the reference before training.

    If `args.precompute_ref_log_probs` is `None`, the rows are scored if the scores stay valid and save time: the
    datasets are map-style, the reference is frozen and has no dropout, the run sees each row at least once, and
    `shared_prompt` is not `False`, which selects the arithmetic of [`~trl.DPOTrainer`].

    Args:
        args ([`DPOShiftConfig`]):
            Settings of the run.
        train_dataset (`Dataset` or `IterableDataset`):
            Training rows.
        eval_dataset (`Dataset`, `IterableDataset` or a dictionary of them, *optional*):
            Evaluation rows.
        draws_noise (`bool`):
            Whether the reference scores with dropout.
    """
    if args.precompute_ref_log_probs is not None:
        return bool(args.precompute_ref_log_probs)
    datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
    map_style = all(isinstance(rows, Dataset) for rows in datasets if rows is not None)
    if not map_style or args.sync_ref_model or draws_noise or args.shared_prompt is False:
        return False
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.num_train_epochs >= 1 if args.max_steps <= 0 else args.max_steps * batch >= len(train_dataset)


def reference_loader(
    policy: Any,
    args: DPOShiftConfig,
    dtype: torch.dtype,
    fingerprint: str,
    prepare: Callable[[Any], Any],
    quantization_config: Any = None,
) -> Callable[[], Any]:
    """
    Create a function that loads the reference of a policy again, as [`~trl.DPOTrainer`] loads it.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            The policy, whose config contains the path or Hub id of the reference.
        args ([`DPOShiftConfig`]):
            Settings of the run.
        dtype (`torch.dtype`):
            Dtype of the weights of the reference.
        fingerprint (`str`):
            Fingerprint of the freed reference, from [`reference_fingerprint`].
        prepare (`Callable`):
            Takes the loaded model and returns it ready to score as the freed one did.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantization of the freed reference.

    Returns:
        `Callable[[], PreTrainedModel]`: Loads the reference. Raises a `ValueError` if it can no longer be loaded, or
        has changed.
    """

    def load() -> Any:
        config, problem = policy.config, "its weights are no longer those that training started with"
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
            same, problem = False, " ".join(str(error).split()).rstrip(".")
        if not same:
            raise ValueError(
                "`eval_dataset` must be passed to the trainer if the reference can no longer be loaded from "
                f"{get_config_model_id(config)!r}: {problem}. Pass these rows to `DPOShiftTrainer`, or set "
                "`precompute_ref_log_probs=False`."
            )
        return prepare(reference)

    return load
