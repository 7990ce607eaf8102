"""From two models and preference pairs to scores, metrics, and a verdict."""

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..columns import ROW_INDEX
from ..console import say
from ..data.audit import AuditedRows
from ..data.errors import DataError
from ..pipeline.loading import legend
from ..report.verdict import Verdict, verdict
from ..training.metrics import PairScores, evaluation_metrics, pair_metrics
from ..training.token_scores import changed_most, selected, token_table
from .models import ModelSource, find_models, load_config, load_model, load_tokenizer
from .output import check_folder, choose_folder, describe, save
from .pairs import answer_lengths, check_sizes, check_vocabulary, load_pairs
from .scoring import AnswerScorer
from .settings import DiagnoseError, DiagnoseSettings


@dataclass(frozen=True)
class Diagnosis:
    """
    How far a policy moved from its reference.

    Args:
        folder (`Path`):
            Where everything was written.
        verdict ([`~report.verdict.Verdict`]):
            What the numbers say.
        metrics (`dict[str, float]`):
            The metrics that [`DPOShiftTrainer`] logs, without their prefix, and without those of lambda.
    """

    folder: Path
    verdict: Verdict
    metrics: dict[str, float]


def diagnose(settings: DiagnoseSettings, overwrite: bool = False) -> Diagnosis:
    """
    Score preference pairs with a trained model and its reference, and say what training did to them.

    Nothing is trained. Models of any trainer can be diagnosed.

    Args:
        settings ([`DiagnoseSettings`]):
            What is diagnosed, and on which pairs.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether another diagnosis in `output_dir` is replaced.

    Returns:
        [`Diagnosis`]: Folder, verdict, and metrics.

    Raises:
        DiagnoseError: If the models or the output folder cannot be used.
        DataError: If the pairs cannot be read or scored.

    Example:

    ```python
    >>> from dposhift_trl.data.config import DataConfig
    >>> from dposhift_trl.diagnose import DiagnoseSettings, diagnose

    >>> settings = DiagnoseSettings("my-dpo-model", DataConfig("prefs.jsonl"), reference="my-sft-model")
    >>> print(diagnose(settings).verdict)
    ```
    """
    began = time.monotonic()
    check_folder(settings)
    policy, reference = models = find_models(settings)
    for source in models:
        say(f"{source.role}: {source.text}")
    configs = {source: load_config(source, settings.trust_remote_code) for source in models}
    audited, tokenizer = _audited_pairs(settings, policy, reference)
    rows = audited.train
    assert isinstance(rows, Dataset)  # streams are refused
    check_sizes(rows, configs, settings)
    described = describe(settings, models, rows)
    folder = choose_folder(settings, described, overwrite)
    known = min(config.get_text_config().vocab_size for config in configs.values())
    padding = tokenizer.pad_token_id if (tokenizer.pad_token_id or 0) < known else None
    accelerator = Accelerator()
    scores, tokens = _scored(_Models(*models, settings, accelerator, padding or 0), rows, tokenizer)
    metrics = pair_metrics(scores, settings.beta) | evaluation_metrics(scores, settings.beta)
    metrics = {name: value for name, value in metrics.items() if not name.startswith("shift/")}
    content = {
        "settings": described,
        "policy": policy.text,
        "reference": reference.text,
        "pairs": len(rows),
        "metrics": metrics,
        "seconds": round(time.monotonic() - began, 1),
        "device": str(accelerator.device),
        "version": __version__,
    }
    save(folder, settings, audited, scores, tokens, content)
    return Diagnosis(folder, verdict(metrics), metrics)


def _audited_pairs(
    settings: DiagnoseSettings, policy: ModelSource, reference: ModelSource
) -> tuple[AuditedRows, PreTrainedTokenizerBase]:
    """The pairs as tokens of the policy, which are those of the reference too, and the tokenizer."""
    own, other = (load_tokenizer(source, settings.trust_remote_code) for source in (policy, reference))
    tokenizer = own or other
    if tokenizer is None:
        raise DiagnoseError(
            f"`policy` must come with a tokenizer, got none in {policy.place} and {reference.place}. Save the "
            "tokenizer there."
        )
    for source, found in ((policy, own), (reference, other)):
        if found is None:
            say(f"{source.role}: there is no tokenizer in {source.place}, so the other model's is used.")
    audited = load_pairs(settings, tokenizer)
    for audit in audited.audits.values():
        say(f"pairs: {audit}")
    if (meaning := legend(audited.audits)) is not None:
        say(meaning)
    audited.check()
    if own is not None and other is not None:
        check_vocabulary(audited.train, own, other, reference.place)
    return audited, tokenizer


@dataclass
class _Models:
    """Policy and reference, of which one is in memory at a time, unless they are one model and its adapter."""

    policy: ModelSource
    reference: ModelSource
    settings: DiagnoseSettings
    accelerator: Accelerator
    pad_token_id: int
    loaded: tuple[str, AnswerScorer] | None = None

    def scorer(self, source: ModelSource) -> AnswerScorer:
        """Scorer of a model, which is loaded if it is not."""
        if self.loaded is None or self.loaded[0] != source.place:
            self.loaded = None
            gc.collect()  # the fused head creates a reference cycle
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            scorer = AnswerScorer(
                load_model(source, self.settings), self.accelerator, self.settings, self.pad_token_id
            )
            self.loaded = source.place, scorer
        return self.loaded[1]

    def score(self, rows: Dataset) -> PairScores:
        """Scores of all pairs."""
        (ref_chosen_logps, ref_rejected_logps), (chosen_logps, rejected_logps) = (
            self.scorer(source).score(rows, source.role, source.without_adapter)
            for source in (self.reference, self.policy)
        )
        chosen_tokens, rejected_tokens = answer_lengths(rows, self.settings)
        unknown = torch.full_like(chosen_logps, torch.nan)
        return PairScores(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_tokens,
            rejected_tokens,
            shift_lambda=unknown,
            batch_loss=unknown,
            row_index=torch.tensor(rows[ROW_INDEX][:]),
        )

    def score_tokens(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
        """Scores of the tokens of a few pairs."""
        logps, ref_logps = (
            self.scorer(source).score_tokens(rows, source.without_adapter) for source in (self.policy, self.reference)
        )
        return token_table(tokenizer, logps, ref_logps)


def _scored(models: _Models, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[PairScores, pa.Table | None]:
    """Scores of all pairs, and of the tokens of those whose chosen answers fell and rose most."""
    try:
        scores = models.score(rows)
        wanted = changed_most(scores.as_table())
        return scores, models.score_tokens(selected(rows, wanted), tokenizer) if wanted else None
    except torch.OutOfMemoryError as error:
        settings = models.settings
        raise DiagnoseError(
            f"The device has too little memory for `batch_size` {settings.batch_size} in {settings.dtype}. Pass a "
            "smaller --batch-size, or --dtype bfloat16."
        ) from error
    except ValueError as error:
        if "finite" not in str(error):
            raise
        raise DataError(f"The pairs cannot be scored: {error}") from error
