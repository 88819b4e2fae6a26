"""Matrices laid out for a few rows of x: in their dtype, in 8 and in 4 bits."""

from __future__ import annotations

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ref.quantize.config import INT4_GROUPS
from qwen_ref.quantize.rounding import FewBits

FAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The most rows of x that go through the embedding bag, each reading the block again from the processor's
# cache. 6192 × 2048 in bfloat16, 2 cores: 4 rows take 1.6 ms, 8 take 2.6; as products of matrices 1.9, 2.1.
# In int8 8 rows take 2.5 ms, 16 take 4.8; as products of matrices, for which weights are widened, 4.0, 4.5.
# A bag computes each row by itself: a pass over so many tokens has the bits of passes over one token.
# decoding/lookup.py needs that for a token and the eight that it guesses.
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

    table: Tensor

    def __init__(self, weight: Tensor, wide: bool) -> None:
        width = block_width(len(weight), torch.get_num_threads())
        outputs, inputs = weight.shape
        super().__init__(outputs, inputs, weight.dtype, width, wide)
        self.must_not_round = wide and self.dtype != torch.float32  # as the bag does, to the table's dtype
        table = weight.new_zeros(self.blocks, self.inputs, self.width)
        for block, rows in zip(table, weight.split(self.width), strict=True):
            block[:, : len(rows)] = rows.t()
        self.register_buffer("table", table.flatten(0, 1))  # (blocks · in, width)

    def few(self, rows: Tensor) -> Tensor:
        if self.must_not_round:
            return torch.cat([self.many(row) for row in rows.split(1)])
        bags = _bags(self.blocks, self.inputs, len(rows))
        return _side_by_side(bag(self.table, bags, rows.expand(self.blocks, -1, -1)), self.blocks)

    def columns(self, start: int, stop: int) -> Tensor:
        return self.table.view(self.blocks, self.inputs, self.width)[start:stop]

    def many(self, rows: Tensor) -> Tensor:
        if len(rows) < _MANY_ROWS and self.product_dtype == self.dtype:
            return _side_by_side((rows @ self.columns(0, self.blocks)).flatten(0, 1), self.blocks)
        return super().many(rows)


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
        layout = int4_layout()
        assert layout is not None, "the caller looks whether the layout is known"
        values = _unpacked(packed, *layout).unflatten(1, (-1, self.group_size)).to(self.product_dtype)
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
    return numbered(numbers.expand(-1, rows, -1, -1))


@functools.lru_cache(maxsize=8)  # a model's matrices have four or five sizes
@torch.inference_mode(False)
def _counted(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device="cpu")


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_workspaces = _Workspaces()


def _workspace(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that many products use one after another: to allocate it each time costs as much as the copy."""
    found = _workspaces.by_dtype.get(dtype)
    if found is None or len(found) < size:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
            found = _workspaces.by_dtype[dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return found


def _has_products(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies matrices of this dtype faster than those of float32."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32


def bag(table: Tensor, rows: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """A weighted sum of rows of a table (…, width) for each bag → (bags, width)."""
    numbers, starts = rows
    table = table.view(-1, table.shape[-1])
    return torch.embedding_bag(table, numbers, starts, False, 0, False, weights.reshape(-1), True)[0]


def numbered(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bags of rows (…, rows of a bag) → their numbers, where bags start (and the last one ends)."""
    starts = torch.arange(0, rows.numel() + 1, rows.shape[-1], dtype=torch.int32, device="cpu")
    return rows.flatten().int(), starts
