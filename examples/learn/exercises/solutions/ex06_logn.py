"""Exercise 6, solved. qwen_ref/model.py, logn_scale."""

import math

import torch
from torch import Tensor


def logn_scale(positions: Tensor, seq_length: int, dtype: torch.dtype) -> Tensor:
    # Position p sees p + 1 tokens. The ratio is below 1 exactly where n < seq_length: clamp is the "else 1".
    scale = torch.log(positions.double() + 1) / math.log(seq_length)
    return scale.clamp(min=1.0).to(dtype)
