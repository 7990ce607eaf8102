"""
`python -m dposhift_trl.generate RUN_DIR`: greedy and sampled answers of a run's first and final model, side by side.

The two models are named by their stage: `sft` and `dpo`; `base` takes the place of the one that a recipe has no stage
for. Files in the destination, `RUN_DIR/generations` by default, in UTF-8, each written whole or not at all:

`statistics.json`, the last to be written:
- `settings`: what the answers depend on: `prompts` (the file's name, or null for the evaluation rows), `questions` (a
  digest of them), `limit`, `max_new_tokens`, `temperature`, `top_p`, `seed`.
- `models`: the names of the two models, the earlier first. `modes`: `["greedy", "sampled"]`.
- `questions`: how many were put. `left_out`: how many were not, by reason: `empty` (a prompt of no tokens), `too_long`
  (a prompt that fills the model's positions).
- `statistics`: `statistics[model][mode]` as [`answer_statistics`] has it; every turn's answer counts as one.
- `chosen`: the same of the chosen answers, or null where none are known. They are never cut, so compare lengths with
  an eye on `cut`.

`side_by_side.jsonl`, one line a question:
- `question_id`: that of the file, else the row's index in the evaluation rows, or the prompt's in the file, from 0.
- `category`: MT-Bench's, or null.
- `prompt`: text or a conversation. `follow_ups`: the user's later turns, mostly none.
- `answers`: `answers[model][mode]` is a list of texts, one a turn.
- `chosen`: the chosen answer as the rows have it, or null.

For each model and mode, `<model>-<mode>` followed by
- `.alpaca_eval.json`: a list of `instruction`, `output`, `generator`, of the first turn only, which is what
  `alpaca_eval --model_outputs` reads. `.jsonl` holds the same, one a line, which it does not read.
- `.mt_bench.jsonl`: FastChat's answers, to be copied to `data/mt_bench/model_answer/<model_id>.jsonl` for its judge.

Generated answers are without special tokens and without white space at their ends.
"""

import argparse
import dataclasses
import gc
import hashlib
import itertools
import json
import statistics
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import AutoPeftModelForCausalLM
from pyarrow import ArrowException
from ruamel.yaml.error import YAMLError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging
from trl import get_quantization_config, maybe_extract_prompt

from .artifacts import EVAL_ROWS, FINISHED, GENERATIONS, PAGE, RECIPE, REPORT, SIDE_BY_SIDE, STATISTICS, write_whole
from .data.errors import one_line
from .recipe import STAGES, RecipeModelConfig, parse_yaml


MODES = ("greedy", "sampled")
ANSWER_FILES = (".jsonl", ".alpaca_eval.json", ".mt_bench.jsonl")
LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)


class GenerateError(ValueError):
    """What was asked for cannot be generated; the message is one line, for the user."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclass(frozen=True)
class GenerationSettings:
    """
    How answers are generated.

    Args:
        limit (`int`, *optional*, defaults to `64`):
            Put only the first questions.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer, in tokens; shorter where the model's positions end before.
        batch_size (`int`, *optional*, defaults to `8`):
            Answers generated at once. Beside rounding, no answer depends on it.
        temperature (`float`, *optional*, defaults to `0.7`):
            Divides the logits of the sampled answers.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sampled answers are drawn from the likeliest tokens that have this probability together.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampled answers.
    """

    limit: int = 64
    max_new_tokens: int = 256
    batch_size: int = 8
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self):
        for name in ("limit", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise GenerateError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}. Leave it out for "
                    f"{type(self).__dataclass_fields__[name].default}."
                )
        if not 0 < self.temperature < float("inf"):
            raise GenerateError(
                f"`temperature` must be finite and above 0, got {self.temperature}. Greedy answers are written too."
            )
        if not 0 < self.top_p <= 1:
            raise GenerateError(
                f"`top_p` must be above 0 and at most 1, got {self.top_p}. Write 1.0 for the whole vocabulary."
            )


@dataclass(frozen=True)
class Question:
    """
    What the models are asked.

    Args:
        question_id (`int` or `str`):
            Names the question; the sampled answers' seed depends on it.
        instruction (`str`):
            The prompt as one text, for AlpacaEval.
        prompt (`str` or `list[dict]`):
            Text that the model goes on from as it is, or a conversation for the tokenizer's chat template.
        follow_ups (`tuple[str]`, *optional*):
            The user's later turns; each follows the model's own answer to the turn before.
        category (`str`, *optional*):
            MT-Bench's category.
        chosen (`str`, *optional*):
            The chosen answer.
    """

    question_id: int | str
    instruction: str
    prompt: str | list[dict[str, Any]]
    follow_ups: tuple[str, ...] = ()
    category: str | None = None
    chosen: str | None = None


@dataclass(frozen=True)
class Answer:
    """
    One answer to one turn.

    Args:
        tokens (`tuple[int]` or `None`):
            Its tokens up to the first that ends an answer, that one left out; None where the turns before fill the
            model's positions, so that no answer was generated.
        text (`str`):
            Its text, without special tokens and without white space at its ends.
        cut (`bool`):
            Whether it ran into its limit.
    """

    tokens: tuple[int, ...] | None
    text: str
    cut: bool


@dataclass(frozen=True)
class _Run:
    folder: Path
    name: str
    model: RecipeModelConfig
    models: tuple[str, str]

    def path(self, name: str) -> str:
        """Where a model lies: a stage's folder, or what the recipe starts from."""
        if name != "base":
            return str(self.folder / name)
        start = str(self.model.model_name_or_path)
        return str(self.folder / "base") if start == "demo" else start


