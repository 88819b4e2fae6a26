"""The same model, faster on a CPU: its matrices laid out, once after loading, for one token at a time.

    model = fasten(load_model("Qwen-1_8B", "auto"))                 # the same dtype: 3.7 GB
    model = fasten(load_model("Qwen-1_8B", "auto"), "int8")         # 2.2 GB, of which the embedding is 0.6
    model = fasten(load_model("Qwen-1_8B", "auto"), "int4")         # 1.6 GB
    model = fasten(load_model("Qwen-1_8B-Chat-Int4", "bfloat16", packed=True))  # its own 4 bits

model.py stays the default and the oracle. fasten swaps its linear layers for others with the same meaning,
and its attention for one that reads the cache in another order.

A decode step multiplies every matrix W (out, in) by one vector x: each weight is read from memory and used
once. So memory bandwidth is the limit, and the usual matrix product kernels reach two thirds of it. But

    y = Σ over i of x[i] · W[:, i]

is a weighted sum of the rows of Wᵀ. torch has an operation for such sums, the embedding bag, made for tables
larger than any cache. Its kernel prefetches rows, so it reads memory as fast as a plain sum. It adds in
float32. The table is cut into blocks of outputs: a row's sums stay in the processor's registers, and each
thread has its own blocks:

    W (out, in) → table (blocks, in, width ≤ 352): row i of block b is W[b · width : (b + 1) · width, i]

More than 9 rows of x, as in prefill, use the ordinary matrix product.

All figures in this folder are from a 2-core AMD EPYC (Zen 5) with AVX-512, torch 2.13.0. The width of a block
fits AVX-512's registers. `python -m qwen_ref.bench --fast --against plain` measures your own processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from qwen_ref.checkpoint import dtype_name
from qwen_ref.config import InputError
from qwen_ref.fast.attention import FastAttention, FastCache
from qwen_ref.fast.matrices import (
    FAST_DTYPES,
    Int4Matrix,
    Int8Table,
    Matrix,
    Table,
    int4_layout,
    kernel_group,
)
from qwen_ref.model import Attention, Qwen
from qwen_ref.parallel import Group, RowParallelLinear, VocabularyParallelHead
from qwen_ref.quantize.config import INT4_GROUP, QUANTIZATIONS
from qwen_ref.quantize.gptq import packed_weight
from qwen_ref.quantize.rounding import check_group, rounded


def fasten(
    model: Qwen,
    quantize: str | None = None,
    group_size: int = INT4_GROUP,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Qwen:
    """Swaps the layers of a model that load_model made for faster ones, in place; returns it.

    quantize: None keeps the dtype. "int8" rounds weights to 8 bits, with a scale for each output. "int4"
    rounds them to 4 bits, with a scale and a zero for each group_size inputs; the output head becomes int8,
    which is as fast. Weights of a GPTQ checkpoint that was loaded packed keep their own bits, with None.
    The embedding, the norms and the biases keep their dtype; activations and cache, too.
    4-bit weights take 4 bits in a bfloat16 model, where torch has a fast product for them, in layers whose
    results are not added up over several ranks. Elsewhere each takes a byte and has the same value.
    Every weight is copied, a layer at a time, and the checkpoint's files are closed. If the model has the
    dtype of its files ("auto"), the peak memory is that of the fast model and one layer.
    progress is called with the bytes done and the bytes in all. Several ranks call it alike.
    Raises ValueError if the device, the dtype or the widths do not allow it, before anything is changed; and
    for weights to quantise that are not finite: then the model cannot be used any more.
    """
    with model.group.together():
        _check(model, quantize, group_size)
    total, done = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), 0
    for name in [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]:
        layer = cast(nn.Linear, model.get_submodule(name))
        owner, _, attribute = name.rpartition(".")
        bits = "int8" if quantize == "int4" and isinstance(layer, VocabularyParallelHead) else quantize
        with model.group.together():
            try:
                fast = FastLinear(layer, model.group, bits, group_size)
            except ValueError as error:
                raise InputError(f"{name}.weight: {error}") from None
        setattr(model.get_submodule(owner), attribute, fast)
        done += sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
        if progress is not None:
            progress(done, total)
    for module in list(model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.clone(), requires_grad=False))
    for block in model.blocks:
        block.attn = FastAttention(cast(Attention, block.attn))
    model.cache_type = FastCache
    if progress is not None:
        progress(total, total)
    return model


def _check(model: Qwen, quantize: str | None, group_size: int) -> None:
    weight = model.embed.weight
    if is_fast(model):
        raise InputError("this model is fast already; load it again to make it so in another way")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise InputError(f"quantize={quantize!r} is unknown; use {' or '.join(QUANTIZATIONS)}")
    for name, layer in model.named_modules():
        packed = packed_weight(layer)
        if packed is not None and quantize is not None:
            raise InputError(
                "the weights are quantised already; leave --quantize out, --fast uses their bits"
            )
        if packed is not None:
            try:
                packed[0].check_even()
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
    if weight.device.type != "cpu":
        raise InputError(
            f"the faster layers are made for the CPU, the model is on {weight.device}; leave --fast and "
            "--quantize out there"
        )
    if weight.dtype not in FAST_DTYPES:
        works = ", ".join(map(dtype_name, FAST_DTYPES))
        raise InputError(f"{dtype_name(weight.dtype)} has no faster layers; load the model in {works}")
    if quantize == "int4":
        D, width, ranks = model.config.hidden_size, model.config.mlp_width, model.group.size
        for inputs in sorted({D, D // ranks, width // ranks}):
            check_group(inputs, group_size)


def is_fast(model: Qwen) -> bool:
    """Whether fasten was here."""
    return isinstance(model.blocks[0].attn, FastAttention)


class FastLinear(nn.Module):
    """A linear layer of the model with its weight in another form; the ranks add up or gather as before."""

    def __init__(self, layer: nn.Linear, group: Group, quantize: str | None, group_size: int) -> None:
        super().__init__()
        self.group = group
        self.sums = group.size > 1 and isinstance(layer, RowParallelLinear)
        self.gathers = group.size > 1 and isinstance(layer, VocabularyParallelHead)
        self.matrix = _matrix(layer, self.sums, quantize, group_size)
        self.bias = layer.bias

    def forward(self, x: Tensor, only_rank_0: bool = False) -> Tensor | None:
        y = self.matrix(x)
        if self.sums:
            y = self.group.sum(y)
        if self.bias is not None:
            y = y + self.bias
        y = y.to(x.dtype)
        return self.group.gather(y, only_rank_0) if self.gathers else y

    def _apply(self, fn: Callable, recurse: bool = True) -> FastLinear:
        """What .to(), .half(), .cuda() and the like do: not with scales and packed bits."""
        raise InputError("a fast model keeps its dtype and its device; load it again for others")


def _matrix(layer: nn.Linear, wide: bool, quantize: str | None, group_size: int) -> Matrix:
    """A layer's weight in the form that is asked for, or in its own bits."""
    packed = packed_weight(layer)
    if packed is not None:
        few_bits, dtype = packed[0].few_bits(), packed[1]
    else:
        weight = layer.weight.detach().flatten(0, -2)  # qkv's of several ranks is (3, rows, in)
        if quantize is None:
            return Table(weight, wide)
        dtype = weight.dtype
        in_4_bits = quantize == "int4" and dtype == torch.bfloat16 and not wide
        few_bits = rounded(weight, quantize, group_size, torch.bfloat16 if in_4_bits else torch.float32)
    fits = few_bits.bits == 4 and kernel_group(few_bits.group_size) is not None
    if fits and dtype == torch.bfloat16 and not wide and int4_layout() is not None:
        return Int4Matrix(few_bits)
    return Int8Table(few_bits, dtype, wide)
