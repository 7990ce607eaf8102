"""Preference rows: where they come from, and how they are read."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from datasets.table import CastError
from pandas.errors import ParserError
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from ..columns import PREFERENCE_COLUMNS, TEMPLATE_COLUMNS
from .demo import demo_dataset


AUDIT_KINDS = {
    "missing": "an answer or the prompt is null or of the wrong type",
    "empty": "an answer is empty or only white space",
    "identical": "chosen and rejected are the same",
    "duplicate": "the same row stands earlier in the split",
    "leaked": "the same row stands in the evaluation split",
    "lost": "the prompt alone fills `max_length`, so no answer is left",
    "cut": "an answer is cut by `max_length`",
}
AUDIT_POLICIES = ("drop", "keep", "error")

KEPT_COLUMNS = (*PREFERENCE_COLUMNS, *TEMPLATE_COLUMNS)

# One message after another, told apart by role alone; an answer ends with EOS so that a model learns to stop
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)

MAX_LINE = 4_000  # of a message; the longest of use lists transformers' optimizers

Rows: TypeAlias = Dataset | IterableDataset


class DataError(ValueError):
    """Preference data that cannot be trained on; the message is one line, for the user."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """A message as a terminal can show it: in one line that ends, what has no glyph escaped."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(message.split()))
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} [...] {line[-MAX_LINE // 2 :]}"


@contextlib.contextmanager
def reading_rows():
    """Make a `DataError` of what readers raise in the midst of a file, wherever rows are read."""
    try:
        yield
    except Exception as error:
        if not _is_of_a_reader(error):
            raise
        raise DataError(f"the rows of `data` cannot be read: {error}. Mend the file.") from error


def _is_of_a_reader(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno is None  # Arrow's, of broken Parquet
    if isinstance(error, TypeError):
        return str(error).startswith("Couldn't cast")
    return isinstance(error, (ArrowException, CastError, DatasetsError, ParserError, UnicodeDecodeError))


@dataclass
class DataSource:
    """
    Where preference rows come from.

    Parameters:
        path (`str`):
            Hub name, local folder, or a `.jsonl`, `.json`, `.csv` or `.parquet` file; `demo` is the built-in data.
        name (`str`, *optional*):
            Configuration of a Hub dataset.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub dataset.
        data_files (`str`, `list[str]` or `dict[str, str]`, *optional*):
            Files inside `path`, as [`~datasets.load_dataset`] takes them.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        eval_split (`str`, *optional*):
            Split to evaluate on.
        columns (`dict[str, str]`, *optional*):
            Names of the columns where they differ: `{prompt: question, chosen: good, rejected: bad}`.
        weight (`float`, *optional*, defaults to `1.0`):
            Share in a mixture, relative to the other sources'.
    """

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    train_split: str = "train"
    eval_split: str | None = None
    columns: dict[str, str] | None = None
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(
                f"`weight` must be finite and greater than 0, got {self.weight!r}. Leave the source out instead."
            )
        unknown = sorted(set(self.columns or {}) - set(KEPT_COLUMNS))
        if unknown:
            raise ValueError(
                f"`columns` must map {', '.join(PREFERENCE_COLUMNS)} to the names in the data, got the key "
                f"{unknown[0]!r}. Write `columns: {{chosen: {(self.columns or {})[unknown[0]]}}}`, ours first."
            )
        theirs = list((self.columns or {}).values())
        if len(set(theirs)) < len(theirs):
            raise ValueError(f"`columns` must name a column of the data once, got {self.columns!r}.")


@dataclass
class DataConfig(DataSource):
    """
    The `data` section of a recipe: one source, or a mixture of several, and what to do with unusable rows.

    Parameters:
        mixture (`list[dict]`, *optional*):
            Sources drawn from in proportion to their `weight`, until the first is exhausted; in place of `path`.
        eval_size (`int` or `float`, *optional*):
            Rows (int) or share (float) of the training rows to hold out, where there is no `eval_split`.
        max_train_rows (`int`, *optional*):
            Take only the first rows.
        max_eval_rows (`int`, *optional*):
            Take only the first evaluation rows.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as training goes, without a copy on disk. The stages then need `max_steps`.
        audit (`str` or `dict[str, str]`, *optional*, defaults to `"drop"`):
            `drop`, `keep` or `error`, for all kinds of unusable rows or for each by name.
        min_rows_kept (`float`, *optional*, defaults to `0.5`):
            Share of a split that must survive the audit.
    """

    mixture: list[dict[str, Any]] | None = None
    eval_size: int | float | None = None
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    streaming: bool = False
    audit: str | dict[str, str] = "drop"
    min_rows_kept: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if bool(self.path) == (self.mixture is not None):
            raise ValueError(
                f"one of `path` and `mixture` must be set, got {'both' if self.path else 'neither'}. Write "
                "`path: demo` for the built-in data."
            )
        if self.mixture is not None and not self.mixture:
            raise ValueError("`mixture` must hold at least one source, got []. Write for example `- path: demo`.")
        if self.mixture is not None:
            for f in dataclasses.fields(DataSource):
                if getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"`{f.name}` must stand in the sources of a `mixture`, not beside it, got "
                        f"{getattr(self, f.name)!r}. Write it into each source it applies to."
                    )
            for index, source in enumerate(self.sources):
                if not source.path:
                    raise ValueError(
                        f"`path` must be set in every source of a `mixture`, but source {index} has none."
                    )
        if self.eval_size is not None:
            if self.has_eval_split:
                raise ValueError(
                    f"`eval_size` must be left out where there is an `eval_split`, got {self.eval_size!r}. Remove one."
                )
            share = isinstance(self.eval_size, float)
            if not self.eval_size > 0 or (share and self.eval_size >= 1):
                raise ValueError(
                    "`eval_size` must be a number of rows above 0 or a share between 0 and 1, got "
                    f"{self.eval_size!r}. Write for example `eval_size: 0.05`."
                )
            if self.streaming and share:
                raise ValueError(
                    f"`eval_size` must be a number of rows with `streaming`, got {self.eval_size!r}. Write for "
                    "example `eval_size: 500`."
                )
        for name in ("max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}. Leave it out to take all rows.")
        if self.max_eval_rows is not None and not self.has_eval:
            raise ValueError(
                f"`max_eval_rows` must be left out where there are no evaluation rows, got {self.max_eval_rows}. Name "
                "an `eval_split`, or hold rows out with `eval_size`."
            )
        if not 0 < self.min_rows_kept <= 1:
            raise ValueError(
                f"`min_rows_kept` must be a share above 0 and at most 1, got {self.min_rows_kept!r}. Write for "
                "example 0.5 to stop where more than half of a split would be dropped."
            )
        policies = self.audit if isinstance(self.audit, dict) else {"missing": self.audit}
        for kind, policy in policies.items():
            if kind not in AUDIT_KINDS:
                raise ValueError(f"`audit` must name its kinds among {', '.join(AUDIT_KINDS)}, got {kind!r}.")
            if policy not in AUDIT_POLICIES:
                raise ValueError(f"`audit` must be one of {', '.join(AUDIT_POLICIES)}, got {policy!r} for {kind}.")
        if policies.get("missing") == "keep" and isinstance(self.audit, dict):
            raise ValueError("`audit` must be drop or error for missing, got 'keep': a null cannot be trained on.")

    @property
    def sources(self) -> list[DataSource]:
        """The sources of the mixture, or the one source."""
        if self.mixture is None:
            return [self]
        return [DataSource(**source) for source in self.mixture]

    @property
    def has_eval_split(self) -> bool:
        return any(source.eval_split is not None for source in self.sources)

    @property
    def has_eval(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.has_eval_split or self.eval_size is not None

    def policy(self, kind: str) -> str:
        """What to do with rows of one of the [`AUDIT_KINDS`]."""
        if isinstance(self.audit, dict):
            return self.audit.get(kind, "drop")
        return "drop" if (kind, self.audit) == ("missing", "keep") else self.audit


@reading_rows()
def load_preferences(config: DataConfig, seed: int) -> tuple[Rows, Rows | None]:
    """
    Load training and evaluation rows with the columns `prompt` (unless implicit), `chosen` and `rejected`.

    Args:
        config ([`DataConfig`]):
            Sources, splits and columns.
        seed (`int`):
            Seed of the order in which a mixture is drawn and of the rows held out.

    Returns:
        `tuple[Dataset or IterableDataset, Dataset or IterableDataset or None]`: Training and evaluation rows.

    Raises:
        DataError: If a source cannot be read, lacks a split or a column, or does not fit the others of a mixture.
    """
    sources = config.sources
    train = [_load_split(source, source.train_split, config.streaming) for source in sources]
    if len(sources) > 1:
        total = sum(source.weight for source in sources)
        weights = [source.weight / total for source in sources]
        rows = _mixed(sources, train, lambda parts: interleave_datasets(parts, weights, seed=seed))
    else:
        rows = train[0]
    evaluated = [source for source in sources if source.eval_split is not None]
    evaluation = [_load_split(source, str(source.eval_split), config.streaming) for source in evaluated]
    eval_rows = _mixed(evaluated, evaluation, concatenate_datasets) if evaluation else None
    if config.eval_size is not None:
        rows, eval_rows = _hold_out(rows, config.eval_size, seed)
    return _first(rows, config.max_train_rows), _first(eval_rows, config.max_eval_rows)


def _first(rows: Rows | None, count: int | None) -> Rows | None:
    if rows is None or count is None:
        return rows
    return rows.take(count) if isinstance(rows, IterableDataset) else rows.select(range(min(count, len(rows))))


def _hold_out(rows: Rows, size: int | float, seed: int) -> tuple[Rows, Rows]:
    if isinstance(rows, IterableDataset):
        if next(iter(rows.skip(int(size))), None) is None:
            raise DataError(
                f"`data.eval_size` must be less than the number of training rows, got {size}, with which none is "
                "left. Write a smaller number."
            )
        return rows.skip(int(size)), rows.take(int(size))
    count = len(rows)
    if (size if isinstance(size, int) else math.ceil(size * count)) >= count:
        raise DataError(
            f"`data.eval_size` must be less than the {count} training rows, got {size}. "
            + (f"Write for example `eval_size: {math.ceil(count / 10)}`." if count > 1 else "Leave it out.")
        )
    split = rows.train_test_split(test_size=size, seed=seed)
    return split["train"], split["test"]


def _load_split(source: DataSource, split: str, streaming: bool) -> Rows:
    try:
        rows = _read(source, split, streaming)
        names = column_names(rows)
    except Exception as error:  # each reader has errors of its own
        reason = f"{error}{': ' if error.__cause__ else ''}{error.__cause__ or ''}"
        raise DataError(f"`data.path` {source.path!r}, split {split!r}, cannot be read: {reason}") from error
    if not names:
        raise DataError(f"`data.path` {source.path!r}, split {split!r}, has no rows.")
    columns = source.columns or {}
    for ours, theirs in columns.items():
        if theirs not in names:
            raise DataError(
                f"`data.columns` maps {ours} to {theirs!r}, but {source.path!r} has the columns {', '.join(names)}."
            )
    ours_first = {name: name for name in KEPT_COLUMNS if name in names and name not in columns.values()} | columns
    missing = [name for name in ("chosen", "rejected") if name not in ours_first]
    if missing:
        raise DataError(
            f"{source.path!r} has no column {missing[0]!r}, only {', '.join(names)}. Name yours, for example "
            f"`data.columns: {{{missing[0]}: {names[0]}}}`."
        )
    rows = rows.select_columns(list(ours_first.values()))
    renamed = {theirs: ours for ours, theirs in ours_first.items() if ours != theirs}
    if renamed and isinstance(rows, IterableDataset):
        # `rename_columns` cannot swap two columns of a stream
        return rows.map(
            lambda row: {ours: row[theirs] for ours, theirs in ours_first.items()}, remove_columns=list(renamed)
        )
    return rows.rename_columns(renamed) if renamed else rows


def column_names(rows: Rows) -> list[str]:
    """Names of the columns; of a stream that does not know them, those of its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def _mixed(sources: list[DataSource], rows: list[Rows], mix: Callable[[list[Rows]], Rows]) -> Rows:
    with_prompt = [source.path for source, part in zip(sources, rows, strict=True) if "prompt" in column_names(part)]
    if with_prompt and len(with_prompt) < len(sources):
        raise DataError(
            "the sources of `data.mixture` must all have a column 'prompt' or none, got it in "
            f"{', '.join(map(str, with_prompt))} alone. Add it to the others."
        )
    try:
        return mix(rows)
    except (ValueError, TypeError) as error:
        raise DataError(f"the sources of `data.mixture` cannot be mixed: {error}") from error


def _read(source: DataSource, split: str, streaming: bool) -> Rows:
    assert source.path
    if source.path == "demo":
        demo = demo_dataset()
        if split not in demo:
            raise ValueError(f"the demo has the splits {', '.join(demo)}")
        return demo[split].to_iterable_dataset() if streaming else demo[split]
    path = Path(source.path)
    builder = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if builder is not None and (path.is_file() or not path.exists()):
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        if split != "train":
            raise ValueError("a file has the one split 'train'; hold rows out with `data.eval_size`")
        return load_dataset(builder, data_files=str(path), split="train", streaming=streaming)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"it has the splits {', '.join(saved)}")
            saved = saved[split]
        elif split not in ("train", str(saved.split)):
            raise ValueError("it holds no splits, only rows; hold some out with `data.eval_size`")
        return saved.to_iterable_dataset() if streaming else saved
    if path.is_file():
        raise ValueError("a file must end in .jsonl, .json, .csv or .parquet")
    return load_dataset(
        source.path,
        source.name,
        revision=source.revision,
        data_files=source.data_files,
        split=split,
        streaming=streaming,
    )


@reading_rows()
def use_plain_chat_template(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the plain one if the rows are conversational; say whether it did."""
    conversational = any(is_conversation(row.get("chosen")) for row in islice(rows, 100))
    if tokenizer.chat_template is not None or not conversational:
        return False
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return True


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, at least one."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
