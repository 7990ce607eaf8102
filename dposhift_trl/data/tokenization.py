"""Preference rows to tokens, once per run, as TRL makes them."""

import datetime
import json
from typing import Any

import transformers
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..columns import CHOSEN_START, FILE_ROW, REFUSAL, ROW_INDEX, ROW_KINDS, STREAM_ROW_INDEX, TOKEN_COLUMNS
from .errors import DataError
from .kinds import Vocabulary, row_kinds
from .messages import template_inputs
from .rendering import TemplateLimitError, bounded, render
from .tokens import shorten, split_pair


FORMAT = 2  # part of every cache key; increase it if the columns or their meaning change

COLUMNS = {
    **{name: List(Value("int64")) for name in TOKEN_COLUMNS},
    CHOSEN_START: Value("int64"),
    ROW_KINDS: List(Value("string")),
    REFUSAL: Value("string"),
}


def tokenize_rows(
    rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None
) -> Dataset:
    """
    Add the columns `prompt_ids`, `chosen_ids` and `rejected_ids` as [`~trl.DPOTrainer`] does, and what the audit has
    to know of them. The result is in the cache of datasets if the rows are.

    Args:
        rows (`Dataset`):
            Rows with an explicit `prompt`, `chosen` and `rejected`, and optionally `tools` and `chat_template_kwargs`.
        split (`str`):
            Name of the split, for messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template if the rows are conversational.
        num_proc (`int`, *optional*):
            Number of processes.

    Raises:
        DataError: If the chat template exceeds its bounds, or text has no EOS token to end with.
    """
    state, tokenized, failure = PartialState(), None, None
    with state.main_process_first(), state.local_main_process_first():  # the others read its cache, as in TRL
        try:
            tokenized = rows.map(
                PairTokenizer(tokenizer, split),
                batched=True,
                num_proc=num_proc,
                features=Features({**rows.features, **COLUMNS}),
                new_fingerprint=_fingerprint(rows, tokenizer),
                desc=f"Tokenizing {split} dataset",
            )
        except Exception as error:  # raised below, since the other processes wait for the end of this block
            failure = error
    if failure is not None:
        raise failure
    return tokenized


def _fingerprint(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of what determines the tokens; `None`, by which datasets hashes the function, if that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    template = json.dumps(tokenizer.chat_template)
    # gpt-oss and Llama 3 write the date
    today = str(datetime.date.today()) if "strftime_now" in template else None
    known = [
        __version__,
        FORMAT,
        rows._fingerprint,
        transformers.__version__,
        type(tokenizer).__qualname__,
        template,
        today,
    ]
    fingerprint: str = Hasher.hash([*known, backend.to_str(), json.dumps(tokenizer.special_tokens_map, default=str)])
    return fingerprint


class PairTokenizer:
    """
    Tokenizes batches of rows as [`~trl.DPOTrainer`] does, and names what is wrong with them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        split (`str`):
            Name of the split, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split: str):
        self.tokenizer = tokenizer
        self.split = split
        self.vocabulary = Vocabulary(tokenizer)
        # Tokenizers with their own way from messages to tokens may not go through text
        self.renders_text = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template

    def one(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns of one row."""
        return {name: values[0] for name, values in self({key: [value] for key, value in row.items()}).items()}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The columns of a batch, see `COLUMNS`."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        refusals: list[str | None] = []
        sequences: list[Any] = []  # of each row: prompt, prompt and chosen, prompt and rejected
        for row in rows:
            refusal, rendered = None, ["", "", ""]
            try:
                rendered = self._render(row)
            except (DataError, TemplateLimitError) as error:
                raise self._refuse(row, error) from error
            except Exception as error:  # a template is a program that runs on whatever the row contains
                refusal = f"{error or type(error).__name__}"
            refusals.append(refusal)
            sequences += rendered
        ids = self._encode(sequences, conversational=bool(rows) and isinstance(rows[0]["prompt"], list))
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for place, (row, refusal) in enumerate(zip(rows, refusals, strict=True)):
            tokens, chosen_start, whole_prompt = split_pair(*ids[3 * place : 3 * place + 3])
            kinds = ["refused"] if refusal is not None else row_kinds(row, tokens, whole_prompt, self.vocabulary)
            values = (*tokens, chosen_start, kinds, refusal)
            for name, value in zip(COLUMNS, values, strict=True):
                columns[name].append(value)
        return columns

    def _render(self, row: dict[str, Any]) -> list[Any]:
        kwargs = template_inputs(row)  # TRL reads it for text too
        prompt, answers = row["prompt"], [row["chosen"], row["rejected"]]
        if isinstance(prompt, list):
            if reserved := {"tokenize", "add_generation_prompt"} & set(kwargs):
                raise ValueError(f"`chat_template_kwargs` must not contain `{min(reserved)}`, which TRL sets")
            kwargs["tokenize"] = not self.renders_text
            with bounded():
                return [
                    render(self.tokenizer, prompt, add_generation_prompt=True, **kwargs),
                    *(render(self.tokenizer, prompt + answer, **kwargs) for answer in answers),
                ]
        eos = self.tokenizer.eos_token
        if eos is None:
            raise DataError(
                "The tokenizer must have an EOS token to end answers that are text, got none. Set `sft.eos_token`, or "
                "use a model that has one."
            )
        return [prompt, *(prompt + (answer if answer.endswith(eos) else answer + eos) for answer in answers)]

    def _refuse(self, row: dict[str, Any], error: Exception) -> DataError:
        if isinstance(error, DataError):
            return error
        number = next((row[name] for name in (FILE_ROW, ROW_INDEX, STREAM_ROW_INDEX) if name in row), "?")
        return DataError(
            f"The chat template must write little more than what a row contains, within seconds, got one that {error} "
            f"for row {number} of the {self.split} split. Use a model with another chat template, or shorten the row: "
            f"{shorten(row['prompt'])}"
        )

    def _encode(self, sequences: list[Any], conversational: bool) -> list[list[int]]:
        if not sequences or isinstance(next(filter(None, sequences), ""), list):
            return [list(sequence) for sequence in sequences]
        kwargs = {"add_special_tokens": False} if conversational else {}  # as `apply_chat_template` does
        ids: list[list[int]] = self.tokenizer(sequences, **kwargs)["input_ids"]
        return ids
