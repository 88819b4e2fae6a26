"""Every stage of a prompt in numbers, and `python -m qwen_ref.trace`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref.trace.tracing import Lens, Prediction, Stage, Trace, trace

__all__ = [
    "Lens",
    "Prediction",
    "Stage",
    "Trace",
    "trace",
]

_HOME = {
    "Lens": "tracing",
    "Prediction": "tracing",
    "Stage": "tracing",
    "Trace": "tracing",
    "trace": "tracing",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: --help must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
