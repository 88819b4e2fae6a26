"""Slips in RMSNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qwen_ref.config import QwenConfig
from qwen_ref.parity.forward import Forward, How
from qwen_ref.parity.mistakes.grammar import Slip, slip


def norm_epsilon(eps: float) -> tuple[tuple[str, How], ...]:
    """The change to another layer_norm_epsilon."""
    how = _normed(lambda x, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    return ("attn_norm", how), ("mlp_norm", how), ("norm", how)


def _normed(
    normalise: Callable[[Tensor, float], Tensor],
    weighted: Callable[[Tensor, Tensor], Tensor] = lambda x, w: x * w,
) -> How:
    """RMSNorm with another function, in float32, or another use of the weight."""

    def how(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
        return weighted(normalise(x.to(run.wide), run.config.layer_norm_epsilon).to(x.dtype), weight)

    return how


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def weight_before_cast(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
    return (rms(x.to(run.wide), run.config.layer_norm_epsilon) * weight.to(run.wide)).to(x.dtype)


def _narrow_norm(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
    return rms(x, run.config.layer_norm_epsilon) * weight


def _per_head(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
    heads = x.to(run.wide).unflatten(-1, (-1, run.config.kv_channels))
    return rms(heads, run.config.layer_norm_epsilon).flatten(-2).to(x.dtype) * weight


NORMS: dict[str, How] = {
    "LayerNorm for RMSNorm": _normed(
        lambda x, eps: (
            (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
        )
    ),
    "mean subtracted before RMSNorm's root of the whole": _normed(
        lambda x, eps: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    ),
    "divided by the standard deviation, mean not subtracted": _normed(
        lambda x, eps: x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    ),
    "without its weight": _normed(rms, lambda x, w: x),
    "1 + weight for weight": _normed(rms, lambda x, w: x * (1 + w)),
    "weight applied twice": _normed(rms, lambda x, w: x * w * w),
    "epsilon outside the root": _normed(lambda x, eps: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps)),
    "no epsilon": _normed(lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
    "the sum of squares for their mean": _normed(
        lambda x, eps: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps)
    ),
    "the mean over D − 1 numbers for D": _normed(
        lambda x, eps: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1) + eps)
    ),
    "the mean of absolute values for the root of the mean square": _normed(
        lambda x, eps: x / (x.abs().mean(-1, keepdim=True) + eps)
    ),
    "no root: divided by the mean square": _normed(
        lambda x, eps: x / (x.pow(2).mean(-1, keepdim=True) + eps)
    ),
    "divided by the largest value": _normed(lambda x, eps: x / x.abs().amax(-1, keepdim=True)),
    "left out": lambda run, right, x, w: x,
    "left out, its weight applied": lambda run, right, x, w: x * w,
    "done twice": lambda run, right, x, w: right(right(x, w), w),
    "head by head": _per_head,
}
PLACES = {"attn_norm": "ln_1", "mlp_norm": "ln_2"}


def of_norms(config: QwenConfig) -> Iterator[Slip]:
    every = ("attn_norm", "mlp_norm", "norm")
    for eps in (1e-5, 1e-6, 1e-8, 1e-3):
        if eps != config.layer_norm_epsilon:
            text = f"layer_norm_epsilon {eps:g} for {config.layer_norm_epsilon:g}"
            yield Slip(text, norm_epsilon(eps), common=True)
    yield Slip(
        "norm weight applied before the cast to the model's dtype",
        tuple((step, weight_before_cast) for step in every),
        common=True,
        choice=True,
        alone=False,
    )
    yield Slip(
        "norm computed in the model's dtype",
        tuple((step, _narrow_norm) for step in every),
        common=True,
        alone=False,
    )
    other = {
        "attn_norm": lambda run, right, x, w: right(x, run.own("mlp_norm.weight")),
        "mlp_norm": lambda run, right, x, w: right(x, run.own("attn_norm.weight")),
    }
    yield Slip("ln_1 and ln_2 swapped", tuple(other.items()), common=True)
    for text, how in NORMS.items():
        yield Slip(f"norms: {text}", tuple((step, how) for step in every))
        for step, place in PLACES.items():
            yield slip(f"{place}: {text}", step, how)
    for step, place in PLACES.items():
        yield slip(f"{place} with the other norm's weight", step, other[step])
        for by, whose in ((1, "next"), (-1, "previous")):
            yield slip(f"{place} with the {whose} layer's weight", step, neighbours(f"{step}.weight", by))
    final: How = lambda run, right, x, w: right(x, run.weights("norm.weight"))
    yield slip("ln_1 with the final norm's weight", "attn_norm", final)


def neighbours(name: str, by: int) -> How:
    """A step with another layer's weight; beyond the first or the last layer, round the other end."""

    def how(run: Forward, right: Callable, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        layer = (run.source + by) % run.config.num_hidden_layers
        more = [run.own("attn.qkv.bias", layer)] if bias else []
        return right(x, run.own(name, layer), *more)

    return how
