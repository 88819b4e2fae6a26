"""Weights in 8 and 4 bits: rounded here, or by GPTQ."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwen_ref.quantize.config import GPTQConfig

if TYPE_CHECKING:
    from qwen_ref.quantize.rounding import dequantize_gptq, dequantize_int4, quantize_int4, quantize_int8

__all__ = ["GPTQConfig", "dequantize_gptq", "dequantize_int4", "quantize_int4", "quantize_int8"]


def __getattr__(name: str) -> Any:
    """Imports rounding.py when it is first used: the commands read config.py, and --help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("qwen_ref.quantize.rounding"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
