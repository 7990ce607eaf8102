"""The row audit: which rows cannot be trained on as they are, and what is done with them."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational, maybe_extract_prompt

from ..columns import PREFERENCE_COLUMNS, ROW_INDEX, TEMPLATE_COLUMNS, with_row_index
from .sources import AUDIT_KINDS, DataConfig, DataError, Rows, column_names, is_conversation, reading_rows


@dataclass
class Finding:
    """Rows of one kind in one split: how many, what was done, and up to three of them."""

    policy: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class SplitAudit:
    """What the audit found in one split; `rows` and `kept` are None where rows are streamed."""

    rows: int | None
    kept: int | None
    findings: dict[str, Finding] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.rows is None:
            return "rows are checked as they are read"
        found = [f"{found.count} {kind} ({found.policy})" for kind, found in self.findings.items() if found.count]
        return f"{self.kept} of {self.rows} rows kept" + (f": {', '.join(found)}" if found else "")


@reading_rows()
def audit_preferences(
    train: Rows,
    evaluation: Rows | None,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> tuple[Rows, Rows | None, dict[str, SplitAudit]]:
    """
    Find unusable rows, apply each kind's policy, and make the prompt explicit.

    At the reference an identical pair is a hidden SFT step of weight beta (1 - lambda) / 2, so unusable rows matter
    more under a shift than in DPO. Streamed rows are checked as they are read; duplicates are not looked for there.

    Args:
        train, evaluation (`Dataset` or `IterableDataset`):
            Rows of [`load_preferences`].
        config ([`DataConfig`]):
            Policies.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            With a chat template where the rows are conversational.
        max_length (`int`, *optional*):
            Tokens of prompt and answer that the stages keep.

    Returns:
        `tuple`: Training rows, evaluation rows and what was found by split.

    Raises:
        DataError: If a kind with the policy `error` occurs, or too few rows are left.
    """
    audits: dict[str, SplitAudit] = {}
    eval_keys: set[bytes] = set()
    checked: dict[str, Rows | None] = {"eval": None}
    # Evaluation first: a row in both splits is taken out of training
    for split, rows in (("eval", evaluation), ("train", train)):
        if rows is None:
            continue
        rows = with_row_index(rows)
        if "chat_template_kwargs" in column_names(rows):
            rows = rows.map(_with_template_kwargs)
        check = _RowCheck(tokenizer, max_length, eval_keys if split == "train" else set())
        if isinstance(rows, IterableDataset):
            checked[split] = _audit_stream(rows, split, config, check)
            audits[split] = SplitAudit(None, None, {k: Finding(config.policy(k)) for k in _RowCheck.STREAMED})
        else:
            checked[split], audits[split] = _audit_split(rows, split, config, check)
        if split == "eval":
            eval_keys = check.seen
    kept = checked["train"]
    assert kept is not None
    return kept, checked["eval"], dict(sorted(audits.items(), reverse=True))


def _audit_split(rows: Dataset, split: str, config: DataConfig, check: "_RowCheck") -> tuple[Dataset, SplitAudit]:
    findings = {kind: Finding(config.policy(kind)) for kind in AUDIT_KINDS}
    keep = []
    for index, row in enumerate(rows):
        kinds = check(row)
        # Of several, the first that takes the row out
        kind = next((kind for kind in kinds if findings[kind].policy != "keep"), kinds[0] if kinds else None)
        if kind is not None:
            finding = findings[kind]
            finding.count += 1
            if len(finding.examples) < 3:
                finding.examples.append(
                    {"row": row[ROW_INDEX], **{name: _shown(row.get(name)) for name in PREFERENCE_COLUMNS}}
                )
        if kind is None or findings[kind].policy == "keep":
            keep.append(index)
    for kind, finding in findings.items():
        if finding.count and finding.policy == "error":
            raise DataError(
                f"{finding.count} of {len(rows)} {split} rows are `{kind}`: {AUDIT_KINDS[kind]} (first at row "
                f"{finding.examples[0]['row']}). Mend the data, or set `data.audit.{kind}: drop`."
            )
    audit = SplitAudit(len(rows), len(keep), findings)
    if not keep or len(keep) < config.min_rows_kept * len(rows):
        raise DataError(
            f"the row audit leaves {audit.kept} of {audit.rows} {split} rows, less than `data.min_rows_kept` "
            f"({config.min_rows_kept}): {audit}. Mend the data, raise `max_length`, or lower `data.min_rows_kept`."
        )
    kept = rows if len(keep) == len(rows) else rows.select(keep)
    return (kept if check.explicit else kept.map(_with_prompt)), audit


def _audit_stream(rows: IterableDataset, split: str, config: DataConfig, check: "_RowCheck") -> IterableDataset:
    def usable(row: dict[str, Any]) -> bool:
        for kind in check.streamed(row):
            if config.policy(kind) == "error":
                raise DataError(f"a {split} row is `{kind}`: {AUDIT_KINDS[kind]}: {_shown(row.get('chosen'))!r}")
            if config.policy(kind) == "drop":
                return False
        return True

    kept = rows.filter(usable).map(_with_prompt)
    if next(iter(kept), None) is None:
        raise DataError(
            f"the row audit leaves none of the streamed {split} rows. Mend the data, raise `max_length`, or hold out "
            "fewer rows."
        )
    return kept


class _RowCheck:
    """Names what is wrong with a row; remembers the rows it has seen."""

    STREAMED = ("missing", "empty", "identical", "lost", "cut")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, forbidden: set[bytes]):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.forbidden = forbidden
        self.seen: set[bytes] = set()
        self.explicit = True
        self.form: type | None = None  # text or conversations, which TRL decides by the first row

    def __call__(self, row: dict[str, Any]) -> list[str]:
        kinds = list(self.streamed(row))
        if "missing" in kinds:
            return kinds
        explicit = _with_prompt(row)
        # A digest, since the texts of a whole split are too much to hold
        text = json.dumps([explicit[name] for name in PREFERENCE_COLUMNS], default=str).encode()
        key = hashlib.blake2b(text, digest_size=16).digest()
        if key in self.forbidden:
            kinds.append("leaked")
        if key in self.seen:
            kinds.append("duplicate")
        self.seen.add(key)
        return kinds

    def streamed(self, row: dict[str, Any]) -> Iterator[str]:
        """The checks that need no memory of other rows."""
        explicit = _with_prompt(row) if _is_preference(row) else None
        if explicit is None or explicit["prompt"] == []:
            yield "missing"
            return
        self.form = self.form or type(row["chosen"])
        if not isinstance(row["chosen"], self.form):
            yield "missing"
            return
        self.explicit = self.explicit and explicit is row
        if _has_empty_answer(explicit):
            yield "empty"
        if row["chosen"] == row["rejected"]:
            yield "identical"
        if self.max_length is None and self.form is str and not row.keys() & set(TEMPLATE_COLUMNS):
            return  # text alone has no length to keep, and no template to fail
        limit = math.inf if self.max_length is None else self.max_length
        if self._tokens(explicit, None) >= limit:
            yield "lost"
        elif max(self._tokens(explicit, "chosen"), self._tokens(explicit, "rejected")) > limit:
            yield "cut"

    def _tokens(self, row: dict[str, Any], answer: str | None) -> int:
        """Length in tokens of the prompt, with one answer or alone, as TRL will tokenise it."""
        tools = row.get("tools")
        try:
            # TRL reads both for text too
            kwargs = {
                "tools": json.loads(tools) if isinstance(tools, str) else tools,
                **(row.get("chat_template_kwargs") or {}),
            }
            if is_conversational(row):
                tokens = self.tokenizer.apply_chat_template(
                    row["prompt"] + (row[answer] if answer else []),
                    tokenize=True,
                    return_dict=True,
                    add_generation_prompt=answer is None,
                    **kwargs,
                )
                return len(tokens["input_ids"])
        except Exception as error:  # a template is a program, run on whatever the row holds
            raise DataError(f"the chat template cannot render a row: {error}: {_shown(row['prompt'])}") from error
        text = row["prompt"]
        if answer:
            eos = self.tokenizer.eos_token or ""
            text += row[answer] if row[answer].endswith(eos) else row[answer] + eos
        return len(self.tokenizer(text)["input_ids"])


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with an explicit prompt: what the answers share, as TRL has it; itself if it has one already."""
    if "prompt" not in row and not (row["chosen"] and row["rejected"]):
        return {**row, "prompt": ""}
    explicit: dict[str, Any] = maybe_extract_prompt(row)
    if explicit is row:
        return row
    if explicit["prompt"] == [] and isinstance(row.get("prompt"), str):
        explicit["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return {**row, **explicit}


def _with_template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """An empty mapping for a null, which TRL would unpack."""
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
    answers = (row["chosen"], row["rejected"])
    return not all((answer if isinstance(answer, str) else answer[-1]["content"]).strip() for answer in answers)


def _shown(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:200] + "..."
