"""The same model laid out for speed on the CPU: its matrices, its cache, its attention."""

from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.fast.layers import fasten

__all__ = ["Int8Cache", "fasten"]
