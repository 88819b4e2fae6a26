"""The same model, faster on a CPU: its matrices laid out, once after loading, for one token at a time.

    model = fasten(load_model("Qwen-1_8B", "auto"))                 # the same dtype: 3.7 GB
    model = fasten(load_model("Qwen-1_8B", "auto"), "int8")         # 2.2 GB, of which the embedding is 0.6
    model = fasten(load_model("Qwen-1_8B", "auto"), "int4")         # 1.6 GB
    model = fasten(load_model("Qwen-1_8B-Chat-Int4", "bfloat16", packed=True))  # its own 4 bits

model.py stays what it is, the default and the oracle; here its linear layers are swapped for others with the
same meaning, and attention reads its cache in another order.

A decoded token multiplies every matrix W (out, in) by one vector x, so that each weight is read from memory
and used once. Nothing but the rate at which memory is read matters then, and the common product kernels reach
two thirds of it. But

    y = Σ over i of x[i] · W[:, i]

is a weighted sum of the rows of Wᵀ. That is an embedding bag, an operation made for tables larger than any
cache: its kernel asks for the rows that it will need next before it needs them, and reads memory as fast as
summing it up does. It adds in float32. The table is cut into blocks of outputs, so that a row's sums stay in
the processor's registers and each thread has blocks of its own:

    W (out, in) → table (blocks, in, width ≤ 352): row i of block b is W[b · width : (b + 1) · width, i]

What few rows x do not fill, whole prompts, is left to the ordinary product of matrices.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ref.config import INT4_GROUP, INT4_GROUPS, QUANTIZATIONS, InputError
from qwen_ref.gptq import packed_weight
from qwen_ref.launch import first_line
from qwen_ref.model import Attention, KVCache, Qwen, widened
from qwen_ref.parallel import Group, RowParallelLinear, VocabularyParallelHead
from qwen_ref.quantize import FewBits, check_group, rounded

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The most rows of x that go through the embedding bag, each reading the block again from the processor's
# cache. 6192 × 2048 in bfloat16, 2 cores: 4 rows take 1.6 ms, 8 take 2.6; as products of matrices 1.9, 2.1.
# In int8 8 rows take 2.5 ms, 16 take 4.8; as products of matrices, for which weights are widened, 4.0, 4.5.
# Rows do not meet in a bag: a pass over so many tokens has the bits of passes over one, as lookup.py wants it
# for a token and the eight that it guesses.
FEW_ROWS = 9
# Where every group has a scale, turning weights back takes longer: 5504 × 2048 in groups of 128, 16 rows take
# 5.5 ms in bags and 14.9 as a product, 32 take 10.8 and 18, 64 take 20.3 and 12.8.
_FEW_ROWS_IN_GROUPS = 32
# From here on the table is turned back into a matrix first: 512 rows then take 33.5 ms instead of 38.3, but
# 16 rows would take 3.9 instead of 2.8.
_MANY_ROWS = 64
_WORKSPACE = 2**22  # numbers of the matrix turned back at a time: 8 MB of bfloat16


def fasten(
    model: Qwen,
    quantize: str | None = None,
    group_size: int = INT4_GROUP,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Qwen:
    """Swaps the layers of a model that load_model made for faster ones, in place; returns it.

    quantize: None keeps the dtype; "int8" rounds weights to 8 bits, with a scale for each output; "int4" to 4
    bits, with a scale and a zero for each group_size inputs, and the output head to int8, which is as fast.
    Weights of a GPTQ checkpoint that was loaded packed are used in their own bits, with None.
    The embedding, the norms and the biases keep their dtype; activations and cache, too.
    In 4 bits they are where torch multiplies by them fast: in a bfloat16 model, and where no results of
    several ranks are to be added up unrounded. Elsewhere each takes a byte, of the same value.
    Every weight is copied, a layer at a time, and the checkpoint's files are let go: where the model has the
    dtype of its files ("auto"), the most memory taken is that of the fast model and one layer.
    progress is called with the bytes done and the bytes in all. Several ranks call it alike.
    Raises ValueError where the device, the dtype or the widths do not allow it, before anything is changed;
    and for weights to quantise that are not finite: the model is then of no more use.
    """
    with model.group.together():
        _check(model, quantize, group_size)
    total, done = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), 0
    for name in [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]:
        layer = model.get_submodule(name)
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
        block.attn = FastAttention(block.attn)
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
    if weight.dtype not in _DTYPES:
        works = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise InputError(
            f"{str(weight.dtype).removeprefix('torch.')} has no faster layers; load the model in {works}"
        )
    if quantize == "int4":
        D, width, ranks = model.config.hidden_size, model.config.mlp_width, model.group.size
        for inputs in sorted({D, D // ranks, width // ranks}):
            check_group(inputs, group_size)


def compile_layers(model: Qwen) -> None:
    """Has torch.compile fuse norms and MLPs, in place; the first pass, made here, takes seconds to a minute.

    It pays where starting an operation costs more than the operation. On the CPU it was measured to gain
    nothing: see the README. Raises ValueError for several ranks, which the compiler would have to follow
    through their collectives, for fast layers, and where there is no compiler.
    """
    if model.group.size > 1:
        raise InputError("torch.compile is for a model in one process; leave --compile out")
    if is_fast(model):
        raise InputError("torch.compile is for the plain layers, not for fast ones; leave one of them out")
    for block in model.blocks:
        for part in (block.attn_norm, block.mlp_norm, block.mlp):
            part.compile(dynamic=True)
    try:
        with torch.inference_mode():
            for T in (8, 1):
                model.hidden_states(torch.zeros(1, T, dtype=torch.int64, device=model.embed.weight.device))
    except RuntimeError as error:
        raise InputError(f"torch.compile failed ({first_line(error)}); leave --compile out") from error


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


class Matrix(nn.Module):
    """W (out, in) in some form: x (…, in) → x Wᵀ (…, out), in float32 where the results are to be added up
    unrounded (wide), else in x's dtype or wider.
    """

    def __init__(
        self,
        outputs: int,
        inputs: int,
        dtype: torch.dtype,
        width: int,
        wide: bool,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.outputs, self.inputs, self.dtype = outputs, inputs, dtype
        self.width = width  # outputs of a block; zeros fill up the last one
        self.blocks = -(-self.outputs // width)
        self.register_buffer("order", order)  # of the inputs, where it is not theirs
        # Where the processor has no products of half precision, those of float32 are sooner done.
        self.product_dtype = torch.float32 if wide or not _has_products(dtype) else dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs)
        if self.order is not None:
            rows = rows[:, self.order]
        y = self.few(rows) if self.takes_few(len(rows)) else self.many(rows)  # (rows, blocks · width)
        return y[:, : self.outputs].reshape(*x.shape[:-1], self.outputs)

    def takes_few(self, rows: int) -> bool:
        return rows <= FEW_ROWS

    def few(self, rows: Tensor) -> Tensor:
        """The product with a few rows, straight from memory."""
        raise NotImplementedError

    def columns(self, start: int, stop: int) -> Tensor:
        """The blocks from start to stop of Wᵀ, (stop - start, in, width)."""
        raise NotImplementedError

    def many(self, rows: Tensor) -> Tensor:
        """The product with many rows: a stretch of Wᵀ is turned back into a matrix, then used for all."""
        x = rows.to(self.product_dtype)
        step = max(1, _WORKSPACE // (self.inputs * self.width))
        workspace = _workspace(self.inputs * self.width * step, self.product_dtype)
        y = x.new_empty(len(x), self.blocks * self.width)
        for start in range(0, self.blocks, step):
            columns = self.columns(start, min(start + step, self.blocks))
            matrix = workspace[: columns.numel()].view(self.inputs, -1, self.width)
            matrix.copy_(columns.transpose(0, 1))
            stop = start * self.width + columns.shape[0] * self.width
            y[:, start * self.width : stop] = x @ matrix.flatten(1)
        return y


class Table(Matrix):
    """Rows of Wᵀ, a block of outputs at a time, in the model's dtype."""

    def __init__(self, weight: Tensor, wide: bool) -> None:
        width = block_width(len(weight), torch.get_num_threads())
        super().__init__(*weight.shape, weight.dtype, width, wide)
        self.must_not_round = wide and self.dtype != torch.float32  # as the bag does, to the table's dtype
        table = weight.new_zeros(self.blocks, self.inputs, self.width)
        for block, rows in zip(table, weight.split(self.width), strict=True):
            block[:, : len(rows)] = rows.t()
        self.register_buffer("table", table.flatten(0, 1))  # (blocks · in, width)

    def few(self, rows: Tensor) -> Tensor:
        if self.must_not_round:
            return torch.cat([self.many(row) for row in rows.split(1)])
        bags = _bags(self.blocks, self.inputs, len(rows))
        return _side_by_side(_bag(self.table, bags, rows.expand(self.blocks, -1, -1)), self.blocks)

    def columns(self, start: int, stop: int) -> Tensor:
        return self.table.view(self.blocks, self.inputs, self.width)[start:stop]

    def many(self, rows: Tensor) -> Tensor:
        if len(rows) < _MANY_ROWS and self.product_dtype == self.dtype:
            return _side_by_side((rows @ self.columns(0, self.blocks)).flatten(0, 1), self.blocks)
        return super().many(rows)


