"""Choices: roundings that a right port may do. And dtypes other than the declared one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qwen_ref.config import QwenConfig
from qwen_ref.parity.forward import Change, Forward, How
from qwen_ref.parity.mistakes.attention import attention
from qwen_ref.parity.mistakes.grammar import ALL, Mistake, made, rounded_to
from qwen_ref.parity.mistakes.rotation import single_tables


def _int8(over: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """To 8 bits with one scale for these dimensions together: the largest is ±127 steps."""

    def change(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.abs().amax(over, keepdim=True) / 127
        return ((wide / scale.clamp(min=1e-30)).round() * scale).to(x.dtype)

    return change


def _cached(change: Callable[[Tensor], Tensor], decoded: bool = False) -> tuple[tuple[str, How], ...]:
    """Keys and values as a cache keeps them. decoded: the prompt itself is computed with exact ones."""
    if not decoded:
        how: How = lambda run, right, x: change(x)
        return ("keys", how), ("values", how)

    def attend(run: Forward, right: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        exact, P = right(q, k, v, mask), run.prefill_length
        if run.T <= P:
            return exact
        # Heads are the second dimension here, the third for `change`. A step sees its own key exactly.
        k2, v2 = (change(x.transpose(1, 2)).transpose(1, 2) for x in (k, v))
        return torch.cat((exact[:, :, :P], right(q, k2, v2, mask)[:, :, P:]), dim=2)

    return (("attend", attend),)


_ROUNDED = 2**22  # numbers of a matrix


def products_in(dtype: torch.dtype) -> tuple[tuple[str, How], ...]:
    """Only what enters a product with a weight is rounded. Large matrices are left as they are: a published
    checkpoint's are in half precision already, and to round them takes longer than the product.
    """
    narrow = rounded_to(dtype)
    how: How = lambda run, right, x, w, *bias: right(
        narrow(x), w if w.numel() > _ROUNDED else narrow(w), *bias
    )
    return tuple((step, how) for step in (*ALL, "logits"))


def _grouped(x: Tensor, size: int | None) -> Tensor:
    groups = x.unflatten(-1, (-1, size if size and x.shape[-1] % size == 0 else x.shape[-1]))
    return _int8((-1,))(groups).flatten(-2)


def _in_8_bits(size: int | None, inputs: bool) -> tuple[tuple[str, How], ...]:
    """Weights in 8 bits, perhaps also what they multiply. size: of a group with a scale; None: a row."""

    how: How = lambda run, right, x, w, *bias: right(
        _grouped(x, size) if inputs else x, _grouped(w.to(x.dtype), size), *bias
    )
    return tuple((step, how) for step in (*ALL, "logits"))


SINGLE_TABLES = "RoPE's angles, cosines and sines in float32"
CLAMPED = "float16 overflow, clamped to 65504"


def _saturated(run: Forward, right: Callable, *inputs: Any) -> Tensor:
    limit = torch.finfo(torch.float16).max
    x, *rest = inputs
    return right(x.clamp(-limit, limit), *rest).clamp(-limit, limit)


def precisions(config: QwenConfig) -> Iterator[Mistake]:
    for name in ("bfloat16", "float16", "float32"):
        yield Mistake(f"computed in {name}", dtype=name, sized=True)
    steps = (*ALL, "logits", "norm", "attn_norm", "mlp_norm")
    clamped = tuple(Change(step, _saturated) for step in steps)
    yield Mistake(
        CLAMPED,
        (*clamped, Change("embed", lambda run, right, *a: right(*a).clamp(-65504, 65504))),
        dtype="float16",
    )


@functools.cache
def choices() -> tuple[Mistake, ...]:
    """Roundings that a right port may do, one by one and together. Each belongs to the activations' dtype,
    which may be finer than the declared one.
    """
    found: list[Mistake] = []
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    for size, scale in ((None, "a scale a row"), (32, "a scale for 32 numbers")):
        for inputs in (False, True):
            text = f"weights{' and what they multiply' if inputs else ''} in 8 bits, {scale}"
            embedded = Change("embed", lambda run, right, ids, w, size=size: _grouped(right(ids, w), size))
            hows = made(_in_8_bits(size, inputs))
            found.append(Mistake(text, hows, choice=True, costly=True))
            found.append(Mistake(f"{text}, and the embedding", (*hows, embedded), choice=True, costly=True))
    tables = (("rotate_q", single_tables), ("rotate_k", single_tables))
    found.append(Mistake(SINGLE_TABLES, made(tables), choice=True))
    caches: dict[str, tuple[tuple[str, How], ...]] = {"": ()}
    for name, dtype in half.items():
        caches[f"keys and values rounded to {name}"] = _cached(rounded_to(dtype))
        caches[f"keys and values rounded to {name}, read in decode steps only"] = _cached(
            rounded_to(dtype), True
        )
    for over, scale in {(-1,): "a scale a token and head", (-2, -1): "a scale a token"}.items():
        text = f"keys and values rounded to int8, {scale}"
        caches[text] = _cached(_int8(over))
        caches[f"{text}, read in decode steps only"] = _cached(_int8(over), True)
    products = {"": ()} | {f"{name} products": products_in(dtype) for name, dtype in half.items()}
    for name, dtype in half.items():
        head = tuple(each for each in products_in(dtype) if each[0] == "logits")
        found.append(Mistake(f"{name} product of the head", made(head), choice=True))
    mixing: dict[str, tuple[tuple[str, How], ...]] = {"": ()}
    for name, dtype in half.items():
        mixing[f"attention probabilities rounded to {name}"] = (("attend", attention(round_p=dtype)),)
    mixing["queries rounded to float16"] = (("attend", attention(round_q=torch.float16)),)
    for product, a in products.items():
        for cache, b in caches.items():
            for mix, c in mixing.items():
                text = " + ".join(part for part in (product, cache, mix) if part)
                if text:
                    found.append(Mistake(text, made(a, b, c), choice=True))
    narrow = {name: rounded_to(dtype) for name, dtype in half.items()}
    for name, change in narrow.items():
        stream = tuple(
            (step, lambda run, right, *args, change=change: change(right(*args)))
            for step in (
                "attn_norm",
                *ALL,
                "mlp_norm",
                "act",
                "product",
                "attend",
                "norm",
                "rotate_q",
                "rotate_k",
            )
        )
        found.append(
            Mistake(
                f"{name} activations, the residual stream in float32",
                made(stream, products_in(half[name])),
                choice=True,
            )
        )
    return tuple(found)
