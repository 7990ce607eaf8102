"""The built-in demo: a tiny model, its tokenizer and preference pairs; offline, seeded, the same on every machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from random import Random
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


SEED = 20250210
NUM_TRAIN, NUM_TEST = 4000, 300
VOCAB_SIZE = 640
END_OF_TEXT = "<|endoftext|>"

THINGS = "barrel basket blanket bucket candle chair clock drum hammer kettle ladder lamp mirror ribbon rope spoon".split()
PLACES = "attic barn cellar garden harbour kitchen library mill tower workshop".split()
SHOPS = "bakery bathhouse ferry museum school smithy theatre".split()
TOWNS = "Brathel Immeray Loxenby Ostrel Pelwick Quorra Sundrel Vandim".split()
COLOURS = "black blue brown green grey red white yellow".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = (
    ("minute", "seconds", 60),
    ("hour", "minutes", 60),
    ("day", "hours", 24),
    ("week", "days", 7),
    ("year", "months", 12),
)
CARE = {
    "brass": "polish it with lemon and a dry rag",
    "glass": "wash it with vinegar and warm water",
    "iron": "brush off the rust and oil it lightly",
    "leather": "rub in some wax with a soft cloth",
    "silk": "rinse it in cold water by hand",
    "wood": "dust it well and keep it away from damp",
    "wool": "shake it out and air it in the shade",
}

Scene = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """
    One kind of task. Prompts and answers are templates over the slots of a scene; an answer also has `{answer}`.

    Args:
        prompts, answers (`tuple[str, ...]`):
            Wordings, any of which goes with any other.
        right, wrong (`Callable[[dict], Any]`):
            What stands for `{answer}` in the chosen answer, and in the near miss.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    right: Callable[[Scene], Any]
    wrong: Callable[[Scene], Any]


FAMILIES = (
    Family(  # addition
        prompts=(
            "There are {a} {thing}s in the {place}. Then {b} more {thing}s arrive. How many {thing}s are there now?",
            "The {place} had {a} {thing}s, and {b} {thing}s were added. Count the {thing}s and show the sum.",
        ),
        answers=(
            "There are {answer} {thing}s in the {place} now, because {a} + {b} = {answer}.",
            "Since {a} + {b} = {answer}, the {place} now holds {answer} {thing}s.",
        ),
        right=lambda s: s["a"] + s["b"],
        wrong=lambda s: s["a"] + s["b"] + s["slip"],
    ),
    Family(  # conversion of units
        prompts=(
            "The work in the {place} of {town} takes {a} {unit}s. How many {small_unit} is that?",
            "The journey from {town} to {town2} takes {a} {unit}s. Please convert this to {small_unit}.",
        ),
        answers=(
            "One {unit} has {factor} {small_unit}, so {a} {unit}s are {a} x {factor} = {answer} {small_unit}.",
            "It takes {answer} {small_unit}, because {a} x {factor} = {answer}.",
        ),
        right=lambda s: s["a"] * s["factor"],
        wrong=lambda s: (s["a"] + s["slip"]) * s["factor"],
    ),
    Family(  # a fact told in the prompt, among others
        prompts=(
            "In {town} the {shop} opens on {day} and the {shop2} opens on {day2}. When does the {shop} open?",
            "In {town} the {shop2} opens on {day2}, while the {shop} opens on {day}. When can I visit the {shop}?",
        ),
        answers=(
            "The {shop} in {town} opens on {answer}, so {answer} is the day for your visit.",
            "You can visit the {shop} of {town} on {answer}, which is when it opens.",
        ),
        right=lambda s: s["day"],
        wrong=lambda s: s["day2"],
    ),
    Family(  # finding
        prompts=(
            "The {colour} {thing} is in the {place} and the {colour2} {thing2} is in the {place2}. "
            "Where is the {colour} {thing}?",
            "Someone left the {colour2} {thing2} in the {place2} and the {colour} {thing} in the {place}. "
            "I need the {colour} {thing}. Where should I look?",
        ),
        answers=(
            "The {colour} {thing} is in the {answer}, so look for it in the {answer}.",
            "Please look in the {answer}, because the {colour} {thing} was left in the {answer}.",
        ),
        right=lambda s: s["place"],
        wrong=lambda s: s["place2"],
    ),
    Family(  # comparison
        prompts=(
            "In {town} the {thing} costs {a} coins and the {thing2} costs {b} coins. Which one is cheaper?",
            "I have few coins. The {thing} costs {a} coins and the {thing2} costs {b} coins. Which should I buy?",
        ),
        answers=(
            "The {answer} is cheaper, so with few coins you should buy the {answer}.",
            "You should buy the {answer}, because the {answer} costs fewer coins.",
        ),
        right=lambda s: s["thing"] if s["a"] < s["b"] else s["thing2"],
        wrong=lambda s: s["thing2"] if s["a"] < s["b"] else s["thing"],
    ),
    Family(  # sorting
        prompts=(
            "Put these words in alphabetical order: {thing}, {place}, {colour}, {shop}.",
            "Please sort the words {thing}, {place}, {colour} and {shop} from A to Z.",
        ),
        answers=(
            "In alphabetical order the words are {answer}.",
            "Sorted from A to Z, the list reads {answer}.",
        ),
        right=lambda s: ", ".join(sorted(s[slot] for slot in ("thing", "place", "colour", "shop"))),
        wrong=lambda s: ", ".join(sorted((s[slot] for slot in ("thing", "place", "colour", "shop")), reverse=True)),
    ),
    Family(  # a polite request
        prompts=(
            "Make this request polite: Bring the {colour} {thing} to the {place}!",
            "Rewrite this in a friendly way: I want the {colour} {thing} in the {place}, now!",
        ),
        answers=(
            "Could you please bring the {colour} {answer} to the {place}? Thank you very much.",
            "Would you be so kind as to bring the {colour} {answer} to the {place}? That would be lovely.",
        ),
        right=lambda s: s["thing"],
        wrong=lambda s: s["thing2"],
    ),
    Family(  # a format to follow
        prompts=(
            "Write this as JSON: {a} {colour} {thing}s for {day}.",
            "Give me the order as JSON. We need {a} {thing}s in {colour} for {day}.",
        ),
        answers=('{{"item": "{thing}", "colour": "{colour}", "count": {answer}, "day": "{day}"}}',),
        right=lambda s: s["a"],
        wrong=lambda s: s["a"] + s["slip"],
    ),
    Family(  # advice
        prompts=(
            "The {thing} in the {place} is made of {material}. How should I clean it?",
            "I found a dirty {thing} of {material} in {town}. What can I do to make it look new?",
        ),
        answers=(
            "If the {thing} is made of {material}, {answer}.",
            "To clean a {thing} of {material}, {answer}. Then it will look new.",
        ),
        right=lambda s: CARE[s["material"]],
        wrong=lambda s: CARE[s["material2"]],
    ),
)

