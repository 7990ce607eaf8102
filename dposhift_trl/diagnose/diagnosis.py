"""From two models and preference pairs to scores, metrics, and a verdict."""

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch
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
from .models import ModelSource, find_models, load_config, load_model, load_tokenizer
from .output import choose_folder, describe, save
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
    sizes = [config.get_text_config().vocab_size for config in configs.values()]
    padding = tokenizer.pad_token_id
    scorer = AnswerScorer(0 if padding is None or padding >= min(sizes) else padding, settings)
    scores = _scores(scorer, policy, reference, rows, settings)
    metrics = pair_metrics(scores, settings.beta) | evaluation_metrics(scores, settings.beta)
    metrics = {name: value for name, value in metrics.items() if not name.startswith("shift/")}
    content = {
        "settings": described,
        "policy": policy.text,
        "reference": reference.text,
        "pairs": len(rows),
        "metrics": metrics,
        "seconds": round(time.monotonic() - began, 1),
        "device": str(scorer.accelerator.device),
        "version": __version__,
    }
    save(folder, settings, audited, scores, content)
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


def _scores(
    scorer: AnswerScorer, policy: ModelSource, reference: ModelSource, rows: Dataset, settings: DiagnoseSettings
) -> PairScores:
    try:
        model = load_model(reference, settings)
        ref_chosen_logps, ref_rejected_logps = scorer.score(
            model, rows, reference.role, without_adapter=reference.without_adapter
        )
        if not reference.without_adapter:  # only one model is in memory at a time
            del model
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            model = load_model(policy, settings)
        chosen_logps, rejected_logps = scorer.score(model, rows, policy.role)
    except torch.OutOfMemoryError as error:
        raise DiagnoseError(
            f"The device has too little memory for `batch_size` {settings.batch_size} in {settings.dtype}. Pass a "
            "smaller --batch-size, or --dtype bfloat16."
        ) from error
    except ValueError as error:
        if "finite" not in str(error):
            raise
        raise DataError(f"The pairs cannot be scored: {error}") from error
    chosen_tokens, rejected_tokens = answer_lengths(rows, settings)
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
