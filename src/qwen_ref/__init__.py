"""A reference implementation of first-generation Qwen: exactly what it computes, in readable PyTorch.

    model = qwen_ref.load_model("Qwen-1_8B")
    tokenizer = qwen_ref.Tokenizer.from_file("Qwen-1_8B")

The loop is `from qwen_ref.generate import generate`. `python -m qwen_ref` lists the commands.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref import chat, perplexity, quantize, sampling
    from qwen_ref.config import InputError, QwenConfig
    from qwen_ref.loading.loader import load_model
    from qwen_ref.loading.tokenizer import FastTokenizer as Tokenizer
    from qwen_ref.model import KVCache, Qwen
    from qwen_ref.tokenizer import StreamDecoder

__version__ = "0.1.0"

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
    "load_model": "loading.loader",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: a command's --help must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"qwen_ref.{_HOME[name]}"), name)
    if name == "Tokenizer":
        return import_module("qwen_ref.loading.tokenizer").FastTokenizer
    if name in __all__:
        return import_module(f"qwen_ref.{name}")
    raise AttributeError(f"module 'qwen_ref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_MOVED = {"qwen_ref.harness": "qwen_ref.evaluate.harness", "qwen_ref.lookup": "qwen_ref.decoding.lookup"}


class _Moved:
    """Modules that stood at the top level once, under the names that scripts know them by."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_MOVED[spec.name])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put that of the old name there


sys.meta_path.append(_Moved())  # type: ignore[arg-type]
