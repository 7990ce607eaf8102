"""Answers of a run's first and final model, side by side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


_HOME = {
    "generate_answers": "answers",
    "GenerateError": "settings",
    "GenerationSettings": "settings",
    "answer_statistics": "statistics",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from .answers import generate_answers as generate_answers
    from .settings import GenerateError as GenerateError
    from .settings import GenerationSettings as GenerationSettings
    from .statistics import answer_statistics as answer_statistics


def __getattr__(name: str) -> Any:
    # torch and trl take seconds to import
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
