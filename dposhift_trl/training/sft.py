"""ChosenSFTTrainer: stage 1, supervised fine-tuning on the chosen answers."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer, extract_prompt

from ..columns import CHOSEN_IDS, CHOSEN_START, PROMPT_IDS, TOKEN_COLUMNS, as_python_values
from .callbacks import KeepFreedMemoryCallback, TokenCountCallback
from .checks import check_not_empty
from .exact_resume import ExactResume
from .settings import name_best_metric, warn_of_slow_precision
from .sharded import Sharded


class ChosenSFTTrainer(ExactResume, Sharded, SFTTrainer):
    r"""
    Trainer for stage 1, supervised fine-tuning on the chosen answers of preference data.

    $$ \mathcal{L} = -\frac{1}{|y_w|} \sum_i \log \pi_\theta(y_{w,i} \mid x, y_{w,<i}) $$

    Takes the arguments of [`~trl.SFTTrainer`]. Rows with `chosen` and `rejected`, and `prompt` explicit or implicit in
    both, become rows of `prompt` and `completion`, on which [`~trl.SFTTrainer`] takes the loss on the completion
    only. Rows of any other form, and all rows if a `formatting_func` is given, are passed unchanged.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        check_not_empty(train_dataset=train_dataset, eval_dataset=eval_dataset)
        self._selects_chosen = formatting_func is None
        # A mask of the assistant's tokens needs a chat template of its own, so TRL tokenizes the text
        self._uses_tokens = not (args and args.assistant_only_loss)
        if args is not None:
            name_best_metric(args, eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._select_chosen(train_dataset),
            eval_dataset=self._select_chosen(eval_dataset),
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        warn_of_slow_precision(self.model.dtype, self.accelerator)
        self.add_callback(KeepFreedMemoryCallback())
        self.add_callback(TokenCountCallback())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Counts tokens from where the checkpoint ended that training was resumed from."""
        tokens = next(cb for cb in self.callback_handler.callbacks if isinstance(cb, TokenCountCallback))
        self._total_train_tokens = tokens.num_tokens
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens.num_tokens = self._total_train_tokens
        return result

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates on the chosen answers of the rows that are passed, too."""
        return super().evaluate(self._select_chosen(eval_dataset), ignore_keys, metric_key_prefix)

    def _select_chosen(self, dataset: Any) -> Any:
        dataset = as_python_values(dataset)
        return select_chosen(dataset, self._uses_tokens) if self._selects_chosen else dataset


def select_chosen(dataset: Any, use_tokens: bool = True) -> Any:
    """
    Preference rows as `prompt` and `completion`, the chosen answer, and its tokens if the rows are tokenized.

    Args:
        dataset (`Dataset`, `IterableDataset`, a dictionary of them, or anything else, which is returned unchanged):
            Rows; those without `chosen` and `rejected` are returned unchanged.
        use_tokens (`bool`, *optional*, defaults to `True`):
            Whether the tokens of rows that have them become `input_ids` and `completion_mask`.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: select_chosen(rows, use_tokens) for name, rows in dataset.items()})
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    first: dict[str, Any] = next(iter(dataset), {})
    if "chosen" not in first or "rejected" not in first:
        return dataset
    if "prompt" not in first:
        dataset = dataset.map(extract_prompt)
    tokens = [*TOKEN_COLUMNS, CHOSEN_START] if CHOSEN_START in first else []
    return dataset.map(
        _with_input_ids if tokens and use_tokens else _with_completion,
        remove_columns=["chosen", "rejected", *tokens],
    )


def _with_completion(row: dict[str, Any]) -> dict[str, Any]:
    return {"completion": row["chosen"]}


def _with_input_ids(row: dict[str, Any]) -> dict[str, Any]:
    ids, start = row[PROMPT_IDS] + row[CHOSEN_IDS], row[CHOSEN_START]
    return {"completion": row["chosen"], "input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)}
