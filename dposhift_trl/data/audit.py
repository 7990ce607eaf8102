"""The row audit: judges the tokens that training reads, and drops rows, keeps them or refuses the split."""

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset, Value
from transformers import PreTrainedTokenizerBase
from trl import maybe_extract_prompt

from ..columns import (
    CHOSEN_START,
    PREFERENCE_COLUMNS,
    REFUSAL,
    ROW_KINDS,
    STREAM_ROW_INDEX,
    TOKEN_COLUMNS,
    with_row_index,
)
from .config import AUDIT_KINDS, ROW_ID, DataConfig
from .errors import DataError, reading_rows
from .kinds import starts_with_other_prompts
from .messages import is_conversation
from .origin import origin, origin_text
from .shapes import wrong_shape
from .sources import Rows, column_names
from .tokenization import PairTokenizer, tokenize_rows
from .tokens import PairTokens, Truncation, shorten


# Kinds that depend on other rows, and so are not looked for in a stream
AMONG_ROWS = ("duplicate", "leaked")
# Columns that only the audit reads
NOTES = (ROW_KINDS, REFUSAL)
REASON = "reason"  # key of an example in `audit.json`


@dataclass
class Finding:
    """Rows of one kind in one split: the policy applied, their number and up to three examples."""

    policy: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class SplitAudit:
    """
    Findings in one split. `rows` and `kept` are `None` for streaming datasets; `refusal` says why it is refused, and
    `advice` what would keep more rows.
    """

    rows: int | None
    kept: int | None
    findings: dict[str, Finding] = field(default_factory=dict)
    refusal: str | None = None
    advice: str | None = None

    def __str__(self) -> str:
        if self.rows is None:
            return "rows are checked as they are read"
        counts = [f"{found.count} {kind} ({found.policy})" for kind, found in self.findings.items() if found.count]
        text = f"{self.kept} of {self.rows} rows kept" + (f": {', '.join(counts)}" if counts else "")
        return f"{text}. {self.advice}." if self.advice else text


@dataclass
class AuditedRows:
    """Rows to train and evaluate on, with an explicit prompt and their tokens, and the findings by split."""

    train: Rows
    evaluation: Rows | None
    audits: dict[str, SplitAudit]

    def check(self) -> None:
        """
        Refuse rows that the audit refuses.

        Raises:
            DataError: If a kind with the policy `error` occurs, or too few rows are left.
        """
        for audit in self.audits.values():
            if audit.refusal is not None:
                raise DataError(audit.refusal)


@dataclass
class _Split:
    """A split before anything is dropped for its truncation: rows as tokens, and those that cannot become tokens."""

    name: str
    rows: Rows
    source: Rows
    malformed: list[tuple[int, list[str]]] = field(default_factory=list)  # place in `source`, and kinds


@reading_rows()
def audit_preferences(
    train: Rows,
    evaluation: Rows | None,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    truncations: Iterable[Truncation],
    num_proc: int | None = None,
) -> dict[Truncation, AuditedRows]:
    """
    Make prompts explicit, tokenize all rows once, find unusable rows, and apply the policy for each kind.

    At the reference, an identical pair is a hidden SFT step of weight beta (1 - lambda) / 2, so unusable rows matter
    more with a shift than in DPO. Streamed rows are checked as they are read, and not for duplicates.

    Args:
        train, evaluation (`Dataset` or `IterableDataset`):
            Rows from [`load_preferences`].
        config ([`DataConfig`]):
            Policies.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template if the rows are conversational.
        truncations (`Iterable[Truncation]`):
            How the stages that train on the rows truncate them.
        num_proc (`int`, *optional*):
            Number of processes that tokenize.

    Returns:
        `dict[Truncation, AuditedRows]`: For each truncation the rows that are left, and the findings. Whether they
        are refused is for [`AuditedRows.check`] to say, so that the findings can be saved first.

    Raises:
        DataError: If the rows cannot be read or tokenized, or no row of a stream is usable.
    """
    splits = [
        _tokenized(rows, name, tokenizer, num_proc)
        # Evaluation first: rows in both splits are dropped from training
        for name, rows in (("eval", evaluation), ("train", train))
        if rows is not None
    ]
    return {truncation: _audited(splits, config, truncation) for truncation in dict.fromkeys(truncations)}


