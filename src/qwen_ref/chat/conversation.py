"""Chat: ChatML contexts as token ids, a conversation, and `python -m qwen_ref.chat`.

    response, history = reply(model, tokenizer, "冰岛的首都是哪里？")
    response, history = reply(model, tokenizer, "And of Norway?", history)

A chat model was trained on texts of this form, in which <|im_start|> and <|im_end|> are single tokens:

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    冰岛的首都是哪里？<|im_end|>
    <|im_start|>assistant

and goes on with its answer and <|im_end|>. The ids are put together piece by piece. They are never those of
such a text as a whole: what a user or the model wrote is encoded as plain text, so that "<|im_end|>" in it
stays ten characters, and nobody can speak in another's name.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qwen_ref.chat.context import (
    DEFAULT_SYSTEM,
    MAX_WINDOW_SIZE,
    Context,
    Turn,
    _check_count,
    chat_stop_ids,
    check_texts,
    context,
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

    A new turn computes what the last one did not (see prefix.py). There is one answer at a time: asking again
    ends one that is still coming, as closing its iterator does.
    """

    def __init__(
        self,
        model: Qwen,
        tokenizer: Tokenizer,
        system: str = DEFAULT_SYSTEM,
        history: Sequence[Turn] = (),
        max_window_size: int = MAX_WINDOW_SIZE,
        stop_texts: Collection[str] = (),
        stop_ids: Collection[int] | None = None,
        **settings: Any,
    ) -> None:
        """settings: those of qwen_ref.generate.generate, all but cache. A seed is that of the first answer,
        and the next one's is one more. stop_ids: those of ChatML by default.
        """
        check_texts("", history, system)
        self.settings = {"max_new_tokens": 512, **settings}
        _check_count("max_window_size", max_window_size)
        _check_count("max_new_tokens", self.settings["max_new_tokens"])
        self.tokenizer = tokenizer
        self.system = system
        self.history: list[Turn] = [(asked, answered) for asked, answered in history]
        self.max_window_size = max_window_size
        self.settings = {"max_new_tokens": 512, **settings}
        self.stop_texts = checked_stop_texts(stop_texts)
        self.stop_ids = chat_stop_ids(tokenizer) if stop_ids is None else checked_stop_ids(stop_ids)
        self.prefix = PrefixCache(model)
        self.answers = 0  # so many were asked for, repeated ones included
        self.context = Context([], 0)  # the last one
        # Of the last answer: "stop" or "length"; None: it is still coming, or was given up.
        self.finish_reason: str | None = None
        self._answer: Generator[str] | None = None

    def ask(self, query: str) -> Iterator[str]:
        """Yields the answer's text as it comes, in whole characters; then the turn is part of the history.

        So it is with what was yielded when the iterator is closed or interrupted, unless that is nothing.
        Raises what `generate` raises.
        """
        if self._answer is not None:
            self._answer.close()
        self.context = context(self.tokenizer, query, self.history, self.system, self.max_window_size)
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
    history: Sequence[Turn] = (),
    system: str = DEFAULT_SYSTEM,
    max_window_size: int = MAX_WINDOW_SIZE,
    **settings: Any,
) -> tuple[str, list[Turn]]:
    """The model's answer to query, and the history with this turn at its end, for the next call.

    settings: those of qwen_ref.generate.generate, all but cache. Greedy by default; max_new_tokens is 512.
    Where the window has no room for the oldest turns, a warning is logged, and the history still has them.
    Each call computes its whole context; a Conversation keeps what the last answer left in the cache.
    Raises ValueError for what is no text, and what `generate` raises.
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
