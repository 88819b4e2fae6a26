"""A conversation: the turns so far, and a model that answers the next query.

response, history = reply(model, tokenizer, "冰岛的首都是哪里？")
response, history = reply(model, tokenizer, "And of Norway?", history)
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Sequence
from typing import TYPE_CHECKING, Any

from qwen_ref.chat.context import (
    DEFAULT_SYSTEM,
    MAX_WINDOW_SIZE,
    Context,
    Turn,
    chat_stop_ids,
    check_texts,
    check_tokens,
    fitted_context,
)
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.decoding.streaming import TextStream, checked_stop_texts
from qwen_ref.generate import begun, checked_stop_ids
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen_ref.generate import Step
    from qwen_ref.model import Qwen

_logger = logging.getLogger(__name__)


class Conversation:
    """A system message, the turns so far, and a model that answers the next query.

    Each turn computes only what the cache does not hold from the turn before (decoding/prefix.py). There is
    one answer at a time: the next `ask` ends an answer that is still coming, as closing its iterator does.
    """

    def __init__(
        self,
        model: Qwen,
        tokenizer: Tokenizer,
        system: str = DEFAULT_SYSTEM,
        history: Sequence[Turn] | None = (),
        max_window_size: int = MAX_WINDOW_SIZE,
        stop_texts: Collection[str] = (),
        stop_ids: Collection[int] | None = None,
        **settings: Any,
    ) -> None:
        """settings: those of qwen_ref.generate.generate, all but cache. A seed is the first answer's; each
        later answer has the seed before it plus one. stop_ids: those of ChatML by default.
        """
        history = () if history is None else history
        check_texts("", history, system)
        self.settings = {"max_new_tokens": 512, **settings}
        check_tokens("max_window_size", max_window_size)
        check_tokens("max_new_tokens", self.settings["max_new_tokens"])
        self.tokenizer = tokenizer
        self.system = system
        self.history: list[Turn] = [(asked, answered) for asked, answered in history]
        self.max_window_size = max_window_size
        self.stop_texts = checked_stop_texts(stop_texts)
        self.stop_ids = chat_stop_ids(tokenizer) if stop_ids is None else checked_stop_ids(stop_ids)
        self.prefix = PrefixCache(model)
        self.answers = 0  # how many were asked for, repeated ones included
        self.context = Context([], 0)  # that of the last answer
        # The last answer's: "stop" or "length"; None while it is coming and after it was stopped.
        self.finish_reason: str | None = None
        self._answer: Generator[str] | None = None

    def __repr__(self) -> str:
        return f"Conversation({len(self.history)} answered, {self.prefix.model})"

    def ask(self, query: str) -> Generator[str]:
        """Yields the answer's text as it comes, in whole characters; then the turn is part of the history.

        If the iterator is closed or interrupted, the text yielded so far becomes the answer of the turn;
        without any text there is no turn. Raises what `generate` raises.
        """
        if self._answer is not None:
            self._answer.close()
        self.context = fitted_context(self.tokenizer, query, self.history, self.system, self.max_window_size)
        settings = {**self.settings, "stop_ids": self.stop_ids}
        if settings.get("seed") is not None:
            settings["seed"] = (settings["seed"] + self.answers) % 2**63
        self.finish_reason = None
        self._answer = begun(self._answered(query, self.prefix.generate(self.context.ids, **settings)))
        self.answers += 1
        return self._answer

    def _answered(self, query: str, steps: Generator[Step]) -> Generator[str | None]:
        stream = TextStream(steps, self.tokenizer, self.stop_ids, self.stop_texts)
        response = ""
        try:
            yield None  # see begun
            for piece in stream:
                response += piece
                yield piece
            self.finish_reason = stream.finish_reason
        finally:
            steps.close()
            if self.finish_reason is not None or response:
                self.history.append((query, response))


def reply(
    model: Qwen,
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[Turn] | None = (),
    system: str = DEFAULT_SYSTEM,
    max_window_size: int = MAX_WINDOW_SIZE,
    **settings: Any,
) -> tuple[str, list[Turn]]:
    """The model's answer to query, and the history with this turn at its end, for the next call.

    settings: those of qwen_ref.generate.generate, all but cache. Greedy by default; max_new_tokens is 512.
    If the window has no room for the oldest turns, a warning is logged. The history keeps these turns.
    Each call computes its whole context; a Conversation reuses the cache of the last answer.
    Raises ValueError for a query, history or system message of the wrong type, and what `generate` raises.
    """
    conversation = Conversation(model, tokenizer, system, history, max_window_size, **settings)
    response = "".join(conversation.ask(query))
    if conversation.context.dropped:
        _logger.warning(dropped_note(conversation))
    return response, conversation.history


def dropped_note(conversation: Conversation) -> str:
    """Which turns the last answer was given without."""
    dropped = conversation.context.dropped
    turns = "the oldest turn is" if dropped == 1 else f"the {dropped} oldest turns are"
    return f"{turns} left out: the window holds {conversation.max_window_size} tokens"