class Int8Table(Matrix):
    """Rows of Wᵀ in a byte each, and a scale for each output, or for each output and group of inputs.

    torch's bag of bytes takes a byte u of a row for u · scale + bias, with scale and bias of the row in the
    eight bytes behind it. A scale of ours belongs to a column: there they are 1 and minus the middle of the
    range, 128 or (of 4 bits) 8, and the sums over each group, which are float32, are scaled.
    """

    def __init__(self, few_bits: FewBits, dtype: torch.dtype, wide: bool) -> None:
        outputs, inputs = few_bits.shape
        width = block_width(outputs, torch.get_num_threads())
        super().__init__(outputs, inputs, dtype, width, wide, few_bits.order)
        self.groups = inputs // few_bits.group_size
        self.middle = 1 << (few_bits.bits - 1)
        table = torch.zeros(self.blocks, inputs, self.width + 8, dtype=torch.uint8, device="cpu")
        scales, offsets = table.new_zeros(2, self.blocks, self.groups, self.width, dtype=torch.float32)
        behind = torch.tensor([1.0, -self.middle], dtype=torch.float32, device="cpu").view(torch.uint8)
        for n, block in enumerate(table):
            q, scale, offset = few_bits.rows(slice(n * self.width, (n + 1) * self.width))
            block[:, : len(q)] = q.t()
            block[:, self.width :] = behind
            scales[n, :, : len(q)], offsets[n, :, : len(q)] = scale.t(), offset.t()
        self.register_buffer("table", table.flatten(0, 1))  # (blocks · in, width + 8)
        self.register_buffer("scale", scales[:, None])  # (blocks, 1, groups, width)
        self.register_buffer("offset", offsets[:, None] if offsets.any() else None)

    def takes_few(self, rows: int) -> bool:
        return rows <= (FEW_ROWS if self.scaled_afterwards else _FEW_ROWS_IN_GROUPS)

    def few(self, rows: Tensor) -> Tensor:
        indices, offsets = _bags(self.blocks, self.inputs, len(rows), self.groups)
        weights = rows.float().expand(self.blocks, -1, -1).reshape(-1)
        bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        sums = bag(self.table, indices, offsets, False, 0, False, weights, None, True)
        sums = sums.view(self.blocks, len(rows), self.groups, self.width).mul_(self.scale)
        if self.offset is not None:
            sums += rows.float().view(len(rows), self.groups, -1).sum(dim=2)[:, :, None] * self.offset
        return _side_by_side(sums.sum(dim=2).flatten(0, 1), self.blocks)

    def columns(self, start: int, stop: int) -> Tensor:
        table = self.table.view(self.blocks, self.inputs, -1)[start:stop, :, : self.width]
        if self.scaled_afterwards:
            return table.to(self.product_dtype).sub_(self.middle)  # exact: 8 bits are what bfloat16 has
        values = table.unflatten(1, (self.groups, -1)).float().sub_(self.middle)  # (blocks, groups, G, width)
        values *= self.scale[start:stop].transpose(1, 2)
        if self.offset is not None:
            values += self.offset[start:stop].transpose(1, 2)
        return values.flatten(1, 2).to(self.product_dtype)

    def many(self, rows: Tensor) -> Tensor:
        y = super().many(rows)
        return y * self.scale.flatten() if self.scaled_afterwards else y

    @property
    def scaled_afterwards(self) -> bool:
        return self.groups == 1 and self.offset is None


