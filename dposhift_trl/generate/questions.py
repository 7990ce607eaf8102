"""The questions that models are asked: read from a file of prompts or from a run's evaluation rows."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase
from trl import maybe_extract_prompt

from ..artifacts import EVAL_ROWS, ArtifactError, check_file, read_rows
from ..columns import SAVED_ROW_INDEX
from ..console import say
from ..data.messages import message_as_text, template_inputs
from .settings import GenerateError


@dataclass(frozen=True)
class Question:
    """
    A question.

    Args:
        question_id (`int` or `str`):
            Name of the question. The seed of its sampled answers depends on it.
        instruction (`str`):
            The prompt as one text, for AlpacaEval.
        prompt (`str` or `list[dict]`):
            Text that the model continues, or a conversation for the chat template.
        follow_ups (`tuple[str]`, *optional*):
            Later turns of the user. Each one follows the model's own answer to the turn before.
        category (`str`, *optional*):
            Category in MT-Bench.
        chosen (`str`, *optional*):
            The chosen answer.
        template_inputs (`dict[str, Any]`, *optional*):
            What the chat template is given with the conversation, such as `tools`.
    """

    question_id: int | str
    instruction: str
    prompt: str | list[dict[str, Any]]
    follow_ups: tuple[str, ...] = ()
    category: str | None = None
    chosen: str | None = None
    template_inputs: dict[str, Any] = field(default_factory=dict)


def load_questions(
    folder: Path, prompts: str | Path | None, limit: int, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """
    Read the first questions of a file, or of a run's evaluation rows.

    Args:
        folder (`Path`):
            Run folder.
        prompts (`str` or `Path`, *optional*):
            `.jsonl` or `.json` file with `prompt`, `instruction` or `turns`, or `.txt` file. `None` for the evaluation
            rows.
        limit (`int`):
            Maximum number of questions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The run's tokenizer.

    Raises:
        GenerateError: If there are no questions, or one of them is not valid.
    """
    rows = _evaluation_rows(folder, limit if prompts is None else 1)
    if prompts is None:
        if not rows:
            raise GenerateError(f"{folder} has no evaluation rows. Pass a file of prompts with `--prompts`.")
        return [row_question(row, index) for index, row in enumerate(rows)]
    converses = not isinstance(rows[0]["chosen"], str) if rows else tokenizer.chat_template is not None
    questions = [
        _file_question(value, index, converses, f"{prompts}: prompt {index}")
        for index, value in enumerate(itertools.islice(_read_prompts(Path(prompts)), limit))
    ]
    if not questions:
        raise GenerateError(f"{prompts} must contain at least one prompt, got none.")
    seen: set[str] = set()
    for question in questions:
        if str(question.question_id) in seen:
            raise GenerateError(f"{prompts}: `question_id` must be unique, got {question.question_id} twice.")
        seen.add(str(question.question_id))
    return questions


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, Any]],
    template_inputs: Mapping[str, Any] | None = None,
) -> list[int]:
    """
    Tokenize a prompt as TRL's `DPOTrainer` does: a conversation with the chat template and its generation prompt, a
    text with the special tokens that the tokenizer adds to any text.

    Raises:
        GenerateError: If the tokenizer has no chat template, or the template cannot render the conversation.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    if tokenizer.chat_template is None:
        raise GenerateError(
            "a prompt must be text if the tokenizer has no chat template, got a conversation. Train the run on "
            "conversations, or use questions with one turn."
        )
    try:
        rendered = tokenizer.apply_chat_template(
            prompt, tokenize=True, return_dict=True, add_generation_prompt=True, **(template_inputs or {})
        )
    except Exception as error:  # a template is a program that runs on the content of the prompt
        raise GenerateError(f"the chat template cannot render a prompt: {error}: {prompt}") from error
    return list(rendered["input_ids"])


