"""Chat: contexts in ChatML as token ids, conversations, and `python -m qwen_ref.chat`."""

from typing import TYPE_CHECKING

from qwen_ref.commands.lazy import lazy

if TYPE_CHECKING:
    from qwen_ref.chat.context import DEFAULT_SYSTEM, Context, Turn, build_context, chat_stop_ids
    from qwen_ref.chat.conversation import Conversation, reply

__all__ = ["DEFAULT_SYSTEM", "Context", "Conversation", "Turn", "build_context", "chat_stop_ids", "reply"]

__getattr__, __dir__ = lazy(
    __name__,
    context=["DEFAULT_SYSTEM", "Context", "Turn", "build_context", "chat_stop_ids"],
    conversation=["Conversation", "reply"],
)
