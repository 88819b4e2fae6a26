"""Log-probabilities of given tokens: what perplexity and multiple-choice questions are made of.

A text goes through the model in chunks (generate.in_chunks). Logits are made for a few positions at a time:
those of 32,768 positions over 152,064 tokens would take 20 GB in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_ref.commands.sizes import cache_bytes, resident_bytes
from qwen_ref.config import InputError, shown, whole, whole_numbers
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.generate import checked_ids, in_chunks, prefill
from qwen_ref.model import KVCache, Qwen, ntk_alpha
from qwen_ref.sampling import check_finite

_LOGITS = 2**24  # numbers at a time: 64 MB in float32


class Scores(NamedTuple):
    """The scores of n tokens, each given all tokens before it."""

    logprobs: Tensor  # (n)
    likeliest: Tensor  # (n), bool: whether the token was the likeliest

    def part(self, start: int, stop: int | None = None) -> Scores:
        return Scores(self.logprobs[start:stop], self.likeliest[start:stop])


def score(
    model: Qwen,
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    continuations: Sequence[Sequence[int]] | None = None,
    batch_size: int = 8,
) -> Tensor | list[Tensor]:
    """Log-probabilities of the tokens of a text, of several texts, or of continuations of one prompt.

    ids: a text of T tokens → (T − 1): of each token but the first, given all before it. Several texts of any
    lengths → a list of such tensors. A tensor (B, T) → (B, T − 1).
    continuations: what may follow the prompt `ids` → a list with a tensor for each continuation: of its
    tokens, given the prompt and the tokens before them. The prompt goes through the model once.
    batch_size: how many texts or continuations share a pass. It changes the numbers by rounding alone.
    float32, or float64 in a float64 model. Dynamic NTK's α is that of each whole text, prompt and
    continuation together. Several ranks call it alike, and all get the result.
    Raises ValueError for ids that are no text, ids outside the vocabulary, and logits that are not finite.

    >>> score(model, tokenizer.encode("冰岛的首都是雷克雅未克")).sum()  # log p, given the first token
    >>> yes, no = score(model, prompt, [tokenizer.encode(" yes"), tokenizer.encode(" no")])
    >>> yes.sum() > no.sum()
    """
    dimensions = 1 + any(map(_is_list, ids)) if isinstance(ids, Sequence) else getattr(ids, "ndim", 0)
    right = dimensions in (1, 2) and len(ids) > 0 and not isinstance(ids, str | bytes)
    if not right or (dimensions == 2 and not all(map(_is_list, ids))):
        raise InputError(f"ids must be the tokens of a text, or of several; they are {shown(ids)}")
    given: Any = ids  # of a type that mypy cannot follow
    texts = [list(text) for text in (given if dimensions == 2 else [given])]
    if continuations is not None:
        if dimensions == 2:
            raise InputError("continuations are those of one prompt: ids must be a single list of token ids")
        several = isinstance(continuations, Iterable) and not isinstance(continuations, str | bytes)
        if not several or not all(map(_is_list, continuations := list(continuations))):
            raise InputError(f"continuations must be lists of token ids; they are {shown(continuations)}")
        # Tensors made in inference mode cannot carry gradients; a copy can.
        scores = score_continuations(model, texts[0], continuations, batch_size)
        return [each.logprobs.clone() for each in scores]
    found = [each.logprobs.clone() for each in score_texts(model, texts, batch_size=batch_size)]
    if dimensions == 1:
        return found[0]
    return torch.stack(found) if isinstance(ids, torch.Tensor) else found


def _is_list(ids: object) -> bool:
    text = isinstance(ids, str | bytes)
    return (isinstance(ids, Sequence) and not text) or getattr(ids, "ndim", 0) > 0


def score_texts(
    model: Qwen,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int] | None = None,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[Scores]:
    """The scores of each text's tokens from its start on; by default from 1, since nothing precedes token 0.

    Texts of similar lengths share a pass, padded on the left. Dynamic NTK's α is that of each whole text.
    advance: called after each chunk with the number of its tokens, padding included.
    """
    group, V = model.group, model.config.vocab_size
    with group.together():
        ids = [checked_ids(text, V) for text in texts]
        starts = [1] * len(ids) if starts is None else whole_numbers("starts", starts)
        if len(starts) != len(ids) or not all(1 <= s <= len(t) for s, t in zip(starts, ids, strict=True)):
            raise InputError(f"{starts=} must have an index from 1 to the text's length for each text")
        whole("batch_size", batch_size)
    if group.size > 1:
        group.require_same("these scores", {"a text": ids, "where to start": starts, "batch": batch_size})
    found: list[Scores] = [_none(model)] * len(ids)
    wanted = [row for row in range(len(ids)) if starts[row] < len(ids[row])]
    order = sorted(wanted, key=lambda row: len(ids[row]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        scores = _batch(model, [ids[row] for row in rows], [starts[row] for row in rows], advance)
        for row, score in zip(rows, scores, strict=True):
            found[row] = score
    return found


@torch.inference_mode()
def _batch(
    model: Qwen, texts: list[list[int]], starts: list[int], advance: Callable[[int], None] | None
) -> list[Scores]:
    B, longest = len(texts), max(map(len, texts))
    padding = [longest - len(text) for text in texts]
    # Padding is the text's own first token. Any other could have values that are not finite, which would
    # make the row NaN.
    rows = [text[:1] * pad + text for pad, text in zip(padding, texts, strict=True)]
    ids = torch.tensor(rows, device="cpu")
    mask = (torch.arange(longest, device="cpu") >= torch.tensor(padding, device="cpu")[:, None]).long()
    with model.group.together():
        cache = model.new_cache(B, longest, prompt_length=longest)  # the last token is scored, not fed
    # Position t scores the token of position t + 1. The first columns may score nothing that is asked for.
    skipped = min(pad + start for pad, start in zip(padding, starts, strict=True)) - 1
    logprobs, likeliest = _columns(model, ids, cache, mask[:, :-1], skipped, advance)
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

    prefix: a PrefixCache for prompts that begin alike, the same one for all. Each prompt then computes only
    what the one before did not. Dynamic NTK's α is that of prompt and continuation together: the prompt
    is computed once for each α.
    """
    config, group = model.config, model.group
    with group.together():
        prompt = checked_ids(prompt, config.vocab_size)
        texts = [whole_numbers("a continuation", each) for each in continuations]
        texts = [checked_ids(each, config.vocab_size) if each else [] for each in texts]
        whole("batch_size", batch_size)
    if group.size > 1:
        asked = {"the prompt": prompt, "the continuations": texts, "batch": batch_size}
        group.require_same("these scores", asked)
    prefix = PrefixCache(model) if prefix is None else prefix
    found: list[Scores] = [_none(model)] * len(texts)
    by_alpha: dict[int, list[int]] = {}
    for number, each in enumerate(texts):
        length = len(prompt) + len(each)
        alpha = ntk_alpha(length, config.seq_length) if config.use_dynamic_ntk else 1
        if each:
            by_alpha.setdefault(alpha, []).append(number)
    for numbers in by_alpha.values():
        scores = _behind(model, prompt, [texts[number] for number in numbers], batch_size, prefix)
        for number, score in zip(numbers, scores, strict=True):
            found[number] = score
    return found


