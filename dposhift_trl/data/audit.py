"""The row audit: finds rows that should not be trained on and drops them, keeps them or raises an error."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import maybe_extract_prompt

from ..columns import PREFERENCE_COLUMNS, ROW_INDEX, TEMPLATE_COLUMNS, with_row_index
from .config import AUDIT_KINDS, DataConfig
from .errors import DataError, reading_rows
from .messages import is_conversation, is_empty
from .shapes import wrong_shape
from .sources import Rows, column_names
from .tokens import Truncation, shorten, tokenize_pair


@dataclass
class Finding:
    """Rows of one kind in one split: the policy applied, their number and up to three examples."""

    policy: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class SplitAudit:
    """Findings in one split. `rows` and `kept` are `None` for streaming datasets."""

    rows: int | None
    kept: int | None
    findings: dict[str, Finding] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.rows is None:
            return "rows are checked as they are read"
        counts = [f"{found.count} {kind} ({found.policy})" for kind, found in self.findings.items() if found.count]
        return f"{self.kept} of {self.rows} rows kept" + (f": {', '.join(counts)}" if counts else "")


@dataclass
class AuditedRows:
    """Rows to train and evaluate on, with an explicit prompt, and the findings by split."""

    train: Rows
    evaluation: Rows | None
    audits: dict[str, SplitAudit]


@reading_rows()
def audit_preferences(
    train: Rows,
    evaluation: Rows | None,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
) -> AuditedRows:
    """
    Find unusable rows, apply the policy for each kind, and make the prompt explicit.

    At the reference, an identical pair is a hidden SFT step of weight beta (1 - lambda) / 2, so unusable rows matter
    more with a shift than in DPO. Streamed rows are checked as they are read, and not for duplicates.

    Args:
        train, evaluation (`Dataset` or `IterableDataset`):
            Rows from [`load_preferences`].
        config ([`DataConfig`]):
            Policies.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template if the rows are conversational.
        truncation ([`~data.tokens.Truncation`]):
            How the stage that trains on the rows truncates them.

    Returns:
        [`AuditedRows`]: The rows that are left, and the findings.

    Raises:
        DataError: If a kind with the policy `error` occurs, or too few rows are left.
    """
    audits: dict[str, SplitAudit] = {}
    eval_keys: set[bytes] = set()
    checked: dict[str, Rows | None] = {"eval": None}
    # Evaluation first: rows in both splits are dropped from training
    for split, rows in (("eval", evaluation), ("train", train)):
        if rows is None:
            continue
        rows = with_row_index(rows)
        if "chat_template_kwargs" in column_names(rows):
            rows = rows.map(_with_template_kwargs)
        check = _RowCheck(tokenizer, truncation, eval_keys if split == "train" else set())
        if isinstance(rows, IterableDataset):
            checked[split] = _audit_stream(rows, split, config, check)
            audits[split] = SplitAudit(None, None, {k: Finding(config.policy(k)) for k in _RowCheck.STREAMED})
        else:
            checked[split], audits[split] = _audit_split(rows, split, config, check)
        if split == "eval":
            eval_keys = check.seen
    kept = checked["train"]
    assert kept is not None
    return AuditedRows(kept, checked["eval"], dict(sorted(audits.items(), reverse=True)))


def _audit_split(rows: Dataset, split: str, config: DataConfig, check: "_RowCheck") -> tuple[Dataset, SplitAudit]:
    findings = {kind: Finding(config.policy(kind)) for kind in AUDIT_KINDS}
    keep = []
    shape = None  # what is wrong with the first row of no known shape
    for index, row in enumerate(rows):
        kinds = check(row)
        if "missing" in kinds and shape is None:
            shape = wrong_shape(row)
        # If a row is of several kinds, the first one that drops it counts
        kind = next((kind for kind in kinds if findings[kind].policy != "keep"), kinds[0] if kinds else None)
        if kind is not None:
            finding = findings[kind]
            finding.count += 1
            if len(finding.examples) < 3:
                finding.examples.append(
                    {"row": row[ROW_INDEX], **{name: shorten(row.get(name)) for name in PREFERENCE_COLUMNS}}
                )
        if kind is None or findings[kind].policy == "keep":
            keep.append(index)
    for kind, finding in findings.items():
        if finding.count and finding.policy == "error":
            raise DataError(
                f"{finding.count} of {len(rows)} {split} rows are `{kind}`: {AUDIT_KINDS[kind]} (first in row "
                f"{finding.examples[0]['row']}). Fix the data, or set `data.audit.{kind}: drop`."
            )
    audit = SplitAudit(len(rows), len(keep), findings)
    if not keep or len(keep) < config.min_rows_kept * len(rows):
        raise DataError(
            f"The row audit leaves {audit.kept} of {audit.rows} {split} rows, less than `data.min_rows_kept` "
            f"({config.min_rows_kept}): {audit}. "
            + _remedy(shape if findings["missing"].count > (len(rows) - len(keep)) / 2 else None)
            + ", or lower `data.min_rows_kept`."
        )
    kept = rows if len(keep) == len(rows) else rows.select(keep)
    return (kept if check.all_explicit else kept.map(_with_prompt)), audit


def _audit_stream(rows: IterableDataset, split: str, config: DataConfig, check: "_RowCheck") -> IterableDataset:
    def usable(row: dict[str, Any]) -> bool:
        for kind in check.streamed(row):
            if config.policy(kind) == "error":
                raise DataError(
                    f"A row of the {split} split is `{kind}`: {AUDIT_KINDS[kind]}, chosen: "
                    f"{shorten(row.get('chosen'))!r}. Fix the data, or set `data.audit.{kind}: drop`."
                )
            if config.policy(kind) == "drop":
                return False
        return True

    kept = rows.filter(usable).map(_with_prompt)
    if next(iter(kept), None) is None:
        remedy = _remedy(wrong_shape(next(iter(rows), {})))
        raise DataError(f"The row audit leaves none of the streamed {split} rows. {remedy}, or hold out fewer rows.")
    return kept


def _remedy(shape: str | None) -> str:
    return f"{shape} Change the rows" if shape else "Fix the data, raise `max_length`"


class _RowCheck:
    """Names the kinds of a row, and remembers the rows it has seen."""

    STREAMED = ("missing", "empty", "identical", "lost", "cut")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, truncation: Truncation, eval_keys: set[bytes]):
        self.tokenizer = tokenizer
        self.truncation = truncation
        self.eval_keys = eval_keys
        self.seen: set[bytes] = set()
        self.all_explicit = True
        self.answer_type: type | None = None  # text or conversations; TRL decides by the first row

    def __call__(self, row: dict[str, Any]) -> list[str]:
        kinds = list(self.streamed(row))
        if "missing" in kinds:
            return kinds
        explicit = _with_prompt(row)
        # A digest, since the texts of a whole split may not fit in memory
        text = json.dumps([explicit[name] for name in PREFERENCE_COLUMNS], default=str).encode()
        key = hashlib.blake2b(text, digest_size=16).digest()
        if key in self.eval_keys:
            kinds.append("leaked")
        if key in self.seen:
            kinds.append("duplicate")
        self.seen.add(key)
        return kinds

    def streamed(self, row: dict[str, Any]) -> Iterator[str]:
        """The checks that do not depend on other rows."""
        explicit = _with_prompt(row) if _is_preference(row) else None
        if explicit is None or explicit["prompt"] == []:
            yield "missing"
            return
        self.answer_type = self.answer_type or type(row["chosen"])
        if not isinstance(row["chosen"], self.answer_type):
            yield "missing"
            return
        self.all_explicit = self.all_explicit and explicit is row
        if _has_empty_answer(explicit):
            yield "empty"
        if row["chosen"] == row["rejected"]:
            yield "identical"
        is_plain_text = self.answer_type is str and not row.keys() & set(TEMPLATE_COLUMNS)
        if self.truncation.max_length is None and is_plain_text:
            return  # nothing is truncated, and there is no template that could fail
        tokens = tokenize_pair(explicit, self.tokenizer)
        if self.truncation.loses_answers(tokens):
            yield "lost"
        elif self.truncation.cuts_an_answer(tokens):
            yield "cut"


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


def _has_empty_answer(row: dict[str, Any]) -> bool:
    return is_empty(row["chosen"]) or is_empty(row["rejected"])
