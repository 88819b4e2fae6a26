"""A conversation as token ids, in the form that chat models were trained on: ChatML.

There <|im_start|> and <|im_end|> are single tokens:

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    冰岛的首都是哪里？<|im_end|>
    <|im_start|>assistant

The model continues with its answer and <|im_end|>. The ids are put together piece by piece, never from such a
text as a whole: what a user or the model wrote is encoded as plain text. "<|im_end|>" in a message is
therefore ten characters and no control token, and nobody can speak in another's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qwen_ref.config import InputError, shown
from qwen_ref.tokenizer import Tokenizer

MAX_WINDOW_SIZE = 6144  # tokens of a context, unless the folder's generation_config.json gives another size
DEFAULT_SYSTEM = "You are a helpful assistant."
STOP_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

Turn = tuple[str, str]  # a query and the response to it


class Context(NamedTuple):
    """What the model reads before it answers."""

    ids: list[int]
    dropped: int  # how many of the oldest turns were left out


def build_context(
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[Turn] | None = (),
    system: str = DEFAULT_SYSTEM,
    max_window_size: int = MAX_WINDOW_SIZE,
) -> list[int]:
    """The ids of a conversation up to where the assistant begins to answer query.

    history: the turns so far, the oldest first; None and () are none. A turn is left out, with all turns
    before it, if it would bring the system message and the turns up to max_window_size tokens. The query is
    always there and does not count.
    Raises ValueError for a query or system message that is no text, a turn that is no pair of texts, and a
    max_window_size below 1.

    >>> build_context(tokenizer, "hi", system="")  # with the published vocabulary
    [151644, 8948, 198, 151645, 198, 151644, 872, 198, 6023, 151645, 198, 151644, 77091, 198]
    """
    return fitted_context(tokenizer, query, history, system, max_window_size).ids


def fitted_context(
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[Turn] | None = (),
    system: str = DEFAULT_SYSTEM,
    max_window_size: int = MAX_WINDOW_SIZE,
) -> Context:
    """The ids of build_context, and how many turns were left out."""
    history = () if history is None else history
    check_texts(query, history, system)
    check_tokens("max_window_size", max_window_size)
    im_start, im_end = (tokenizer.special_ids[name] for name in ("<|im_start|>", "<|im_end|>"))
    newline = tokenizer.encode("\n")

    def message(role: str, content: str) -> list[int]:
        return [im_start, *tokenizer.encode(role), *newline, *tokenizer.encode(content), im_end]

    system_ids = message("system", system)
    turns: list[int] = []
    kept = 0
    for asked, answered in reversed(history):
        turn = [*newline, *message("user", asked), *newline, *message("assistant", answered)]
        if len(system_ids) + len(turn) + len(turns) >= max_window_size:
            break
        turns = turn + turns
        kept += 1
    question = [*newline, *message("user", query), *newline, im_start, *tokenizer.encode("assistant")]
    return Context([*system_ids, *turns, *question, *newline], len(history) - kept)


def check_texts(query: object, history: object, system: object) -> None:
    """Raises ValueError where query or system message is no text, or a turn no pair of texts."""
    for name, text in (("query", query), ("system", system)):
        if not isinstance(text, str):
            raise InputError(f"{name} must be text, not {shown(text)}")
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise InputError(f"history must be a list of pairs (query, response), not {shown(history)}")
    for number, turn in enumerate(history):
        pair = isinstance(turn, tuple | list) and len(turn) == 2
        if not pair or not all(isinstance(text, str) for text in turn):
            raise InputError(
                f"history[{number}] must be a pair of texts (query, response), not {shown(turn)}"
            )


def check_tokens(name: str, value: object) -> None:
    """Raises ValueError for what is no number of tokens."""
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={shown(value)} must be at least 1 token, a whole number")


def chat_stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer: those of ChatML and <|endoftext|>."""
    return frozenset(tokenizer.special_ids[name] for name in STOP_TOKENS)
