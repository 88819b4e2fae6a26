"""Forms of a weight matrix: each holds it in another layout, with another product for a few rows of x.

    form             kernel   bits of a weight             product of a few rows
    Table            bag      those of the dtype           embedding bag
    Rows             linear   those of the dtype           torch's linear
    Int8Table        bag      8, for 8 or 4 of the weight  embedding bag of bytes
    DynamicInt8      dynamic  8                            8-bit product, x in two integers of 7 bits
    Int4Matrix       int4     4                            torch's weight-only product

kernels.py chooses among those that hold a weight as it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ref.parallel import has_products, linear, unrounded_linear
from qwen_ref.quantize.config import INT4_GROUPS
from qwen_ref.quantize.rounding import FewBits

FAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The most rows of x that are multiplied each by itself, reading the weights again from the processor's cache.
# In embedding bags, 6192 × 2048 in bfloat16, 2 cores: 4 rows take 1.6 ms, 8 take 2.6; as products of matrices
# 1.9 and 2.1.
# In int8 8 rows take 2.5 ms, 16 take 4.8; as products of matrices, for which weights are widened, 4.0, 4.5.
# So in every form a pass over so many tokens has the bits of passes over one token. decoding/lookup.py needs
# that for a token and the eight that it guesses.
FEW_ROWS = 9
# Where every group has a scale, turning weights back takes longer: 5504 × 2048 in groups of 128, 16 rows take
# 5.5 ms in bags and 14.9 as a product, 32 take 10.8 and 18, 64 take 20.3 and 12.8.
_FEW_ROWS_IN_GROUPS = 32
# From here on the table is turned back into a matrix first: 512 rows then take 33.5 ms instead of 38.3, but
# 16 rows would take 3.9 instead of 2.8.
_MANY_ROWS = 64
_WORKSPACE = 2**22  # numbers of the matrix turned back at a time: 8 MB of bfloat16


class Matrix(nn.Module):
    """W (out, in) in some form: x (…, in) → x Wᵀ (…, out), in float32 where the results are to be added up
    unrounded (wide), else in x's dtype or wider.
    """

    order: Tensor | None

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
        self.product_dtype = dtype if has_products(dtype) and not wide else torch.float32

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
        """The blocks from start to stop of Wᵀ, side by side: (in, (stop - start) · width)."""
        raise NotImplementedError

    def in_order(self, y: Tensor) -> Tensor:
        """The product with such columns, (rows, …) → the outputs in their order."""
        return y

    def many(self, rows: Tensor) -> Tensor:
        """The product with many rows: a stretch of Wᵀ is turned back into a matrix, then used for all."""
        x = rows.to(self.product_dtype)
        step = max(1, _WORKSPACE // (self.inputs * self.width))
        y = x.new_empty(len(x), self.blocks * self.width)
        for start in range(0, self.blocks, step):
            stop = min(start + step, self.blocks)
            y[:, start * self.width : stop * self.width] = self.in_order(x @ self.columns(start, stop))
        return y


class Rows(Matrix):
    """W as it is, in the model's dtype."""

    weight: Tensor

    def __init__(self, weight: Tensor, wide: bool) -> None:
        outputs, inputs = weight.shape
        # A stretch stays in the processor's cache while each of a few rows is multiplied by it.
        super().__init__(outputs, inputs, weight.dtype, max(1, 2**21 // inputs), wide)
        self.wide = wide
        self.register_buffer("weight", large_pages(weight.shape, weight.dtype).copy_(weight))

    def few(self, rows: Tensor) -> Tensor:
        parts = self.weight.split(self.width)
        return torch.cat([torch.cat([self._product(x, part) for x in rows.split(1)]) for part in parts], 1)

    def many(self, rows: Tensor) -> Tensor:
        return self._product(rows, self.weight)

    def _product(self, rows: Tensor, weight: Tensor) -> Tensor:
        return unrounded_linear(rows, weight) if self.wide else linear(rows, weight, None)


class Table(Matrix):
    """Rows of Wᵀ, a block of outputs at a time, in the model's dtype."""

    table: Tensor

    def __init__(self, weight: Tensor, wide: bool) -> None:
        width = block_width(len(weight), torch.get_num_threads())
        outputs, inputs = weight.shape
        super().__init__(outputs, inputs, weight.dtype, width, wide)
        self.must_not_round = wide and self.dtype != torch.float32  # as the bag does, to the table's dtype
        table = large_pages((self.blocks, self.inputs, self.width), self.dtype)
        for block, rows in zip(table, weight.split(self.width), strict=True):
            block[:, : len(rows)] = rows.t()
        self.register_buffer("table", table.flatten(0, 1))  # (blocks · in, width)

    def few(self, rows: Tensor) -> Tensor:
        if self.must_not_round:
            return torch.cat([self.many(row) for row in rows.split(1)])
        bags = _bags(self.blocks, self.inputs, len(rows))
        return _side_by_side(bag(self.table, bags, rows.expand(self.blocks, -1, -1)), self.blocks)

    def columns(self, start: int, stop: int) -> Tensor:
        return _side_by_side_columns(self._blocks[start:stop], self.product_dtype)

    def many(self, rows: Tensor) -> Tensor:
        if len(rows) < _MANY_ROWS and self.product_dtype == self.dtype:
            return _side_by_side((rows @ self._blocks).flatten(0, 1), self.blocks)
        return super().many(rows)

    @property
    def _blocks(self) -> Tensor:
        return self.table.view(self.blocks, self.inputs, self.width)


class Int8Table(Matrix):
    """Rows of Wᵀ in a byte each, and a scale for each output, or for each output and group of inputs.

    torch's bag of bytes takes a byte u of a row for u · scale + bias, with scale and bias of the row in the
    eight bytes behind it. A scale of ours belongs to a column. So the row's scale is 1, its bias is minus the
    middle of the range (128, or 8 for 4 bits), and the sums over each group, in float32, are scaled later.
    """

    table: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, few_bits: FewBits, dtype: torch.dtype, wide: bool) -> None:
        outputs, inputs = few_bits.shape
        width = block_width(outputs, torch.get_num_threads())
        super().__init__(outputs, inputs, dtype, width, wide, few_bits.order)
        self.groups = inputs // few_bits.group_size
        self.middle = 1 << (few_bits.bits - 1)
        table = large_pages((self.blocks, inputs, self.width + 8), torch.uint8)
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
        sums = sums.sum(dim=2) if self.groups > 1 else sums
        return _side_by_side(sums.view(-1, self.width), self.blocks)

    def columns(self, start: int, stop: int) -> Tensor:
        blocks = self.table.view(self.blocks, self.inputs, -1)[start:stop, :, : self.width]
        matrix = _side_by_side_columns(blocks, torch.float32)
        if self.scaled_afterwards:
            return _rounded(matrix.sub_(self.middle), self.product_dtype)  # exact: bfloat16 has 8 bits
        scale, offset = (
            None if part is None else part[start:stop, 0].transpose(0, 1).flatten(1)
            for part in (self.scale, self.offset)
        )
        assert scale is not None
        offset = scale * -self.middle if offset is None else offset - scale * self.middle
        return _scaled(matrix, scale, offset, self.product_dtype)

    def many(self, rows: Tensor) -> Tensor:
        y = super().many(rows)
        return y * self.scale.flatten() if self.scaled_afterwards else y

    @property
    def scaled_afterwards(self) -> bool:
        return self.groups == 1 and self.offset is None


class DynamicInt8(Matrix):
    """W in a byte each and a scale for each output, as torch's dynamically quantised product takes it.

    That product rounds x to integers, with one scale for all rows. We leave it nothing to round: a row x is
    given as two rows of integers, which are x to 1 / 7,938 of its largest number,

        x ≈ s (a + b / 126),  s = max |x| / 63,  a = round(x / s),  b = round(126 (x / s - a)),  |a|, |b| ≤ 63

    A row more holds -64 and 63, so that the scale that it chooses is 1. Without AVX-512 the product
    adds pairs in 16 bits. That has room for 7 bits of x, not for 8. All sums are exact, so a row does not
    depend on the others.
    """

    STEPS, PARTS = 63, 126

    def __init__(self, few_bits: FewBits, dtype: torch.dtype, wide: bool) -> None:
        outputs, inputs = few_bits.shape
        super().__init__(outputs, inputs, dtype, outputs, wide)
        step = max(1, 2**25 // inputs)  # torch copies weights twice to pack them: so not all at once
        parts = [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]
        self.packed = [_packed(few_bits, part) for part in parts]

    def takes_few(self, rows: int) -> bool:
        return True

    def few(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        integers = _workspaces.integers(len(rows), self.inputs)  # (2 · rows + 1, in)
        first, second = integers[:-1].view(2, len(rows), -1)
        step = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).div_(self.STEPS)
        # Zeros have no step, a subnormal step may be much too small, and a row that is not finite must
        # not spoil the others: below, its step makes its results infinite or NaN.
        steps = torch.div(rows, step).nan_to_num_(0.0, 0.0, 0.0).clamp_(-self.STEPS, self.STEPS)
        torch.round(steps, out=first)
        torch.sub(steps, first, out=second).mul_(self.PARTS)
        parts = [torch.ops.quantized.linear_dynamic(integers, packed, True) for packed in self.packed]
        y = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        y = torch.add(y[: len(rows)], y[len(rows) : -1], alpha=1 / self.PARTS)
        return y.mul_(step)

    def get_extra_state(self) -> list[Any]:
        """For state_dict: the weights, which are no tensors."""
        return self.packed

    def set_extra_state(self, state: list[Any]) -> None:
        self.packed = state

    @property
    def packed_bytes(self) -> int:
        """Of what torch packed, which is no tensor: weights in a byte each, a scale and a sum an output.

        Without AVX-512 it fills up blocks of 512 inputs.
        """
        inputs = self.inputs
        if not torch.cpu._is_avx512_supported():
            inputs = -(-inputs // 512) * 512
        return self.outputs * (inputs + 4 + 4)


def _packed(few_bits: FewBits, outputs: slice) -> Any:
    """Some outputs as torch packs them, less 128."""
    count = outputs.stop - outputs.start
    q = large_pages((count, few_bits.shape[1]), torch.int8)
    scale = torch.empty(count, dtype=torch.float64, device="cpu")
    zeros = torch.zeros(count, dtype=torch.int64, device="cpu")
    for start in range(0, count, 512):  # rounding takes several times the memory of what it gives
        part = slice(start, min(start + 512, count))
        rows = slice(outputs.start + part.start, outputs.start + part.stop)
        found, scale[part, None], _ = few_bits.rows(rows)
        q[part] = found.view(torch.int8) ^ -128
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to move such tensors into another package
        quantised = torch._make_per_channel_quantized_tensor(q, scale, zeros, 0)
        del q  # torch has copied it, and copies it again
        return torch.ops.quantized.linear_prepack(quantised, None)


class Int4Matrix(Matrix):
    """W in 4 bits, with a scale and an offset for each group of inputs, as torch's product takes them.

    That product is fast in bfloat16 alone: the same weights take 30 times as long in float32 and in float16.
    How torch packs them depends on the processor (see int4_layout). Many rows are multiplied as in every
    other form.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, few_bits: FewBits) -> None:
        outputs, inputs = few_bits.shape
        super().__init__(outputs, inputs, torch.bfloat16, 64, False, few_bits.order)
        group_size = kernel_group(few_bits.group_size)
        assert group_size is not None, "the caller looks whether torch has such groups"
        self.group_size = group_size
        copies = few_bits.group_size // self.group_size
        packed = large_pages((self.blocks, inputs * 32), torch.uint8)
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
        """In the order (2, pairs): outputs in the lower halves of bytes, then those in the upper."""
        strip, _ = self.layout
        bytes_ = self.packed.view(self.blocks, -1)[start:stop].view(-1, self.inputs, strip // 2)
        words = bytes_.view(torch.int64).transpose(0, 1).contiguous()  # faster in words than in bytes
        pairs = words.view(torch.uint8).flatten(1)  # (in, pairs)
        matrix = _workspace(2 * pairs.numel(), torch.float32).view(self.inputs, 2, -1)
        matrix[:, 0], matrix[:, 1] = pairs & 15, pairs >> 4
        scales = self.scales.unflatten(1, (self.blocks, 64))[:, start:stop].float()
        scale, zero = (self._pairs(part).permute(0, 3, 1, 2).flatten(1) for part in scales.unbind(-1))
        return _scaled(matrix.flatten(1), scale, zero - 8 * scale, self.product_dtype)

    def in_order(self, y: Tensor) -> Tensor:
        strip, neighbours = self.layout
        y = y.view(len(y), 2, -1, strip // 2)  # (rows, 2, strips, bytes)
        return y.permute(0, 2, 3, 1).flatten(1) if neighbours else y.transpose(1, 2).flatten(1)

    def _pairs(self, part: Tensor) -> Tensor:
        """Numbers of all outputs (groups, blocks, 64) → (groups, strips, bytes, 2): the two of each byte."""
        strip, neighbours = self.layout
        if neighbours:
            return part.reshape(len(part), -1, strip // 2, 2)
        return part.reshape(len(part), -1, 2, strip // 2).transpose(2, 3)

    @property
    def layout(self) -> tuple[int, bool]:
        layout = int4_layout()
        assert layout is not None, "the caller looks whether the layout is known"
        return layout


def large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros, in pages of 2 MB where Linux has them.

    A processor finds memory by tables of pages. Those of 4 KB do not fit its cache of them: with large pages
    the bag reads 22 GB/s instead of 16 (2-core Intel Xeon, AVX2 kernels), in a virtual machine.
    """
    size = math.prod(shape) * dtype.itemsize
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= 2**21:
        with contextlib.suppress(OSError):  # too little memory: torch says so
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype).view(*shape)
    return torch.zeros(*shape, dtype=dtype, device="cpu")


def kernel_group(group_size: int) -> int | None:
    """The largest group of torch's int4 product that divides one of this size; None: there is none."""
    return max((size for size in INT4_GROUPS if group_size % size == 0), default=None)


def block_width(outputs: int, threads: int) -> int:
    """As many blocks for every thread, the fewest in which a row's sums fit into registers; a multiple of 8.

    AVX-512 has room for 28 · 16 sums, AVX2 for 12 · 8. On AVX-512 blocks of 64 take 1.3 times as long as of
    352, of 1024 twice. On AVX2 blocks of 352 take 1.4 times as long as of 96.
    """
    most = 352 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 96
    blocks = threads * -(-outputs // (most * threads))
    return -(-outputs // (8 * blocks)) * 8


@functools.cache
@torch.inference_mode(False)
def int4_layout() -> tuple[int, bool] | None:
    """How torch packs int4 weights on this processor, found by packing some; None: in an unknown way.

    The outputs of a strip stand together: bytes of a strip are (in, strip / 2). Byte n of an input holds
    outputs n (low half) and n + strip / 2 of the strip; or, where neighbours share a byte, 2n and 2n + 1.
    AVX-512 has strips of 64, AVX2 of 32. Without either, neighbours share a byte.
    """
    if not hasattr(torch, "_convert_weight_to_int4pack_for_cpu"):  # torch 2.2, the last for Intel Macs
        return None
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
    if rows == 1:
        return sums.view(1, -1)
    return sums.view(blocks, rows, -1).transpose(0, 1).reshape(rows, -1)


def _side_by_side_columns(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of Wᵀ (n, in, width) → (in, n · width)."""
    n, inputs, width = blocks.shape
    matrix = _workspace(blocks.numel(), dtype).view(inputs, n, width)
    return matrix.copy_(blocks.transpose(0, 1)).flatten(1)


def _scaled(matrix: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix · scale + offset for each group of rows, in float32, then rounded to dtype.

    matrix (in, columns) is overwritten; scale and offset are (groups, columns).
    """
    groups = matrix.view(len(scale), -1, matrix.shape[1])
    torch.addcmul(offset[:, None], groups, scale[:, None], out=groups)
    return _rounded(matrix, dtype)


def _rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    if matrix.dtype == dtype:
        return matrix
    return _workspace(matrix.numel(), dtype).view(matrix.shape).copy_(matrix)


def _bags(blocks: int, inputs: int, rows: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """For each block and each row of x a bag of the block's table rows, or one for each group of them.

    Only the numbers for one row of x are kept. Those of every number of rows would take gigabytes at the
    72B's widths; they are copied for each product, 4 bytes for a table row of 100 to 700.
    """
    numbers, starts = _bags_of_one_row(blocks * inputs, inputs // groups)
    if rows == 1:
        return numbers, starts
    return numbered(numbers.view(blocks, 1, groups, -1).expand(-1, rows, -1, -1))


@functools.lru_cache(maxsize=8)  # a model's matrices have four or five sizes
@torch.inference_mode(False)
def _bags_of_one_row(count: int, bag_size: int) -> tuple[Tensor, Tensor]:
    return numbered(torch.arange(count, dtype=torch.int32, device="cpu").view(-1, bag_size))


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}
        self._integers: dict[tuple[int, int], Tensor] = {}

    def integers(self, rows: int, inputs: int) -> Tensor:
        """What DynamicInt8 gives its product: (2 · rows + 1, inputs), the last row -64, 63, 0, …"""
        found = self._integers.get((rows, inputs))
        if found is None:
            with torch.inference_mode(False):
                found = torch.zeros(2 * rows + 1, inputs, dtype=torch.float32, device="cpu")
                found[-1, :2] = torch.tensor([-64.0, 63.0], dtype=torch.float32, device="cpu")
            if rows <= FEW_ROWS:
                self._integers[rows, inputs] = found
        return found


_workspaces = _Workspaces()


def _workspace(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that many products use one after another: to allocate it each time costs as much as the copy."""
    found = _workspaces.by_dtype.get(dtype)
    if found is None or len(found) < size:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
            found = _workspaces.by_dtype[dtype] = large_pages((size,), dtype)
    return found[:size]


def bag(table: Tensor, rows: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """A weighted sum of rows of a table (…, width) for each bag → (bags, width)."""
    numbers, starts = rows
    table = table.view(-1, table.shape[-1])
    return torch.embedding_bag(table, numbers, starts, False, 0, False, weights.reshape(-1), True)[0]


def numbered(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bags of rows (…, rows of a bag) → their numbers, where bags start (and the last one ends)."""
    starts = torch.arange(0, rows.numel() + 1, rows.shape[-1], dtype=torch.int32, device="cpu")
    return rows.flatten().int(), starts
