"""Log-probabilities of given texts, and `python -m qwen_ref.perplexity`."""

from typing import TYPE_CHECKING

from qwen_ref.commands.lazy import lazy

if TYPE_CHECKING:
    from qwen_ref.perplexity.scoring import score

__all__ = ["score"]

__getattr__, __dir__ = lazy(__name__, scoring=["score"])
