"""load_model and open_checkpoint that first find everything that is wrong with a checkpoint folder."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref.loading.loader import load_model, open_checkpoint

__all__ = ["load_model", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: --help must not wait for torch."""
    if name in __all__:
        return getattr(import_module("qwen_ref.loading.loader"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
