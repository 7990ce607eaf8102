"""Where a trainer's reference log-probabilities come from: scored before training, or batch by batch."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, use_adapter

from ..columns import REFERENCE_LOGPS, SHARED_PROMPT
from ..reference.precompute import precomputes_reference, reference_loader
from ..reference.scorer import ReferenceScorer, ScoringSettings, StoredReference
from ..scoring import PairLayout, enable_shared_prompt
from .checks import TrainingStopped, check_rows_left
from .collator import PairCollator
from .sharded import divided, release


def lack_scores(dataset: Any) -> bool:
    """Whether the rows of a dataset have no scores of the reference."""
    return isinstance(dataset, (Dataset, IterableDataset)) and REFERENCE_LOGPS[0] not in (dataset.column_names or ())


class References:
    """
    The reference of a [`DPOShiftTrainer`]: scores rows before training, frees the model, and brings it back.

    The one part that sets the trainer's `ref_model` and `precompute_ref_logps` and adds scores to its datasets.
    FSDP1 and data collators other than TRL's keep the way of [`~trl.DPOTrainer`].

    Args:
        trainer ([`DPOShiftTrainer`]):
            The trainer, which need not be built yet.
    """

    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer
        self.scorer: ReferenceScorer | None = None  # made by `prepare`, if rows are scored before training
        self.stored: StoredReference | None = None
        self._loads_again = False  # whether that comes from its folder

    def prepare(self, policy: Any, given: Any, quantization_config: Any) -> None:
        """
        Score every row by the reference, if that pays or was asked for, and put the model away.

        Args:
            policy (`torch.nn.Module`):
                The model to train as it can be run now, which is the reference if there is no other.
            given ([`~transformers.PreTrainedModel`], *optional*):
                The `ref_model` that was passed to the trainer.
            quantization_config (`BitsAndBytesConfig`, *optional*):
                Of policy and reference.
        """
        trainer, args = self.trainer, self.trainer.args
        rows = trainer.train_dataset, trainer.eval_dataset
        trainer.precompute_ref_logps = bool(args.precompute_ref_log_probs)
        noisy = is_peft_model(trainer.model) if given is None else given.training
        if not self._supported or not precomputes_reference(
            args, *rows, draws_noise=noisy and not args.disable_dropout
        ):
            return
        if args.precompute_ref_log_probs is None and trainer.is_fsdp_enabled and trainer.ref_model is None:
            return  # an adapter's base, of which each device would have to hold all
        trainer.precompute_ref_logps = True
        settings = ScoringSettings(args.max_length, args.truncation_mode, trainer.ld_alpha, trainer.shares_prompts)
        self.scorer = ReferenceScorer(
            trainer.compute_ref_log_probs,
            trainer.data_collator,
            trainer.accelerator,
            settings,
            show_progress=not args.disable_tqdm,
        )
        sizes = args.per_device_train_batch_size, args.per_device_eval_batch_size
        train_size, eval_size = (args.precompute_ref_batch_size or size for size in sizes)
        trainer.train_dataset = self.score(rows[0], "train", train_size, policy)
        if isinstance(rows[1], dict):
            trainer.eval_dataset = {
                name: self.score(split, name, eval_size, policy) for name, split in rows[1].items()
            }
        elif rows[1] is not None:
            trainer.eval_dataset = self.score(rows[1], "eval", eval_size, policy)
        self._put_away(given, quantization_config)

    def serves(self, dataset: Any) -> bool:
        """Whether [`References.score`] takes a dataset, and not [`~trl.DPOTrainer`]."""
        if self.scorer is None:  # in `DPOTrainer.__init__`, or never to be made
            return isinstance(dataset, Dataset) and self._supported
        return isinstance(dataset, Dataset) or self.trainer.args.precompute_ref_log_probs is None

    def score(self, dataset: Any, name: str, batch_size: int, policy: Any = None) -> Any:
        """
        The dataset with the reference's scores in its columns; unchanged if they are computed later.

        Args:
            dataset (`Dataset` or `IterableDataset`):
                Tokenized rows. The rows of an iterable dataset are scored batch by batch.
            name (`str`):
                What to call the dataset in the progress bar and in the cache.
            batch_size (`int`):
                Pairs scored at a time by each process.
            policy (`torch.nn.Module`, *optional*):
                The model to train as it can be run now; by default the trainer's own, once it trains.
        """
        if self.scorer is None or isinstance(dataset, IterableDataset):
            return dataset
        trainer = self.trainer
        check_rows_left(dataset, name, trainer.args.max_length)
        model = (policy or trainer.model) if trainer.ref_model is None else trainer.ref_model
        adapters = getattr(trainer.accelerator.unwrap_model(model), "peft_config", {})
        adapter = "ref" if trainer.ref_model is None and "ref" in adapters else None
        return self.scorer.score(model, adapter, dataset, name, batch_size)

    def of_batch(self, inputs: dict[str, Any], layout: PairLayout | None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The reference's log-probabilities of a batch.

        Args:
            inputs (`dict[str, Any]`):
                The batch, with the scores if they were computed before training.
            layout ([`~scoring.PairLayout`], *optional*):
                The batch laid out so that shared tokens are read once.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Of the chosen and of the rejected answers, in nats. Shape:
                `(batch_size,)` each.

        Raises:
            TrainingStopped: If the batch has lost the scores and the reference is gone.
        """
        trainer = self.trainer
        if trainer.precompute_ref_logps and REFERENCE_LOGPS[0] in inputs:
            return inputs[REFERENCE_LOGPS[0]], inputs[REFERENCE_LOGPS[1]]
        if trainer.precompute_ref_logps and trainer.ref_model is None and not is_peft_model(trainer.model):
            raise TrainingStopped(
                "The batch holds no `ref_chosen_logps` and `ref_rejected_logps`, although the reference was scored "
                "before training and is gone. Let the data collator keep them, or set "
                "`precompute_ref_log_probs=False`."
            )
        reference = trainer.model if trainer.ref_model is None else trainer.ref_model
        return trainer.compute_ref_log_probs(reference, {**inputs, SHARED_PROMPT: layout})

    @contextlib.contextmanager
    def at_hand(self, needed: bool) -> Iterator[None]:
        """Bring the reference back for a while, if it is needed and was put away."""
        if self.stored is None or not self.stored.away or not needed:
            yield
            return
        try:
            self.trainer.ref_model = self.stored.bring_back()
            yield
        finally:
            self._release(self.trainer.ref_model)
            self.trainer.ref_model = None
            self.trainer.ref_model = self.stored.put_away()

    @contextlib.contextmanager
    def model(self) -> Iterator[Any]:
        """The reference to call, brought back for a while, or the policy without its adapter. `None` if it is gone."""
        with self.at_hand(needed=True):
            reference, policy = self.trainer.ref_model, self.trainer.accelerator.unwrap_model(self.trainer.model)
            if reference is not None or not is_peft_model(policy):
                yield reference
                return
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                yield policy

    @property
    def _supported(self) -> bool:
        collator = self.trainer.data_collator
        collator = collator.collator if isinstance(collator, PairCollator) else collator
        return isinstance(collator, DataCollatorForPreference) and not self.trainer.flattens_weights

    def _put_away(self, given: Any, quantization_config: Any) -> None:
        trainer, reference, load = self.trainer, self.trainer.ref_model, None
        if reference is None:
            return
        if given is None:
            assert self.scorer is not None
            load = reference_loader(
                trainer.model,
                trainer.args,
                trainer.accelerator.unwrap_model(reference).dtype,
                str(self.scorer.fingerprint),
                self._prepare_loaded,
                quantization_config,
            )
        elif trainer.is_deepspeed_enabled:  # whose engine would not find its way between two models later
            load = functools.partial(divided, trainer.accelerator.unwrap_model(reference), trainer.accelerator)
        self.stored = StoredReference(reference, next(reference.parameters()).device, load)
        self._loads_again = given is None
        self._release(reference)
        trainer.ref_model = reference = None
        trainer.accelerator.free_memory()  # which holds the model too
        trainer.ref_model = self.stored.put_away()

    def _release(self, reference: Any) -> None:
        if self.trainer.is_deepspeed_enabled and reference is not None:
            release(reference, keep_weights=not self._loads_again)

    def _prepare_loaded(self, reference: Any) -> Any:
        add_fused_lm_head(reference)
        if self.trainer.shares_prompts:
            enable_shared_prompt(reference, like=self.trainer.accelerator.unwrap_model(self.trainer.model))
        return divided(reference, self.trainer.accelerator)
