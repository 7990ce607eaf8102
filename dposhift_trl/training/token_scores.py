"""Saves where in an answer its log-probability changed: the tokens of the pairs that fell and rose most."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..artifacts import TOKENS, write_whole
from ..columns import PROMPT_IDS, ROW_INDEX, SAVED_ROW_INDEX, SHARED_PROMPT
from ..console import printable
from ..report.findings import UNCHANGED
from ..scoring import shared_prompt_scores


logger = logging.getLogger(__name__)

AnswerTokens = tuple[int, str, list[int], list[float]]  # row, answer, tokens, and their log-probabilities

PAIRS_AT_EACH_END = 10
UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to

TOKEN_TABLE = pa.schema(
    [
        (SAVED_ROW_INDEX, pa.int64()),
        ("answer", pa.string()),
        ("text", pa.string()),
        ("logps", pa.float64()),
        ("ref_logps", pa.float64()),
    ]
)


def save_token_scores(
    trainer: DPOTrainer, reference: Callable[[], contextlib.AbstractContextManager[Any]], rows: Any, table: Path
) -> None:
    """
    Save the log-probabilities of each token of the pairs whose chosen answers fell and rose most in an evaluation.

    The file is `tokens/<name>` beside `table`. Nothing is saved of iterable datasets and images; with `ld_alpha`,
    where the tokens of an answer do not add up to its score; if no pair changed; or if the reference is gone, as with
    `precompute_ref_log_probs=True`. That it cannot be saved is a warning, since a run must not end by it.

    Args:
        trainer ([`DPOShiftTrainer`]):
            Its policy scores as it is now.
        reference (`Callable`):
            Returns a context in which the reference is at hand. The context gives the model to call.
        rows (`Dataset`):
            The rows that were evaluated, tokenized and numbered.
        table (`Path`):
            Scores of the pairs, saved by the evaluation.
    """
    path, is_main = table.parent / TOKENS / table.name, trainer.is_world_process_zero()
    wanted: list[int] = []
    with _errors_as_warnings():
        if is_main:
            path.unlink(missing_ok=True)  # of an earlier evaluation at this step
    collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
    usable = isinstance(rows, Dataset) and {PROMPT_IDS, ROW_INDEX} <= set(rows.column_names)
    if not usable or not isinstance(collator, DataCollatorForPreference) or trainer.ld_alpha is not None:
        return
    with _errors_as_warnings():
        if is_main and table.exists():
            wanted = changed_most(table)
    (wanted,) = broadcast_object_list([wanted])
    with _errors_as_warnings():
        # On every process, since all of them load the reference together
        found = _tokens_of(trainer, reference, selected(rows, wanted)) if wanted else None
        if found is not None and is_main:
            write_whole(path, found)


@contextlib.contextmanager
def _errors_as_warnings() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # such as no memory for both models
        reason = printable(" ".join(str(error).split()))[:300]
        logger.warning("The log-probabilities of tokens are not saved: %s", reason)


def changed_most(table: Path | pa.Table) -> list[int]:
    """Numbers of the rows whose chosen log-ratio fell most, then of those whose chosen log-ratio rose most."""
    table = table if isinstance(table, pa.Table) else pq.read_table(table)
    columns = table.select([SAVED_ROW_INDEX, "chosen_logratios"]).to_pydict()
    pairs = sorted(zip(columns["chosen_logratios"], columns[SAVED_ROW_INDEX], strict=True))
    fell = [int(row) for change, row in pairs[:PAIRS_AT_EACH_END] if change < -UNCHANGED]
    rose = [int(row) for change, row in reversed(pairs[-PAIRS_AT_EACH_END:]) if change > UNCHANGED]
    return [*fell, *rose]


def selected(rows: Dataset, wanted: Sequence[int]) -> Dataset:
    """The rows with some numbers, in their order."""
    places = {number: place for place, number in enumerate(rows[ROW_INDEX])}
    return rows.select([places[number] for number in wanted if number in places])


def _tokens_of(trainer: DPOTrainer, reference: Callable[[], Any], rows: Dataset) -> pa.Table | None:
    """The tokens of all answers in order, or `None` if there is no reference."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    settings = trainer.data_collator, trainer.args.per_device_eval_batch_size, trainer.accelerator
    logps = score_tokens(policy, rows, *settings)
    with reference() as model:
        if model is None:
            return None
        ref_logps = score_tokens(model, rows, *settings)
    return token_table(getattr(trainer.processing_class, "tokenizer", trainer.processing_class), logps, ref_logps)


