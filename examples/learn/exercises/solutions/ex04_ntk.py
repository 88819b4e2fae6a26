"""Exercise 4, solved. qwen_ref/model.py, ntk_alpha and rotary_frequencies."""

import math

import torch
from torch import Tensor


def ntk_alpha(prompt_length: int, seq_length: int) -> int:
    # A short prompt has a negative logarithm: without max the base would be multiplied by a power of −0.97.
    return max(2 ** math.ceil(math.log2(prompt_length / seq_length) + 1) - 1, 1)


def frequencies(base: float, alpha: int, K: int) -> Tensor:
    stretched = base * alpha ** (K / (K - 2))
    return stretched ** (-torch.arange(0, K, 2, dtype=torch.float32) / K)
