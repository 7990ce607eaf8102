"""Generating the answers of a run's first and final model, with their statistics."""

import gc
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..artifacts import GENERATIONS
from ..console import say
from .models import load_model, load_tokenizer, read_finished_run, select_device
from .output import Answers, describe_settings, prepare_destination, save_answers
from .questions import Question, load_questions, select_questions
from .sampling import Answer, answer_questions, positions
from .settings import MODES, GenerationSettings
from .statistics import Statistics, answer_statistics


def generate_answers(
    folder: str | Path,
    prompts: str | Path | None = None,
    settings: GenerationSettings | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """
    Generate answers with the first and the final model of a run, and write them with their statistics.

    Args:
        folder (`str` or `Path`):
            Run folder with finished stages.
        prompts (`str` or `Path`, *optional*):
            File of prompts. Defaults to the run's evaluation rows. A text prompt becomes a user message if the run's
            rows are conversations or, without evaluation rows, if the tokenizer has a chat template.
        settings ([`GenerationSettings`], *optional*):
            How to generate.
        output (`str` or `Path`, *optional*):
            Folder to write to. Defaults to `generations` in the run folder.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to write even if the folder contains other files, which are kept, or answers with other settings.
        device (`str`, *optional*):
            Device of the models. Defaults to an accelerator if there is one.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run Python code that comes with a model or tokenizer. The run's own recipe cannot allow it.

    Returns:
        `dict[str, Any]`: Content of `statistics.json`.

    Raises:
        GenerateError: If the run, the prompts or the output folder cannot be used.
    """
    settings = settings or GenerationSettings()
    run = read_finished_run(Path(folder), trust_remote_code)
    tokenizer = load_tokenizer(run)
    questions = load_questions(run.folder, prompts, settings.limit, tokenizer)
    destination = Path(output) if output is not None else run.folder / GENERATIONS
    described = describe_settings(settings, prompts, questions)
    weights = run.weights
    prepare_destination(destination, weights, described, overwrite)
    torch_device = select_device(device)
    questions, left_out = select_questions(questions, tokenizer, None)
    answers: Answers = {}
    for name in run.models:
        model = load_model(run, name, torch_device)
        if not answers:  # both models have the same number of positions
            questions, too_long = select_questions(questions, tokenizer, positions(model))
            left_out |= {"too_long": too_long["too_long"]}
        answers[name] = {}
        for mode in MODES:
            began = time.monotonic()
            answers[name][mode] = answer_questions(model, tokenizer, questions, settings, mode)
            say(f"{name}: {len(questions)} {mode} answers in {time.monotonic() - began:.1f} s")
        del model
        gc.collect()
        if torch_device.type == "cuda":
            torch.cuda.empty_cache()
    report = {
        "settings": described,
        "models": list(run.models),
        "weights": weights,
        "modes": list(MODES),
        "questions": len(questions),
        "left_out": left_out,
        "statistics": {name: {mode: _statistics(answers[name][mode]) for mode in MODES} for name in run.models},
        "chosen": _chosen_statistics(questions, tokenizer),
    }
    save_answers(destination, run, questions, answers, report)
    say(f"The answers are in {destination}")
    return report


def _statistics(answers: list[list[Answer]]) -> Statistics:
    generated = [(answer.tokens, answer) for turns in answers for answer in turns if answer.tokens is not None]
    return answer_statistics(
        [tokens for tokens, _ in generated],
        [answer.text for _, answer in generated],
        [answer.cut for _, answer in generated],
    )


def _chosen_statistics(questions: list[Question], tokenizer: PreTrainedTokenizerBase) -> Statistics | None:
    texts = [question.chosen for question in questions if question.chosen is not None]
    if not texts:
        return None
    tokens = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    tokens = [list(itertools.takewhile(lambda token: token != tokenizer.eos_token_id, ids)) for ids in tokens]
    return answer_statistics(tokens, [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens])
