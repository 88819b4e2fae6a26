"""A weight in fewer bits: int8 with a scale for each output, int4 with scale and zero for groups of inputs.

Only weights are rounded; activations keep their dtype. Both are plain round-to-nearest: no calibration text
is needed. A weight is off by half a step of its row or group at most, and by what rounds scale and zero.

    int8    W[o, i] ≈ q[o, i] · scale[o]                                        q from -127 to 127
    int4    W[o, i] ≈ (q[o, i] - 8) · scale[o, i // G] + zero[o, i // G]        q from 0 to 15, groups of G
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_ref.config import INT4_GROUPS


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) → q, int8 (out, in), and scale, float32 (out, 1): an output's largest weight is ±127 steps.

    >>> quantize_int8(torch.tensor([[0.5, -1.27]]))
    (tensor([[  50, -127]], dtype=torch.int8), tensor([[0.0100]]))

    Raises ValueError for weights that are not finite.
    """
    weight = _finite(weight).float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    q = (weight / _nonzero(scale)).round_().clamp_(-127, 127)  # where scale is subnormal, q is not 127
    return q.to(torch.int8), scale


def quantize_int4(
    weight: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) → q, uint8 (out, in), scale and zero, dtype (out, in / group_size).

    The 16 steps of a group reach from its smallest weight to its largest. scale and zero are rounded to dtype
    before the weights are, so that q makes up for that.

    >>> quantize_int4(torch.arange(32.0)[None] / 2, 32)[1:]
    (tensor([[1.0333]]), tensor([[8.2667]]))

    Raises ValueError for weights that are not finite and for a group that does not divide the inputs.
    """
    check_group(weight.shape[1], group_size)
    groups = _finite(weight).float().unflatten(1, (-1, group_size))  # (out, in / G, G)
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    scale = ((high - low) / 15).to(dtype)
    zero = (low + 8 * scale).to(dtype)
    q = ((groups - zero) / _nonzero(scale.float())).round_().add_(8).clamp_(0, 15)
    return q.flatten(1).to(torch.uint8), scale[..., 0], zero[..., 0]


def dequantize_int4(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What quantize_int4 stands for: (out, in), in scale's dtype."""
    groups = q.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    return ((groups - 8) * scale[..., None] + zero[..., None]).flatten(1)


def check_group(inputs: int, group_size: int) -> None:
    """Raises ValueError where int4 groups of this size cannot be, naming those that can."""
    works = [size for size in INT4_GROUPS if inputs % size == 0]
    if group_size not in works:
        can = f"use {_either(works)}" if works else "no size does; use int8"
        raise ValueError(
            f"groups of {group_size} do not work for a weight of {inputs} inputs: a group is one of "
            f"{_either(INT4_GROUPS)} inputs and divides them; {can}"
        )


def _either(sizes: tuple[int, ...] | list[int]) -> str:
    return " or ".join(map(str, sizes))


def _nonzero(scale: Tensor) -> Tensor:
    """1 for 0: a row or group of equal weights has no steps, and 0 / 0 would be NaN."""
    return torch.where(scale == 0, 1.0, scale)


def _finite(weight: Tensor) -> Tensor:
    if not torch.isfinite(weight).all():
        raise ValueError("a weight is NaN or infinite and cannot be quantised; check the checkpoint")
    return weight
