"""Scores the rows of a dataset with the reference once, and frees the reference until it is needed again."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..columns import REFERENCE_LOGPS
from ..scoring import PREFIX
from .cache import cached_reference_logps
from .fingerprint import reference_fingerprint, reference_key


@dataclass(frozen=True)
class ScoringSettings:
    """
    Settings that determine the scores of a row.

    Args:
        max_length (`int`, *optional*):
            Maximum length of prompt and answer together; longer rows are truncated.
        truncation_mode (`str`):
            End to keep when truncating, `"keep_start"` or `"keep_end"`.
        ld_alpha (`float`, *optional*):
            Weight of the tokens beyond the length of the shorter answer; see [`~losses.sequence_logps`].
        shares_prompts (`bool`):
            Whether the tokens that both answers share are read once, which changes the rounding.
    """

    max_length: int | None
    truncation_mode: str
    ld_alpha: float | None
    shares_prompts: bool


class ReferenceScorer:
    """
    Scores the rows of a dataset with the reference, and caches the scores on disk.

    Args:
        score_batch (`Callable`):
            Takes a model and a batch and returns the log-probabilities of the chosen and of the rejected answers, in
            nats, each of shape `(batch_size,)`.
        collator (`Callable`):
            Collates tokenized rows into a batch.
        accelerator ([`~accelerate.Accelerator`]):
            Distributes the rows among processes.
        settings ([`ScoringSettings`]):
            Settings that determine the scores.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """

    def __init__(
        self,
        score_batch: Callable[[Any, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]],
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        accelerator: Accelerator,
        settings: ScoringSettings,
        show_progress: bool = True,
    ):
        self.score_batch = score_batch
        self.collator = collator
        self.accelerator = accelerator
        self.settings = settings
        self.show_progress = show_progress
        self.fingerprint: str | None = None  # of the reference that scored last

    def score(self, model: Any, adapter: str | None, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """
        Add the columns `ref_chosen_logps` and `ref_rejected_logps` to a dataset, in nats.

        Args:
            model (`torch.nn.Module`):
                The reference, or a policy that is the reference with its adapters disabled.
            adapter (`str`, *optional*):
                Name of the adapter that belongs to the reference, a frozen copy of the trained one.
            dataset (`Dataset`):
                Tokenized rows. Existing columns with these names, such as scores of another reference, are replaced.
            name (`str`):
                Name of the dataset in the progress bar and in the cache.
            batch_size (`int`):
                Number of pairs per batch and process.

        Returns:
            `Dataset`: The dataset with the two columns.
        """
        dataset = dataset.remove_columns([column for column in REFERENCE_LOGPS if column in dataset.features])
        self.fingerprint = reference_fingerprint(self.accelerator.unwrap_model(model), adapter)
        key = reference_key(
            dataset,
            self.fingerprint,
            max_length=self.settings.max_length,
            truncation_mode=self.settings.truncation_mode,
            ld_alpha=self.settings.ld_alpha,
            precision=self._arithmetic(model),
        )
        training = model.training
        move_model(model, self.accelerator.device).eval()
        values = cached_reference_logps(
            key,
            len(dataset),
            lambda rows: self._score_rows(model, dataset, rows, name, batch_size),
            description={"model": model.config._name_or_path, "adapter": adapter, "rows": name},
        )
        model.train(training)
        for column, scores in zip(REFERENCE_LOGPS, values, strict=True):
            dataset = dataset.add_column(column, scores)
        return dataset

    def _arithmetic(self, model: Any) -> str:
        """Everything that determines rounding, and the version of the model's code, which a release may fix."""
        unwrapped = self.accelerator.unwrap_model(model)
        base = unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped
        return ", ".join(
            (
                self.accelerator.mixed_precision,
                model.config._attn_implementation.removeprefix(PREFIX),
                self.accelerator.device.type,
                torch.get_float32_matmul_precision(),
                transformers.__version__,
                type(base).__module__,  # contains the revision of code from the Hub
            )
        ) + (", shared prompt" if self.settings.shares_prompts else "")

    def _score_rows(
        self, model: Any, dataset: Dataset, rows: range, name: str, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A separate generator, so that training draws the same numbers whether or not the scores are cached
        loader = DataLoader(dataset.select(rows), batch_size, collate_fn=self.collator, generator=torch.Generator())
        progress = tqdm(
            prepare_data_loader(loader, self.accelerator.device, put_on_device=True),
            desc=f"Reference log-probabilities ({name}, rows {rows.start} to {rows.stop} of {len(dataset)})",
            disable=not (self.show_progress and self.accelerator.is_main_process),
        )
        gather = self.accelerator.gather_for_metrics
        chosen, rejected = zip(*(gather(self.score_batch(model, batch)) for batch in progress), strict=True)
        return torch.cat(chosen), torch.cat(rejected)


class StoredReference:
    """
    A reference model that is off its device while only its scores are needed, and comes back for rows without scores.

    Args:
        model (`torch.nn.Module`):
            The reference.
        device (`torch.device`):
            Device on which it scores.
        load (`Callable`, *optional*):
            Loads the same reference again. If given, `model` is freed; otherwise it is moved to the CPU.
    """

    def __init__(self, model: Any, device: torch.device, load: Callable[[], Any] | None = None):
        self.device = device
        self.load = load
        self.away = False
        self._kept = model if load is None else None

    def put_away(self) -> Any:
        """Return the model on the CPU, or `None` if it will be loaded again. Delete other references to it before."""
        self.away = True
        if self._kept is not None:
            return move_model(self._kept, "cpu")
        gc.collect()  # the fused head creates a reference cycle
        return None

    def bring_back(self) -> Any:
        """Return the reference on its device."""
        reference = move_model(self._kept if self.load is None else self.load(), self.device)
        self.away = False
        return reference


def move_model(model: Any, device: torch.device | str) -> Any:
    """Move a model, unless Accelerate has distributed it over several devices or it is quantized."""
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return model
    return model.to(device)
