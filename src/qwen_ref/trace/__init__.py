"""Every stage of a prompt in numbers, and `python -m qwen_ref.trace`."""

from typing import TYPE_CHECKING

from qwen_ref.commands.lazy import lazy

if TYPE_CHECKING:
    from qwen_ref.trace.tracing import Lens, Prediction, Stage, Trace, trace

__all__ = ["Lens", "Prediction", "Stage", "Trace", "trace"]

__getattr__, __dir__ = lazy(__name__, tracing=["Lens", "Prediction", "Stage", "Trace", "trace"])
