"""A weight in fewer bits: int8 with a scale for each output, int4 with scale and zero for groups of inputs.

Only weights are rounded; activations keep their dtype. Both forms are plain round-to-nearest and need no
calibration text. A weight is off by at most half a step of its row or group, plus the rounding of scale and
zero.

    int8    W[o, i] ≈ q[o, i] · scale[o]                                        q from -127 to 127
    int4    W[o, i] ≈ (q[o, i] - 8) · scale[o, i // G] + zero[o, i // G]        q from 0 to 15, groups of G

GPTQ releases were rounded elsewhere, with calibration text, to q in 4 or 8 bits. g_idx gives each input's
group. A zero point z has the units of q; the file stores z - 1 (see zero_points):

    GPTQ    W[o, i] = (q[i, o] - z[g, o]) · scales[g, o],  g = g_idx[i]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_ref.config import InputError, either
from qwen_ref.quantize.config import INT4_GROUPS, GPTQConfig, check_bits

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class FewBits(NamedTuple):
    """A weight in 4 or 8 bits, in groups of inputs. Faster layers read it some outputs at a time.

    W[o, order[i]] = (q[o, i] - 2^(bits - 1)) · scale[o, i // G] + offset[o, i // G]
    """

    shape: tuple[int, int]  # (out, in)
    bits: int
    group_size: int  # G
    # Some outputs → q, uint8 (outputs, in), scale and offset (outputs, in / G).
    rows: Callable[[slice], tuple[Tensor, Tensor, Tensor]]
    order: Tensor | None = None  # (in): None: as they are


def rounded(weight: Tensor, quantize: str, group_size: int, dtype: torch.dtype = torch.float32) -> FewBits:
    """A weight (out, in) rounded to "int8" or "int4"; for int4, scale and offset to dtype."""
    outputs, inputs = weight.shape

    def int8(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        q, scale = quantize_int8(weight[rows])
        return (q.short() + 128).to(torch.uint8), scale, torch.zeros_like(scale)

    def int4(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        return quantize_int4(weight[rows], group_size, dtype)

    if quantize == "int8":
        return FewBits((outputs, inputs), 8, inputs, int8)
    return FewBits((outputs, inputs), 4, group_size, int4)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) → q, int8 (out, in), and scale, float32 (out, 1): an output's largest weight is ±127 steps.

    >>> quantize_int8(torch.tensor([[0.5, -1.27]]))
    (tensor([[  50, -127]], dtype=torch.int8), tensor([[0.0100]]))

    Raises ValueError for weights that are not finite.
    """
    weight = _finite(weight.float())
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    q = (weight / _nonzero(scale)).round_().clamp_(-127, 127)  # where scale is subnormal, q is not 127
    return q.to(torch.int8), scale


def quantize_int4(
    weight: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) → q, uint8 (out, in), scale and zero, dtype (out, in / group_size).

    The 16 steps of a group reach from its smallest weight to its largest. scale and zero are rounded to dtype
    first, then the weights: q is chosen for the rounded scale and zero.

    >>> quantize_int4(torch.arange(32.0)[None] / 2, 32)[1:]
    (tensor([[1.0333]]), tensor([[8.2667]]))

    Raises ValueError for weights that are not finite and for a group that does not divide the inputs.
    """
    check_group(weight.shape[1], group_size)
    groups = _finite(weight.float()).unflatten(1, (-1, group_size))  # (out, in / G, G)
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    scale = ((high - low) / 15).to(dtype)
    zero = (low + 8 * scale).to(dtype)
    if not (torch.isfinite(scale).all() and torch.isfinite(zero).all()):
        reach = f"{low.min():g} to {high.max():g}"
        raise InputError(f"weights from {reach} are too far apart for scales in {dtype}; use int8")
    q = ((groups - zero) / _nonzero(scale.float())).round_().add_(8).clamp_(0, 15)
    return q.flatten(1).to(torch.uint8), scale[..., 0], zero[..., 0]


def dequantize_int4(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What quantize_int4 stands for: (out, in), in scale's dtype."""
    groups = q.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    return ((groups - 8) * scale[..., None] + zero[..., None]).flatten(1)


def dequantize_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensor:
    """A packed layer of a GPTQ checkpoint (AutoGPTQ v1) → its weight, (out, in) float32.

    qweight: (in · bits / 32, out) int32, an output's q's along the inputs, the first in the lowest bits.
    qzeros: (groups, out · bits / 32) int32, the zero points less 1, along the outputs (see zero_points).
    scales: (groups, out), float16. g_idx: (in), the group of each input. bits: 4 or 8.
    Exactly: a float16 or bfloat16 scale times a difference of bytes has at most 20 bits, which float32 holds.

    >>> q = torch.tensor([[0x76543210]], dtype=torch.int32)  # q from 0 to 7
    >>> zeros = torch.tensor([[7]], dtype=torch.int32)  # of eight outputs; that of the first is 8
    >>> scales = torch.full((1, 8), 0.5)
    >>> dequantize_gptq(q.repeat(1, 8), zeros, scales, torch.zeros(8, dtype=torch.int32), 4)[0]
    tensor([-4.0000, -3.5000, -3.0000, -2.5000, -2.0000, -1.5000, -1.0000, -0.5000])

    Raises ValueError for shapes that do not belong together, other bits, and a group that is not there.
    """
    check_bits(bits)
    parts = (
        ("qweight", qweight, 2, "int32", qweight.dtype == torch.int32),
        ("qzeros", qzeros, 2, "int32", qzeros.dtype == torch.int32),
        ("scales", scales, 2, "floating-point numbers", scales.is_floating_point()),
        ("g_idx", g_idx, 1, "integers", g_idx.dtype in _INTEGERS),
    )
    for name, tensor, dimensions, kind, of_kind in parts:
        if tensor.ndim != dimensions or tensor.numel() == 0 or not of_kind:
            raise InputError(
                f"{name} must be {kind} of {dimensions} dimensions, not {tensor.dtype} {tuple(tensor.shape)}"
            )
    inputs, outputs, groups = len(g_idx), qweight.shape[1], len(scales)
    if inputs % (32 // bits) or outputs % (32 // bits):
        raise InputError(
            f"{inputs} inputs and {outputs} outputs must both be multiples of {32 // bits}: in {bits} bits "
            "so many fill a word"
        )
    wanted = [
        ("qweight", qweight, (inputs * bits // 32, outputs)),
        ("qzeros", qzeros, (groups, outputs * bits // 32)),
        ("scales", scales, (groups, outputs)),
    ]
    for name, tensor, shape in wanted:
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} is {tuple(tensor.shape)}, should be {shape} for {inputs} inputs, {outputs} outputs "
                f"and {groups} groups in {bits} bits"
            )
    check_groups(g_idx, groups)
    zeros, scales = zero_points(qzeros, bits).float(), scales.float()  # (groups, out)
    weight = torch.empty(outputs, inputs, dtype=torch.float32, device=qweight.device)
    step = 128 * bits // 32  # words of 128 inputs: what is between stays in the processor's cache
    for words, g, columns in zip(
        qweight.split(step), g_idx.long().split(128), weight.split(128, 1), strict=True
    ):
        columns.copy_(((unpack(words, bits, dim=0) - zeros[g]) * scales[g]).t())
    return weight


def gptq_steps(group: Tensor, config: GPTQConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each output of a group (out, inputs), which reach over all of it and 0.

    Raises ValueError for weights that are too large for float16 scales.
    """
    top = 2**config.bits - 1
    low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
    if config.sym:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    else:  # many readers take a zero point of 0 for 2^bits: none is written, so a step is below 0
        low = torch.minimum(low, -high / (top - 1))
    scale = ((high - low) / top).to(torch.float16)
    if not torch.isfinite(scale).all():
        raise InputError(f"weights up to {group.abs().max():g} are too large for float16 scales")
    scale[scale == 0] = 1
    if config.sym:
        return scale, torch.full_like(scale, (top + 1) // 2, dtype=torch.int32)
    return scale, (-low / scale.double()).round().clamp(1, top).int()


def pack_gptq(q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> dict[str, Tensor]:
    """What dequantize_gptq reads, by its names: q (in, out), zero points (groups, out), none of them 0."""
    return {
        "qweight": pack(q, bits, dim=0),
        "qzeros": pack(zeros - 1, bits, dim=1),
        "scales": scales.contiguous(),
        "g_idx": g_idx,
    }


def pack(values: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned numbers of so many bits → int32 words along a dimension, the first in the lowest bits."""
    parts = values.long().unflatten(dim, (-1, 32 // bits))
    shifts = torch.arange(0, 32, bits, device=values.device)
    words = (parts << shifts.view([-1 if d == dim + 1 else 1 for d in range(parts.ndim)])).sum(dim=dim + 1)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Words (…, n, …) of 32 bits → the unsigned numbers of so many bits in them, (…, n · 32 / bits, …)."""
    shape = [1] * (words.ndim + 1)
    shape[dim + 1] = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(shape)
    return (words.unsqueeze(dim + 1) >> shifts & (1 << bits) - 1).flatten(dim, dim + 1)


def zero_points(qzeros: Tensor, bits: int) -> Tensor:
    """The zero points of a GPTQ checkpoint, (groups, out). The file stores each of them less 1.

    Writers subtract 0x11111111 (8 bits: 0x01010101) from the word, modulo 2^32. So a zero point of 0 borrows
    from its neighbour: 0, 8, 8, … is stored as 0x7777776F.
    """
    ones = {4: 0x11111111, 8: 0x01010101}[bits]
    return unpack(qzeros.long() + ones, bits, dim=1)  # 64 bits, of which unpack reads the lower 32


def check_groups(g_idx: Tensor, groups: int) -> None:
    """Raises ValueError where an input is in a group that is not there."""
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise InputError(f"g_idx names group {low if low < 0 else high}; there are {groups}, from 0 on")


def check_group(inputs: int, group_size: int) -> None:
    """Raises ValueError if int4 groups of this size do not work, and names the sizes that do."""
    works = [size for size in INT4_GROUPS if inputs % size == 0]
    if group_size not in works:
        can = f"use {either(works)}" if works else "no size does; use int8"
        raise InputError(
            f"groups of {group_size} do not work for a weight of {inputs} inputs: a group is one of "
            f"{either(INT4_GROUPS)} inputs and divides them; {can}"
        )


def _nonzero(scale: Tensor) -> Tensor:
    """1 for 0: a row or group of equal weights has no steps, and 0 / 0 would be NaN."""
    return torch.where(scale == 0, 1.0, scale)


def _finite(weight: Tensor) -> Tensor:
    if not torch.isfinite(weight).all():
        raise InputError(
            "a weight is NaN or infinite (in float32) and cannot be quantised; check the checkpoint"
        )
    return weight
