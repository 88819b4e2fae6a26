"""Log-probabilities of given texts, and `python -m qwen_ref.perplexity`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref.perplexity.windows import score

__all__ = [
    "score",
]

_HOME = {
    "score": "windows",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: --help must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
