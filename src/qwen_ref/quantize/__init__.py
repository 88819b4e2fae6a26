"""Weights in 8 and 4 bits: rounded here, or by GPTQ."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref.quantize.config import GPTQConfig
    from qwen_ref.quantize.rounding import dequantize_gptq, dequantize_int4, quantize_int4, quantize_int8

__all__ = [
    "GPTQConfig",
    "dequantize_gptq",
    "dequantize_int4",
    "quantize_int4",
    "quantize_int8",
]

_HOME = {
    "quantize_int4": "rounding",
    "GPTQConfig": "config",
    "dequantize_gptq": "rounding",
    "dequantize_int4": "rounding",
    "quantize_int8": "rounding",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: --help must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