def select_questions(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[list[Question], dict[str, int]]:
    """
    Leave out questions that cannot be asked.

    Args:
        questions (`list[Question]`):
            The questions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The run's tokenizer.
        positions (`int`, *optional*):
            Number of positions of the model, or `None` if it has no limit.

    Returns:
        `tuple[list[Question], dict[str, int]]`: The questions that are left, and how many were left out, by reason:
        `empty`, `too_long`.

    Raises:
        GenerateError: If no question is left.
    """
    lengths = [len(prompt_tokens(tokenizer, question.prompt, question.template_inputs)) for question in questions]
    limit = float("inf") if positions is None else positions
    kept = [question for question, length in zip(questions, lengths, strict=True) if 0 < length < limit]
    left_out = {"empty": lengths.count(0), "too_long": sum(length >= limit for length in lengths)}
    if not kept:
        raise GenerateError(
            f"No prompt left: {left_out['empty']} have no tokens, {left_out['too_long']} fill the model's {positions} "
            "positions. Pass others with `--prompts`."
        )
    if sum(left_out.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        say(f"Prompts left out: {reasons.replace('_', ' ')}")
    return kept, left_out


def _evaluation_rows(folder: Path, limit: int) -> list[dict[str, Any]]:
    path = folder / EVAL_ROWS
    if not path.exists():
        return []
    try:
        check_file(path)
        rows = read_rows(path, limit)
    except ArtifactError as error:
        raise GenerateError(str(error)) from error
    except (OSError, ValueError, ArrowException) as error:
        raise GenerateError(f"{path} cannot be read: {error}") from error
    if rows and not {"chosen", "rejected"} <= set(rows[0]):
        raise GenerateError(f"{path} must have the columns `chosen` and `rejected`, got {', '.join(rows[0])}.")
    return rows


def row_question(row: dict[str, Any], index: int) -> Question:
    """The question of an evaluation row, named by its row index, or by its place without one."""
    prompt, chosen = row.get("prompt"), row["chosen"]
    if isinstance(prompt, str) and not isinstance(chosen, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is None:
        explicit = maybe_extract_prompt({"chosen": chosen, "rejected": row["rejected"]})
        prompt, chosen = explicit["prompt"], explicit["chosen"]
    answer = chosen if isinstance(chosen, str) else message_as_text(chosen[-1])
    inputs = {name: value for name, value in template_inputs(row).items() if value is not None}
    return Question(row.get(SAVED_ROW_INDEX, index), _as_text(prompt), prompt, chosen=answer, template_inputs=inputs)


def _read_prompts(path: Path) -> Iterator[Any]:
    """The prompts of a file: texts, or values of its JSON."""
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise GenerateError(f"`--prompts` must be a .jsonl, .json or .txt file, got {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise GenerateError(f"`--prompts` must be a file, got {path}, which does not exist.") from None
    except (OSError, ValueError) as error:
        raise GenerateError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GenerateError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, list):
            raise GenerateError(f"{path} must be a list of prompts, got {type(values).__name__}.")
        yield from values
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield line.removesuffix("\r")
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GenerateError(f"{path}: line {number} is not valid JSON: {error}") from error


def _file_question(value: Any, index: int, converses: bool, where: str) -> Question:
    value = {"prompt": value} if isinstance(value, str) else value
    key = next((k for k in ("turns", "prompt", "instruction") if isinstance(value, dict) and k in value), None)
    if key is None:
        raise GenerateError(f"{where} must have a `prompt`, an `instruction` or `turns`, got {value!r}.")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise GenerateError(f"{where} must be text without lone surrogates, got {value!a}.") from None
    question_id, category = value.get("question_id", index), value.get("category")
    if isinstance(question_id, bool) or not isinstance(question_id, (int, str)):
        raise GenerateError(f"{where}: `question_id` must be a whole number or text, got {question_id!r}.")
    content = value[key]
    if key == "turns":
        if not isinstance(content, list) or not content or not all(isinstance(turn, str) for turn in content):
            raise GenerateError(f"{where}: `turns` must be a list of texts, got {content!r}.")
        first, follow_ups = content[0], tuple(content[1:])
    else:
        first, follow_ups = content, ()
    if isinstance(first, str):
        prompt = [{"role": "user", "content": first}] if converses or follow_ups else first
    elif key == "prompt" and isinstance(first, list) and first and all(map(_is_message, first)):
        prompt = first
    else:
        raise GenerateError(f"{where}: `{key}` must be text{' or messages' * (key == 'prompt')}, got {first!r}.")
    return Question(question_id, _as_text(prompt), prompt, follow_ups, None if category is None else str(category))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _as_text(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return message_as_text(prompt[0])
    return "\n".join(f"{message['role'].capitalize()}: {message_as_text(message)}" for message in prompt)
