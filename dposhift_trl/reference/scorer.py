"""Scores the rows of a dataset with the reference once, and frees the reference until it is needed again."""

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..columns import REFERENCE_LOGPS
from ..console import printable
from ..scoring import PREFIX
from .cache import Scores, cached_reference_logps, validated
from .fingerprint import cache_obstacle, reference_fingerprint, reference_key


logger = logging.getLogger(__name__)

SPOT_ROWS = 4  # of scores from the cache, which are compared with the reference
# Relative and absolute difference, in nats per answer, that rounding explains: batches of another size or width round
# otherwise. bfloat16 and TF32 round a logit of 25 by 0.1; over many tokens such errors average out.
FULL_PRECISION, HALF_PRECISION = (1e-4, 1e-4), (0.02, 0.1)


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

    Scores from the cache are compared with the reference in a few rows, since code that a hash does not see, such as a
    function replaced in another module, changes scores too. A reference with hooks of its own is not cached.

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
        title (`str`, *optional*, defaults to `"Reference log-probabilities"`):
            What the progress bar is called.
    """

    def __init__(
        self,
        score_batch: Callable[[Any, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]],
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        accelerator: Accelerator,
        settings: ScoringSettings,
        show_progress: bool = True,
        title: str = "Reference log-probabilities",
    ):
        self.score_batch = score_batch
        self.collator = collator
        self.accelerator = accelerator
        self.settings = settings
        self.show_progress = show_progress
        self.title = title
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
        training, whole = model.training, range(len(dataset))
        if not isinstance(model, FSDPModule):  # which is where it has to be: on the CPU if FSDP2 offloads parameters
            move_model(model, self.accelerator.device)
        model.eval()

        def score(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
            return self._score_rows(model, dataset, rows, name, batch_size)

        if obstacle := self._cache_obstacle(model):
            if self.accelerator.is_main_process:
                logger.warning("Log-probabilities are not cached, since %s.", printable(obstacle))
            values = validated(score(whole), whole)
        else:
            values = cached_reference_logps(
                key,
                len(dataset),
                score,
                description={
                    "model": self.accelerator.unwrap_model(model).config._name_or_path,
                    "adapter": adapter,
                    "rows": name,
                },
                confirm=lambda found: self._difference(model, found, score),
            )
        model.train(training)
        for column, scores in zip(REFERENCE_LOGPS, values, strict=True):
            dataset = dataset.add_column(column, scores)
        return dataset

    def _cache_obstacle(self, model: Any) -> str | None:
        """Why the scores must not be cached, on any process."""
        obstacles = gather_object([cache_obstacle(self.accelerator.unwrap_model(model))])
        return next((obstacle for obstacle in obstacles if obstacle is not None), None)

    def _difference(
        self,
        model: Any,
        found: dict[tuple[int, int], Scores],
        score: Callable[[range], tuple[torch.Tensor, torch.Tensor]],
    ) -> str | None:
        """The largest difference of cached scores from the reference's in a few rows, or `None` if it is rounding."""
        half = self.accelerator.mixed_precision != "no"
        half |= self.accelerator.unwrap_model(model).dtype in (torch.float16, torch.bfloat16)
        half |= self.accelerator.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        relative, absolute = HALF_PRECISION if half else FULL_PRECISION
        worst, reason = 1.0, None
        for rows, values in spot_rows(found):
            for cached, now in zip(values, validated(score(rows), rows), strict=True):
                excess = np.abs(cached - now) / (absolute + relative * np.abs(now))
                if excess.max() > worst:
                    worst, at = float(excess.max()), int(excess.argmax())
                    reason = f"row {rows[at]} has {cached[at]:.6g} nats there and {now[at]:.6g} now"
        return reason

    @property
    def _precision(self) -> str:
        precision, way = self.accelerator.mixed_precision, self.accelerator.distributed_type
        # Where others autocast operations, these cast whole layers
        casts = way in (DistributedType.FSDP, DistributedType.DEEPSPEED) and precision != "no"
        return f"{precision} by {way.value}" if casts else precision

    def _arithmetic(self, model: Any) -> str:
        """Everything that determines rounding, and the version of the model's code, which a release may fix."""
        unwrapped = self.accelerator.unwrap_model(model)
        base = unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped
        return ", ".join(
            (
                self._precision,
                unwrapped.config._attn_implementation.removeprefix(PREFIX),
                self.accelerator.device.type,
                torch.get_float32_matmul_precision(),
                torch.__version__,
                transformers.__version__,
                str(getattr(unwrapped.config, "_experts_implementation", None)),
                type(base).__module__,  # contains the revision of code from the Hub
            )
        ) + (", shared prompt" if self.settings.shares_prompts else "")

    def _score_rows(
        self, model: Any, dataset: Dataset, rows: range, name: str, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A separate generator, so that training draws the same numbers whether or not the scores are cached
        loader = DataLoader(dataset.select(rows), batch_size, collate_fn=self.collator, generator=torch.Generator())
        place = f"{name}, rows {rows.start} to {rows.stop} of {len(dataset)}"
        progress = tqdm(
            prepare_data_loader(loader, self.accelerator.device, put_on_device=True),
            desc=f"{self.title} ({printable(place)})",
            disable=len(rows) <= SPOT_ROWS or not (self.show_progress and self.accelerator.is_main_process),
        )
        gather = self.accelerator.gather_for_metrics
        chosen, rejected = zip(*(gather(self.score_batch(model, batch)) for batch in progress), strict=True)
        return torch.cat(chosen), torch.cat(rejected)


def spot_rows(
    found: dict[tuple[int, int], Scores],
) -> list[tuple[range, Scores]]:
    """A few rows of what was found, spread over it, with their values."""
    parts = sorted(found)[:: math.ceil(len(found) / SPOT_ROWS)]
    spots = []
    for start, stop in parts:
        step = math.ceil((stop - start) / (SPOT_ROWS // len(parts)))
        chosen_logps, rejected_logps = found[start, stop]
        spots.append((range(start, stop, step), (chosen_logps[::step], rejected_logps[::step])))
    return spots


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
