"""The log-probabilities that one model gives the answers of preference pairs."""

import contextlib
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from ..columns import REFERENCE_LOGPS, SHARED_PROMPT
from ..losses import sequence_logps
from ..reference.scorer import ReferenceScorer, ScoringSettings
from ..scoring import shared_prompt_scores
from ..training.collator import PairCollator
from ..training.sharing import prepare_shared_prompt
from .settings import DiagnoseSettings


class AnswerScorer:
    """
    Scores pairs with one model after the other, as [`DPOShiftTrainer`] scores them with policy and reference.

    Tokens that both answers of a pair share are read once where that is exact. Scores are kept in the cache of
    reference log-probabilities under the model's weights and the rows, so that they are computed once.

    Args:
        pad_token_id (`int`):
            A token that both models know, to pad rows with.
        settings ([`DiagnoseSettings`]):
            How pairs are truncated and batched.
    """

    def __init__(self, pad_token_id: int, settings: DiagnoseSettings):
        self.accelerator = Accelerator()
        self.batch_size = settings.batch_size
        self.truncation = settings.truncation
        self.collator = DataCollatorForPreference(pad_token_id, self.truncation.max_length, self.truncation.mode)

    def score(self, model: Any, rows: Dataset, role: str, without_adapter: bool = False) -> list[torch.Tensor]:
        """
        Score pairs with a model.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The model, which is prepared for scoring in place.
            rows (`Dataset`):
                Tokenized pairs.
            role (`str`):
                What to call the model in the progress bar.
            without_adapter (`bool`, *optional*, defaults to `False`):
                Whether the adapter of the model is disabled.

        Returns:
            `list[torch.Tensor]`: Log-probabilities of the chosen and of the rejected answers, in nats.
            Shape: `(len(rows),)` each.
        """
        peft = is_peft_model(model)
        add_fused_lm_head(model.get_base_model() if peft else model)
        shares = prepare_shared_prompt("auto", [model], None, self.accelerator.autocast)
        adapter = model.active_adapter if peft and not without_adapter else None
        disabled = model.disable_adapter if peft and without_adapter else contextlib.nullcontext

        def score_batch(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad(), self.accelerator.autocast(), disabled():
                return _answer_logps(model, batch)

        scorer = ReferenceScorer(
            score_batch,
            PairCollator(self.collator, shares),
            self.accelerator,
            ScoringSettings(self.truncation.max_length, self.truncation.mode, None, shares),
            title="Log-probabilities",
        )
        scored = scorer.score(model, adapter, rows, role, self.batch_size).with_format("torch", list(REFERENCE_LOGPS))
        return [scored[name][:].double() for name in REFERENCE_LOGPS]


def _answer_logps(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    completion_mask = batch["completion_mask"]
    if SHARED_PROMPT in batch:
        log_probs = shared_prompt_scores(model, batch[SHARED_PROMPT]).log_probs
    else:
        labels = batch["input_ids"].masked_fill(completion_mask == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        log_probs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    mask = completion_mask[:, 1:]
    # Prompt-learning PEFT prepends virtual tokens to the outputs
    chosen_logps, rejected_logps = sequence_logps(log_probs[:, -mask.size(1) :], mask).chunk(2)
    return chosen_logps, rejected_logps
