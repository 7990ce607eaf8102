"""The page "Recipe reference", made from the dataclasses that check a recipe."""

import html
import re
from collections.abc import Sequence

from dposhift_trl.recipe.keys import RecipeKey, recipe_keys


INTRODUCTION = """# Recipe reference

Every key that a recipe may have, as this version checks it. On the command line `section.key=value` sets one, and
`python -m dposhift_trl.run --keys` prints this list. Editors that read JSON schemas complete and check keys by
`recipes/recipe.schema.json`, which the first line of each recipe names.
"""
SECTIONS = {
    "": ("Top level", "Where the run is written, and what both stages share."),
    "model": ("model", "TRL's `ModelConfig`, and what this package adds."),
    "data": ("data", "[Data formats](data_formats.md) shows rows, and what the audit does."),
    "sft": ("sft", "Stage 1: TRL's `SFTConfig`. Without this section there is no stage 1."),
    "dpo": ("dpo", "Stage 2: `DPOShiftConfig`, TRL's `DPOConfig` with lambda. Without this section there is none."),
    "wandb": ("wandb", "Weights & Biases. [Environment variables](environment.md) fill in what is left open."),
}
MOST_WORDS = 12


def recipe_page() -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION]
    for name, (title, sentence) in SECTIONS.items():
        keys = recipe_keys(name)
        ours, theirs = ([key for key in keys if key.is_ours is own] for own in (True, False))
        parts.append(f"## {title}\n\n{sentence}\n")
        if ours:
            parts.append(_table(ours, whole=True))
        if theirs:
            heading = f'??? note "{len(theirs)} keys of TRL and transformers"' if ours or len(theirs) > 20 else ""
            table = _table(theirs, whole=False)
            parts.append(f"{heading}\n\n{_indented(table)}" if heading else table)
    return "\n".join(parts)


def _table(keys: Sequence[RecipeKey], whole: bool) -> str:
    """Keys in a table, with all of their help or its first sentence."""
    rows = [
        f"| `{key.name}` | {_cell(_type(key))} | {_code(key.default_text)} | {_cell(text)} |"
        for key in keys
        for text in [key.help if whole else key.sentence]
    ]
    return "\n".join(["| Key | Takes | Default | What it does |", "| --- | --- | --- | --- |", *rows, ""])


def _type(key: RecipeKey) -> str:
    if len(key.words) > MOST_WORDS:
        return f"one of {len(key.words)} words, such as {', '.join(key.words[:3])}"
    return key.type


def _code(text: str) -> str:
    """A default as code, what is said about it as text."""
    value, comma, rest = text.partition(", or ")
    if not comma:
        return text if text == "none, required" else f"`{text}`"
    other, _, condition = rest.partition(" ")
    return f"`{value}`, or `{other}` {condition}"


def _cell(text: str) -> str:
    """Text of a docstring as a cell: links to classes as code, nothing that Markdown or HTML would read."""
    text = re.sub(r"\[`~?([^]`]+)`\](\([^)]*\))?", r"`\1`", text)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(x if x.startswith("`") else html.escape(x, quote=False) for x in parts).replace("|", "\\|")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else line for line in text.split("\n"))
