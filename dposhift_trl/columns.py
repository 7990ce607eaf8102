"""Names of the columns of preference rows and of the batches made of them, each in one place."""

from typing import Any

from datasets import Dataset, IterableDataset


# What TRL reads, and what its tokenization adds
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
BATCH_KEYS = ("input_ids", "attention_mask", "completion_mask")

# Log-probabilities of the reference, as TRL names them
REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")

# Added by this package. No dataset has a column of its own with the first name; files call it by the second.
ROW_INDEX = "dposhift_row_index"
SAVED_ROW_INDEX = "row_index"
SHARED_PROMPT = "shared_prompt"


def with_row_index(dataset: Any) -> Any:
    """
    Number the rows of a dataset from 0, in the column `dposhift_row_index`; numbered rows keep their numbers.

    Args:
        dataset (`Dataset`, `IterableDataset`, a dictionary of them, or anything else, which is returned unchanged):
            Preference rows.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: with_row_index(rows) for name, rows in dataset.items()})
    if isinstance(dataset, Dataset) and ROW_INDEX not in dataset.column_names:
        return dataset.add_column(ROW_INDEX, range(len(dataset)))
    if isinstance(dataset, IterableDataset) and ROW_INDEX not in (dataset.column_names or next(iter(dataset), {})):
        return dataset.map(lambda row, index: {ROW_INDEX: index}, with_indices=True)
    return dataset
