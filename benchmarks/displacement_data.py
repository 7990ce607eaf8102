"""
Pairs that `displacement.py` trains and measures on, and the models that training starts from.

Two sets are synthetic: `demo`, the built-in one; `hard`, its near misses only, with a fifth of the training pairs
turned round, so that the preference can be learnt only in part. Two are real, JSON lines with `prompt`, `chosen` and
`rejected` that are not part of the project: `demo_pairs`, LLaMA-Factory's `dpo_en_demo` (message lists, judged by a
model), and `pandalm`, the test set of PandaLM (texts, judged by people). Real rows are split by prompt, since several
share one, and anew for each seed.
"""

import argparse
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dposhift_trl.data.demo import FAMILIES, _pick, _scene, demo_dataset


FILES = {"demo_pairs": "llamafactory_dpo_en_demo.jsonl", "pandalm": "pandalm_human.jsonl"}
# Pairs to train on, pairs held out, and the most tokens of an answer and of a prompt
SIZES = {"demo_pairs": (80, 50, 600, 200), "pandalm": (300, 150, 100, 200)}


def load_pairs(name: str, folder: Path, model: str | None, seed: int) -> DatasetDict:
    """
    Training and held-out pairs, `train` and `test`.

    Args:
        name (`str`):
            `demo`, `hard`, `demo_pairs` or `pandalm`.
        folder (`Path`):
            Where the files of the real sets are.
        model (`str`, *optional*):
            Model whose tokenizer counts the tokens of the real sets.
        seed (`int`):
            Seed of the split of the real sets.
    """
    if name == "demo":
        return demo_dataset()
    if name == "hard":
        return hard_dataset()
    return _real_dataset(name, folder, AutoTokenizer.from_pretrained(model), seed)


def hard_dataset() -> DatasetDict:
    """Near misses only; a fifth of the training pairs turned round."""
    rng, rows = Random(7), {}
    while len(rows) < 2700:
        family = _pick(rng, FAMILIES, 1)[0]
        prompt, answer = _pick(rng, family.prompts, 1)[0], _pick(rng, family.answers, 1)[0]
        scene = vars(_scene(rng))
        right, wrong = (
            answer.format(**scene, answer=f(argparse.Namespace(**scene))) for f in (family.right, family.wrong)
        )
        rows.setdefault(prompt.format(**scene), (f" {right}", f" {wrong}"))
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in rows.items() if c != r]
    train = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if index % 5 == 0 else row
        for index, row in enumerate(pairs[:2400])
    ]
    return DatasetDict(train=Dataset.from_list(train), test=Dataset.from_list(pairs[2400:]))


def _real_dataset(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> DatasetDict:
    train_size, test_size, answer_length, prompt_length = SIZES[name]
    if not (folder / FILES[name]).is_file():
        raise SystemExit(f"{folder / FILES[name]} does not exist. Name its folder with --files.")
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in map(_as_messages, Dataset.from_json(str(folder / FILES[name]))):
        lengths = {column: len(tokenizer(_text(row[column]))["input_ids"]) for column in row}
        if lengths.pop("prompt") <= prompt_length and max(lengths.values()) <= answer_length:
            by_prompt.setdefault(_text(row["prompt"]), []).append(row)
    prompts = sorted(by_prompt)
    Random(seed).shuffle(prompts)
    split: dict[str, list[dict[str, Any]]] = {"test": [], "train": []}
    for prompt in prompts:
        part = "test" if len(split["test"]) < test_size else "train"
        split[part] += by_prompt[prompt]
    if len(split["train"]) < train_size:
        got = len(split["train"])
        raise ValueError(f"{name} must have {train_size} pairs to train on that are short enough, got {got}")
    return DatasetDict(
        train=Dataset.from_list(split["train"][:train_size]), test=Dataset.from_list(split["test"][:test_size])
    )


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {
        column: [{"role": role, "content": row[column]}] if isinstance(row[column], str) else row[column]
        for column, role in roles.items()
    }


def _text(messages: list[dict[str, Any]]) -> str:
    return "\n".join(message["content"] for message in messages)
