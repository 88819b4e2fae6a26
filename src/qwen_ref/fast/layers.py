"""The same model, faster on a CPU: its matrices laid out, once after loading, for one token at a time.

    model = fasten(load_model("Qwen-1_8B", "auto"))                 # the same dtype: 3.7 GB
    model = fasten(load_model("Qwen-1_8B", "auto"), "int8")         # 2.2 GB, of which the embedding is 0.6
    model = fasten(load_model("Qwen-1_8B", "auto"), "int4")         # 1.6 GB in 4 bits
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

    W (out, in) → table (blocks, in, width): row i of block b is W[b · width : (b + 1) · width, i]

It is one of several products that torch has for few rows of x. Which is the fastest depends on the processor:
kernels.py measures it. More than 9 rows, as in prefill, use the ordinary matrix product.

Figures in this folder that name no machine are from a 2-core AMD EPYC (Zen 5) with AVX-512, torch 2.13.0.
`python -m qwen_ref.bench --fast --against plain` measures your own processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ref.checkpoint import dtype_name
from qwen_ref.config import InputError, either
from qwen_ref.fast.attention import FastAttention, FastCache
from qwen_ref.fast.kernels import Choice, forms, has_dynamic
from qwen_ref.fast.matrices import FAST_DTYPES, Matrix, int4_layout
from qwen_ref.model import Attention, Block, Qwen, RMSNorm
from qwen_ref.parallel import Group, RowParallelLinear, VocabularyParallelHead
from qwen_ref.quantize.config import INT4_GROUP, KERNELS, QUANTIZATIONS
from qwen_ref.quantize.gptq import packed_weight
from qwen_ref.quantize.rounding import FewBits, check_group, rounded


def fasten(
    model: Qwen,
    quantize: str | None = None,
    group_size: int = INT4_GROUP,
    *,
    kernel: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Qwen:
    """Swaps the layers of a model that load_model made for faster ones, in place; returns it.

    quantize: None keeps the dtype. "int8" rounds weights to 8 bits, with a scale for each output. "int4"
    rounds them to 4 bits, with a scale and a zero for each group_size inputs; the output head becomes int8,
    which is as fast. Weights of a GPTQ checkpoint that was loaded packed keep their own bits, with None.
    The embedding, the norms and the biases keep their dtype; activations and cache, too.
    kernel: the product for a few rows, "bag", "linear", "dynamic" or "int4" (see matrices.py), for all
    matrices that it is for. None: for each shape the fastest on this processor, measured in a fraction of a
    second. The kernels add in different orders, so name one to get the same bits again. kernels_of tells
    which layer has which.
    4-bit weights take 4 bits with the kernel int4 alone, for bfloat16 and layers whose results are not added
    up over several ranks. With the others each takes a byte: these are not chosen where memory is short.
    Kernel dynamic rounds what "int4" gives again, to 8 bits with a scale for each output. It is never used
    for the weights of a GPTQ checkpoint.
    Every weight is copied, a layer at a time, and the checkpoint's files are closed. If the model has the
    dtype of its files ("auto"), the peak memory is that of the fast model and one layer.
    progress is called with the bytes done and the bytes in all. Several ranks call it alike.
    Raises ValueError if the device, the dtype or the widths do not allow it, before anything is changed; and
    for weights to quantise that are not finite. After that, or where it is interrupted, some layers are laid
    out and others are not: the model then refuses every pass.
    """
    with model.group.together():
        _check(model, quantize, group_size)
        _check_kernel(model, quantize, kernel)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    choice = Choice(kernel, model.group, sum(layer.in_features * layer.out_features for layer in layers))
    total, done = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), 0
    unfinished = model.blocks[0].register_forward_pre_hook(_refuse)
    try:
        for name in [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]:
            layer = cast(nn.Linear, model.get_submodule(name))
            owner, _, attribute = name.rpartition(".")
            bits = "int8" if quantize == "int4" and isinstance(layer, VocabularyParallelHead) else quantize
            try:
                fast = FastLinear(layer, model.group, bits, group_size, choice)
            except ValueError as error:
                raise InputError(f"{name}.weight: {error}") from None
            setattr(model.get_submodule(owner), attribute, fast)
            done += sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
            if progress is not None:
                progress(done, total)
    finally:
        choice.close()
    for module in list(model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.clone(), requires_grad=False))
    norms = [found for found in model.named_modules() if isinstance(found[1], RMSNorm)]
    for name, norm in norms if hasattr(F, "rms_norm") else []:  # torch 2.2, the last for Intel Macs, has none
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, FastNorm(norm))
    for block in model.blocks:
        block.attn = FastAttention(cast(Attention, block.attn))
    model.cache_type = FastCache
    unfinished.remove()
    if progress is not None:
        progress(total, total)
    return model


def _refuse(*_: object) -> None:
    raise InputError("fasten did not finish with this model, which has layers of both kinds; load it again")


def _check(model: Qwen, quantize: str | None, group_size: int) -> None:
    weight = model.embed.weight
    if _refuse in cast(Block, model.blocks[0])._forward_pre_hooks.values():
        _refuse()
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


def _check_kernel(model: Qwen, quantize: str | None, kernel: str | None) -> None:
    if kernel is None:
        return
    if kernel not in KERNELS:
        raise InputError(f"kernel={kernel!r} is unknown; use {either(KERNELS)}")
    packed = packed_weight(cast(Block, model.blocks[0]).mlp.up)
    bits = {None: 16, "int8": 8, "int4": 4}[quantize] if packed is None else packed[0].bits
    in_4_bits = bits == 4 and model.embed.weight.dtype == torch.bfloat16
    has = {
        "bag": True,
        "linear": bits == 16,
        "dynamic": packed is None and bits < 16 and has_dynamic(),
        "int4": in_4_bits and int4_layout() is not None,
    }
    if not has[kernel]:
        can = either([name for name, able in has.items() if able])
        raise InputError(f"kernel {kernel} is for {KERNELS[kernel]}; use {can} here, or none for the fastest")


def is_fast(model: Qwen) -> bool:
    """Whether fasten was here."""
    return isinstance(model.blocks[0].attn, FastAttention)


def kernels_of(model: Qwen) -> dict[str, str]:
    """The kernel of each layer that fasten changed, by the layer's name."""
    return {name: layer.kernel for name, layer in model.named_modules() if isinstance(layer, FastLinear)}


