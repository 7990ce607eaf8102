"""Column names of preference rows, keys of their batches, and row numbers."""

from typing import TYPE_CHECKING, Any


# The report imports the names; importing datasets, torch and accelerate with them would take seconds
if TYPE_CHECKING:
    from datasets import IterableDataset


# Columns that TRL reads, columns that its tokenization adds, and the keys of its batches
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS = TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
BATCH_KEYS = ("input_ids", "attention_mask", "completion_mask")

# Reference log-probabilities, named as in TRL
REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")

# Row numbers that this package adds to map-style and to iterable datasets, and their name in saved files
ROW_INDEX = "dposhift_row_index"
STREAM_ROW_INDEX = "dposhift_stream_row_index"
SAVED_ROW_INDEX = "row_index"

# Further columns of rows that this package loads and tokenizes: where a row comes from, where the chosen answer starts
# if it is compared with the prompt alone, and what the audit has to know
FILE_ROW = "dposhift_file_row"
FILE_SOURCE = "dposhift_file_source"
CHOSEN_START = "dposhift_chosen_start"
ROW_KINDS = "dposhift_row_kinds"
REFUSAL = "dposhift_refusal"

# Key of a batch: the layout that reads shared tokens once
SHARED_PROMPT = "shared_prompt"


def with_row_index(dataset: Any, dispatched: bool = False) -> Any:
    """
    Add a column with row numbers, starting at 0. Rows that already have numbers keep them.

    If n dataloader workers or processes read an iterable dataset, the first one numbers its rows 0, n, 2n, ..., the
    second one 1, n + 1, 2n + 1, ..., so that no two rows have the same number. Numbered before it is shuffled, a row
    keeps its place in the order in which the files are read: with one file and one worker, its number in the file.

    Args:
        dataset (`Dataset`, `IterableDataset` or a dictionary of them):
            Preference rows. Any other object is returned unchanged.
        dispatched (`bool`, *optional*, defaults to `False`):
            Whether the main process reads iterable datasets for all processes (`dispatch_batches`).
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, dict):
        return type(dataset)({name: with_row_index(rows, dispatched) for name, rows in dataset.items()})
    if isinstance(dataset, Dataset) and ROW_INDEX not in dataset.column_names:
        return dataset.add_column(ROW_INDEX, range(len(dataset)))
    if isinstance(dataset, IterableDataset) and STREAM_ROW_INDEX not in _column_names(dataset):
        return dataset.map(_StreamNumbers(dataset.num_shards, dispatched), with_indices=True)
    return dataset


def as_python_values(dataset: Any) -> Any:
    """
    Undo a format such as `with_format("torch")`: training reads text and lists.

    A transform of the user's own is applied to every row, once, as tokenization is.

    Args:
        dataset (`Dataset`, `IterableDataset` or a dictionary of them):
            Preference rows. Any other object is returned unchanged.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, dict):
        return type(dataset)({name: as_python_values(rows) for name, rows in dataset.items()})
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if isinstance(dataset, Dataset) and dataset.format["type"] is not None:
        visible = dataset.select_columns(dataset.format["columns"])
        return (visible.map(dict) if dataset.format["type"] == "custom" else visible).with_format(None)
    return dataset


def _column_names(dataset: "IterableDataset") -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))


class _StreamNumbers:
    """Numbers the rows of an iterable dataset, whose shards are split among processes, then among their workers."""

    def __init__(self, num_shards: int, dispatched: bool = False):
        from accelerate import PartialState

        state = PartialState()
        # Accelerate splits the shards among processes if there are enough; otherwise each process reads all rows
        split = num_shards >= state.num_processes and not dispatched
        self.processes: int = state.num_processes if split else 1
        self.process: int = state.process_index if split else 0
        self.shards = -(-num_shards // self.processes)

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, int]:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        # Workers beyond the number of shards read no rows
        workers, number = (min(worker.num_workers, self.shards), worker.id) if worker is not None else (1, 0)
        return {STREAM_ROW_INDEX: (index * workers + number) * self.processes + self.process}
