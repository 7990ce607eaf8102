"""The built-in demo: preference pairs, a tiny model and its tokenizer, all generated from a seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer


SEED = 20250210
NUM_TRAIN, NUM_TEST = 2400, 300
VOCAB_SIZE, NUM_POSITIONS = 1024, 128

UNITS = (("hour", "minutes", 60), ("day", "hours", 24), ("week", "days", 7), ("year", "months", 12))
CARE = {
    "brass": "polish it with lemon and a dry rag",
    "glass": "wash it with vinegar and warm water",
    "iron": "brush off the rust and oil it lightly",
    "leather": "rub in some wax with a soft cloth",
    "silk": "rinse it in cold water by hand",
    "wood": "dust it well and keep it away from damp",
}
WORDS = {
    "thing": "barrel basket blanket bucket candle chair clock drum hammer kettle ladder lamp mirror ribbon rope spoon",
    "place": "attic barn cellar garden harbour kitchen library mill tower workshop",
    "shop": "bakery bathhouse ferry museum school smithy theatre",
    "town": "Brathel Immeray Loxenby Ostrel Pelwick Quorra Sundrel Vandim",
    "colour": "black blue brown green grey red white yellow",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "material": " ".join(CARE),
}


@dataclass(frozen=True)
class Family:
    """
    One family of tasks.

    Args:
        prompts, answers (`tuple[str, ...]`):
            Templates that are filled from a scene.
        right, wrong (`Callable`):
            Values for `{answer}` in the chosen answer and in a near miss.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    right: Callable[[SimpleNamespace], Any]
    wrong: Callable[[SimpleNamespace], Any]


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
        right=lambda s: s.a + s.b,
        wrong=lambda s: s.a + s.b + s.slip,
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
        right=lambda s: s.a * s.factor,
        wrong=lambda s: (s.a + s.slip) * s.factor,
    ),
    Family(  # one of the facts given in the prompt
        prompts=(
            "In {town} the {shop} opens on {day} and the {shop2} opens on {day2}. When does the {shop} open?",
            "In {town} the {shop2} opens on {day2}, while the {shop} opens on {day}. When can I visit the {shop}?",
        ),
        answers=(
            "The {shop} in {town} opens on {answer}, so {answer} is the day for your visit.",
            "You can visit the {shop} of {town} on {answer}, which is when it opens.",
        ),
        right=lambda s: s.day,
        wrong=lambda s: s.day2,
    ),
    Family(  # finding a thing
        prompts=(
            "The {colour} {thing} is in the {place} and the {colour2} {thing2} is in the {place2}. Find the {thing}.",
            "I left the {thing2} in the {place2} and the {thing} in the {place}. Where should I look for the {thing}?",
        ),
        answers=(
            "The {thing} is in the {answer}, so look for it in the {answer}.",
            "Please look in the {answer}, because the {thing} was left in the {answer}.",
        ),
        right=lambda s: s.place,
        wrong=lambda s: s.place2,
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
        right=lambda s: s.thing if s.a < s.b else s.thing2,
        wrong=lambda s: s.thing2 if s.a < s.b else s.thing,
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
        right=lambda s: "{}, {}, {}, {}".format(*sorted([s.thing, s.place, s.colour, s.shop])),
        wrong=lambda s: "{1}, {0}, {2}, {3}".format(*sorted([s.thing, s.place, s.colour, s.shop])),
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
        right=lambda s: s.thing,
        wrong=lambda s: s.thing2,
    ),
    Family(  # a format to follow
        prompts=(
            "Write this as JSON: {a} {colour} {thing}s for {day}.",
            "Give me the order as JSON. We need {a} {thing}s in {colour} for {day}.",
        ),
        answers=('{{"item": "{thing}", "colour": "{colour}", "count": {answer}, "day": "{day}"}}',),
        right=lambda s: s.a,
        wrong=lambda s: s.a + s.slip,
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
        right=lambda s: CARE[s.material],
        wrong=lambda s: CARE[s.material2],
    ),
)

# Templates for rejected answers, mostly near misses; `short` is the value for `{answer}` in `wrong`
FAULTS = 3 * ("{wrong}",) + (
    "{right} No, I mean {short}.",
    "{short}, and that is all I will say about it.",
    "Well, that is hard to say, but perhaps: {wrong}",
    "{right} {echo} {echo} {echo}.",
)


def demo_dataset() -> DatasetDict:
    """
    Preference pairs from nine families of tasks. The chosen answer is right, the rejected one a near miss.

    Returns:
        `datasets.DatasetDict`: Splits `train` and `test` with columns `prompt`, `chosen` and `rejected`. Prompts are
        unique across both splits; completions start with a space.
    """
    rng = Random(SEED)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < NUM_TRAIN + NUM_TEST:
        row = _pair(rng)
        rows.setdefault(row["prompt"], row)
    pairs = list(rows.values())
    return DatasetDict(train=Dataset.from_list(pairs[:NUM_TRAIN]), test=Dataset.from_list(pairs[NUM_TRAIN:]))


def save_demo_model(folder: str | PathLike[str]) -> None:
    """
    Save a small GPT-2 with random weights and its byte-level BPE tokenizer for `from_pretrained`.

    Args:
        folder (`str` or `os.PathLike`):
            Folder to save to; created if it does not exist.
    """
    tokenizer = _tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=NUM_POSITIONS,
        n_embd=160,
        n_layer=3,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,  # with GPT-2's 0.02, this width learns several times slower
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # `torch.manual_seed` would also seed accelerators
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pick(rng: Random, options: Sequence[Any], count: int) -> list[Any]:
    """Distinct options in random order. Only uses `getrandbits`, which is stable across Python versions."""
    left = list(options)
    return [left.pop(rng.getrandbits(32) % len(left)) for _ in range(count)]


def _scene(rng: Random) -> SimpleNamespace:
    """One value for each slot of the templates; slots of the same type get different values."""
    scene = SimpleNamespace()
    scene.a, scene.b = _pick(rng, range(3, 10), 2)
    scene.slip = _pick(rng, (-2, -1, 1, 2), 1)[0]
    scene.unit, scene.small_unit, scene.factor = _pick(rng, UNITS, 1)[0]
    for slot, words in WORDS.items():
        first, second = _pick(rng, words.split(), 2)
        setattr(scene, slot, first)
        setattr(scene, f"{slot}2", second)
    return scene


def _pair(rng: Random) -> dict[str, str]:
    family, fault = _pick(rng, FAMILIES, 1)[0], _pick(rng, FAULTS, 1)[0]
    prompt, answer = _pick(rng, family.prompts, 1)[0], _pick(rng, family.answers, 1)[0]
    scene = _scene(rng)
    short = family.wrong(scene)
    right = answer.format(**vars(scene), answer=family.right(scene))
    wrong = answer.format(**vars(scene), answer=short)
    echo = " ".join(right.rstrip(".?}").split()[-2:])
    rejected = fault.format(right=right, wrong=wrong, short=short, echo=echo)
    return {"prompt": prompt.format(**vars(scene)), "chosen": f" {right}", "rejected": f" {rejected}"}


def _tokenizer() -> GPT2Tokenizer:
    texts = [text for row in demo_dataset()["train"] for text in row.values()]
    untrained = GPT2Tokenizer(pad_token="<|endoftext|>", model_max_length=NUM_POSITIONS)
    return untrained.train_new_from_iterator(texts, VOCAB_SIZE, show_progress=False)
