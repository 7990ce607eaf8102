"""What stops training on purpose: scores that are not finite, a reference that is not the policy, no examples."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments

from ..artifacts import write_whole
from ..columns import PREFERENCE_COLUMNS, ROW_INDEX
from ..integrity import training_state_fault
from .metrics import PairScores


logger = get_logger(__name__)

# Models of one family pad their embeddings to different sizes; Qwen2.5's differ by 128, tokenizers by thousands
VOCABULARY_PADDING = 1024


class TrainingStopped(ValueError):
    """Training stopped on purpose, for a reason that the message explains to the user."""


def check_not_empty(**datasets: Any) -> None:
    """
    Refuse datasets without rows, which TRL answers with a bare `StopIteration`.

    Args:
        datasets (`Dataset`, `IterableDataset`, a dictionary of them, or anything else, which is not checked):
            Each under the name of the argument that it was passed as.

    Raises:
        ValueError: If one has no row.
    """
    for argument, dataset in datasets.items():
        sets = dataset if isinstance(dataset, dict) else {None: dataset}
        for name, rows in sets.items():
            if isinstance(rows, (Dataset, IterableDataset)) and next(iter(rows), None) is None:
                where = f"`{argument}`" if name is None else f"`{argument}[{name!r}]`"
                raise ValueError(f"{where} must have at least one row, got none. Pass a dataset with rows.")


def check_rows_left(rows: Dataset | IterableDataset, split: str, max_length: int | None) -> None:
    """
    Refuse a tokenized split without examples: TRL drops those whose prompt fills `max_length`, silently.

    Raises:
        ValueError: If there is no example.
    """
    if next(iter(rows), None) is None:
        raise ValueError(
            f"No {split} examples left: every prompt is at least as long as `max_length` ({max_length}). Raise "
            "`max_length`."
        )


def vocabulary_mistake(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> str | None:
    """What is wrong if a tokenizer has tokens that a model has no embedding of; `None` if it has one of each."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if size is None or largest < size:
        return None
    return (
        f"the tokenizer has a token with the id {largest}, but the model has only {size} embeddings. Call "
        "`model.resize_token_embeddings(len(tokenizer))` and save the model, or use the tokenizer it was trained with."
    )