@torch.inference_mode()
def _behind(
    model: Qwen, prompt: list[int], continuations: list[list[int]], batch_size: int, prefix: PrefixCache
) -> list[Scores]:
    P, longest, device = len(prompt), max(map(len, continuations)), model.embed.weight.device
    cache = prefix.rewind(prompt, P + longest - 1, prompt_length=P + longest)
    prefix.make_room(P + longest - 1)
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
        # Padded on the right: padding behind a continuation changes nothing before it.
        ids = torch.tensor(
            [continuations[n] + [0] * (room - len(continuations[n])) for n in batch], device="cpu"
        )
        try:
            logprobs, likeliest = _columns(model, ids, rows)
        finally:  # for the next prompt, whatever happened
            cache.length = P
        for row, number in enumerate(batch):
            rest = Scores(logprobs[row], likeliest[row]).part(0, len(continuations[number]) - 1)
            found[number] = Scores(*map(torch.cat, zip(found[number], rest, strict=True)))
    return found


def _rows_for(model: Qwen, cache: KVCache, longest: int, batch_size: int) -> int:
    """How many continuations go through the model together: the copies of the prompt's keys and values may
    take as much memory as the weights, no more.
    """
    if isinstance(cache, Int8Cache):  # a copy would be rounded once more
        return 1
    ranks, dtype = model.group.size, model.embed.weight.dtype
    copy = cache_bytes(model.config, cache.length + longest, dtype, ranks)
    return max(min(batch_size, resident_bytes(model) // copy), 1)


def _repeated(model: Qwen, cache: KVCache, rows: int, room: int) -> KVCache:
    """A cache of several rows, each with the keys and values of a cache of one row, of any layout."""
    wide = model.new_cache(rows, cache.length + room)
    heads, K = model.config.num_attention_heads // model.group.size, model.config.kv_channels
    nothing = model.embed.weight.new_empty(1, heads, 0, K)
    for layer in range(len(model.blocks)):
        k, v = cache.append(layer, nothing, nothing)  # (1, H, S, K)
        wide.append(layer, k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1))
    wide.length, wide.frequencies = cache.length, cache.frequencies
    return wide


def _columns(
    model: Qwen,
    ids: Tensor,
    cache: KVCache,
    mask: Tensor | None = None,
    skipped: int = 0,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids (B, T) go through the model, all but the last column → log-probabilities (B, T − 1 − skipped) of
    the columns after the first, and if likeliest. The first `skipped` of them are not wanted.
    """
    parts, done = [], 0
    for states in in_chunks(model, ids[:, :-1], cache, mask):
        t = states.shape[1]
        wanted = slice(max(skipped - done, 0), t)
        if wanted.start < t:
            targets = ids[:, done + 1 : done + 1 + t]
            parts.append(_judged(model, states[:, wanted], targets[:, wanted].to(states.device)))
        done += t
        if advance is not None:
            advance(len(ids) * t)
    logprobs, likeliest = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return logprobs, likeliest


def _judged(model: Qwen, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, t, D) and the tokens that follow (B, t) → log-probabilities (B, t), and if likeliest."""
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
