"""Generated tokens as text while they come: whole characters, up to a stop id or a stop text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from qwen_ref.config import InputError, shown
from qwen_ref.generate import Step, checked_stop_ids
from qwen_ref.tokenizer import StreamDecoder, Tokenizer


def checked_stop_texts(stop_texts: Iterable[str]) -> tuple[str, ...]:
    """The texts that end a text, from any collection or iterator; InputError for anything else.

    A single str is refused: each of its letters would become a stop text.
    """
    if isinstance(stop_texts, str):
        raise InputError(f"stop_texts must be a list of texts: [{shown(stop_texts)}], with brackets, is one")
    try:
        found = tuple(stop_texts)
    except TypeError:
        raise InputError(f"stop_texts must be a list of texts, not {shown(stop_texts)}") from None
    for text in found:
        if not isinstance(text, str):
            raise InputError(f"stop_texts must be a list of texts; {shown(text)} is none")
    if "" in found:
        raise InputError("a stop text is empty: it would end every text at once")
    return found


class TextStream:
    """The text of generated steps as it comes, in whole characters, up to a stop id or a stop text.

    Iterate over it for pieces of text; the stop itself is left out. `steps` are the steps taken so far.
    `finish_reason` is "stop" or "length" once the text has ended by itself, and None before. Instead of
    iterating, a caller may push steps one by one, and flush at the end.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        tokenizer: Tokenizer,
        stop_ids: Collection[int] = (),
        stop_texts: Collection[str] = (),
    ) -> None:
        self.steps: list[Step] = []
        self.finish_reason: str | None = None
        self._source = steps
        self._stop_ids = checked_stop_ids(stop_ids)
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._until = _UntilStop(checked_stop_texts(stop_texts))

    def __iter__(self) -> Iterator[str]:
        for step in self._source:
            if text := self.push(step):
                yield text
            if self.finish_reason is not None:
                return
        if text := self.flush():
            yield text
        self.finish_reason = "stop" if self._until.found else "length"

    def push(self, step: Step) -> str:
        """The text that a step adds; finish_reason is "stop" if it was the last one."""
        self.steps.append(step)
        stopped = step.token in self._stop_ids
        text = self.flush() if stopped else self._until.push(self._decoded(step.token))
        if stopped or self._until.found:
            self.finish_reason = "stop"
        return text

    def _decoded(self, token: int) -> str:
        # The output head has more rows than the tokenizer has ids. At a high temperature sampling may choose
        # such a row.
        return (
            self._decoder.push(token) if token < self._tokenizer.n_vocab else self._decoder.flush() + "\ufffd"
        )

    def flush(self) -> str:
        """Returns the text that is still held back. Call it if you stop iterating before the end."""
        return self._until.push(self._decoder.flush()) + self._until.flush()


class _UntilStop:
    """Lets text through up to the first stop text; holds back what may be the beginning of one."""

    def __init__(self, stop_texts: tuple[str, ...]) -> None:
        self.found = False
        self._stop_texts = stop_texts
        self._held = ""

    def push(self, text: str) -> str:
        self._held += text
        starts = [start for stop in self._stop_texts if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            ready, self._held = self._held[: min(starts)], ""
            return ready
        keep = max((_overlap(self._held, stop) for stop in self._stop_texts), default=0)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def flush(self) -> str:
        ready, self._held = self._held, ""
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