class Int4Matrix(Matrix):
    """W in 4 bits, with a scale and an offset for each group of inputs, as torch's product takes them.

    That product is fast in bfloat16 alone: the same weights take 30 times as long in float32 and in float16.
    How torch packs them depends on the processor (see int4_layout). Many rows are multiplied as in every
    other form, whichever it is.
    """

    def __init__(self, few_bits: FewBits) -> None:
        outputs, inputs = few_bits.shape
        super().__init__(outputs, inputs, torch.bfloat16, 64, False, few_bits.order)
        self.group_size = kernel_group(few_bits.group_size)
        copies = few_bits.group_size // self.group_size
        packed = torch.empty(self.blocks, inputs * 32, dtype=torch.uint8, device="cpu")
        scales = torch.empty(inputs // self.group_size, self.blocks, 64, 2, dtype=self.dtype, device="cpu")
        for block in range(0, self.blocks, 8):
            parts = few_bits.rows(slice(64 * block, 64 * (block + 8)))
            q, scale, zero = (F.pad(part, (0, 0, 0, -len(part) % 64)) for part in parts)
            stop = block + len(q) // 64
            packed[block:stop] = torch._convert_weight_to_int4pack_for_cpu(q.int(), 2).view(stop - block, -1)
            both = torch.stack((scale.t(), zero.t()), dim=2).unflatten(1, (-1, 64))
            scales[:, block:stop] = both.repeat_interleave(copies, dim=0)
        self.register_buffer("packed", packed.view(self.blocks * 64, -1))
        self.register_buffer("scales", scales.flatten(1, 2))

    def takes_few(self, rows: int) -> bool:
        return rows < _MANY_ROWS

    def few(self, rows: Tensor) -> Tensor:
        x = rows.to(self.dtype).contiguous()
        return torch._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.scales)

    def columns(self, start: int, stop: int) -> Tensor:
        scales = self.scales.unflatten(1, (self.blocks, 64))[:, start:stop].to(self.product_dtype)
        scale, zero = scales.transpose(0, 1)[:, :, None].unbind(-1)  # (blocks, groups, 1, 64) each
        packed = self.packed.view(self.blocks, -1)[start:stop]
        values = _unpacked(packed, *int4_layout()).unflatten(1, (-1, self.group_size)).to(self.product_dtype)
        return (values.sub_(8) * scale + zero).flatten(1, 2)


