"""Slips in the MLP and in the residual stream, and a few that can be made at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_ref.config import QwenConfig
from qwen_ref.parity.forward import Forward, How
from qwen_ref.parity.mistakes.grammar import Slip, slip

# MLP

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "GELU": (F.gelu, True),
    "GELU (tanh)": (lambda x: F.gelu(x, approximate="tanh"), True),
    "ReLU": (F.relu, True),
    "quick GELU, x · σ(1.702 x),": (lambda x: x * torch.sigmoid(1.702 * x), False),
    "ReLU²": (lambda x: F.relu(x).square(), False),
    "sigmoid": (torch.sigmoid, False),
    "tanh": (torch.tanh, False),
    "mish": (F.mish, False),
    "hard swish": (F.hardswish, False),
    "ELU": (F.elu, False),
    "SELU": (F.selu, False),
    "softplus": (F.softplus, False),
    "leaky ReLU": (F.leaky_relu, False),
    "nothing": (lambda x: x, False),
    "SiLU done twice": (lambda x: F.silu(F.silu(x)), False),
    "SiLU of −x": (lambda x: F.silu(-x), False),
    "−SiLU": (lambda x: -F.silu(x), False),
    "x · σ(2x)": (lambda x: x * torch.sigmoid(2 * x), False),
    "x · tanh(x)": (lambda x: x * torch.tanh(x), False),
    "softsign": (F.softsign, False),
    "hard sigmoid": (F.hardsigmoid, False),
    "SiLU cut at 7": (lambda x: F.silu(x.clamp(max=7)), False),
}


def of_mlp(config: QwenConfig) -> Iterator[Slip]:
    for name, (function, common) in _ACTIVATIONS.items():
        how: How = lambda run, right, gate, function=function: function(gate)
        yield slip(f"{name} for SiLU", "act", how, common=common)
    products: dict[str, How] = {
        "gate and up added, not multiplied": lambda run, right, up, act: up + act,
        "gate and up added, without SiLU": lambda run, right, up, act: up + run.given["act"][0],
        "the activation after the product, silu(gate · up)": lambda run, right, up, act: F.silu(
            up * run.given["act"][0]
        ),
        "up left out: silu(gate) alone": lambda run, right, up, act: act,
        "gate left out: up alone": lambda run, right, up, act: up,
        "gate twice: gate · silu(gate)": lambda run, right, up, act: run.given["act"][0] * act,
        "up activated as well: silu(up) · silu(gate)": lambda run, right, up, act: F.silu(up) * act,
        "up added after the product, (up + 1) · silu(gate)": lambda run, right, up, act: (up + 1) * act,
        "the second half of the MLP's channels missing": lambda run, right, up, act: (
            right(up, act) * (torch.arange(up.shape[-1]) < up.shape[-1] // 2)
        ),
        "halves of the MLP's channels swapped": lambda run, right, up, act: torch.cat(
            right(up, act).chunk(2, dim=-1)[::-1], dim=-1
        ),
        "channels of up in reverse order": lambda run, right, up, act: right(up.flip(-1), act),
        "channels of up rolled by one": lambda run, right, up, act: right(up.roll(1, -1), act),
        "squared": lambda run, right, up, act: right(up, act).square(),
    }
    for text, how in products.items():
        yield slip(f"MLP: {text}", "product", how)
    both: How = lambda run, right, h, w: right(h, run.own("mlp.gate.weight"))
    yield slip("MLP: up with gate's matrix", "up", both)
    yield slip(
        "MLP: gate with up's matrix", "gate", lambda run, right, h, w: right(h, run.own("mlp.up.weight"))
    )
    stream: How = lambda run, right, h, w: right(run.given["mlp_norm"][0], w)
    yield slip("MLP: it reads the residual stream, not ln_2's output", "gate up", stream)
    yield slip("MLP: gate reads the residual stream, not ln_2's output", "gate", stream)
    yield slip("MLP: up reads the residual stream, not ln_2's output", "up", stream)
    yield slip(
        "MLP: it reads ln_1's output, not ln_2's",
        "gate up",
        lambda run, right, h, w: right(run.given["qkv"][0], w),
    )


# Residual stream


def _renormed(weight: str) -> How:
    """Adds the normalised result."""
    return lambda run, right, x, y: right(x, run.norm(y, run.own(weight)))


def of_residual(config: QwenConfig) -> Iterator[Slip]:
    for step, place, norm, first in (
        ("attn_add", "attention", "attn_norm", "qkv"),
        ("mlp_add", "the MLP", "mlp_norm", "gate"),
    ):
        adds: dict[str, How] = {
            "left out": lambda run, right, x, y: x,
            "added twice": lambda run, right, x, y: right(right(x, y), y),
            "added with its sign turned": lambda run, right, x, y: x - y,
            "halved": lambda run, right, x, y: right(x, y / 2),
            "without the residual": lambda run, right, x, y: y,
            "with the residual doubled": lambda run, right, x, y: right(x + x, y),
            "with the residual halved": lambda run, right, x, y: right(x / 2, y),
            "with the sum halved": lambda run, right, x, y: right(x, y) / 2,
            "with the sum divided by √2": lambda run, right, x, y: right(x, y) / math.sqrt(2),
            "added to the norm's output, not to its input": lambda run, right, x, y, first=first: right(
                run.given[first][0], y
            ),
            "divided by √(2 · layers)": lambda run, right, x, y: right(
                x, y / math.sqrt(2 * config.num_hidden_layers)
            ),
            "divided by the layer's number": lambda run, right, x, y: right(x, y / (run.layer + 1)),
            "multiplied, not added": lambda run, right, x, y: x * y,
        }
        for text, how in adds.items():
            yield slip(f"{place} {text}", step, how)
        yield slip(f"{place}: its result normalised before it is added", step, _renormed(f"{norm}.weight"))
        # Post-norm: the norm after, not before.
        yield Slip(
            f"{place}: its norm after it, not before",
            ((norm, lambda run, right, x, w: x), (step, _renormed(f"{norm}.weight"))),
        )
        yield Slip(
            f"{place}: its norm after the residual sum, not before",
            (
                (norm, lambda run, right, x, w: x),
                (step, lambda run, right, x, y, norm=norm: run.norm(right(x, y), run.own(f"{norm}.weight"))),
            ),
        )
    yield slip(
        "attention: its result normalised by ln_2 before it is added",
        "attn_add",
        _renormed("mlp_norm.weight"),
    )
    yield slip(
        "attention and MLP side by side: both read the layer's input",
        "mlp_norm",
        lambda run, right, x, w: right(run.x, w),
    )
    yield slip(
        "attention and MLP side by side, with ln_1 for both",
        "mlp_norm",
        lambda run, right, x, w: right(run.x, run.own("attn_norm.weight")),
    )
    yield slip(
        "the MLP added to the stream before attention: attention's part is lost",
        "mlp_add",
        lambda run, right, x, y: right(run.x, y),
    )
    yield slip("the MLP done twice, with ln_2 and the residual sum", "mlp_add", _again)
    yield Slip(
        "attention and the MLP added to their norms' outputs, not to the inputs of these",
        (
            ("attn_add", lambda run, right, x, y: right(run.given["qkv"][0], y)),
            ("mlp_add", lambda run, right, x, y: right(run.given["gate"][0], y)),
        ),
    )
    yield slip(
        "the layer's input added once more at its end",
        "mlp_add",
        lambda run, right, x, y: right(x, y) + run.x,
    )
    yield Slip(
        "both norms after, not before: post-norm",
        (
            ("attn_norm", lambda run, right, x, w: x),
            ("mlp_norm", lambda run, right, x, w: x),
            ("attn_add", lambda run, right, x, y: run.norm(right(x, y), run.own("attn_norm.weight"))),
            ("mlp_add", lambda run, right, x, y: run.norm(right(x, y), run.own("mlp_norm.weight"))),
        ),
    )
    yield Slip(
        "both results normalised before they are added",
        (
            ("attn_norm", lambda run, right, x, w: x),
            ("mlp_norm", lambda run, right, x, w: x),
            ("attn_add", _renormed("attn_norm.weight")),
            ("mlp_add", _renormed("mlp_norm.weight")),
        ),
    )


def _again(run: Forward, right: Callable, x: Tensor, y: Tensor) -> Tensor:
    x = right(x, y)
    h = run.norm(x, run.own("mlp_norm.weight"))
    gate, up = (run.linear(h, run.own(f"mlp.{name}.weight")) for name in ("gate", "up"))
    return right(x, run.linear(up * F.silu(gate), run.own("mlp.down.weight")))


# The same few slips at every step

_ANYWHERE = {
    "attn_norm": "ln_1's output",
    "q": "q",
    "k": "k",
    "v": "v",
    "rotate_q": "q after rotation",
    "rotate_k": "k after rotation",
    "attend": "attention's mixed values",
    "out": "attention's output",
    "mlp_norm": "ln_2's output",
    "gate": "gate",
    "up": "up",
    "act": "the activated gate",
    "product": "up · silu(gate)",
    "down": "the MLP's output",
}
_GENERIC: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "doubled": lambda x: 2 * x,
    "halved": lambda x: x / 2,
    "with its sign turned": lambda x: -x,
    "with channels rolled by one": lambda x: x.roll(1, -1),
    "with channels rolled by one, the other way": lambda x: x.roll(-1, -1),
    "with channels in reverse order": lambda x: x.flip(-1),
}


def anywhere() -> Iterator[Slip]:
    for step, name in _ANYWHERE.items():
        for text, change in _GENERIC.items():
            yield slip(f"{name} {text}", step, lambda run, right, *args, change=change: change(right(*args)))
        along = 2 if step == "attend" else 1
        for by, way in ((1, "late"), (-1, "early")):
            how: How = lambda run, right, *args, by=by, along=along: _late(right(*args), by, along)
            yield slip(f"{name} one position {way}", step, how, whole=by < 0)


def _late(x: Tensor, by: int, along: int) -> Tensor:
    """Each position has the one before's, or the one after's; at the end its own."""
    at = (torch.arange(x.shape[along]) - by).clamp(0, x.shape[along] - 1)
    return x.index_select(along, at)


SCALED_STEPS = (*_ANYWHERE, "norm", "embed")


def scaled_at(step: str, factor: float) -> tuple[tuple[str, How], ...]:
    """The change that multiplies what a step gives, in all layers."""
    return ((step, lambda run, right, *args: right(*args) * factor),)
