"""Around the loop: text as it streams, a common prefix used again, several tokens a pass."""

from qwen_ref.decoding.lookup import generate_lookup
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.decoding.streaming import TextStream

__all__ = ["PrefixCache", "TextStream", "generate_lookup"]
