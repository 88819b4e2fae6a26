"""Mistakes outside the layers: the embedding, the output head, the list of layers, the ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qwen_ref import model
from qwen_ref.config import QwenConfig
from qwen_ref.parity.forward import Change, Forward, How
from qwen_ref.parity.mistakes.attention import seen
from qwen_ref.parity.mistakes.grammar import Mistake
from qwen_ref.parity.mistakes.norms import NORMS, PLACES, rms
from qwen_ref.parity.mistakes.rotation import counted_logn


def _change(text: str, step: str, how: How, **options: Any) -> Mistake:
    return Mistake(text, (Change(step, how),), **options)


def outside(config: QwenConfig) -> Iterator[Mistake]:
    D, L = config.hidden_size, config.num_hidden_layers
    if L > 1:
        for text, kept in (("last layer dropped", range(L - 1)), ("first layer dropped", range(1, L))):
            yield _change(text, "layers", lambda run, right, layers, kept=kept: list(kept), common=True)
    yield _change(
        "head tied: logits with the embedding's matrix",
        "logits",
        lambda run, right, h, w: right(h, run.weights("embed.weight")),
        common=True,
    )
    yield _change(
        "embedding tied: ids looked up in the head's matrix",
        "embed",
        lambda run, right, ids, w: right(ids, run.weights("lm_head.weight")),
        common=True,
    )
    yield _change("no final norm", "norm", lambda run, right, x, w: x, common=True)
    for text, how in NORMS.items():
        if text != "left out":
            yield _change(f"final norm: {text}", "norm", how)
    for name in ("attn_norm", "mlp_norm"):
        for layer in (0, config.num_hidden_layers - 1):
            yield _change(
                f"final norm with the weight of layer {layer}'s {PLACES[name]}",
                "norm",
                lambda run, right, x, w, name=name, layer=layer: right(x, run.own(f"{name}.weight", layer)),
            )
    V = config.vocab_size
    for text, factor in {"√D": D**0.5, "1/√D": D**-0.5, "2": 2.0, "½": 0.5, "√2": 2**0.5, "−1": -1.0}.items():
        yield _change(
            f"embedding times {text}",
            "embed",
            lambda run, right, ids, w, factor=factor: right(ids, w) * torch.tensor(factor, dtype=run.dtype),
        )
    for by, text in ((1, "one further on"), (-1, "one before"), (2, "two further on")):
        yield _change(
            f"embedding rows shifted: each id has the row {text}",
            "embed",
            lambda run, right, ids, w, by=by: right((ids + by) % V, w),
        )
        yield _change(
            f"head rows shifted: each logit has the row {text}",
            "logits",
            lambda run, right, h, w, by=by: right(h, w).roll(-by, -1),
        )
    for end, fill in (("a row of zeros", torch.zeros_like), ("the last row again", lambda row: row)):
        yield _change(
            f"head rows shifted: each logit has the row one further on, the last one {end}",
            "logits",
            lambda run, right, h, w, fill=fill: right(h, torch.cat((w[1:], fill(w[-1:])))),
        )
        first = end.replace("last", "first")
        yield _change(
            f"head rows shifted: each logit has the row one before, the first one {first}",
            "logits",
            lambda run, right, h, w, fill=fill: right(h, torch.cat((fill(w[:1]), w[:-1]))),
        )
    for by, text in ((1, "one further on"), (-1, "one before")):
        yield _change(
            f"embedding rows shifted: each id has the row {text}, at the end its own",
            "embed",
            lambda run, right, ids, w, by=by: right((ids + by).clamp(0, V - 1), w),
        )
    yield _change(
        "embedding normalised",
        "embed",
        lambda run, right, ids, w: rms(right(ids, w).to(run.wide), config.layer_norm_epsilon).to(run.dtype),
    )
    yield _change(
        "embedding normalised, with layer 0's ln_1",
        "embed",
        lambda run, right, ids, w: run.norm(right(ids, w), run.own("attn_norm.weight", 0)),
    )
    yield _change(
        "embedding: columns rolled by one", "embed", lambda run, right, ids, w: right(ids, w).roll(1, -1)
    )
    yield _change(
        "embedding: sine and cosine of the position added",
        "embed",
        lambda run, right, ids, w: right(ids, w) + _sinusoids(run, D),
    )
    yield _change("head: columns rolled by one", "logits", lambda run, right, h, w: right(h.roll(-1, -1), w))
    yield _change(
        "head: input with channels in reverse order", "logits", lambda run, right, h, w: right(h.flip(-1), w)
    )
    yield _change(
        "head: the second half of its columns missing",
        "logits",
        lambda run, right, h, w: right(h * (torch.arange(h.shape[-1]) < h.shape[-1] // 2), w),
    )
    yield _change(
        "head reads the last layer's ln_2 output, not the final norm's",
        "norm",
        lambda run, right, x, w: run.given["mlp_norm"][0],
    )


def _sinusoids(run: Forward, D: int) -> Tensor:
    angles = run.positions[..., None] / 1e4 ** (torch.arange(0, D, 2, dtype=run.wide) / D)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(run.dtype)


def layer_lists(config: QwenConfig) -> Iterator[Mistake]:
    """Layers left out, run twice, in another order, one in place of another."""
    L = config.num_hidden_layers
    if L == 1:
        return

    def listed(text: str, order: list[int], **options: Any) -> Mistake:
        return _change(text, "layers", lambda run, right, layers: order, **options)

    right = list(range(L))
    yield listed("layers in reverse order", right[::-1])
    yield listed("layers rolled by one", right[1:] + right[:1])
    yield listed("all layers run twice", right * 2)
    for i in right[1:-1]:
        yield listed(f"layer {i} dropped", right[:i] + right[i + 1 :])
    for i in right:
        yield listed(f"layer {i} run twice", right[: i + 1] + right[i:])
    for i in right:
        for j in right:
            if i < j:
                order = right.copy()
                order[i], order[j] = j, i
                yield listed(f"layers {i} and {j} swapped", order)
            if i != j and (L <= 12 or abs(i - j) == 1 or i == 0):
                order = right.copy()
                order[j] = i
                yield listed(f"layer {i} loaded in place of layer {j}", order)
    for i in range(2, L - 1):
        yield listed(f"layers from {i} on missing", right[:i])
    if L % 2 == 0 and L > 2:
        yield listed("halves of the layers swapped", right[L // 2 :] + right[: L // 2])
        yield listed("even layers before odd ones", right[0::2] + right[1::2])


def inputs(config: QwenConfig) -> Iterator[Mistake]:
    orders: dict[str, Callable[[Tensor], Tensor]] = {
        "ids in reverse order": lambda ids: ids.flip(1),
        "first id dropped, the last one repeated": lambda ids: torch.cat((ids[:, 1:], ids[:, -1:]), dim=1),
        "first id dropped, the rest moved up round the end": lambda ids: ids.roll(-1, 1),
        "last id dropped, the first one repeated": lambda ids: torch.cat((ids[:, :1], ids[:, :-1]), dim=1),
        "ids rolled by one": lambda ids: ids.roll(1, 1),
    }
    for text, order in orders.items():
        yield _change(text, "ids", lambda run, right, ids, order=order: order(ids), whole=True)
    yield Mistake(
        "attention_mask ignored: padding seen and counted",
        common=True,
        changes=(
            Change("rotate_q", _ignored),
            Change("rotate_k", _ignored),
            Change("scale_q", counted_logn),
            Change("attend", seen(lambda run, i, j: j <= i, padded=False)),
        ),
    )
    if config.use_dynamic_ntk:
        text = "NTK's α recomputed at every decode step, all keys with it"
        yield Mistake(text, uncached=True, common=True)


def _ignored(run: Forward, right: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    frequencies = model.rotary_frequencies(run.config, [run.prompt_length], run.wide)
    return right(x, *run.tables(torch.arange(run.T)[None], frequencies))
