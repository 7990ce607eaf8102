"""The report: one HTML page about a run, or comparing several."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


_HOME = {"write_report": "page", "ReportError": "errors"}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from .errors import ReportError as ReportError
    from .page import write_report as write_report


def __getattr__(name: str) -> Any:
    # matplotlib and scipy take seconds to import, and most users of this package only need the verdict
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
