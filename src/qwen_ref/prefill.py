"""A long text through the model, chunk by chunk.

In one pass the activations of all its tokens exist at once: with the 72B's widths half a megabyte for each.
In chunks those of one chunk do, and what grows with the text is the cache alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    """Puts tokens (B, T) behind what the cache holds; yields the states of each chunk (B, up to chunk, D).

    The same computation as model.hidden_states of all of them: queries see what is cached, and dynamic NTK's
    α is that of the whole text. In floating point chunks of another size round differently.
    attention_mask: (B, T), for the padding that an empty cache's rows may begin with. It ends within the
    first chunk, which is as long as that needs.
    progress: called with the tokens done and all of them.
    """
    T, done = input_ids.shape[1], 0
    padding = 0 if attention_mask is None else int((attention_mask == 0).sum(dim=1).max())
    if whole_is_new := cache.length == 0 and cache.prompt_length is None:
        cache.prompt_length = T
    while done < T:
        end = min(max(done + chunk, padding + 1), T)
        first_mask = attention_mask[:, :end] if attention_mask is not None and done == 0 else None
        states = model.hidden_states(input_ids[:, done:end], first_mask, cache)
        if whole_is_new:
            cache.prompt_length = None  # the first call fixed α; the cache may be rewound for another text
        done = end
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