def token_table(tokenizer: Any, logps: Sequence[AnswerTokens], ref_logps: Sequence[AnswerTokens]) -> pa.Table:
    """
    The tokens of all answers in order, with their log-probabilities.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        logps, ref_logps (`Sequence[AnswerTokens]`):
            Output of [`score_tokens`] for the policy and for the reference.
    """
    lines = []
    for (number, answer, ids, values), (*_, ref_values) in zip(logps, ref_logps, strict=True):
        texts, start = list(token_texts(tokenizer, ids)), 0
        if "".join(text for text, _ in texts) != _decoded(tokenizer, ids):
            continue
        for text, count in texts:
            sums = (sum(scores[start : start + count]) for scores in (values, ref_values))
            lines.append((number, answer, text, *sums))
            start += count
    columns = zip(*lines, strict=True) if lines else [[] for _ in TOKEN_TABLE]
    return pa.table([list(column) for column in columns], schema=TOKEN_TABLE)


def score_tokens(
    model: Any, rows: Dataset, collator: Callable[..., Any], batch_size: int, accelerator: Any
) -> list[AnswerTokens]:
    """
    The tokens of each answer and their log-probabilities.

    Args:
        model (`torch.nn.Module`):
            The model, which scores by TRL's fused head.
        rows (`Dataset`):
            Tokenized and numbered pairs.
        collator (`Callable`):
            Collates them into a batch.
        batch_size (`int`):
            Number of pairs per batch.
        accelerator ([`~accelerate.Accelerator`]):
            Its device and precision.
    """
    found: list[AnswerTokens] = []
    training = model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        examples = [rows[place] for place in range(start, min(start + batch_size, len(rows)))]
        batch = collator(examples)
        log_probs = token_logps(model, batch, accelerator)
        numbers = [example[ROW_INDEX] for example in examples]
        answers = [(number, answer) for answer in ("chosen", "rejected") for number in numbers]
        mask, ids = batch["completion_mask"][:, 1:].bool(), batch["input_ids"][:, 1:]
        for (number, answer), inside, tokens, values in zip(answers, mask, ids, log_probs, strict=True):
            found.append((number, answer, tokens[inside].tolist(), values[inside].tolist()))
    model.train(training)
    return found


def token_logps(model: Any, batch: dict[str, Any], accelerator: Any) -> torch.Tensor:
    """
    Log-probability of each token of a batch of pairs, zero outside the answers.

    Args:
        model (`torch.nn.Module`):
            The model, which scores by TRL's fused head.
        batch (`dict[str, Any]`):
            Output of the trainer's collator, on the CPU.
        accelerator ([`~accelerate.Accelerator`]):
            Its device and precision.

    Returns:
        `torch.Tensor`: In nats, on the CPU, chosen answers first. Shape: `(2 * batch_size, seq_len - 1)`.
    """
    inputs = {name: batch[name].to(accelerator.device) for name in ("input_ids", "attention_mask", "completion_mask")}
    layout, mask = batch.get(SHARED_PROMPT), inputs.pop("completion_mask")
    with torch.no_grad(), accelerator.autocast():
        if layout is None:
            labels = inputs["input_ids"].masked_fill(mask == 0, -100)
            output = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        else:
            output = shared_prompt_scores(model, layout.to(accelerator.device))
    # Prompt-learning PEFT prepends virtual tokens to the outputs
    return output.log_probs[:, 1 - mask.size(1) :].double().cpu()


def token_texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[str, int]]:
    """
    The text that each token adds to an answer, and how many tokens add it: several for a character of several tokens.

    Together, the texts are the decoded answer. Each is what the decoded text grows by, since many tokenizers decode a
    token otherwise on its own than after others.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        ids (`Sequence[int]`):
            Tokens of the answer.
    """

    before, start = 0, 0  # first tokens of the piece before and of this one
    for stop in range(1, len(ids) + 1):
        known, text = (_decoded(tokenizer, ids[before:end]) for end in (start, stop))
        if stop == len(ids) or (text.startswith(known) and not text.endswith(UNFINISHED)):
            yield text[len(known) :], stop - start
            before, start = start, stop


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
