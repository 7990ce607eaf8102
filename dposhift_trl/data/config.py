"""The `data` section of a recipe."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..columns import PREFERENCE_COLUMNS, TEMPLATE_COLUMNS
from ..ranges import check_ranges


AUDIT_POLICIES = ("drop", "keep", "error")

ROW_ID = "id"  # of the data, shown with the number of a row
KEPT_COLUMNS = (*PREFERENCE_COLUMNS, *TEMPLATE_COLUMNS, ROW_ID)

SHUFFLE_BUFFER = 1_000  # as in datasets; each look at the first row of a stream fills it


class AuditKind(NamedTuple):
    """
    A kind of row that the audit finds.

    Args:
        description (`str`):
            What is found.
        default (`str`, *optional*, defaults to `"drop"`):
            Policy unless the recipe names this kind. `keep` for what harms little, or is in every row of some models.
        trainable (`bool`, *optional*, defaults to `True`):
            Whether such rows could be kept.
    """

    description: str
    default: str = "drop"
    trainable: bool = True


# The gravest first: a dropped row counts as the first of its kinds that is not kept
AUDIT_KINDS = {
    "missing": AuditKind("an answer or the prompt is null or of the wrong type", trainable=False),
    "refused": AuditKind("the chat template raises an error", trainable=False),
    "empty": AuditKind("an answer is empty or only whitespace"),
    "identical": AuditKind("chosen and rejected are the same to the model"),
    "prompts": AuditKind("chosen and rejected answer different prompts"),
    "user": AuditKind("an answer ends with a message by the user"),
    "duplicate": AuditKind("the split already contains the same row"),
    "leaked": AuditKind("the evaluation split contains the same row"),
    "lost": AuditKind("the prompt alone fills `max_length`, so no answer is left"),
    "cut": AuditKind("an answer is truncated to fit `max_length`"),
    "roles": AuditKind("roles are out of order, or a user speaks within an answer", "keep"),
    "boundary": AuditKind("the tokens of the prompt alone are not those in front of the answers", "keep"),
    "doubled": AuditKind("two BOS or EOS tokens in a row", "keep"),
    "thinking": AuditKind("only one answer has an empty `<think>` block", "keep"),
}


def legend(found: Iterable[str]) -> str:
    """What kinds of rows are, in one line, the gravest first."""
    names = set(found)
    return "; ".join(f"{name}: {kind.description}" for name, kind in AUDIT_KINDS.items() if name in names)


@dataclass
class DataSource:
    """
    Where preference rows come from.

    Parameters:
        path (`str`):
            Hub name, local folder, or a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` file. Text files may
            be compressed: `.gz`, `.bz2`, `.xz` or `.zst`. Cells of CSV and TSV files are text. `demo` is the built-in
            data.
        name (`str`, *optional*):
            Configuration of a Hub dataset.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub dataset.
        data_files (`str`, `list[str]` or `dict[str, str]`, *optional*):
            Files inside `path`, as in [`~datasets.load_dataset`]: names, which are read as they are, and patterns.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        eval_split (`str`, *optional*):
            Split to evaluate on.
        columns (`dict[str, str]`, *optional*):
            Column names, if the data uses others: `{prompt: question, chosen: good, rejected: bad}`.
        weight (`float`, *optional*, defaults to `1.0`):
            Sampling weight in a mixture, relative to the other sources.
    """

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    train_split: str = "train"
    eval_split: str | None = None
    columns: dict[str, str] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)
        columns = self.columns or {}
        unknown = sorted(set(columns) - set(KEPT_COLUMNS))
        if unknown:
            raise ValueError(
                f"`columns` must map {', '.join(PREFERENCE_COLUMNS)} to the column names in the data, got the key "
                f"{unknown[0]!r}. Write for example `columns: {{chosen: {columns[unknown[0]]}}}`."
            )
        if len(set(columns.values())) < len(columns):
            raise ValueError(
                f"`columns` must not name a column of the data twice, got {columns!r}. Map each column once."
            )


@dataclass
class DataConfig(DataSource):
    """
    The `data` section of a recipe: one source or a mixture of several, and what to do with unusable rows.

    Parameters:
        mixture (`list[dict]`, *optional*):
            Sources to sample from in proportion to their `weight`, until the first one is exhausted. Replaces `path`.
        eval_size (`int` or `float`, *optional*):
            Number (int) or share (float) of training rows to hold out for evaluation, if there is no `eval_split`.
        seed (`int`, *optional*):
            Seed that chooses the rows held out by `eval_size` and those of a mixture; the recipe's `seed` by default.
            Set it to evaluate runs with different seeds on the same rows. Not supported with `streaming`, which holds
            out the first rows.
        max_train_rows (`int`, *optional*):
            Use only the first training rows.
        max_eval_rows (`int`, *optional*):
            Use only the first evaluation rows.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows during training, without a copy on disk. Every stage then needs `max_steps`.
        shuffle_buffer (`int`, *optional*):
            With `streaming`, number of training rows in memory from which the next ones are drawn at random, as in
            [`datasets.IterableDataset.shuffle`]; 1,000 by default. 0 trains in the order of the files. Without
            `streaming`, all rows are shuffled.
        max_expanded_gib (`float`, *optional*, defaults to `4.0`):
            Largest size of a compressed local file when expanded, in GiB.
        audit (`str` or `dict[str, str]`, *optional*, defaults to `"drop"`):
            `drop`, `keep` or `error`, either for all kinds of unusable rows or per kind. Rows of the kinds `roles`,
            `boundary`, `doubled`, and `thinking` are usable: they are counted and kept unless the kind is named.
        min_rows_kept (`float`, *optional*, defaults to `0.5`):
            Minimum share of each split that must be left after the audit.
    """

    mixture: list[dict[str, Any]] | None = None
    eval_size: int | float | None = None
    seed: int | None = None
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    streaming: bool = False
    shuffle_buffer: int | None = None
    max_expanded_gib: float = 4.0
    audit: str | dict[str, str] = "drop"
    min_rows_kept: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sources()
        self._check_sizes()
        self._check_audit()

    def _check_sources(self) -> None:
        if bool(self.path) == (self.mixture is not None):
            raise ValueError(
                f"Exactly one of `path` and `mixture` must be set, got {'both' if self.path else 'neither'}. For the "
                "built-in data, write `path: demo`."
            )
        if self.mixture is None:
            return
        if not self.mixture:
            raise ValueError("`mixture` must contain at least one source, got []. Write for example `- path: demo`.")
        for f in dataclasses.fields(DataSource):
            if getattr(self, f.name) != f.default:
                raise ValueError(
                    f"`{f.name}` is not supported next to `mixture`, got {getattr(self, f.name)!r}. Set it in each "
                    "source of the mixture."
                )
        for index, source in enumerate(self.sources):
            if not source.path:
                raise ValueError(
                    f"`path` must be set in every source of a `mixture`, got none in source {index}. Add it."
                )

    def _check_sizes(self) -> None:
        if self.eval_size is not None:
            if self.has_eval_split:
                raise ValueError(
                    f"`eval_size` is not supported with `eval_split`, got {self.eval_size!r}. Remove one of the two."
                )
            if self.streaming and isinstance(self.eval_size, float):
                raise ValueError(
                    f"`eval_size` must be a number of rows with `streaming`, got {self.eval_size!r}. Write for "
                    "example `eval_size: 500`."
                )
            if self.streaming and self.mixture is not None:
                raise ValueError(
                    f"`eval_size` is not supported with a streamed `mixture`, got {self.eval_size!r}: each pass would "
                    "hold out other rows. Set `eval_split` in its sources."
                )
        if self.seed is not None and (self.streaming or (self.eval_size is None and self.mixture is None)):
            raise ValueError(
                f"`seed` has an effect only with `eval_size` or `mixture`, and not with `streaming`, got {self.seed}. "
                "Remove it; the order of training follows the recipe's `seed`."
            )
        if self.max_eval_rows is not None and not self.has_eval:
            raise ValueError(
                f"`max_eval_rows` needs evaluation rows, got {self.max_eval_rows} without any. Set `eval_split` or "
                "`eval_size`."
            )
        if self.shuffle_buffer is not None and not self.streaming:
            raise ValueError(
                f"`shuffle_buffer` requires `streaming`, got {self.shuffle_buffer} without it: all rows are shuffled. "
                "Remove it."
            )

    def _check_audit(self) -> None:
        policies = self.audit if isinstance(self.audit, dict) else {"missing": self.audit}
        for kind, policy in policies.items():
            if kind not in AUDIT_KINDS:
                raise ValueError(
                    f"`audit` must use the kinds {', '.join(AUDIT_KINDS)}, got {kind!r}. Write for example "
                    "`audit: {cut: keep}`."
                )
            if policy not in AUDIT_POLICIES:
                raise ValueError(
                    f"`audit` must be one of {', '.join(AUDIT_POLICIES)}, got {policy!r}"
                    + (f" for {kind}" if isinstance(self.audit, dict) else "")
                    + ". Write for example `audit: drop`."
                )
        for kind, policy in policies.items():
            if policy == "keep" and isinstance(self.audit, dict) and not AUDIT_KINDS[kind].trainable:
                raise ValueError(
                    f"`audit` must be drop or error for {kind}, got 'keep'. Such rows cannot be trained on; remove "
                    "the key to drop them."
                )

    @property
    def sources(self) -> list[DataSource]:
        """The sources of the mixture, or the single source."""
        if self.mixture is None:
            return [self]
        return [DataSource(**source) for source in self.mixture]

    @property
    def rows_in_buffer(self) -> int:
        """Number of rows in the shuffle buffer; 0 if rows are not streamed, or trained on in order."""
        if not self.streaming:
            return 0
        return SHUFFLE_BUFFER if self.shuffle_buffer is None else self.shuffle_buffer

    @property
    def has_eval_split(self) -> bool:
        """Whether a source has an evaluation split."""
        return any(source.eval_split is not None for source in self.sources)

    @property
    def has_eval(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.has_eval_split or self.eval_size is not None

    def policy(self, kind: str) -> str:
        """Policy for rows of one of the `AUDIT_KINDS`."""
        default = AUDIT_KINDS[kind].default
        if isinstance(self.audit, dict):
            return self.audit.get(kind, default)
        if default == "keep" or (self.audit == "keep" and not AUDIT_KINDS[kind].trainable):
            return default
        return self.audit