def kernel_group(group_size: int) -> int | None:
    """The largest group of torch's int4 product that divides one of this size; None: there is none."""
    return max((size for size in INT4_GROUPS if group_size % size == 0), default=None)


def block_width(outputs: int, threads: int) -> int:
    """As many blocks for every thread, the fewest of at most 352 outputs; a multiple of 8.

    A row's sums then fit into the registers of AVX-512 (28 of 16 numbers), and a row is long enough to be
    read at full speed: blocks of 64 take 1.3 times as long, of 1024 twice.
    """
    blocks = threads * -(-outputs // (352 * threads))
    return -(-outputs // (8 * blocks)) * 8


@functools.cache
@torch.inference_mode(False)
def int4_layout() -> tuple[int, bool] | None:
    """How torch packs int4 weights on this processor, found by packing some; None: in an unknown way.

    The outputs of a strip stand together: bytes of a strip are (in, strip / 2). Byte n of an input holds
    outputs n (low half) and n + strip / 2 of the strip; or, where neighbours share a byte, 2n and 2n + 1.
    AVX-512 has strips of 64, AVX2 of 32. Without either, neighbours share a byte.
    """
    q = (torch.arange(64, device="cpu")[:, None] * 7 + torch.arange(32, device="cpu") * 5) // 3 % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(q.int(), 2).view(1, -1)
    for strip in (64, 32, 16):
        for neighbours in (False, True):
            if torch.equal(_unpacked(packed, strip, neighbours)[0], q.t()):
                return strip, neighbours
    return None


def _unpacked(packed: Tensor, strip: int, neighbours: bool) -> Tensor:
    """torch's blocks of 64 outputs, (blocks, 32 · in) bytes → their values, (blocks, in, 64)."""
    strips = packed.view(len(packed), 64 // strip, -1, strip // 2).transpose(1, 2)  # (blocks, in, …)
    return torch.stack((strips & 15, strips >> 4), dim=-1 if neighbours else -2).flatten(2)


def _side_by_side(sums: Tensor, blocks: int) -> Tensor:
    """(blocks · rows, width) → (rows, blocks · width)."""
    rows = len(sums) // blocks
    return sums.view(blocks, rows, -1).transpose(0, 1).reshape(rows, -1)


def _bags(blocks: int, inputs: int, rows: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """For each block and each row of x a bag of the block's table rows, or one for each group of them.

    Only the numbers of one row of x are kept. Those of every number of rows would take gigabytes at the
    72B's widths; they are copied for each product, 4 bytes for a table row of some 700.
    """
    numbers = _counted(blocks * inputs).view(blocks, 1, groups, -1)
    return _numbered(numbers.expand(-1, rows, -1, -1))


@functools.lru_cache(maxsize=8)  # a model's matrices have four or five sizes
@torch.inference_mode(False)
def _counted(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device="cpu")


_workspaces = threading.local()  # by dtype


def _workspace(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that many products use one after another: taken anew each time, it costs as much as the copy."""
    found = vars(_workspaces).get(dtype)
    if found is None or len(found) < size:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
            found = vars(_workspaces)[dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return found


def _has_products(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies matrices of this dtype faster than those of float32."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32


# Attention of a few new tokens


class FastAttention(Attention):
    """The attention of model.py, where a few new tokens read the cache as FastLinear reads weights."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.head_size, self.qkv, self.out = attention.head_size, attention.qkv, attention.out

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        T = q.shape[2]
        if not isinstance(cache, FastCache) or T > FEW_ROWS or (T > 1 and cache.length == 0):
            return super().mix(q, k, v, mask, cache, layer)
        cache.write(layer, k, v)
        rows = [cache.attend(layer, row, mask, cache.length + t) for t, row in enumerate(q.split(1, dim=2))]
        return torch.cat(rows, dim=2)


class FastCache(KVCache):
    """A cache in which both products of one query with all positions are weighted sums of rows.

    Values already are what is summed, a position a row. Keys are transposed, a dimension a row, in blocks of
    128 positions: the scores of a block are the sum over dimensions d of q[d] · row d.

    The bag rounds its sums to the cache's dtype. Scores must not be rounded to half precision: they stand in
    an exponent. So a block has one row more, which takes the rounded scores, and a second bag sums what is
    left when they are subtracted: both together are the score as float32 had it.
    """

    BLOCK = 128

    def __init__(
        self, layers: int, shape: tuple[int, int, int, int], prompt_length: int | None, like: Tensor
    ) -> None:
        super().__init__(0, shape, prompt_length, like)
        B, H, max_length, K = shape
        blocks = -(-max_length // self.BLOCK)
        self.rounds = like.dtype != torch.float32
        key_shape = (B, H, blocks, K + self.rounds, self.BLOCK)
        self.keys = [like.new_empty(key_shape) for _ in range(layers)]
        self.values = [like.new_empty((B, H, blocks * self.BLOCK, K)) for _ in range(layers)]
        # Whole blocks are summed up, positions beyond the last with weight 0. What stands there must be 0,
        # too: 0 · NaN is NaN. By layer, the values from the first of these to the second are.
        self.zeros = [(0, 0)] * layers
        self.minus_one = like.new_full((B, H, 1, 1), -1)
        self.rows: tuple[tuple[int, int], _Rows] | None = None  # of so many blocks, and so many in use

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.write(layer, k, v)
        if self.length == 0:
            return k, v
        end, K = self.length + k.shape[2], k.shape[3]
        keys = self.keys[layer][:, :, : -(-end // self.BLOCK), :K].transpose(3, 4).flatten(2, 3)
        return keys[:, :, :end], self.values[layer][:, :, :end]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts the keys and values of T new positions, (B, H, T, K) each, behind those that are there."""
        K, end = k.shape[3], self.length + k.shape[2]
        self._add_blocks(layer, -(-end // self.BLOCK))
        self.values[layer][:, :, self.length : end] = v
        start_of_zeros, ready = self.zeros[layer]
        stop = -(-end // self.BLOCK) * self.BLOCK
        if stop > ready or end < start_of_zeros:  # a new block, or a cache that was rewound
            self.values[layer][:, :, end : max(start_of_zeros, stop)] = 0
        self.zeros[layer] = end, max(ready, stop)
        start = self.length
        while start < end:
            block, offset = divmod(start, self.BLOCK)
            stop = min(end, (block + 1) * self.BLOCK)
            part = k[:, :, start - self.length : stop - self.length].transpose(2, 3)  # (B, H, K, positions)
            self.keys[layer][:, :, block, :K, offset : offset + stop - start] = part
            start = stop

    def _add_blocks(self, layer: int, needed: int) -> None:
        """As make_room, in whole blocks."""
        blocks = self.keys[layer].shape[2]
        if needed > blocks:
            blocks = min(max(needed, 2 * blocks), -(-self.max_length // self.BLOCK))
            self.keys[layer] = widened(self.keys[layer], blocks)
            self.values[layer] = widened(self.values[layer], blocks * self.BLOCK)

    def attend(self, layer: int, q: Tensor, mask: Tensor | None, position: int) -> Tensor:
        """softmax(q kᵀ / √K) v for one query (B, H, 1, K), which stands at a position that was written.

        mask: causal_mask's of all the new positions, (1 or B, 1, T, S), of which the query's is one.
        """
        B, H, _, K = q.shape
        S = position + 1
        used = -(-S // self.BLOCK)
        keys, values = self.keys[layer], self.values[layer]
        if self.rows is None or self.rows[0] != (keys.shape[2], used):
            rows = _rows_in_use(B * H, keys.shape[2], used, keys.shape[3], K, self.BLOCK)
            self.rows = (keys.shape[2], used), rows
        rows = self.rows[1]
        # Most of √K is taken from q, exactly, as a power of two: float16 ends at 65,504.
        scale = 2.0 ** -int(math.log2(K) / 2)
        q = q * scale
        scores = _bag(keys, rows.keys, q.expand(B, H, used, K))  # (B · H · blocks in use, positions)
        if self.rounds:
            keys[:, :, :used, K] = scores.view(B, H, used, self.BLOCK)
            minus_rounded = torch.cat((self.minus_one, q), dim=3).expand(B, H, used, K + 1)
            scores = scores.float().add_(_bag(keys, rows.keys_and_rounded, minus_rounded))
        scores = scores.view(B, H, 1, -1).div_(math.sqrt(K) * scale)
        scores[..., S:] = -torch.inf
        if mask is not None:
            seen = mask[:, :, position - self.length, :S][:, :, None]  # (1 or B, 1, 1, S)
            scores[..., :S].masked_fill_(~seen, -torch.inf)
        return _bag(values, rows.values, scores.softmax(dim=-1).to(q.dtype)).view(B, H, 1, K)


class _Rows(NamedTuple):
    """Which rows of a cache's tables the bags hold."""

    keys: tuple[Tensor, Tensor]
    keys_and_rounded: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]


@torch.inference_mode(False)
def _rows_in_use(heads: int, blocks: int, used: int, rows: int, K: int, positions: int) -> _Rows:
    """heads: of all sequences; each has blocks of so many rows, of which some are used."""

    def count(n: int) -> Tensor:
        return torch.arange(n, device="cpu")

    block = count(heads)[:, None] * blocks + count(used)  # (heads, used)
    keys = block[:, :, None] * rows + count(K)
    rounded = block[:, :, None] * rows + K
    values = count(heads)[:, None] * (blocks * positions) + count(used * positions)
    return _Rows(*map(_numbered, (keys, torch.cat((rounded, keys), dim=2), values)))


def _numbered(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bags of rows (…, rows of a bag) → their numbers, where bags start (and the last one ends)."""
    starts = torch.arange(0, rows.numel() + 1, rows.shape[-1], dtype=torch.int32, device="cpu")
    return rows.flatten().int(), starts


def _bag(table: Tensor, rows: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """A weighted sum of rows of a table (…, width) for each bag → (bags, width)."""
    numbers, starts = rows
    table = table.view(-1, table.shape[-1])
    return torch.embedding_bag(table, numbers, starts, False, 0, False, weights.reshape(-1), True)[0]
