"""Slips in attention: its scale, its mask, its softmax, its cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_ref.config import QwenConfig
from qwen_ref.parity.forward import Forward, How, copies
from qwen_ref.parity.mistakes.grammar import Slip, known, slip
from qwen_ref.parity.mistakes.norms import rms
from qwen_ref.parity.mistakes.rotation import counted_logn, decoded, moved


def seen(visible: Callable[[Forward, Tensor, Tensor], Tensor], padded: bool = True) -> How:
    """Attention in which query i sees key j where visible(run, i (T, 1), j (1, T)) is true.

    A query that sees nothing gives 0. padded: keys at padding stay unseen.
    """

    def how(run: Forward, right: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        at = torch.arange(run.T)
        sees = visible(run, at[:, None], at[None])[None, None]
        if padded and run.padding is not None:
            real = at >= run.padding[:, None, None, None]
            sees = copies((sees & real) | (sees & torch.eye(run.T, dtype=torch.bool)), len(q))
        none = ~sees.any(-1, keepdim=True)
        mixed = right(q, k, v, sees | none)
        return mixed.masked_fill(none, 0) if bool(none.any()) else mixed

    return how


def _first(run: Forward) -> int:
    return run.prefill_length


def _seen_in_decode(visible: Callable[[int, Tensor, Tensor], Tensor]) -> How:
    """Decode steps see other keys; visible: (the prompt's length P, i, j)."""
    return seen(
        lambda run, i, j: torch.where(i >= _first(run), visible(_first(run), i, j) & (j <= i), j <= i)
    )


def chunked(size: int) -> dict[str, tuple[tuple[str, How], ...]]:
    """The slips of a prefill in chunks of a size."""
    start = lambda i: i // size * size
    restart = moved(lambda run: torch.where(decoded(run, run.positions), run.positions, run.positions % size))

    def within(run: Forward, i: Tensor, chunk: Tensor) -> Tensor:
        return torch.where(i >= run.prefill_length, True, chunk)

    whole = seen(
        lambda run, i, j: (j <= i) | ((j < (start(i) + size).clamp(max=_first(run))) & (i < _first(run)))
    )
    later = seen(
        lambda run, i, j: (
            (j <= i) | ((i >= size) & (j < (start(i) + size).clamp(max=_first(run))) & (i < _first(run)))
        )
    )
    forgotten = seen(lambda run, i, j: (j <= i) & within(run, i, j >= start(i)))
    top_left = seen(lambda run, i, j: torch.where(i >= _first(run), j <= i, j <= i - start(i)))
    return {
        "a chunk sees all of itself": (("attend", whole),),
        "every chunk but the first sees all of itself": (("attend", later),),
        "positions restart in every chunk": (("rotate_q", restart), ("rotate_k", restart)),
        "the cache is forgotten between chunks": (("attend", forgotten),),
        "causal mask aligned at the top left of a chunk": (("attend", top_left),),
        "positions restart and the cache is forgotten": (
            ("rotate_q", restart),
            ("rotate_k", restart),
            ("attend", forgotten),
        ),
    }


def windowed(size: int) -> tuple[tuple[str, How], ...]:
    """Each query sees the last `size` keys, its own counted."""
    return (("attend", seen(lambda run, i, j: (j <= i) & (j > i - size))),)


def attention(
    weigh: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1),
    score: Callable[[Forward, Tensor], Tensor] = lambda run, s: s,
    round_q: torch.dtype | None = None,
    round_p: torch.dtype | None = None,
) -> How:
    """Attention written out: scores (B, H, T, T) in float32, −∞ where a key is not seen, then `weigh`."""

    def how(run: Forward, right: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if round_q is not None:
            q = q.to(round_q).to(q.dtype)
        scores = q.to(run.wide) @ k.to(run.wide).transpose(-1, -2) * (run.scale or q.shape[-1] ** -0.5)
        if mask is None:
            mask = torch.ones(run.T, run.T, dtype=torch.bool).tril()
        weights = weigh(score(run, scores).masked_fill(~mask, -math.inf))
        if round_p is not None:
            weights = weights.to(round_p)
        return (weights.to(run.wide) @ v.to(run.wide)).to(v.dtype)

    return how


def _scaled(scale: Callable[[QwenConfig], float]) -> How:
    def how(run: Forward, right: Callable, *inputs: Any) -> Tensor:
        before, run.scale = run.scale, scale(run.config)
        mixed = right(*inputs)
        run.scale = before
        return mixed

    return how


def _empty_slot_seen(run: Forward, right: Callable, *inputs: Any) -> Tensor:
    """In decode steps one key and one value more, which are 0, in place of the prompt's last."""

    def one_more(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        steps = (torch.arange(run.T) >= _first(run))[:, None].expand(*mask.shape[:-1], 1)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return right(q, k, v, torch.cat((mask, steps), dim=-1))

    return _seen_in_decode(lambda P, i, j: j != P - 1)(run, one_more, *inputs)


def _over_queries(scores: Tensor) -> Tensor:
    weights = scores.softmax(-2)
    return weights.nan_to_num(0)


def _capped(cap: float) -> Callable[[Forward, Tensor], Tensor]:
    return lambda run, scores: cap * (scores / cap).tanh()


def _alibi(run: Forward, scores: Tensor) -> Tensor:
    H = run.config.num_attention_heads
    slopes = 2.0 ** (-8 / H * torch.arange(1, H + 1, dtype=scores.dtype))
    at = torch.arange(run.T)
    return scores + slopes[:, None, None] * (at[None] - at[:, None])


def _normed_heads(run: Forward, right: Callable, x: Tensor) -> Tensor:
    return rms(x.to(run.wide), run.config.layer_norm_epsilon).to(x.dtype)


def of_attention(config: QwenConfig) -> Iterator[Slip]:
    yield known("no 1/√K in the scores", "attend", _scaled(lambda c: 1.0))
    yield known("scores scaled by 1/√D, not 1/√K", "attend", _scaled(lambda c: c.hidden_size**-0.5))
    scales: dict[str, Callable[[QwenConfig], float]] = {
        "1/K, not 1/√K": lambda c: 1 / c.kv_channels,
        "√K, not 1/√K": lambda c: math.sqrt(c.kv_channels),
        "1/√(K/2), not 1/√K": lambda c: math.sqrt(2 / c.kv_channels),
        "1/√(2K), not 1/√K": lambda c: math.sqrt(0.5 / c.kv_channels),
        "1/√H, not 1/√K": lambda c: c.num_attention_heads**-0.5,
        "1/√K and its sign turned": lambda c: -(c.kv_channels**-0.5),
        "K^(−1/4), not 1/√K": lambda c: c.kv_channels**-0.25,
    }
    for text, scale in scales.items():
        yield slip(f"scores scaled by {text}", "attend", _scaled(scale))
    not_causal = seen(lambda run, i, j: j < torch.where(i < _first(run), _first(run), i + 1))
    yield known("attention not causal", "attend", not_causal, whole=True)
    yield known("padding not masked", "attend", seen(lambda run, i, j: j <= i, padded=False), alone=False)
    masks: dict[str, Callable[[Forward, Tensor, Tensor], Tensor]] = {
        "one key too many: the next position is seen": lambda run, i, j: j <= i + 1,
        "one key too few: its own key is not seen": lambda run, i, j: (j < i) | ((i == 0) & (j == 0)),
        "its own key is not seen, the first position gives 0": lambda run, i, j: j < i,
        "two keys too few": lambda run, i, j: (j < i - 1) | ((i <= 1) & (j == 0)),
        "the first key is not seen": lambda run, i, j: (j <= i) & ((j > 0) | (i == 0)),
        "only its own key is seen": lambda run, i, j: j == i,
        "the mask turned round: later keys are seen, not earlier ones": lambda run, i, j: j >= i,
        "the first key is always the only one": lambda run, i, j: j == 0,
    }
    for text, visible in masks.items():
        future = text.startswith(("one key too many", "the mask"))
        yield slip(f"attention mask: {text}", "attend", seen(visible), whole=future)
    in_steps: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
        "the newest key is not seen": lambda P, i, j: j < i,
        "the key before the newest is not seen": lambda P, i, j: j != i - 1,
        "the newest key overwrites the one before": lambda P, i, j: j != torch.where(i >= P, i - 1, -1),
        "the newest key overwrites the prompt's last": lambda P, i, j: j != P - 1,
        "each new key overwrites the prompt's last": lambda P, i, j: (j < P - 1) | (j == i),
        "each new key overwrites the last decoded one": lambda P, i, j: (j < P) | (j == i),
        "the first key is overwritten": lambda P, i, j: j != 0,
        "only the prompt's keys are seen": lambda P, i, j: j < P,
        "only the prompt's keys and its own are seen": lambda P, i, j: (j < P) | (j == i),
        "the prompt is forgotten": lambda P, i, j: j >= P,
        "only its own key is seen": lambda P, i, j: j == i,
        "only the first key is seen: causal mask aligned at the top left": lambda P, i, j: j == 0,
        "the prompt's last key is not seen": lambda P, i, j: j != P - 1,
        "the first decoded key is not seen": lambda P, i, j: (j != P) | (i == P),
        "the newest two keys are not seen": lambda P, i, j: j < i - 1,
    }
    for text, in_decode in in_steps.items():
        if text != "the newest key overwrites the one before":
            yield slip(f"in decode steps {text}", "attend", _seen_in_decode(in_decode))
    yield slip(
        "in decode steps the newest key overwrites the prompt's last, and an empty slot is seen",
        "attend",
        _empty_slot_seen,
    )
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax with base 2": lambda s: (s * math.log(2)).softmax(-1),
        "softmax with one more in the denominator": lambda s: (
            s - torch.logaddexp(s.logsumexp(-1, keepdim=True), s.new_zeros(()))
        ).exp(),
        "sigmoid for softmax": lambda s: s.sigmoid(),
        "exp without the softmax's denominator": lambda s: s.exp(),
        "no softmax": lambda s: s.masked_fill(s == -math.inf, 0),
        "ReLU for softmax": lambda s: s.relu(),
        "softmax of the scores' absolute values": lambda s: (
            s.abs().masked_fill(s == -math.inf, -math.inf).softmax(-1)
        ),
        "softmax done twice": lambda s: s.softmax(-1).masked_fill(s == -math.inf, -math.inf).softmax(-1),
        "log-softmax for softmax": lambda s: s.log_softmax(-1).masked_fill(s == -math.inf, 0),
        "the mean of the values: no scores": lambda s: (s * 0).nan_to_num(nan=-math.inf).softmax(-1),
        "only the key with the highest score": lambda s: F.one_hot(s.argmax(-1), s.shape[-1]).to(s.dtype),
        "masked scores 0, not −∞": lambda s: s.masked_fill(s == -math.inf, 0).softmax(-1),
    }
    for text, weigh in functions.items():
        yield slip(f"attention: {text}", "attend", attention(weigh), whole=text.startswith("masked"))
    yield slip("attention: softmax over the queries", "attend", attention(_over_queries), whole=True)
    yield slip("attention: ALiBi as well", "attend", attention(score=_alibi))
    for cap in (30, 50):
        yield slip(
            f"attention: scores capped, {cap} · tanh(score / {cap})", "attend", attention(score=_capped(cap))
        )
    yield slip("q and k normalised before rotation", "q k", _normed_heads)
    yield slip(
        "q and k normalised after rotation",
        "rotate_q rotate_k",
        lambda run, right, *args: _normed_heads(run, right, right(*args)),
    )
    if config.num_attention_heads % 2 == 0:
        grouped: How = lambda run, right, x: x[:, :, 0::2].repeat_interleave(2, dim=2)
        yield slip("keys and values grouped: two heads share those of the first", "keys values", grouped)
        yield slip(
            "keys and values grouped: the first half of the heads, repeated",
            "keys values",
            lambda run, right, x: x[:, :, : x.shape[2] // 2].repeat(1, 1, 2, 1),
        )
    yield slip("keys of the next head", "keys", lambda run, right, k: k.roll(-1, 2))
    yield slip("values of the next head", "values", lambda run, right, v: v.roll(-1, 2))
    yield slip("values in place of keys", "keys", lambda run, right, k: run.given["v"][0])
    yield slip("keys in place of values", "values", lambda run, right, v: run.given["k"][0])
    yield slip("rotated keys in place of values", "values", lambda run, right, v: run.given["keys"][0])
    yield slip("values one position late", "values", lambda run, right, v: v.roll(1, 1))
    columns: How = lambda run, right, x, cos, sin: right(x, *run.tables(torch.arange(run.T)[None]))
    yield Slip(
        "padding counted in positions",
        (("rotate_q", columns), ("rotate_k", columns), ("scale_q", counted_logn)),
        common=True,
        alone=False,
    )
