"""Slips in a layer's matrices: loaded wrongly, transposed, rounded to few bits with a wrong zero point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_ref.config import QwenConfig
from qwen_ref.parity.forward import Forward, How
from qwen_ref.parity.mistakes.grammar import ALL, Slip, known, slip
from qwen_ref.parity.mistakes.norms import neighbours

_NAMES = {
    "qkv": "c_attn",
    "out": "attention's c_proj",
    "gate": "w2 (gate)",
    "up": "w1 (up)",
    "down": "the MLP's c_proj",
}
_OURS = {"qkv": "attn.qkv", "out": "attn.out", "gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"}


def _from_neighbour(parts: str, by: int, bias: bool) -> How:
    """c_attn with some thirds of another layer's weight; bias: and of its bias."""

    def how(run: Forward, right: Callable, x: Tensor, weight: Tensor, own: Tensor) -> Tensor:
        layer = (run.source + by) % run.config.num_hidden_layers

        def mixed(ours: Tensor, name: str) -> Tensor:
            thirds = zip("qkv", ours.chunk(3), run.own(name, layer).chunk(3), strict=True)
            return torch.cat([theirs if part in parts else ours for part, ours, theirs in thirds])

        return right(x, mixed(weight, "attn.qkv.weight"), mixed(own, "attn.qkv.bias") if bias else own)

    return how


def weighed(change: Callable[[Tensor], Tensor], bias: bool = False) -> How:
    """A product with a changed weight; bias: changed likewise."""

    def how(run: Forward, right: Callable, x: Tensor, weight: Tensor, *biases: Tensor) -> Tensor:
        return right(x, change(weight), *(change(b) if bias else b for b in biases))

    return how


def _biased(change: Callable[[Tensor], Tensor]) -> How:
    """c_attn with a changed bias."""
    return lambda run, right, x, weight, bias: right(x, weight, change(bias))


def _third_of_bias(kept: str) -> Callable[[Tensor], Tensor]:
    def change(bias: Tensor) -> Tensor:
        thirds = zip("qkv", bias.chunk(3), strict=True)
        return torch.cat([third if part in kept else torch.zeros_like(third) for part, third in thirds])

    return change


def _reordered(order: str) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        thirds = dict(zip("qkv", weight.chunk(3), strict=True))
        return torch.cat([thirds[part] for part in order])

    return change


