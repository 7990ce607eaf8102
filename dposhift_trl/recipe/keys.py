"""Every key of a recipe, as the dataclasses of its sections define it: for checks, `--keys`, the schema, the docs."""

import dataclasses
import functools
import inspect
import json
import re
import typing
from dataclasses import dataclass
from typing import Any

from ..choices import choices
from ..data.config import DataSource
from ..ranges import RANGES, Rule
from .hints import describe
from .sections import (
    BEST_METRIC,
    DECIDED_ELSEWHERE,
    EVAL_DEFAULTS,
    SECTIONS,
    STAGE_DEFAULTS,
    STAGES,
    WIDER_TYPES,
    TopLevel,
)


TOP_LEVEL = ""  # name of the section of the keys that are in none
MIXTURE = "data.mixture"  # and of those of each of its sources
REQUIRED = dataclasses.MISSING

# A parameter in a docstring, from which the indentation has been removed
PARAMETER = re.compile(r"^    (\w+) \(.*\):\n((?: {8}.*(?:\n|$))+)", re.MULTILINE)
# The end of a sentence, which "e.g." is not
SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)\.(?=\s|$)")


@dataclass(frozen=True)
class RecipeKey:
    """
    A key of a recipe.

    Args:
        section (`str`):
            `model`, `data`, `data.mixture` for its sources, `sft`, `dpo`, `wandb`, or empty for the top level.
        name (`str`):
            Name of the key in its section.
        hint (`Any`):
            Type of its value.
        default (`Any`):
            Value that a recipe has without the key; `REQUIRED` if it has to be set.
        default_without_eval (`Any`):
            The same for recipes without evaluation rows.
        help (`str`):
            What the key does, in Markdown.
        is_ours (`bool`):
            Whether the key is this package's own, or differs from that of TRL or transformers.
        words (`tuple[str, ...]`, *optional*):
            Words that the value may be, if these are a closed set.
    """

    section: str
    name: str
    hint: Any
    default: Any
    default_without_eval: Any
    help: str
    is_ours: bool
    words: tuple[str, ...] = ()

    @property
    def dotted(self) -> str:
        """The key as overrides write it."""
        return f"{self.section}.{self.name}".lstrip(".")

    @property
    def sentence(self) -> str:
        """The first sentence of its help."""
        end = SENTENCE.search(self.help)
        return self.help[: end.end()] if end else self.help

    @property
    def rule(self) -> Rule | None:
        """The numbers that it takes; `None` if all of its type."""
        return RANGES[self.name].rule if self.name in RANGES else None

    @property
    def type(self) -> str:
        """What it takes, in words that follow "must be"."""
        if not self.words:
            return describe(self.hint) + (f", {self.rule.words}" if self.rule else "")
        return f"one of {', '.join(self.words)}" + (" or null" if type(None) in typing.get_args(self.hint) else "")

    @property
    def default_text(self) -> str:
        """Its default, as a recipe writes it, and that without evaluation rows if it differs."""
        if self.default is REQUIRED:
            return "none, required"
        text = _as_written(self.default)
        if self.default == self.default_without_eval:
            return text
        return f"{text}, or {_as_written(self.default_without_eval)} without evaluation rows"


def _as_written(value: Any) -> str:
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value)


def recipe_keys(section: str | None = None) -> list[RecipeKey]:
    """
    List the keys of a recipe.

    Args:
        section (`str`, *optional*):
            `model`, `data`, `data.mixture` for its sources, `sft`, `dpo`, `wandb`, or empty for the top level. All of
            them by default, the top level first.

    Returns:
        `list[RecipeKey]`: In each section, this package's own keys first, in the order of the dataclass.

    Example:

    ```python
    >>> recipe_keys("dpo")[1].dotted
    'dpo.shift_lambda'
    ```
    """
    if section is None:
        return [key for name in (TOP_LEVEL, *SECTIONS) for key in recipe_keys(name)]
    cls = {TOP_LEVEL: TopLevel, MIXTURE: DataSource, **SECTIONS}[section]
    return sorted(keys_of(section, cls).values(), key=lambda key: not key.is_ours)


def keys_by_name(section: str) -> dict[str, RecipeKey]:
    """The keys of a section, by name."""
    return {key.name: key for key in recipe_keys(section)}


@functools.cache
def keys_of(section: str, cls: type) -> dict[str, RecipeKey]:
    """The keys that a dataclass gives a section, by name."""
    hints, documented, own = typing.get_type_hints(cls), _documented(cls), _own_fields(cls)
    without_eval = STAGE_DEFAULTS if section in STAGES else {}
    with_eval = {**without_eval}
    if section in STAGES:
        with_eval |= EVAL_DEFAULTS | {"metric_for_best_model": BEST_METRIC[section], "greater_is_better": False}
    keys = {}
    for field in dataclasses.fields(cls):
        if not field.init or (section in STAGES and field.name in DECIDED_ELSEWHERE):
            continue
        hint = WIDER_TYPES.get(field.name, hints[field.name])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        help_text = field.metadata.get("help", documented.get(field.name, "")).replace("%%", "%")  # as argparse does
        keys[field.name] = RecipeKey(
            section=section,
            name=field.name,
            hint=hint,
            default=with_eval.get(field.name, default),
            default_without_eval=without_eval.get(field.name, default),
            help=help_text,
            is_ours=field.name in own,
            words=tuple(map(str, choices(field, hints[field.name]))),
        )
    return {name: keys[name] for name in dict.fromkeys([*own, *keys]) if name in keys}


def _own_fields(cls: type) -> list[str]:
    """Fields that a class of this package defines, or defines anew, in their order there."""
    package = __name__.split(".")[0]
    ours = [base for base in reversed(cls.__mro__) if base.__module__.split(".")[0] == package]
    return list(dict.fromkeys(name for base in ours for name in inspect.get_annotations(base)))


def _documented(cls: type) -> dict[str, str]:
    """The text of each parameter in the docstrings of a class and its parents."""
    return {
        name: " ".join(text.split())
        for base in reversed(cls.__mro__)
        for name, text in PARAMETER.findall(inspect.cleandoc(base.__doc__ or ""))
    }
