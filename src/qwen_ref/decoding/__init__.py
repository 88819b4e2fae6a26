"""Around the loop: text as it streams, a common prefix used again, several tokens a pass."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref.decoding.lookup import generate_lookup
    from qwen_ref.decoding.prefix import PrefixCache
    from qwen_ref.decoding.streaming import TextStream

__all__ = [
    "PrefixCache",
    "TextStream",
    "generate_lookup",
]

_HOME = {
    "PrefixCache": "prefix",
    "TextStream": "streaming",
    "generate_lookup": "lookup",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: --help must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
