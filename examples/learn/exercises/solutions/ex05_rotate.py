"""Exercise 5, solved. qwen_ref/model.py, rotate; the tables are made in rotation_tables."""

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    return (wide * cos + rotate_half(wide) * sin).to(x.dtype)
