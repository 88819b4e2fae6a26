"""A reference implementation of first-generation Qwen: exactly what it computes, in readable PyTorch.

    model = qwen_ref.load_model("Qwen-1_8B")
    tokenizer = qwen_ref.Tokenizer.from_file("Qwen-1_8B/qwen.tiktoken")

Generation is in qwen_ref.generate, imported by its own name: `python -m qwen_ref.generate` then stays clean.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref import chat, perplexity, quantize, sampling
    from qwen_ref.checkpoint import load_model
    from qwen_ref.config import InputError, QwenConfig
    from qwen_ref.model import KVCache, Qwen
    from qwen_ref.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "InputError",
    "KVCache",
    "Qwen",
    "QwenConfig",
    "StreamDecoder",
    "Tokenizer",
    "chat",
    "load_model",
    "perplexity",
    "quantize",
    "sampling",
]

_HOME = {
    "InputError": "config",
    "KVCache": "model",
    "Qwen": "model",
    "QwenConfig": "config",
    "StreamDecoder": "tokenizer",
    "Tokenizer": "tokenizer",
    "load_model": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: a command's --help must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"qwen_ref.{_HOME[name]}"), name)
    if name in __all__:
        return import_module(f"qwen_ref.{name}")
    raise AttributeError(f"module 'qwen_ref' has no attribute {name!r}")
