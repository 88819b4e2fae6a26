"""The same model laid out for speed on the CPU: its matrices, its cache, its attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref.fast.int8_cache import Int8Cache
    from qwen_ref.fast.layers import fasten

__all__ = [
    "Int8Cache",
    "fasten",
]

_HOME = {
    "Int8Cache": "int8_cache",
    "fasten": "layers",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: --help must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
