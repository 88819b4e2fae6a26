"""Chat: contexts in ChatML as token ids, conversations, and `python -m qwen_ref.chat`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ref.chat.context import DEFAULT_SYSTEM, Context, Turn, build_context, chat_stop_ids, context
    from qwen_ref.chat.conversation import Conversation, reply

__all__ = [
    "DEFAULT_SYSTEM",
    "Context",
    "Conversation",
    "Turn",
    "build_context",
    "chat_stop_ids",
    "context",
    "reply",
]

_HOME = {
    "Context": "context",
    "Conversation": "conversation",
    "DEFAULT_SYSTEM": "context",
    "Turn": "context",
    "build_context": "context",
    "chat_stop_ids": "context",
    "context": "context",
    "reply": "conversation",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: --help must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