def main(argv: Sequence[str] | None = None) -> int:
    """
    Generate answers with the models of a run.

    Returns:
        `int`: Exit code: 0 done, 2 a mistake in what was asked for.
    """
    defaults = GenerationSettings()
    parser = argparse.ArgumentParser(
        prog="python -m dposhift_trl.generate",
        description="Generate answers with the first and the final model of a run, for reading and for a judge.",
    )
    parser.add_argument("run_dir", help="run folder, for example runs/tiny_shift")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines with `prompt`, AlpacaEval's `instruction` or MT-Bench's `turns`, or text with one prompt a "
        "line; by default the run's evaluation rows",
    )
    parser.add_argument("--limit", type=int, default=defaults.limit, help="put only the first questions (%(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=defaults.max_new_tokens, help="longest answer, in tokens (%(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, help="answers generated at once (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="of the sampled answers (%(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="of the sampled answers (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the sampled answers (%(default)s)")
    parser.add_argument("--device", help="for example cpu; by default an accelerator if there is one")
    parser.add_argument("--output", metavar="DIR", help=f"where to write (RUN_DIR/{GENERATIONS})")
    parser.add_argument(
        "--overwrite", action="store_true", help="write even beside other files, or over answers of other settings"
    )
    parser.add_argument(
        "--no-report", action="store_true", help=f"leave RUN_DIR/{REPORT} as it is; by default it is written anew"
    )
    options = parser.parse_args(argv)
    try:
        settings = GenerationSettings(
            **{field.name: getattr(options, field.name) for field in dataclasses.fields(GenerationSettings)}
        )
        report = generate_answers(
            options.run_dir, options.prompts, settings, options.output, options.overwrite, options.device
        )
    except GenerateError as error:
        print(error, file=sys.stderr)
        return 2
    print(_table(report))
    if not options.no_report and options.output is None:
        _renew_report(Path(options.run_dir))
    return 0


def _renew_report(folder: Path) -> None:
    """Write the run's report anew, with the answers, where it has one."""
    if not (folder / REPORT / PAGE).is_file():
        return
    from .report.page import write_report
    from .report.run_folder import ReportError  # draws, and takes seconds to import

    try:
        print(f"The report is {write_report([folder], folder / REPORT)}")
    except ReportError as error:
        print(f"The report is as it was: {error}", file=sys.stderr)


def generate_answers(
    folder: str | Path,
    prompts: str | Path | None = None,
    settings: GenerationSettings | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """
    Generate answers with the first and the final model of a run, and write them with their statistics.

    Args:
        folder (`str` or `Path`):
            Run folder, its stages finished.
        prompts (`str` or `Path`, *optional*):
            File of prompts; by default the run's evaluation rows. A prompt that is text becomes the message of a user
            where the run's rows are conversations, or, without evaluation rows, where the tokenizer has a chat
            template.
        settings ([`GenerationSettings`], *optional*):
            How answers are generated.
        output (`str` or `Path`, *optional*):
            Where to write; by default `generations` in the run folder.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to write beside other files, which stay as they are, and over answers of other settings.
        device (`str`, *optional*):
            Device of the models; by default an accelerator if there is one.

    Returns:
        `dict[str, Any]`: What `statistics.json` holds.

    Raises:
        GenerateError: If the run, the prompts or the destination are not fit for it.
    """
    settings = settings or GenerationSettings()
    run = _read_run(Path(folder))
    tokenizer = _load_tokenizer(run)
    questions = load_questions(run.folder, prompts, settings.limit, tokenizer)
    destination = Path(output) if output is not None else run.folder / GENERATIONS
    described = _describe(settings, prompts, questions)
    _check_destination(destination, run.models, described, overwrite)
    where = _device(device)
    questions, left_out = _sort_out(questions, tokenizer, None)
    answers: dict[str, dict[str, list[list[Answer]]]] = {}
    for name in run.models:
        model = _load_model(run, name, where)
        if not answers:  # both models have the same positions
            questions, too_long = _sort_out(questions, tokenizer, _positions(model))
            left_out |= {"too_long": too_long["too_long"]}
        answers[name] = {}
        for mode in MODES:
            began = time.monotonic()
            answers[name][mode] = answer_questions(model, tokenizer, questions, settings, mode)
            print(f"{name}: {len(questions)} {mode} answers in {time.monotonic() - began:.1f} s", flush=True)
        del model
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
    report = {
        "settings": described,
        "models": list(run.models),
        "modes": list(MODES),
        "questions": len(questions),
        "left_out": left_out,
        "statistics": {name: {mode: _statistics(answers[name][mode]) for mode in MODES} for name in run.models},
        "chosen": _chosen_statistics(questions, tokenizer),
    }
    _save(destination, run, questions, answers, report)
    print(f"The answers are in {destination}", flush=True)
    return report


def answer_statistics(
    answers: Sequence[Sequence[int]], texts: Sequence[str] | None = None, cut: Sequence[bool] | None = None
) -> dict[str, int | float | None]:
    r"""
    Length, repetition and variety of answers.

    An answer of \\( T \\) tokens has \\( T - n + 1 \\) n-grams, overlapping ones included. Its repetition is
    \\( 1 - d / (T - 3) \\) with \\( d \\) its number of distinct 4-grams: 0 where no four tokens in a row come
    back, near 1 for one token over and over.

    Args:
        answers (`Sequence[Sequence[int]]`):
            Tokens of each answer, without the one that ends it.
        texts (`Sequence[str]`, *optional*):
            Text of each answer; without it an answer is empty if it has no tokens.
        cut (`Sequence[bool]`, *optional*):
            Whether each answer ran into its limit; by default none did.

    Returns:
        `dict[str, int or float or None]`: `count`; `mean_tokens` and `median_tokens` of an answer; the share of
        answers that are `empty` (no text but white space) and `cut`; `repetition`, the mean over the answers that
        have a 4-gram; `distinct_1` and `distinct_2`, the distinct n-grams of all answers together divided by the
        number of them, which falls with the amount of text, so compare it at like lengths. None where there is nothing
        to count.
    """
    lengths = [len(answer) for answer in answers]
    empty = [not text.strip() for text in texts] if texts is not None else [not length for length in lengths]
    repetitions = [1 - len(set(grams)) / len(grams) for answer in answers if (grams := _ngrams(answer, 4))]

    def mean(values: Sequence[float]) -> float | None:
        return statistics.fmean(values) if values else None

    def distinct(n: int) -> float | None:
        grams = [gram for answer in answers for gram in _ngrams(answer, n)]
        return len(set(grams)) / len(grams) if grams else None

    return {
        "count": len(answers),
        "mean_tokens": mean(lengths),
        "median_tokens": float(statistics.median(lengths)) if lengths else None,
        "empty": mean(empty),
        "cut": mean(cut if cut is not None else [False] * len(answers)),
        "repetition": mean(repetitions),
        "distinct_1": distinct(1),
        "distinct_2": distinct(2),
    }


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def _statistics(answers: list[list[Answer]]) -> dict[str, int | float | None]:
    given = [(answer.tokens, answer) for turns in answers for answer in turns if answer.tokens is not None]
    return answer_statistics(
        [tokens for tokens, _ in given], [answer.text for _, answer in given], [answer.cut for _, answer in given]
    )


def _chosen_statistics(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase
) -> dict[str, int | float | None] | None:
    texts = [question.chosen for question in questions if question.chosen is not None]
    if not texts:
        return None
    tokens = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    stop = {tokenizer.eos_token_id}
    tokens = [list(itertools.takewhile(lambda token: token not in stop, ids)) for ids in tokens]
    return answer_statistics(tokens, [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens])


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> list[int]:
    """
    Tokens of a prompt as TRL's DPOTrainer has them: a conversation through the chat template up to where the assistant
    begins, a text as the tokenizer takes any text, with the special tokens that it adds.

    Raises:
        GenerateError: If the tokenizer has no chat template, or it cannot render the conversation.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    if tokenizer.chat_template is None:
        raise GenerateError(
            "a prompt must be text where the tokenizer has no chat template, got a conversation. Train the run on "
            "conversations, or put questions of one turn."
        )
    try:
        rendered = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
    except Exception as error:  # a template is a program, run on whatever the prompt holds
        raise GenerateError(f"the chat template cannot render a prompt: {error}: {prompt}") from error
    return list(rendered["input_ids"])


@torch.inference_mode()
def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: GenerationSettings,
    mode: str,
) -> list[list[Answer]]:
    """
    Answers of one model, every turn of every question in order.

    Beside rounding, an answer depends neither on the batch size nor on the other questions: sampling draws each answer
    from a random stream of its own, seeded by `seed`, the question's id and the turn. Two models draw from the same
    streams, so that what differs between their answers comes from the models. Whatever sampling or penalties the
    model's own generation settings ask for, only those here count.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, or a PEFT model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`Sequence[Question]`):
            What to ask.
        settings ([`GenerationSettings`]):
            How to generate.
        mode (`str`):
            `greedy` or `sampled`.

    Returns:
        `list[list[Answer]]`: For each question, one answer a turn.
    """
    given = model.generation_config
    stop = _stop_tokens(given, tokenizer)
    padding = next(token for token in (tokenizer.pad_token_id, *stop, 0) if token is not None)
    answers: list[list[Answer]] = [[] for _ in questions]
    model.generation_config = GenerationConfig(eos_token_id=stop or None, pad_token_id=padding)
    try:
        for turn in range(max((1 + len(question.follow_ups) for question in questions), default=0)):
            asked = [index for index, question in enumerate(questions) if turn <= len(question.follow_ups)]
            prompts = {i: prompt_tokens(tokenizer, _conversation(questions[i], answers[i])) for i in asked}
            found: dict[int, Answer] = {}
            for batch, room in _batches(prompts, settings, _positions(model)):
                if room < 1:
                    found |= {index: Answer(None, "", True) for index in batch}
                    continue
                seeds = [f"{settings.seed}/{questions[index].question_id}/{turn}" for index in batch]
                sampling = _sampling(settings, seeds) if mode == "sampled" else LogitsProcessorList()
                rows = _generate(model, [prompts[index] for index in batch], padding, room, sampling)
                for index, row in zip(batch, rows, strict=True):
                    tokens = tuple(itertools.takewhile(lambda token: token not in stop, row))
                    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                    found[index] = Answer(tokens, text, cut=len(tokens) == len(row))
            for index in asked:
                answers[index].append(found[index])
    finally:
        model.generation_config = given
    return answers


def _conversation(question: Question, answers: list[Answer]) -> str | list[dict[str, Any]]:
    if not answers:
        return question.prompt
    assert not isinstance(question.prompt, str)
    messages = list(question.prompt)
    for answer, follow_up in zip(answers, question.follow_ups, strict=False):
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": follow_up}]
    return messages


def _batches(
    prompts: dict[int, list[int]], settings: GenerationSettings, positions: int | None
) -> Iterator[tuple[list[int], int]]:
    """Batches of like length with the tokens that each may generate, which all its rows have room for alike."""

    def room(index: int) -> int:
        left = settings.max_new_tokens if positions is None else positions - len(prompts[index])
        return max(min(settings.max_new_tokens, left), 0)

    # Were rooms mixed, the longest prompt would cut the answers of its batch, or run past the model's positions
    for tokens, group in itertools.groupby(sorted(prompts, key=lambda i: (room(i), len(prompts[i]), i)), room):
        rows = list(group)
        for start in range(0, len(rows), settings.batch_size):
            yield rows[start : start + settings.batch_size], tokens


def _generate(
    model: PreTrainedModel, prompts: list[list[int]], padding: int, room: int, sampling: LogitsProcessorList
) -> list[list[int]]:
    width = max(map(len, prompts))
    input_ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # `generate` takes out a mask of ones and then warns that there is none
    try:
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            do_sample=False,
            logits_processor=sampling,
        )
    except torch.OutOfMemoryError as error:
        raise GenerateError(f"`batch_size` {len(prompts)} is too large for the device: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


class SeededSampling(LogitsProcessor):
    """
    Makes greedy decoding draw from the distribution: the largest of the logits plus Gumbel noise is a sample of it.

    Each row has a stream of noise of its own, drawn on the CPU so that it is the same for every device, which
    `do_sample` with its one generator for a whole batch cannot give.
    """

    def __init__(self, seeds: Sequence[str]):
        digests = [hashlib.blake2b(seed.encode(), digest_size=8).digest() for seed in seeds]
        self.streams = [torch.Generator().manual_seed(int.from_bytes(digest) >> 1) for digest in digests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = [torch.empty(scores.shape[1]).exponential_(generator=stream) for stream in self.streams]
        return scores - torch.stack(noise).log().to(scores.device)


def _sampling(settings: GenerationSettings, seeds: Sequence[str]) -> LogitsProcessorList:
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return LogitsProcessorList([*warpers, SeededSampling(seeds)])


def _stop_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    theirs = config.eos_token_id if config is not None else None
    stop = theirs if isinstance(theirs, list) else [theirs]
    return sorted({token for token in (*stop, tokenizer.eos_token_id) if token is not None})


def _positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _sort_out(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[list[Question], dict[str, int]]:
    """The questions that can be put, and how many cannot, by reason."""
    lengths = [len(prompt_tokens(tokenizer, question.prompt)) for question in questions]
    limit = float("inf") if positions is None else positions
    kept = [question for question, length in zip(questions, lengths, strict=True) if 0 < length < limit]
    left_out = {"empty": lengths.count(0), "too_long": sum(length >= limit for length in lengths)}
    if not kept:
        raise GenerateError(
            f"no prompt is left: {left_out['empty']} have no tokens, {left_out['too_long']} fill the model's "
            f"{positions} positions. Choose others with `--prompts`."
        )
    if sum(left_out.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        print(f"prompts left out: {reasons.replace('_', ' ')}", flush=True)
    return kept, left_out


def load_questions(
    folder: Path, prompts: str | Path | None, limit: int, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """
    The first questions of a file, or of a run's evaluation rows.

    Args:
        folder (`Path`):
            Run folder.
        prompts (`str` or `Path`, *optional*):
            `.jsonl` or `.json` with `prompt`, `instruction` or `turns`, or `.txt`; None for the evaluation rows.
        limit (`int`):
            At most so many.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The run's tokenizer.

    Raises:
        GenerateError: If there are none, or one of them is not a question.
    """
    rows = _evaluation_rows(folder, limit if prompts is None else 1)
    if prompts is None:
        if not rows:
            raise GenerateError(f"{folder} holds no evaluation rows. Name a file of prompts with `--prompts`.")
        return [_row_question(row, index) for index, row in enumerate(rows)]
    converses = not isinstance(rows[0]["chosen"], str) if rows else tokenizer.chat_template is not None
    questions = [
        _file_question(value, index, converses, f"{prompts}: prompt {index}")
        for index, value in enumerate(itertools.islice(_read_prompts(Path(prompts)), limit))
    ]
    if not questions:
        raise GenerateError(f"{prompts}: must hold at least one prompt, got none.")
    seen: set[str] = set()
    for question in questions:
        if str(question.question_id) in seen:
            raise GenerateError(f"{prompts}: `question_id` must name one question, got {question.question_id} twice.")
        seen.add(str(question.question_id))
    return questions


def _evaluation_rows(folder: Path, limit: int) -> list[dict[str, Any]]:
    path = folder / EVAL_ROWS
    if not path.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).slice(0, limit).to_pylist()
        return rows
    except (OSError, ArrowException) as error:
        raise GenerateError(f"{path}: cannot be read: {error}") from error


def _row_question(row: dict[str, Any], index: int) -> Question:
    prompt, chosen = row.get("prompt"), row["chosen"]
    if isinstance(prompt, str) and not isinstance(chosen, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is None:
        explicit = maybe_extract_prompt({"chosen": chosen, "rejected": row["rejected"]})
        prompt, chosen = explicit["prompt"], explicit["chosen"]
    answer = chosen if isinstance(chosen, str) else chosen[-1]["content"]
    return Question(row.get("row_index", index), _as_text(prompt), prompt, chosen=answer)


def _read_prompts(path: Path) -> Iterator[Any]:
    """Values of a file of prompts: texts, or what its JSON holds."""
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise GenerateError(f"`--prompts` must be a .jsonl, .json or .txt file, got {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise GenerateError(f"`--prompts` must be a file, got {path}. There is no such file.") from None
    except (OSError, ValueError) as error:
        raise GenerateError(f"{path}: cannot be read: {error}") from error
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GenerateError(f"{path}: is not valid JSON: {error}") from error
        if not isinstance(values, list):
            raise GenerateError(f"{path}: must be a list of prompts, got {type(values).__name__}.")
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
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def _read_run(folder: Path) -> _Run:
    if not folder.is_dir():
        raise GenerateError(f"the run folder must be a folder, got {folder}. There is no such folder.")
    path = folder / RECIPE
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
        # Not the whole recipe: its training settings may not suit the machine that generates
        model = RecipeModelConfig(**values["model"])
        stages = [name for name in STAGES if values.get(name) is not None]
        run_name = str(values["run_name"])
    except FileNotFoundError:
        raise GenerateError(f"{folder} holds no {RECIPE}. Name the `output_dir` of a run.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, YAMLError) as error:
        raise GenerateError(f"{path}: is not the recipe of a run: {error}") from error
    for name in stages:
        if not (folder / name / FINISHED).is_file():
            raise GenerateError(
                f"{folder}: stage `{name}` is not finished. Run its recipe again, which goes on with it."
            )
    if not stages:
        raise GenerateError(f"{path}: has no stage {' or '.join(STAGES)}.")
    earlier, final = ["base", *stages][-2:]
    return _Run(folder, run_name, model, (earlier, final))


def _load_tokenizer(run: _Run) -> PreTrainedTokenizerBase:
    # The final stage's for both models: stages share one, and it has the chat template that training may have added
    path = run.path(run.models[-1])
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=run.model.trust_remote_code)
    except LOADING_ERRORS as error:
        raise GenerateError(f"the tokenizer in {path} cannot be loaded: {error}") from error


def _device(name: str | None) -> torch.device:
    try:
        if name is not None:
            device = torch.device(name)
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GenerateError(f"`device` must be one of this machine's, got {name!r}: {error}") from error
    if torch.accelerator.is_available():
        return torch.device(str(torch.accelerator.current_accelerator()))
    return torch.device("cpu")


def _load_model(run: _Run, name: str, device: torch.device) -> PreTrainedModel:
    path, recipe = run.path(name), run.model
    quantization = get_quantization_config(recipe) if device.type == "cuda" else None
    options = {
        "dtype": recipe.dtype or "auto",
        "trust_remote_code": recipe.trust_remote_code,
        "quantization_config": quantization,
        # Kernels such as FlashAttention run on GPUs only
        "attn_implementation": recipe.attn_implementation if device.type == "cuda" else None,
    }
    try:
        if (Path(path) / "adapter_config.json").is_file():
            model = AutoPeftModelForCausalLM.from_pretrained(path, **options)
        else:
            revision = {"revision": recipe.model_revision} if name == "base" else {}
            model = AutoModelForCausalLM.from_pretrained(path, **options, **revision)
        return (model if quantization else model.to(device)).eval()
    except LOADING_ERRORS as error:
        raise GenerateError(f"the model `{name}` in {path} cannot be loaded: {error}") from error


def _describe(settings: GenerationSettings, prompts: str | Path | None, questions: list[Question]) -> dict[str, Any]:
    """What the answers depend on, as a later call compares it."""
    text = json.dumps([dataclasses.asdict(question) for question in questions], default=str)
    described = {
        "prompts": None if prompts is None else Path(prompts).name,
        "questions": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        **dataclasses.asdict(settings),
    }
    del described["batch_size"]
    return described


def _check_destination(destination: Path, models: Sequence[str], described: dict[str, Any], overwrite: bool) -> None:
    """Make the folder; refuse one that holds something else, unless it is to be overwritten."""
    try:
        destination.mkdir(parents=True, exist_ok=True)
        names = sorted(entry.name for entry in destination.iterdir())
        ours = {
            STATISTICS,
            SIDE_BY_SIDE,
            *(f"{m}-{mode}{end}" for m in models for mode in MODES for end in ANSWER_FILES),
        }
        others = [name for name in names if name.removesuffix(".tmp") not in ours]
        if others and not overwrite:
            raise GenerateError(
                f"`--output` {destination} holds other files ({others[0]}). Choose a new folder, or pass --overwrite."
            )
        if STATISTICS in names and not overwrite:
            earlier = _earlier_settings(destination / STATISTICS)
            changes = sorted(key for key in {*earlier, *described} if earlier.get(key) != described.get(key))
            if changes:
                raise GenerateError(
                    f"`--output` {destination} holds answers of other settings; they differ in {', '.join(changes)}. "
                    "Choose a new folder, or pass --overwrite."
                )
    except OSError as error:
        raise GenerateError(f"`--output` {destination} cannot be written: {error}") from error


def _earlier_settings(path: Path) -> dict[str, Any]:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        earlier = None
    return earlier if isinstance(earlier, dict) else {}


def _save(
    destination: Path,
    run: _Run,
    questions: list[Question],
    answers: dict[str, dict[str, list[list[Answer]]]],
    report: dict[str, Any],
) -> None:
    try:
        # So that a stop in between leaves no statistics beside answers that they are not of
        (destination / STATISTICS).unlink(missing_ok=True)
        for name, mode in itertools.product(run.models, MODES):
            generator = f"{run.name}-{name}-{mode}"
            # When the model was made, so that the same answers make the same file
            stamp = (run.folder / (name if name in STAGES else run.models[-1]) / FINISHED).stat().st_mtime
            alpaca, mt_bench = [], []
            for question, turns in zip(questions, answers[name][mode], strict=True):
                texts = [answer.text for answer in turns]
                alpaca.append({"instruction": question.instruction, "output": texts[0], "generator": generator})
                mt_bench.append(
                    {
                        "question_id": question.question_id,
                        "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{generator}/{question.question_id}/{texts}").hex,
                        "model_id": generator,
                        "choices": [{"index": 0, "turns": texts}],
                        "tstamp": stamp,
                    }
                )
            stem = f"{name}-{mode}"
            text = json.dumps(alpaca, ensure_ascii=False, indent=2) + "\n"
            write_whole(destination / f"{stem}.alpaca_eval.json", text)
            write_whole(destination / f"{stem}.jsonl", _lines(alpaca))
            write_whole(destination / f"{stem}.mt_bench.jsonl", _lines(mt_bench))
        side_by_side = [
            {
                "question_id": question.question_id,
                "category": question.category,
                "prompt": question.prompt,
                "follow_ups": list(question.follow_ups),
                "answers": {
                    name: {mode: [answer.text for answer in answers[name][mode][index]] for mode in MODES}
                    for name in run.models
                },
                "chosen": question.chosen,
            }
            for index, question in enumerate(questions)
        ]
        write_whole(destination / SIDE_BY_SIDE, _lines(side_by_side))
        write_whole(destination / STATISTICS, json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise GenerateError(f"`--output` {destination} cannot be written: {error}") from error


def _lines(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _table(report: dict[str, Any]) -> str:
    """The statistics as a terminal shows them, one line for each kind of answer."""
    rows = {
        f"{name} {mode}": report["statistics"][name][mode] for name in report["models"] for mode in report["modes"]
    }
    if report["chosen"] is not None:
        rows["chosen"] = report["chosen"]
    columns = list(next(iter(rows.values())))
    lines = [" " * 14 + "".join(f"{column:>14}" for column in columns)]
    for name, row in rows.items():
        cells = ["-" if row[c] is None else str(row[c]) if c == "count" else f"{row[c]:.3f}" for c in columns]
        lines.append(f"{name:<14}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
