"""The types of keys: whether a value fits one, and what it is in words."""

import dataclasses
import functools
import re
import types
import typing
from typing import Any, Literal

import pydantic


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of a type, without a conversion other than from integers to numbers."""
    try:
        _adapter(hint).validate_python(value)
    except pydantic.ValidationError:
        return False
    return True


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter:
    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return pydantic.TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else config)


def describe(hint: Any) -> str:
    """
    A type in words that follow "must be".

    >>> describe(int | None)
    'an integer or null'
    """
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [describe(argument) for argument in arguments]
        return " or ".join(dict.fromkeys(parts))
    if origin is Literal:
        values = [str(value).lower() if isinstance(value, bool) else str(value) for value in arguments]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is list or hint is list:
        return f"a list of {_plural(arguments[0])}" if arguments else "a list"
    if origin is dict or hint is dict:
        return f"a mapping to {_plural(arguments[1])}" if arguments and arguments[1] is not Any else "a mapping"
    return words.get(hint, "a string")


def _plural(hint: Any) -> str:
    return re.sub(r"^an? (\w+)", r"\1s", describe(hint))
