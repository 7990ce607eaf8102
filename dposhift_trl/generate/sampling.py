"""Greedy and sampled answers of a model, independent of the batch in which they are generated."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from .questions import Question, prompt_tokens
from .settings import GenerateError, GenerationSettings


@dataclass(frozen=True)
class Answer:
    """
    The answer to one turn.

    Args:
        tokens (`tuple[int]` or `None`):
            Its tokens, without the token that ends it. `None` if the turns before fill the model's positions, so no
            answer was generated.
        text (`str`):
            Its text, without special tokens and without white space at both ends.
        cut (`bool`):
            Whether it reached its maximum length.
    """

    tokens: tuple[int, ...] | None
    text: str
    cut: bool


@torch.inference_mode()
def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: GenerationSettings,
    mode: str,
) -> list[list[Answer]]:
    """
    Generate a model's answers to every turn of every question.

    Except for rounding, an answer depends neither on the batch size nor on the other questions: each sampled answer
    has its own random stream, seeded with `seed`, the question's id and the turn. Two models use the same streams, so
    differences between their answers come from the models. The model's own generation settings are ignored.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, or a PEFT model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`Sequence[Question]`):
            The questions.
        settings ([`GenerationSettings`]):
            How to generate.
        mode (`str`):
            `greedy` or `sampled`.

    Returns:
        `list[list[Answer]]`: One answer per turn, for each question.
    """
    own_config = model.generation_config
    stop = _stop_tokens(own_config, tokenizer)
    padding = next(token for token in (tokenizer.pad_token_id, *stop, 0) if token is not None)
    answers: list[list[Answer]] = [[] for _ in questions]
    model.generation_config = GenerationConfig(eos_token_id=stop or None, pad_token_id=padding)
    try:
        for turn in range(max((1 + len(question.follow_ups) for question in questions), default=0)):
            asked = [index for index, question in enumerate(questions) if turn <= len(question.follow_ups)]
            prompts = {
                i: prompt_tokens(tokenizer, _conversation(questions[i], answers[i]), questions[i].template_inputs)
                for i in asked
            }
            found: dict[int, Answer] = {}
            for batch, room in _batches(prompts, settings, positions(model)):
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
        model.generation_config = own_config
    return answers


def positions(model: PreTrainedModel) -> int | None:
    """Number of positions of a model, or `None` if it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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
    """Batches of prompts of similar length, with the number of tokens that every row of the batch has room for."""

    def room(index: int) -> int:
        left = settings.max_new_tokens if positions is None else positions - len(prompts[index])
        return max(min(settings.max_new_tokens, left), 0)

    # A batch with different room would cut answers to that of its longest prompt, or exceed the model's positions
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
    logging.set_verbosity_error()  # `generate` drops a mask of ones and then warns that there is none
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
    Makes greedy decoding sample: the token with the largest sum of logit and Gumbel noise is a sample of the softmax.

    Each row has its own stream of noise, drawn on the CPU so that it is the same on every device. `do_sample` has only
    one generator for a whole batch.

    Args:
        seeds (`Sequence[str]`):
            Seed of each row.
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
    """Tokens that end an answer, by the model's generation settings and the tokenizer."""
    of_model = config.eos_token_id if config is not None else None
    stop = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in (*stop, tokenizer.eos_token_id) if token is not None})
