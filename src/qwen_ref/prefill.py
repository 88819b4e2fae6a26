"""A long text through the model, chunk by chunk.

In one pass the activations of all its tokens exist at once: with the 72B's widths half a megabyte for each.
In chunks those of one chunk do, and what grows with the text is the cache alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qwen_ref.model import KVCache, Qwen

CHUNK = 1024  # tokens: enough for products at full speed, few enough to be small beside weights and cache


def in_chunks(
    model: Qwen,
    input_ids: Tensor,
    cache: KVCache,
    attention_mask: Tensor | None = None,
    *,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Puts tokens (B, T) behind what the cache holds; yields the states of each chunk, (B, t, D).

    The same computation as model.hidden_states of all of them: queries see what is cached, and dynamic NTK's
    α is that of the whole text. In floating point chunks of another size round differently.
    attention_mask: (B, T), for the padding that an empty cache's rows may begin with.
    chunk: tokens of all rows together, at least one of each.
    progress: called with the tokens of a row that are done and all of them.
    """
    (B, T), done = input_ids.shape, 0
    if attention_mask is None and cache.length == 0:
        attention_mask = torch.ones_like(input_ids)  # it also says how long the whole text is, which fixes α
    while done < T:
        end = min(done + max(chunk // B, 1), T)
        states = model.hidden_states(input_ids[:, done:end], attention_mask, cache)
        attention_mask, done = None, end
        if progress is not None:
            progress(done, T)
        yield states


def prefill(
    model: Qwen,
    input_ids: Tensor,
    cache: KVCache,
    attention_mask: Tensor | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """in_chunks, for what the cache then holds; the states of the last position (B, D).

    >>> last = prefill(model, input_ids, model.new_cache(1, 32768))
    >>> model.lm_head(last)  # (B, V): the logits of the next token
    """
    for states in in_chunks(model, input_ids, cache, attention_mask, progress=progress):
        last = states[:, -1]
    return last