def check_vocabularies(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, model: Any, ref_model: Any | None) -> None:
    """
    Check that policy and reference read the tokens of the tokenizer.

    Raises:
        ValueError: If there are tokens that one of them has no embedding of, or if the vocabularies differ by more
            than padding.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    for name, config in (("model", model.config), ("ref_model", getattr(ref_model, "config", None))):
        if config is not None and (mistake := vocabulary_mistake(tokenizer, config)):
            raise ValueError(f"`{name}` must have an embedding of every token: {mistake}")
    if ref_model is None:
        return
    sizes = [getattr(config.get_text_config(), "vocab_size", 0) for config in (model.config, ref_model.config)]
    if abs(sizes[0] - sizes[1]) >= VOCABULARY_PADDING:
        raise ValueError(
            f"`ref_model` must have the vocabulary of `model`, {sizes[0]} tokens, got one with {sizes[1]}. Pass a "
            "reference that was trained with the same tokenizer."
        )


def check_reference(ref_model: Any) -> None:
    """
    Check that the reference that is passed to the trainer is a model.

    Raises:
        TypeError: If it is anything else, such as the name of one.
    """
    if ref_model is not None and not isinstance(ref_model, torch.nn.Module):
        name = repr(ref_model) if isinstance(ref_model, (str, Path)) else "..."
        raise TypeError(
            f"`ref_model` must be a model, got {ref_model!r}. Pass `AutoModelForCausalLM.from_pretrained({name})`, or "
            "leave it out to take the model that training starts from."
        )


def check_embeddings(model: Any) -> None:
    """
    Refuse single trainable tokens in embeddings that are tied to the LM head, which TRL's loss reads as one matrix.

    Raises:
        ValueError: If the adapter has `trainable_token_indices` and the embeddings are tied.
    """
    if is_peft_model(model) and isinstance(model.get_output_embeddings(), TrainableTokensWrapper):
        raise ValueError(
            "`trainable_token_indices` is not supported with embeddings that are tied to the LM head, got "
            f"{model.active_peft_config.trainable_token_indices!r}. Train all tokens with `modules_to_save` instead, "
            "or remove it."
        )


def warn_of_inexact_resume(checkpoint: str | None, args: TrainingArguments) -> None:
    """Warn if a checkpoint lacks state that training needs to go on exactly; [`~transformers.Trainer`] does not."""
    if checkpoint is None:
        return
    fault = training_state_fault(Path(checkpoint), processes=args.world_size, scales_loss=args.fp16)
    if fault is not None:
        logger.warning(
            f"Training does not go on from {checkpoint} as if it had not been interrupted: {fault}. Without these "
            "files it goes on with a new optimizer, the learning rate of the first step, or other random numbers."
        )


def check_starts_at_reference(matrix: torch.Tensor, model: Any, *, half_precision: bool) -> None:
    r"""
    Check that the policy is the reference before the first step, where every lambda gives a loss of \\( \log 2 \\).

    Args:
        matrix (`torch.Tensor`):
            Scores of the first batch, as of [`~metrics.PairScores.as_matrix`].
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, not wrapped for training; it is asked only for the likely cause.
        half_precision (`bool`):
            Whether log-probabilities are rounded to float16 or bfloat16, which allows for 2% instead of 0.01%.

    Raises:
        TrainingStopped: If a log-ratio differs from 0 by more than that share of the log-probability.
    """
    scores = PairScores.from_matrices([matrix])
    tolerance = 0.02 if half_precision else 1e-4
    for logps, logratios in (
        (scores.chosen_logps, scores.chosen_logratios),
        (scores.rejected_logps, scores.rejected_logratios),
    ):
        if (logratios.abs() > tolerance * logps.abs().clamp(min=1.0)).any():
            raise TrainingStopped(
                "The reference is not the policy: before the first step their log-probabilities differ by up to "
                f"{logratios.abs().max():.4g} nats per answer, so the loss would not start at log 2. "
                f"{_why_reference_is_not_policy(model)}"
            )


def _why_reference_is_not_policy(model: Any) -> str:
    """The likely cause, and what to do about it."""
    if names := unreachable_dropout(model):
        return (
            f"`disable_dropout` does not reach {', '.join(names)}. Set it to 0 in the model's config, or set "
            "`disable_dropout=False` to train with dropout."
        )
    if not is_peft_model(model):
        return (
            f"Without `ref_model`, the reference is loaded from {model.config._name_or_path!r}, not copied from "
            "the model in memory. Save the fine-tuned model and pass its folder as `model`, or pass the reference "
            "you want as `ref_model`."
        )
    if "ref" in model.peft_config:
        # DPOTrainer copies what is named `*.default.*`, and PEFT names some parameters `*.default`
        missing = [name for name, _ in model.named_parameters() if name.endswith(".default")]
        return (
            "Without `ref_model`, the reference is the copy of the adapter that TRL makes under the name `ref`"
            f"{f', which does not hold {missing[0]!r}' if missing else ''}. Pass the model with the adapter "
            "merged into it (`merge_and_unload()`) as `ref_model`."
        )
    settings = model.peft_config[model.active_adapters[0]].to_dict().items()
    initializations = [(name, value) for name, value in settings if re.fullmatch(r"init_(\w+_)?weights", name)]
    unusual = next(((name, value) for name, value in initializations if value is not True), None)
    return (
        "Without `ref_model`, the reference is the model without its adapter, which does not start at zero"
        + (f" (`{unusual[0]}={unusual[1]!r}`). Set `{unusual[0]}=True`, or pass" if unusual else ". Pass")
        + " the model that the adapter was put on, loaded once more, as `ref_model`."
    )


def unreachable_dropout(model: torch.nn.Module) -> list[str]:
    """
    Dropout that `disable_dropout` does not reach: probabilities that a module holds as a number, as attention does,
    and not in an `nn.Dropout`; and the jitter of routers.
    """
    found = {
        f"`{type(module).__name__}.{name}={value}`": None
        for module in model.modules()
        for name, entry in vars(module).items()
        if "drop" in name or "jitter" in name
        for value in (entry.values() if isinstance(entry, dict) else [entry])
        if isinstance(value, float) and value > 0
    }
    return list(found)


def stop_on_non_finite(
    scores: PairScores, step: int, split: str, rows: Any, folder: Path, settings: Mapping[str, Any], *, save: bool
) -> NoReturn:
    """
    Save the scores and texts of the pairs that are not finite, and stop.

    Args:
        scores ([`~metrics.PairScores`]):
            Scores of one batch, of which at least one value is not finite.
        step (`int`):
            Optimizer step.
        split (`str`):
            `"train"` or `"eval"`.
        rows (`Dataset`, *optional*):
            Rows that `row_index` numbers, for their texts.
        folder (`Path`):
            Where `non_finite_at_step_<step>/rows.json` is written.
        settings (`Mapping[str, Any]`):
            What else the file holds, such as the learning rate.
        save (`bool`):
            Whether this process writes the file.

    Raises:
        TrainingStopped: Always.
    """
    columns = {field.name: torch.isfinite(getattr(scores, field.name)) for field in fields(scores)}
    finite_loss = columns.pop("batch_loss")
    finite = torch.stack(list(columns.values())).all(dim=0)
    if finite.all():
        finite = finite_loss  # without a pair that is not, the whole batch
    indices = scores.row_index[~finite].long().tolist()
    report = folder / f"non_finite_at_step_{step}" / "rows.json"
    if save:
        texts: dict[int, Any] = {}
        if isinstance(rows, Dataset) and ROW_INDEX in rows.column_names:
            places = {row: place for place, row in enumerate(rows[ROW_INDEX])}
            texts = {index: rows[places[index]] for index in indices if index in places}
        content = {
            "step": step,
            "split": split,
            **settings,
            "rows": [
                {
                    **{field.name: getattr(scores, field.name)[place].item() for field in fields(scores)},
                    "row": {name: texts.get(index, {}).get(name) for name in PREFERENCE_COLUMNS},
                }
                for place, index in zip((~finite).nonzero().flatten().tolist(), indices, strict=True)
            ],
        }
        write_whole(report, json.dumps(_strict_json(content), indent=2, allow_nan=False))
    raise TrainingStopped(
        f"The loss or a log-probability is not finite at step {step} ({split}), rows {indices}. Their scores and "
        f"texts are in {report}; checkpoints are unchanged. Look for empty or very long answers there, lower the "
        "learning rate, or train in bf16 or float32 instead of fp16."
    )


def _strict_json(value: Any) -> Any:
    """The value with numbers that are not finite as text, since JSON has none."""
    if isinstance(value, dict):
        return {key: _strict_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