def _tokenized(rows: Rows, name: str, tokenizer: PreTrainedTokenizerBase, num_proc: int | None) -> _Split:
    rows = with_row_index(rows)
    is_text = (rows.features or {}).get("chat_template_kwargs") == Value("string")  # read by `template_inputs`
    if "chat_template_kwargs" in column_names(rows) and not is_text:
        rows = rows.map(_with_template_kwargs)
    form = _Form()
    if isinstance(rows, IterableDataset):
        return _Split(name, rows.map(_StreamedRow(form, PairTokenizer(tokenizer, name))), rows)
    kinds = [form.kinds(row) for row in rows]
    malformed = [(place, found) for place, found in enumerate(kinds) if found]
    well_formed = rows.select([place for place, found in enumerate(kinds) if not found]) if malformed else rows
    if not form.all_explicit:
        well_formed = well_formed.map(_with_prompt)
    return _Split(name, tokenize_rows(well_formed, name, tokenizer, num_proc), rows, malformed)


def _audited(splits: list[_Split], config: DataConfig, truncation: Truncation) -> AuditedRows:
    audits: dict[str, SplitAudit] = {}
    kept: dict[str, Rows | None] = {"eval": None}
    eval_keys: set[bytes] = set()
    for split in splits:
        if isinstance(split.rows, IterableDataset):
            kept[split.name] = _audit_stream(split.rows, split.name, config, truncation)
            streamed = [kind for kind in AUDIT_KINDS if kind not in AMONG_ROWS]
            audits[split.name] = SplitAudit(None, None, {kind: Finding(config.policy(kind)) for kind in streamed})
        else:
            audit = _SplitAuditor(split, config, truncation, eval_keys if split.name == "train" else set())
            kept[split.name], audits[split.name] = audit.rows, audit.result
            if split.name == "eval":
                eval_keys = audit.seen
    train = kept["train"]
    assert train is not None
    return AuditedRows(train, kept["eval"], dict(sorted(audits.items(), reverse=True)))


