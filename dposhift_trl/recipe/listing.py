"""The keys of a recipe as text, for a terminal or for `grep`."""

import re
import textwrap
from collections.abc import Iterator

from .keys import TOP_LEVEL, RecipeKey, recipe_keys
from .sections import SECTIONS


# Sections as `--keys` names them
LISTED = {"top-level": TOP_LEVEL, **{name: name for name in SECTIONS}}
ALL = "all"

LINK = re.compile(r"\[`~?([^]`]+)`\](?:\([^)]*\))?|\[([^]]+)\]\([^)]*\)")


def key_lines(section: str = ALL, width: int | None = None) -> list[str]:
    """
    Format the keys of a recipe: type, default and one sentence for each.

    Args:
        section (`str`, *optional*, defaults to `"all"`):
            `top-level`, `model`, `data`, `sft`, `dpo`, `wandb`, or `all` of them.
        width (`int`, *optional*):
            Width of the terminal. Without one, each key is a single line that starts with the dotted key.

    Returns:
        `list[str]`: Lines.
    """
    sections = {section: LISTED[section]} if section in LISTED else LISTED
    if width is None:
        return [_one_line(key) for name in sections.values() for key in recipe_keys(name)]
    lines: list[str] = []
    for name, keys in sections.items():
        lines += ["", name] if lines else [name]
        lines += [line for key in recipe_keys(keys) for line in _wrapped(key, width)]
    return lines


def _one_line(key: RecipeKey) -> str:
    return f"{key.dotted}: {key.type}; default {key.default_text}. {_plain(key.sentence)}"


def _wrapped(key: RecipeKey, width: int) -> Iterator[str]:
    head = f"{key.name} ({key.type}; default {key.default_text})"
    for text, indent in ((head, "  "), (_plain(key.sentence), "      ")):
        yield from textwrap.wrap(
            text,
            max(width, 40),
            initial_indent=indent,
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _plain(markdown: str) -> str:
    """Text without the targets of links."""
    return LINK.sub(lambda link: f"`{link[1]}`" if link[1] else link[2], markdown)
