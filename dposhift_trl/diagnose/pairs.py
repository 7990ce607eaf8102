"""The pairs of a diagnosis: loaded and audited as for a run, and whether both models can read them."""

from collections.abc import Iterator, Mapping

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..columns import TOKEN_COLUMNS
from ..console import say
from ..data.audit import AuditedRows, audit_preferences
from ..data.chat_template import check_template, use_plain_chat_template
from ..data.shapes import convert
from ..data.sources import load_preferences
from ..data.tokens import PairTokens
from ..pipeline.preflight import table_positions
from ..training.batching import without_lost_rows
from .models import ModelSource
from .settings import DiagnoseError, DiagnoseSettings


def load_pairs(settings: DiagnoseSettings, tokenizer: PreTrainedTokenizerBase) -> AuditedRows:
    """
    Load the pairs, tokenize them, and audit them as a run does.

    Returns:
        [`~data.audit.AuditedRows`]: The pairs, as `train`. Not yet checked.

    Raises:
        DataError: If they cannot be read or tokenized.
    """
    rows, evaluation = load_preferences(settings.data, settings.seed)
    rows = rows if evaluation is None else evaluation
    assert isinstance(rows, Dataset)  # streams are refused
    if settings.limit is not None and settings.limit < len(rows):
        say(f"pairs: the first {settings.limit} of {len(rows)} rows")
        rows = rows.select(range(settings.limit))
    rows, changes = convert(rows, tokenizer)
    if changes:
        say(f"Rows converted: {'; '.join(changes)}.")
    if use_plain_chat_template(rows, tokenizer):
        say("The tokenizer has no chat template, so messages are written as plain text with the names of the roles.")
    for note in check_template(rows, tokenizer):
        say(note)
    audited = audit_preferences(rows, None, settings.data, tokenizer, [settings.truncation])[settings.truncation]
    if settings.data.policy("lost") == "keep":  # no answer is left of them
        audited.train = without_lost_rows(audited.train, settings.max_length, settings.truncation.mode)
    return audited


def check_vocabulary(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, place: str
) -> None:
    """
    Check that the tokens of the pairs are the same words for both models. Otherwise, scores cannot be compared.

    Args:
        rows (`Dataset`):
            Tokenized pairs.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer, which made the tokens.
        other ([`~transformers.PreTrainedTokenizerBase`]), place (`str`):
            The reference's tokenizer, and where it is.

    Raises:
        DiagnoseError: If a token differs.
    """
    used, size = _used_tokens(rows), max(other.get_vocab().values(), default=-1) + 1
    words = {token: tokenizer.convert_ids_to_tokens(token) for token in used}
    others = {token: other.convert_ids_to_tokens(token) if token < size else None for token in used}
    if differing := [token for token in used if words[token] != others[token]]:
        token = differing[0]
        raise DiagnoseError(
            "`policy` and `reference` must have the same vocabulary, since log-probabilities of other tokens cannot "
            f"be compared, got {len(differing)} of {len(used)} tokens that differ: {token} is {words[token]!r} for "
            f"the policy and {others[token]!r} in {place}. Pass the model that training started from."
        )


def check_sizes(rows: Dataset, configs: Mapping[ModelSource, PreTrainedConfig], settings: DiagnoseSettings) -> None:
    """
    Check that both models have an embedding of each token, and positions for the longest pair.

    Raises:
        DiagnoseError: If one has not.
    """
    largest = _used_tokens(rows)[-1]
    lengths = [len(prompt) + max(map(len, answers)) for prompt, *answers in _read(rows, settings)]
    for source, config in configs.items():
        size = getattr(config.get_text_config(), "vocab_size", None)
        # PEFT resizes the embedding of an adapter's base model to its tokenizer
        if source.base is None and size is not None and largest >= size:
            raise DiagnoseError(
                f"`{source.role}` must have an embedding of every token of the pairs, got {source.place} with {size} "
                f"and the token {largest}. Pass a model with the tokenizer that it was trained with."
            )
        positions = _positions(config, settings.trust_remote_code)
        if positions is not None and max(lengths) > positions:
            beyond = sum(length > positions for length in lengths)
            raise DiagnoseError(
                f"`max_length` must be at most {positions}, the positions of `{source.role}`, got "
                f"{settings.max_length}: {beyond} of {len(rows)} pairs have more tokens, the longest one "
                f"{max(lengths)}. Pass --max-length {positions}."
            )


def answer_lengths(rows: Dataset, settings: DiagnoseSettings) -> list[torch.Tensor]:
    """Number of scored tokens of the chosen and of the rejected answers. Shape: `(len(rows),)` each."""
    # Nothing predicts a token that is the first of its row
    counts = [[len(answer) - (not prompt) for answer in answers] for prompt, *answers in _read(rows, settings)]
    return list(torch.tensor(counts).unbind(1))


def _read(rows: Dataset, settings: DiagnoseSettings) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """What is left of prompt, chosen answer, and rejected answer, whose start is kept."""
    for row in rows.select_columns(list(TOKEN_COLUMNS)):
        (prompt, chosen), (_, rejected) = settings.truncation.read(PairTokens(*(row[name] for name in TOKEN_COLUMNS)))
        yield prompt, chosen, rejected


def _used_tokens(rows: Dataset) -> list[int]:
    table = rows.select_columns(list(TOKEN_COLUMNS)).with_format("arrow")[:]
    return sorted({token for name in TOKEN_COLUMNS for token in pc.unique(pc.list_flatten(table[name])).to_pylist()})


def _positions(config: PreTrainedConfig, trust_remote_code: bool) -> int | None:
    """Number of positions, if the model looks them up in a table."""
    try:
        with torch.device("meta"):
            return table_positions(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    except (ImportError, ValueError, RuntimeError, NotImplementedError):  # its code does not support that
        return None
