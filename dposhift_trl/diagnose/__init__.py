"""How far a trained model moved from its reference on preference pairs, for a model of any trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


_HOME = {
    "diagnose": "diagnosis",
    "Diagnosis": "diagnosis",
    "DiagnoseError": "settings",
    "DiagnoseSettings": "settings",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from .diagnosis import Diagnosis as Diagnosis
    from .diagnosis import diagnose as diagnose
    from .settings import DiagnoseError as DiagnoseError
    from .settings import DiagnoseSettings as DiagnoseSettings


def __getattr__(name: str) -> Any:
    # torch and trl take seconds to import
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
