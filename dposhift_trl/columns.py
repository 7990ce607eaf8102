"""Names of the columns of preference rows and of the batches made of them, each in one place."""

from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info


# What TRL reads, and what its tokenization adds
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
BATCH_KEYS = ("input_ids", "attention_mask", "completion_mask")

# Log-probabilities of the reference, as TRL names them
REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")

# Added by this package to number the rows of map-style and of iterable datasets, with names that no dataset uses for
# columns of its own; files call the number by the last name
ROW_INDEX = "dposhift_row_index"
STREAM_ROW_INDEX = "dposhift_stream_row_index"
SAVED_ROW_INDEX = "row_index"

# Key of a batch: its layout by which shared tokens are read once
SHARED_PROMPT = "shared_prompt"


def with_row_index(dataset: Any) -> Any:
    """
    Number the rows of a dataset from 0, in a column of its own; numbered rows keep their numbers.

    The rows of an iterable dataset that several dataloader workers or processes read are numbered in turn: the first
    reader's 0, n, 2n, ..., the second's 1, n + 1, ... for n readers, so that no two rows have the same number.

    Args:
        dataset (`Dataset`, `IterableDataset`, a dictionary of them, or anything else, which is returned unchanged):
            Preference rows.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: with_row_index(rows) for name, rows in dataset.items()})
    if isinstance(dataset, Dataset) and ROW_INDEX not in dataset.column_names:
        return dataset.add_column(ROW_INDEX, range(len(dataset)))
    if isinstance(dataset, IterableDataset) and STREAM_ROW_INDEX not in _column_names(dataset):
        return dataset.map(_StreamNumbers(dataset.num_shards), with_indices=True)
    return dataset


def _column_names(dataset: IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))


class _StreamNumbers:
    """Numbers the rows of an iterable dataset, whose shards are divided among processes, then among their workers."""

    def __init__(self, num_shards: int):
        state = PartialState()
        # Accelerate divides the shards among processes if there are enough; else each process reads all rows
        divided = num_shards >= state.num_processes
        self.processes: int = state.num_processes if divided else 1
        self.process: int = state.process_index if divided else 0
        self.shards = -(-num_shards // self.processes)

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, int]:
        worker = get_worker_info()
        # Workers beyond the number of shards read nothing
        workers, number = (min(worker.num_workers, self.shards), worker.id) if worker is not None else (1, 0)
        return {STREAM_ROW_INDEX: (index * workers + number) * self.processes + self.process}
