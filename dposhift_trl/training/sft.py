"""ChosenSFTTrainer: stage 1, supervised fine-tuning on the chosen answers."""

from typing import Any

from datasets import Dataset, IterableDataset
from trl import SFTTrainer, extract_prompt

from .allocator import keep_freed_memory


class ChosenSFTTrainer(SFTTrainer):
    r"""
    Trainer for stage 1, supervised fine-tuning on the chosen answers of preference data.

    $$ \mathcal{L} = -\frac{1}{|y_w|} \sum_i \log \pi_\theta(y_{w,i} \mid x, y_{w,<i}) $$

    Takes the arguments of [`~trl.SFTTrainer`]. Rows with `chosen` and `rejected`, and `prompt` explicit or implicit in
    both, become rows of `prompt` and `completion`, on which [`~trl.SFTTrainer`] takes the loss on the completion
    only; rows of any other kind pass unchanged.
    """

    def __init__(self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, *rest, **kwargs):
        super().__init__(
            model, args, data_collator, _chosen_only(train_dataset), _chosen_only(eval_dataset), *rest, **kwargs
        )

    def train(self, *args, **kwargs):
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        return super().evaluate(_chosen_only(eval_dataset), *args, **kwargs)


def _chosen_only(dataset):
    if isinstance(dataset, dict):
        return type(dataset)({name: _chosen_only(rows) for name, rows in dataset.items()})
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    first: dict[str, Any] = next(iter(dataset), {})
    if "chosen" not in first or "rejected" not in first:
        return dataset
    if "prompt" not in first:
        dataset = dataset.map(extract_prompt)
    return dataset.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