def kernels_in_words(model: Qwen) -> str:
    """Which layers have which kernel: "bag for qkv, out, gate, up, down; dynamic for lm_head"."""
    found: dict[str, dict[str, None]] = {}
    for name, kernel in kernels_of(model).items():
        found.setdefault(kernel, {})[name.rpartition(".")[2]] = None
    return "; ".join(f"{kernel} for {', '.join(layers)}" for kernel, layers in found.items())


class FastNorm(nn.Module):
    """The norm of model.py with the same bits, in two operations instead of eight."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight


class FastLinear(nn.Module):
    """A linear layer of the model with its weight in another form; the ranks add up or gather as before."""

    def __init__(
        self, layer: nn.Linear, group: Group, quantize: str | None, group_size: int, choice: Choice
    ) -> None:
        super().__init__()
        self.group = group
        self.sums = group.size > 1 and isinstance(layer, RowParallelLinear)
        # The numbers that are put together of all ranks' outputs; 0: none are.
        self.width = layer.vocab_size if group.size > 1 and isinstance(layer, VocabularyParallelHead) else 0
        with group.together():
            weight, dtype, exact = _weight(layer, self.sums, quantize, group_size)
            found = forms(weight, dtype, self.sums, exact)
        outputs, inputs = weight.shape
        self.kernel = choice.among(found, outputs, inputs, dtype, self.sums)
        with group.together():
            self.matrix: Matrix = found[self.kernel](outputs)
        self.bias = layer.bias

    def forward(self, x: Tensor, only_rank_0: bool = False) -> Tensor | None:
        y = self.matrix.forward(x)  # not by its __call__: a decode step has hundreds of such calls
        if self.sums:
            y = self.group.sum(y)
        if self.bias is not None:
            y = y + self.bias
        y = y.to(x.dtype)
        return self.group.gather(y, only_rank_0, self.width) if self.width else y

    def _apply(self, fn: Callable, recurse: bool = True) -> FastLinear:
        """What .to(), .half(), .cuda() and the like do: not with scales and packed bits."""
        raise InputError("a fast model keeps its dtype and its device; load it again for others")


def _weight(
    layer: nn.Linear, wide: bool, quantize: str | None, group_size: int
) -> tuple[Tensor | FewBits, torch.dtype, bool]:
    """A layer's weight as it is asked for, the model's dtype, and whether it must not be rounded again."""
    packed = packed_weight(layer)
    if packed is not None:
        return packed[0].few_bits(), packed[1], True
    weight = layer.weight.detach().flatten(0, -2)  # qkv's of several ranks is (3, rows, in)
    if quantize is None:
        return weight, weight.dtype, True
    in_4_bits = quantize == "int4" and weight.dtype == torch.bfloat16 and not wide
    scales = torch.bfloat16 if in_4_bits else torch.float32
    return rounded(weight, quantize, group_size, scales), weight.dtype, False