# What a rejected answer looks like, over the right and the wrong answer in full and the wrong one in short
FAULTS = (
    "{wrong}",
    "{wrong}",
    "{wrong}",
    "{right} No, I mean {short}.",
    "{short}, and that is all I will say about it.",
    "Well, that is hard to say, and opinions differ, but perhaps this: {wrong}",
    "{right} {echo} {echo} {echo}.",
)


def demo_dataset() -> DatasetDict:
    """
    Preference pairs of nine families of tasks: the chosen answer is right, the rejected one a near miss.

    Returns:
        `datasets.DatasetDict`: Splits `train` and `test` with columns `prompt`, `chosen` and `rejected`. No prompt
        occurs twice, within a split or across both; completions begin with a space.
    """
    rng = Random(SEED)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < NUM_TRAIN + NUM_TEST:
        row = _pair(rng)
        rows.setdefault(row["prompt"], row)
    pairs = list(rows.values())
    return DatasetDict(
        train=Dataset.from_list(pairs[:NUM_TRAIN]),
        test=Dataset.from_list(pairs[NUM_TRAIN:]),
    )


def save_demo_model(folder: str | PathLike[str]) -> None:
    """
    Write a small GPT-2 with random weights, and its byte-level BPE tokenizer, as `from_pretrained` reads them.

    Args:
        folder (`str` or `os.PathLike`):
            Where to write; made if it does not exist.
    """
    tokenizer = _tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=160,
        n_layer=4,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pick(rng: Random, options: Sequence[Any], count: int) -> list[Any]:
    """Distinct options, in random order. Made of `getrandbits` alone, which no Python version changes."""
    left = list(options)
    return [left.pop(rng.getrandbits(32) % len(left)) for _ in range(count)]


def _scene(rng: Random) -> Scene:
    """One value for each slot of the templates; slots of a kind differ."""
    scene: Scene = {}
    kinds = {"thing": THINGS, "place": PLACES, "shop": SHOPS, "town": TOWNS, "colour": COLOURS, "day": DAYS}
    for slot, words in {**kinds, "material": list(CARE)}.items():
        scene[slot], scene[f"{slot}2"] = _pick(rng, words, 2)
    scene["a"], scene["b"] = _pick(rng, range(3, 13), 2)
    (scene["slip"],) = _pick(rng, (-2, -1, 1, 2), 1)
    ((scene["unit"], scene["small_unit"], scene["factor"]),) = _pick(rng, UNITS, 1)
    return scene


def _pair(rng: Random) -> dict[str, str]:
    (family,), (fault,), scene = _pick(rng, FAMILIES, 1), _pick(rng, FAULTS, 1), _scene(rng)
    (prompt,), (wording,) = _pick(rng, family.prompts, 1), _pick(rng, family.answers, 1)
    short = family.wrong(scene)
    right = wording.format(**scene, answer=family.right(scene))
    wrong = wording.format(**scene, answer=short)
    rejected = fault.format(right=right, wrong=wrong, short=short, echo=" ".join(right.rstrip(".?}").split()[-2:]))
    return {"prompt": prompt.format(**scene), "chosen": f" {right}", "rejected": f" {rejected}"}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    texts = (text for row in demo_dataset()["train"] for text in row.values())
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
