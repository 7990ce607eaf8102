"""The log-probabilities that one model gives the answers of preference pairs, and the tokens of some of them."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from ..columns import REFERENCE_LOGPS, SHARED_PROMPT
from ..losses import sequence_logps
from ..reference.scorer import ReferenceScorer, ScoringSettings, move_model
from ..scoring import shared_prompt_scores
from ..training.collator import PairCollator
from ..training.sharing import prepare_shared_prompt
from ..training.token_scores import AnswerTokens, score_tokens
from .settings import DiagnoseSettings


class AnswerScorer:
    """
    Scores pairs with a model, as [`DPOShiftTrainer`] scores them with policy and reference.

    Tokens that both answers of a pair share are read once where that is exact. Scores are kept in the cache of
    reference log-probabilities under the model's weights and the rows, so that they are computed once.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, which is prepared for scoring in place.
        accelerator ([`~accelerate.Accelerator`]):
            Where to score.
        settings ([`DiagnoseSettings`]):
            How pairs are truncated and batched.
        pad_token_id (`int`):
            A token that the model knows, to pad rows with.
    """

    def __init__(self, model: Any, accelerator: Accelerator, settings: DiagnoseSettings, pad_token_id: int):
        self.model = model
        self.accelerator = accelerator
        self.batch_size = settings.batch_size
        truncation = settings.truncation
        add_fused_lm_head(model.get_base_model() if is_peft_model(model) else model)
        shares = prepare_shared_prompt("auto", [model], None, accelerator.autocast)
        collator = DataCollatorForPreference(pad_token_id, truncation.max_length, truncation.mode)
        self.collator = PairCollator(collator, shares)
        self.settings = ScoringSettings(truncation.max_length, truncation.mode, None, shares)

    def score(self, rows: Dataset, role: str, without_adapter: bool = False) -> list[torch.Tensor]:
        """
        Score pairs.

        Args:
            rows (`Dataset`):
                Tokenized pairs.
            role (`str`):
                What to call the model in the progress bar.
            without_adapter (`bool`, *optional*, defaults to `False`):
                Whether the adapter of the model is disabled.

        Returns:
            `list[torch.Tensor]`: Log-probabilities of the chosen and of the rejected answers, in nats. Shape:
            `(len(rows),)` each.
        """

        def score_batch(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad(), self.accelerator.autocast(), self._adapter(without_adapter):
                return _answer_logps(model, batch)

        scorer = ReferenceScorer(
            score_batch, self.collator, self.accelerator, self.settings, title="Log-probabilities"
        )
        adapter = self.model.active_adapter if is_peft_model(self.model) and not without_adapter else None
        scored = scorer.score(self.model, adapter, rows, role, self.batch_size)
        return [torch.tensor(scored[name][:], dtype=torch.float64) for name in REFERENCE_LOGPS]

    def score_tokens(self, rows: Dataset, without_adapter: bool = False) -> list[AnswerTokens]:
        """The tokens of each answer and their log-probabilities."""
        move_model(self.model, self.accelerator.device)
        with self._adapter(without_adapter):
            return score_tokens(self.model, rows, self.collator, self.batch_size, self.accelerator)

    def _adapter(self, disabled: bool) -> contextlib.AbstractContextManager[Any]:
        disable: Callable[[], Any] = self.model.disable_adapter if disabled else contextlib.nullcontext
        return disable()


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
