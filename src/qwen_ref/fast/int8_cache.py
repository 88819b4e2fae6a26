"""A KV cache in 8 bits: a byte for each number, and a scale for each token and head.

    model.cache_type = Int8Cache        # after fasten, which gives the model a cache of its own

It takes half the memory of a 16-bit cache. Each pass turns the keys and values of one layer at a time back
into the model's dtype. The published releases have a similar option; the choice of scales here is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_ref.model import KVCache


class Int8Cache(KVCache):
    """x ≈ q · scale, with q from -127 to 127 and scale = max |x| / 127 over the K numbers of a token's head.

    Scales are float32 (float64 in a float64 model): float16 has none for heads below 1e-3.

    Attention reads rounded keys and values only, also those of the new tokens. So a prompt at once, in chunks
    and token by token is still the same computation.
    """

    def __init__(
        self, layers: int, shape: tuple[int, int, int, int], prompt_length: int | None, like: Tensor
    ) -> None:
        super().__init__(0, shape, prompt_length, like)
        self.keys, self.values = (
            [like.new_empty(shape, dtype=torch.int8) for _ in range(layers)] for _ in range(2)
        )
        wide = torch.promote_types(like.dtype, torch.float32)
        self.key_scales, self.value_scales = (
            [like.new_empty((*shape[:3], 1), dtype=wide) for _ in range(layers)] for _ in range(2)
        )

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._append(self.keys[layer], self.key_scales[layer], k),
            self._append(self.values[layer], self.value_scales[layer], v),
        )

    def _append(self, numbers: Tensor, scales: Tensor, x: Tensor) -> Tensor:
        """Writes T new positions (B, H, T, K), returns all S, (B, H, S, K)."""
        end = self.length + x.shape[2]
        new = self.length, x.shape[2]
        scale = x.abs().amax(dim=3, keepdim=True).to(scales.dtype) / 127
        scales.narrow(2, *new).copy_(scale)  # a slice would not fail where no room is
        # 0 / 0 would be NaN. A subnormal scale is rounded so much that x / scale can be 190.
        numbers.narrow(2, *new).copy_((x / torch.where(scale == 0, 1, scale)).round().clamp_(-127, 127))
        return (numbers[:, :, :end] * scales[:, :, :end]).to(x.dtype)
