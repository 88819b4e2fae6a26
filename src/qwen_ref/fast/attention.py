"""Attention of a few new tokens, and a cache laid out for it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen_ref.fast.matrices import FEW_ROWS, bag, numbered
from qwen_ref.model import Attention, KVCache, Positions, rotate


class FastAttention(Attention):
    """The attention of model.py. A few new tokens read the cache by embedding bags."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.head_size, self.qkv, self.out = attention.head_size, attention.qkv, attention.out

    def forward(self, x: Tensor, at: Positions, cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, -1, self.head_size)  # (B, T, 3, H, K)
        both = rotate(qkv[:, :, :2].flatten(2, 3), at.cos, at.sin)  # q and k at once: (B, T, 2 H, K)
        q, k = both.chunk(2, dim=2)
        if at.query_scale is not None:
            q = q * at.query_scale
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)  # (B, H, T, K)
        mixed = self.mix(q, k, v, at.mask, cache, layer)  # (B, H, T, K)
        return self.out(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, H·K) → (B, T, D)

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

    Each position is a row of the values. The keys are transposed: each dimension is a row, in blocks of 128
    positions. The scores of a block are the sum over dimensions d of q[d] · row d.

    The bag rounds its sums to the cache's dtype. Scores must not be rounded to half precision, because the
    softmax takes their exponential. So a block has one more row, for the rounded scores. A second bag
    subtracts that row from the same sum, which gives the rounding error. Score = rounded score + error.
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
        # Whole blocks are summed, positions behind the last one with weight 0. Their values must be 0, too,
        # because 0 · NaN is NaN. For each layer: the values from the first to the second position are 0.
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
        start_of_zeros, ready = self.zeros[layer]
        stop = -(-end // self.BLOCK) * self.BLOCK
        if stop > ready or end < start_of_zeros:  # a new block, or a cache that was rewound
            self.values[layer][:, :, end : max(start_of_zeros, stop)] = 0
        # In this order: a pass may be interrupted, and what it leaves behind `length` is no zeros.
        self.zeros[layer] = end, max(ready, stop)
        self.values[layer][:, :, self.length : end] = v
        start = self.length
        while start < end:
            block, offset = divmod(start, self.BLOCK)
            stop = min(end, (block + 1) * self.BLOCK)
            part = k[:, :, start - self.length : stop - self.length].transpose(2, 3)  # (B, H, K, positions)
            self.keys[layer][:, :, block, :K, offset : offset + stop - start] = part
            start = stop

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
        scores = bag(keys, rows.keys, q.expand(B, H, used, K))  # (B · H · blocks in use, positions)
        if self.rounds:
            keys[:, :, :used, K] = scores.view(B, H, used, self.BLOCK)
            minus_rounded = torch.cat((self.minus_one, q), dim=3).expand(B, H, used, K + 1)
            scores = scores.float().add_(bag(keys, rows.keys_and_rounded, minus_rounded))
        scores = scores.view(B, H, 1, -1).div_(math.sqrt(K) * scale)
        scores[..., S:] = -torch.inf
        if mask is not None:
            seen = mask[:, :, position - self.length, :S][:, :, None]  # (1 or B, 1, 1, S)
            scores[..., :S].masked_fill_(~seen, -torch.inf)
        return bag(values, rows.values, scores.softmax(dim=-1).to(q.dtype)).view(B, H, 1, K)


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
    return _Rows(*map(numbered, (keys, torch.cat((rounded, keys), dim=2), values)))
