"""A completion in the shape that OpenAI-compatible servers give and that their users' tools read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen_ref.decoding.alternatives import Scored

MOST_ALTERNATIVES = 1000


def choice(
    text: str, finish_reason: str | None, tokens: Sequence[Scored] | None, tokenizer: Tokenizer
) -> Any:
    """An element of `choices`. tokens: those of the text, and a stop id behind it; None: no `logprobs`."""
    logprobs = None
    if tokens is not None:
        logprobs = {
            "tokens": [name(each.token, tokenizer) for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [top_logprobs(each, tokenizer) for each in tokens],
            "text_offset": _offsets([each.token for each in tokens], tokenizer, len(text)),
        }
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def name(token: int, tokenizer: Tokenizer) -> str:
    r"""A token's text; the bytes of a token that is no whole UTF-8 text.

    >>> name(51461, tokenizer)  # of the published vocabulary
    'bytes:\\x20\\xe6\\xa0'
    """
    if token >= tokenizer.n_vocab:
        return f"<row {token}: no token>"
    encoded = tokenizer.decode_bytes([token])
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in encoded)


def top_logprobs(scored: Scored, tokenizer: Tokenizer) -> dict[str, float] | None:
    """The likeliest tokens' names and log-probabilities, and the token itself; None for a text's first token.

    The number of the token itself is its own. Where two tokens have one name, the likelier is there.
    """
    if scored.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in scored.likeliest:
        found.setdefault(name(token, tokenizer), logprob)
    return {**found, name(scored.token, tokenizer): scored.logprob}


def _offsets(tokens: Sequence[int], tokenizer: Tokenizer, length: int) -> list[int]:
    """Where each token begins in a text of so many characters: behind the whole characters before it."""
    from qwen_ref.decoding.streaming import TextStream
    from qwen_ref.generate import Step

    stream, offsets, done = TextStream((), tokenizer), [], 0
    for token in tokens:
        offsets.append(min(done, length))  # a stop text is no part of the text
        done += len(stream.push(Step(token, 0.0)))
    return offsets