class _SplitAuditor:
    """Judges the rows of a map-style split: `rows` are those that are left, `result` what was found."""

    def __init__(self, split: _Split, config: DataConfig, truncation: Truncation, eval_keys: set[bytes]):
        self.split, self.config, self.truncation, self.eval_keys = split, config, truncation, eval_keys
        self.findings = {kind: Finding(config.policy(kind)) for kind in AUDIT_KINDS}
        self.seen: set[bytes] = set()
        self.too_long: list[int] = []  # `max_length` that rows need which are dropped for it
        for place, kinds in split.malformed:
            self._drops(kinds, split.source, place)
        keep = [place for place, row in enumerate(_token_rows(split.rows)) if self._keeps(place, *row)]
        rows = split.rows if len(keep) == len(split.rows) else split.rows.select(keep)
        self.rows: Dataset = _without_notes(rows, *NOTES)
        self.result = SplitAudit(len(split.source), len(keep), self.findings)
        self.result.refusal = self._refusal()
        if self.result.refusal is None:
            self.result.advice = self._advice(len(keep), len(split.source))

    def _keeps(
        self, place: int, kinds: list[str], prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int]
    ) -> bool:
        tokens = PairTokens(prompt_ids, chosen_ids, rejected_ids)
        if "refused" not in kinds:
            kinds = [*kinds, *truncation_kinds(tokens, self.truncation), *self._repetitions(tokens)]
        kind = self._drops(kinds, self.split.rows, place)
        if kind in ("lost", "cut"):
            self.too_long.append(self.truncation.length_needed(tokens))
        return kind is None

    def _repetitions(self, tokens: PairTokens) -> Iterator[str]:
        key = self.truncation.digest(tokens)
        if key in self.eval_keys:
            yield "leaked"
        if key in self.seen:
            yield "duplicate"
        self.seen.add(key)

    def _drops(self, kinds: list[str], rows: Dataset, place: int) -> str | None:
        """Count a row, and name the kind that drops it: the first one that is not kept."""
        dropped = next((kind for kind in kinds if self.findings[kind].policy != "keep"), None)
        for kind in kinds if dropped is None else [dropped]:
            finding = self.findings[kind]
            finding.count += 1
            if len(finding.examples) < 3:
                finding.examples.append(_example(rows[place], self.split.name, self.config))
        return dropped

    def _refusal(self) -> str | None:
        name, result, share = self.split.name, self.result, self.config.min_rows_kept
        rows, kept = len(self.split.source), result.kept or 0
        for kind, finding in self.findings.items():
            if finding.count and finding.policy == "error":
                first = finding.examples[0]
                where = origin_text(first, self.config) + (f": {first[REASON]}" if REASON in first else "")
                return (
                    f"{finding.count} of {rows} {name} rows are `{kind}`: {AUDIT_KINDS[kind].description} (first in "
                    f"{where}). Fix the data, or set `data.audit.{kind}: drop`."
                )
        if kept >= max(share * rows, 1):
            return None
        return (
            f"The row audit leaves {kept} of {rows} {name} rows, less than `data.min_rows_kept` ({share}): {result}. "
            f"{self._remedy(kept, rows)}, or lower `data.min_rows_kept`."
        )

    def _advice(self, kept: int, rows: int, needed: int = 0) -> str | None:
        """The `max_length` with which nearly all rows that are usable would be kept; `None` if nearly all are."""
        wanted = max(needed, math.ceil(0.95 * (kept + len(self.too_long))))
        if wanted <= kept:
            return None
        lengths = sorted(self.too_long)
        length = lengths[wanted - kept - 1]
        length = -(-length // 64) * 64 if length > 64 else length
        dropped, left = (f"{n / rows:.0%}" for n in (len(lengths), kept + bisect.bisect(lengths, length)))
        longest = self.truncation.max_length
        return f"`max_length` {longest} drops {dropped} of the rows; {length} would keep {left} of all"

    def _remedy(self, kept: int, rows: int) -> str:
        """What to do about rows that are missing, by what most of them are."""
        needed = math.ceil(max(self.config.min_rows_kept * rows, 1))
        advice = self._advice(kept, rows, needed) if kept + len(self.too_long) >= needed else None
        if advice is not None:
            return f"{advice}. Raise `max_length`"
        malformed, refused = self.split.malformed, self.findings["refused"]
        shape = wrong_shape(self.split.source[malformed[0][0]]) if len(malformed) > (rows - kept) / 2 else None
        if shape is not None:
            return f"{shape} Change the rows"
        if refused.count > (rows - kept) / 2:
            return f"The chat template refuses them: {refused.examples[0][REASON]}. Fix the data"
        return "Fix the data"


def _audit_stream(rows: IterableDataset, name: str, config: DataConfig, truncation: Truncation) -> IterableDataset:
    dropped: Counter[str] = Counter()

    def is_usable(row: dict[str, Any]) -> bool:
        kinds = row[ROW_KINDS]
        if row[REFUSAL] is None and kinds[-1:] != ["missing"]:
            kinds = [*kinds, *truncation_kinds(PairTokens(*(row[column] for column in TOKEN_COLUMNS)), truncation)]
        kind = next((kind for kind in kinds if config.policy(kind) != "keep"), None)
        if kind is not None and config.policy(kind) == "error":
            raise DataError(
                f"Row {row[STREAM_ROW_INDEX]} of the streamed {name} rows is `{kind}`: "
                f"{AUDIT_KINDS[kind].description}, {shorten(row[REFUSAL] or row.get('chosen'))!r}. Fix the data, or "
                f"set `data.audit.{kind}: drop`."
            )
        dropped[kind or ""] += 1
        return kind is None

    kept = rows.filter(is_usable)
    if next(iter(kept), None) is None:
        found = ", ".join(f"{count} {kind}" for kind, count in dropped.items())
        first: dict[str, Any] = next(iter(rows), {})
        shape = f"{wrong_shape(first)} " if first and wrong_shape(first) else ""
        longer = " raise `max_length`," if {"lost", "cut"} & set(dropped) else ""
        raise DataError(
            f"The row audit leaves none of the streamed {name} rows: {found or 'there are none'}. {shape}Fix the "
            f"data,{longer} or hold out fewer rows."
        )
    return _without_notes(kept, *NOTES, ROW_ID)


def truncation_kinds(tokens: PairTokens, truncation: Truncation) -> Iterator[str]:
    """The kinds of a row that depend on how a stage truncates it."""
    if truncation.loses_answers(tokens):
        yield "lost"
    elif truncation.cuts_an_answer(tokens):
        yield "cut"
        chosen, rejected = truncation.read(tokens)
        if chosen == rejected and tokens.chosen_ids != tokens.rejected_ids:
            yield "identical"


def _token_rows(rows: Dataset) -> Iterator[tuple[list[str], list[int], list[int], list[int]]]:
    names = [ROW_KINDS, *TOKEN_COLUMNS]
    if len(rows):
        for batch in rows.select_columns(names).iter(batch_size=1000):
            yield from zip(*(batch[name] for name in names), strict=True)


def _without_notes(rows: Any, *names: str) -> Any:
    """Rows without columns that only the audit reads."""
    known = column_names(rows)
    return rows.remove_columns([name for name in names if name in known])


def _example(row: dict[str, Any], split: str, config: DataConfig) -> dict[str, Any]:
    """A row as `audit.json` shows it: where it comes from, and what the chat template says against it."""
    example = origin(row, split, config) | {name: shorten(row.get(name)) for name in PREFERENCE_COLUMNS}
    if row.get(REFUSAL) is not None:
        example[REASON] = shorten(row[REFUSAL])
    return example


class _Form:
    """Whether rows can be tokenized: their types, and that all answers are text or all are conversations."""

    def __init__(self) -> None:
        self.all_explicit = True
        self.answer_type: type | None = None  # TRL decides by the first row

    def kinds(self, row: dict[str, Any]) -> list[str]:
        """The kinds of a row that cannot be tokenized; none for the others."""
        if not _is_preference(row):
            return ["missing"]
        explicit = _with_prompt(row)
        if explicit["prompt"] == []:
            others = starts_with_other_prompts(explicit["chosen"], explicit["rejected"])
            return ["prompts", "missing"] if others else ["missing"]
        self.answer_type = self.answer_type or type(row["chosen"])
        if not isinstance(row["chosen"], self.answer_type):
            return ["missing"]
        self.all_explicit = self.all_explicit and explicit is row
        return []


class _StreamedRow:
    """Makes the prompt of a row explicit and tokenizes it, if it can be tokenized."""

    def __init__(self, form: _Form, tokenize: PairTokenizer):
        self.form, self.tokenize = form, tokenize

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        kinds = self.form.kinds(row)
        if kinds:
            columns: dict[str, Any] = {name: [] for name in TOKEN_COLUMNS}
            return {**row, **columns, CHOSEN_START: 0, ROW_KINDS: kinds, REFUSAL: None}
        row = _with_prompt(row)
        return {**row, **self.tokenize.one(row)}


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with an explicit prompt, extracted by TRL's rule; the same object if the prompt is explicit already."""
    if "prompt" not in row and not (row["chosen"] and row["rejected"]):
        return {**row, "prompt": ""}
    explicit: dict[str, Any] = maybe_extract_prompt(row)
    if explicit is row:
        return row
    if explicit["prompt"] == [] and isinstance(row.get("prompt"), str):
        explicit["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return {**row, **explicit}


def _with_template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """Replace null by an empty mapping, since TRL unpacks the value."""
    return {"chat_template_kwargs": row["chat_template_kwargs"] or {}}


def _is_preference(row: dict[str, Any]) -> bool:
    chosen, rejected, prompt = (row.get(name) for name in ("chosen", "rejected", "prompt"))
    if isinstance(chosen, str):
        return isinstance(rejected, str) and ("prompt" not in row or isinstance(prompt, str))
    return (
        is_conversation(chosen)
        and is_conversation(rejected)
        and ("prompt" not in row or isinstance(prompt, str) or is_conversation(prompt))
    )
