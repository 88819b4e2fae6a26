"""Log-probabilities of given tokens: what perplexity and multiple-choice questions are made of.

A text goes through the model in chunks (prefill.py), and the logits of a few positions at a time exist at
once: those of 32,768 positions over 152,064 tokens would be 20 GB in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_ref.commands.sizes import cache_bytes, resident_bytes
from qwen_ref.config import InputError, whole, whole_numbers
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.generate import checked_ids, in_chunks, prefill
from qwen_ref.model import KVCache, Qwen, ntk_alpha
from qwen_ref.sampling import check_finite

_LOGITS = 2**24  # numbers at a time: 64 MB in float32


class Scores(NamedTuple):
    """Of n tokens, each given all before it: log-probabilities, and whether each was the likeliest; (n)."""

    logprobs: Tensor
    likeliest: Tensor

    def part(self, start: int, stop: int | None = None) -> Scores:
        return Scores(self.logprobs[start:stop], self.likeliest[start:stop])


def score_texts(
    model: Qwen,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int] | None = None,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[Scores]:
    """The scores of each text's tokens from its start on; by default from 1, since nothing precedes token 0.

    Texts of like lengths share a pass, padded on the left. Dynamic NTK's α is that of each whole text.
    advance: called after each chunk with the tokens in it, padding included.
    """
    group, V = model.group, model.config.vocab_size
    with group.together():
        texts = [checked_ids(text, V) for text in texts]
        starts = [1] * len(texts) if starts is None else whole_numbers("starts", starts)
        if len(starts) != len(texts) or not all(1 <= s <= len(t) for s, t in zip(starts, texts, strict=True)):
            raise InputError(f"{starts=} must have an index from 1 to the text's length for each text")
        whole("batch_size", batch_size)
    if group.size > 1:
        group.require_same("these scores", {"a text": texts, "where to start": starts, "batch": batch_size})
    found: list[Scores] = [_none(model)] * len(texts)
    order = sorted(
        (row for row in range(len(texts)) if starts[row] < len(texts[row])), key=lambda row: len(texts[row])
    )
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        scores = _batch(model, [texts[row] for row in rows], [starts[row] for row in rows], advance)
        for row, score in zip(rows, scores, strict=True):
            found[row] = score
    return found


@torch.inference_mode()
def _batch(
    model: Qwen, texts: list[list[int]], starts: list[int], advance: Callable[[int], None] | None
) -> list[Scores]:
    B, longest, device = len(texts), max(map(len, texts)), model.embed.weight.device
    padding = [longest - len(text) for text in texts]
    # Padding is the text's own first token: another one whose values are not finite would spoil the row.
    rows = [text[:1] * pad + text for pad, text in zip(padding, texts, strict=True)]
    ids = torch.tensor(rows, device="cpu")
    mask = (torch.arange(longest, device="cpu") >= torch.tensor(padding, device="cpu")[:, None]).long()
    with model.group.together():
        cache = model.new_cache(B, longest, prompt_length=longest)  # of which the last token is not fed
    # Position t scores the token of position t + 1: so many columns at the left score nothing asked for.
    skipped = min(pad + start for pad, start in zip(padding, starts, strict=True)) - 1
    parts = []
    done = 0
    for states in in_chunks(model, ids[:, :-1], cache, mask[:, :-1]):
        t = states.shape[1]
        wanted = slice(max(skipped - done, 0), t)
        if wanted.start < t:
            targets = ids[:, done + 1 : done + 1 + t]
            parts.append(_judged(model, states[:, wanted], targets[:, wanted].to(device)))
        done += t
        if advance is not None:
            advance(B * t)
    logprobs, likeliest = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))  # (B, columns) each
    return [
        Scores(logprobs[row], likeliest[row]).part(padding[row] + starts[row] - 1 - skipped)
        for row in range(B)
    ]


def score_continuations(
    model: Qwen,
    prompt: Sequence[int],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 8,
    prefix: PrefixCache | None = None,
) -> list[Scores]:
    """The scores of each continuation's tokens behind one prompt, which goes through the model once.

    prefix: where the next prompts begin as this one does, one for all: then each computes what is new of it.
    Dynamic NTK's α is that of prompt and continuation together: the prompt is computed once for each α.
    """
    config, group = model.config, model.group
    with group.together():
        prompt = checked_ids(prompt, config.vocab_size)
        continuations = [whole_numbers("a continuation", each) for each in continuations]
        continuations = [checked_ids(each, config.vocab_size) if each else [] for each in continuations]
        whole("batch_size", batch_size)
    if group.size > 1:
        asked = {"the prompt": prompt, "the continuations": continuations, "batch": batch_size}
        group.require_same("these scores", asked)
    prefix = PrefixCache(model) if prefix is None else prefix
    found: list[Scores] = [_none(model)] * len(continuations)
    by_alpha: dict[int, list[int]] = {}
    for number, each in enumerate(continuations):
        length = len(prompt) + len(each)
        alpha = ntk_alpha(length, config.seq_length) if config.use_dynamic_ntk else 1
        if each:
            by_alpha.setdefault(alpha, []).append(number)
    for numbers in by_alpha.values():
        scores = _behind(model, prompt, [continuations[number] for number in numbers], batch_size, prefix)
        for number, score in zip(numbers, scores, strict=True):
            found[number] = score
    return found


@torch.inference_mode()
def _behind(
    model: Qwen, prompt: list[int], continuations: list[list[int]], batch_size: int, prefix: PrefixCache
) -> list[Scores]:
    P, longest, device = len(prompt), max(map(len, continuations)), model.embed.weight.device
    cache = prefix.rewind(prompt, P + longest - 1, prompt_length=P + longest)
    last = prefill(model, torch.tensor([prompt[cache.length :]], device="cpu"), cache)  # (1, D)
    first_tokens = torch.tensor([[each[0] for each in continuations]], device=device)
    last = last[:, None].expand(-1, len(continuations), -1)
    first = Scores(*(part[0] for part in _judged(model, last, first_tokens)))
    order = sorted(range(len(continuations)), key=lambda number: len(continuations[number]))
    order = [number for number in order if len(continuations[number]) > 1]
    found = [first.part(number, number + 1) for number in range(len(continuations))]
    while order:
        batch = order[: _rows_for(model, cache, longest, batch_size)]
        order = order[len(batch) :]
        rows = cache if len(batch) == 1 else _repeated(model, cache, len(batch), longest)
        room = max(len(continuations[number]) for number in batch)
        # Padded on the right: what stands behind a continuation changes nothing before it.
        ids = torch.tensor(
            [continuations[n] + [0] * (room - len(continuations[n])) for n in batch], device="cpu"
        )
        parts, done = [], 0
        try:
            for states in in_chunks(model, ids[:, :-1], rows):
                done += states.shape[1]
                targets = ids[:, done + 1 - states.shape[1] : done + 1].to(device)
                parts.append(_judged(model, states, targets))
        finally:  # for the next prompt, whatever happened
            cache.length = P
        logprobs, likeliest = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        for row, number in enumerate(batch):
            rest = Scores(logprobs[row], likeliest[row]).part(0, len(continuations[number]) - 1)
            found[number] = Scores(*map(torch.cat, zip(found[number], rest, strict=True)))
    return found


def _rows_for(model: Qwen, cache: KVCache, longest: int, batch_size: int) -> int:
    """How many continuations go through the model together: the copies of the prompt's keys and values take
    no more memory than the weights, and not much of the time to read those.
    """
    if isinstance(cache, Int8Cache):  # copied, they would be rounded once more
        return 1
    ranks, dtype = model.group.size, model.embed.weight.dtype
    copy = cache_bytes(model.config, cache.length + longest, dtype, ranks)
    return max(min(batch_size, resident_bytes(model) // copy), 1)


def _repeated(model: Qwen, cache: KVCache, rows: int, room: int) -> KVCache:
    """A cache of so many rows that begin with what one of a single row holds, whatever its layout."""
    wide = model.new_cache(rows, cache.length + room)
    heads, K = model.config.num_attention_heads // model.group.size, model.config.kv_channels
    nothing = model.embed.weight.new_empty(1, heads, 0, K)
    for layer in range(len(model.blocks)):
        k, v = cache.append(layer, nothing, nothing)  # (1, H, S, K)
        wide.append(layer, k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1))
    wide.length, wide.frequencies = cache.length, cache.frequencies
    return wide


def _judged(model: Qwen, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, t, D) and the tokens that follow (B, t) → their log-probabilities, and if likeliest."""
    group = model.group
    logprobs = states.new_zeros(targets.shape, dtype=torch.promote_types(states.dtype, torch.float32))
    likeliest = torch.zeros_like(targets)
    at = 0
    for some in states.flatten(0, 1).split(max(_LOGITS // model.config.vocab_size, 1)):
        logits = model.lm_head(some, only_rank_0=True)  # (n, V)
        with group.together():
            if logits is not None:
                check_finite(logits)
                wide, these = logits.to(logprobs.dtype), slice(at, at + len(logits))
                tokens = targets.flatten()[these]
                chosen = wide.gather(1, tokens[:, None])[:, 0]
                logprobs.view(-1)[these] = chosen - wide.logsumexp(dim=-1)
                likeliest.view(-1)[these] = logits.argmax(dim=-1) == tokens
                at += len(logits)
    return group.from_rank_0(logprobs), group.from_rank_0(likeliest).bool()


def _none(model: Qwen) -> Scores:
    wide = torch.promote_types(model.embed.weight.dtype, torch.float32)
    device = model.embed.weight.device
    return Scores(torch.empty(0, dtype=wide, device=device), torch.empty(0, dtype=torch.bool, device=device))