def _regrouped(shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.unflatten(0, shape).transpose(0, 1).reshape(weight.shape)


def _squares(weight: Tensor) -> Tensor:
    """Each square of a weight (n·D, D) or (D, n·D) transposed."""
    along = 0 if weight.shape[0] >= weight.shape[1] else 1
    side = weight.shape[1 - along]
    return torch.cat([square.t() for square in weight.split(side, dim=along)], dim=along)


def _third(change: Callable[[Tensor], Tensor], part: str) -> Callable[[Tensor], Tensor]:
    def how(weight: Tensor) -> Tensor:
        thirds = zip("qkv", weight.chunk(3), strict=True)
        return torch.cat([change(third) if name == part else third for name, third in thirds])

    return how


# How weights are rounded to few bits: (groups, their smallest, their largest, steps) → scale and zero point.
_ROUNDINGS: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "symmetric": lambda low, high, n: (torch.maximum(high, -low) * 2 / (n - 1), torch.full_like(low, n // 2)),
    "symmetric, the largest n/2 − 1": lambda low, high, n: (
        torch.maximum(high, -low) / (n // 2 - 1),
        torch.full_like(low, n // 2),
    ),
    "symmetric, the largest n/2": lambda low, high, n: (
        torch.maximum(high, -low) / (n // 2),
        torch.full_like(low, n // 2),
    ),
    "from the smallest to the largest": lambda low, high, n: (
        (high.clamp(min=0) - low.clamp(max=0)) / (n - 1),
        (-low.clamp(max=0) / (high.clamp(min=0) - low.clamp(max=0)).clamp(min=1e-30) * (n - 1)).round(),
    ),
}


def _quantised(bits: int, size: int, by: float, kind: str) -> Callable[[Tensor], Tensor]:
    """Rounded to so many bits in groups of inputs, and its zero point is off."""

    def change(weight: Tensor) -> Tensor:
        groups = weight.float().unflatten(1, (-1, size if weight.shape[1] % size == 0 else weight.shape[1]))
        scale, zero = _ROUNDINGS[kind](groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), 2**bits)
        q = (groups / scale.clamp(min=1e-30)).round().add(zero).clamp(0, 2**bits - 1)
        return ((q - zero - by) * scale).flatten(1).to(weight.dtype)

    return change


def _unpacked(step: str, by: int) -> How:
    """The packed weights of a GPTQ checkpoint with other zero points; others as they are."""

    def how(run: Forward, right: Callable, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        size = run.weights.checkpoint.steps(f"blocks.{run.source}.{_OURS[step]}.weight")
        return right(x, weight if size is None else (weight - by * size).to(weight.dtype), *bias)

    return how


def of_quantising(config: QwenConfig) -> Iterator[Slip]:
    """Zero points off by one, in all matrices and in each: these take the longest, and come last."""
    steps = [*((name, step) for step, name in _NAMES.items()), ("all matrices", " ".join(ALL))]
    for by, off in ((1, "one too high"), (-1, "one too low")):
        for name, step in steps:
            hows = tuple((each, _unpacked(each, by)) for each in step.split())
            yield Slip(f"{name} of the GPTQ checkpoint: zero points {off}", hows, alone=step in _NAMES)
    for bits in (4, 8):
        for size in (32, 64, 128):
            if size > config.hidden_size or (bits == 8 and size != 128):
                continue
            for kind in _ROUNDINGS:
                for by, off in ((1, "one too high"), (-1, "one too low")):
                    for part in "qkv":
                        form = f"quantised to {bits} bits, groups of {size}, {kind}"
                        text = f"the {part} third of c_attn {form}: zero point {off}"
                        how = weighed(_third(_quantised(bits, size, by, kind), part))
                        yield slip(text, "qkv", how, costly=True)
                    for name, step in steps:
                        text = f"{name} quantised to {bits} bits, groups of {size}, {kind}: zero point {off}"
                        how = weighed(_quantised(bits, size, by, kind))
                        yield slip(text, step, how, alone=step in _NAMES, costly=True)


def _half(dim: int, last: bool = False) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        size = weight.shape[dim]
        kept = torch.arange(size) >= size - size // 2 if last else torch.arange(size) < size // 2
        return weight * (kept[:, None] if dim == 0 else kept)

    return change


_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero: never loaded": torch.zeros_like,
    "with its sign turned": lambda w: -w,
    "doubled": lambda w: 2 * w,
    "halved": lambda w: w / 2,
    "rows rolled by one": lambda w: w.roll(1, 0),
    "rows rolled by one, the other way": lambda w: w.roll(-1, 0),
    "columns rolled by one": lambda w: w.roll(1, 1),
    "columns rolled by one, the other way": lambda w: w.roll(-1, 1),
    "rows in reverse order": lambda w: w.flip(0),
    "columns in reverse order": lambda w: w.flip(1),
    "the second half of its rows missing": _half(0),
    "the second half of its columns missing": _half(1),
    "the first half of its rows missing": _half(0, last=True),
    "the first half of its columns missing": _half(1, last=True),
    "halves of its rows swapped": lambda w: torch.cat(w.chunk(2)[::-1]),
    "halves of its columns swapped": lambda w: torch.cat(w.chunk(2, dim=1)[::-1], dim=1),
    "its buffer read as if it were transposed": lambda w: w.t().reshape(w.shape),
    "its buffer read in columns": lambda w: w.reshape(w.shape[1], w.shape[0]).t(),
    "even rows before odd ones": lambda w: torch.cat((w[0::2], w[1::2])),
    "even columns before odd ones": lambda w: torch.cat((w[:, 0::2], w[:, 1::2]), dim=1),
}


_OF_THIRDS = [
    text for text in _WEIGHTS if text.startswith(("rows", "columns", "even rows", "with its", "dou", "hal"))
]


def _said(name: str, what: str) -> str:
    return f"{name} {what}" if what.startswith(("with", "doubled", "halved", "zero")) else f"{name}: {what}"


def of_matrices(config: QwenConfig) -> Iterator[Slip]:
    H, K = config.num_attention_heads, config.kv_channels
    swapped = (
        ("gate", lambda run, right, h, w: right(h, run.own("mlp.up.weight"))),
        ("up", lambda run, right, h, w: right(h, run.own("mlp.gate.weight"))),
    )
    yield Slip("gate and up swapped", swapped, common=True)
    yield known("bias of q, k and v missing", "qkv", _biased(torch.zeros_like))
    for order in ("kqv", "vkq", "qvk", "kvq", "vqk"):
        text = "q, k and v taken from c_attn's {}, {} and {} third".format(*order)
        yield known(text, "qkv", weighed(_reordered(order), bias=True))
    by_head, to_heads = _regrouped((H, 3, K)), _regrouped((3, H, K))
    yield known(
        "rows of c_attn read head by head: q, k and v of head 0, then of head 1, …",
        "qkv",
        weighed(by_head, bias=True),
    )
    yield known(
        "rows of c_attn stored head by head, but read as [q; k; v]", "qkv", weighed(to_heads, bias=True)
    )
    yield known("c_attn transposed: each of its three squares", "qkv", weighed(_squares))
    yield known(
        "c_attn transposed: its buffer read as (D, 3D)",
        "qkv",
        weighed(lambda w: w.reshape(w.shape[1], -1).t()),
    )
    yield known("attention's c_proj transposed", "out", weighed(torch.t))
    for step in ("gate", "up", "down"):
        if config.mlp_width % config.hidden_size == 0:
            yield slip(f"{_NAMES[step]}: each of its squares transposed", step, weighed(_squares))
    for part in "qkv":
        yield slip(f"the {part} third of c_attn transposed", "qkv", weighed(_third(torch.t, part)))
        yield slip(
            f"the {part} third of c_attn zero: never loaded", "qkv", weighed(_third(torch.zeros_like, part))
        )
        for text in _OF_THIRDS:
            changed = weighed(_third(_WEIGHTS[text], part))
            yield slip(_said(f"the {part} third of c_attn", text), "qkv", changed)
        rest = "".join(letter for letter in "qkv" if letter != part)
        yield slip(f"bias of {part} missing", "qkv", _biased(_third_of_bias(rest)))
        yield slip(f"bias of {rest[0]} and {rest[1]} missing", "qkv", _biased(_third_of_bias(part)))
    yield slip("bias of q, k and v added twice", "qkv", _biased(lambda b: 2 * b))
    yield slip("bias of q, k and v with its sign turned", "qkv", _biased(torch.neg))
    yield slip("bias of q, k and v rolled by one", "qkv", _biased(lambda b: b.roll(1)))
    yield slip("bias of q, k and v read head by head", "qkv", _biased(by_head))
    yield slip("rows of c_attn read head by head, its bias as it is", "qkv", weighed(by_head))
    yield slip(
        "bias of the next layer's c_attn",
        "qkv",
        lambda run, right, h, w, b: right(
            h, w, run.own("attn.qkv.bias", (run.source + 1) % config.num_hidden_layers)
        ),
    )
    for by, whose in ((1, "next"), (-1, "previous")):
        text = f"c_attn of the {whose} layer, with its own bias"
        yield slip(text, "qkv", _from_neighbour("qkv", by, False))
        for part in "qkv":
            for bias, rest in ((True, ""), (False, ", with its own bias")):
                text = f"the {part} third of the {whose} layer's c_attn{rest}"
                yield slip(text, "qkv", _from_neighbour(part, by, bias))
    for step, name in _NAMES.items():
        for by, whose in ((1, "next"), (-1, "previous")):
            yield slip(f"{name} of the {whose} layer", step, neighbours(f"{_OURS[step]}.weight", by))
        for text, change in _WEIGHTS.items():
            yield slip(_said(name, text), step, weighed(change))
        yield (
            slip(f"{name} done twice", step, _twice)
            if step == "out"
            else slip(
                f"{name}: its input with its sign turned", step, lambda run, right, x, *rest: right(-x, *rest)
            )
        )
    yield slip("attention's c_proj left out", "out", lambda run, right, h, w: h)
    yield slip(
        "keys before queries: q and k swapped after rotation",
        "attend",
        lambda run, right, q, k, v, mask: right(k, q, v, mask),
    )
    head_order: dict[str, Callable[[Tensor], Tensor]] = {
        "heads in reverse order before c_proj": lambda x: x.flip(1),
        "heads rolled by one before c_proj": lambda x: x.roll(1, 1),
        "halves of the heads swapped before c_proj": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    }
    for text, change in head_order.items():
        yield slip(text, "attend", lambda run, right, *args, change=change: change(right(*args)))
    yield slip(
        "heads and head size exchanged before c_proj",
        "out",
        lambda run, right, h, w: right(h.unflatten(-1, (-1, K)).transpose(-1, -2).flatten(-2), w),
    )
    yield slip(
        "heads not moved back before c_proj: (B, H, T, K) read as (B, T, H · K)",
        "attend",
        _not_moved_back,
        whole=True,
    )


def _twice(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
    return right(right(x, weight), weight)


def _not_moved_back(run: Forward, right: Callable, *inputs: Any) -> Tensor:
    mixed = right(*inputs)  # (B, H, T, K)
    B, H, T, K = mixed.shape
    return mixed.reshape(B, T, H, K).transpose(1, 2)
