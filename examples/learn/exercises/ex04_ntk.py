"""Exercise 4: how fast each pair of dimensions turns, and what dynamic NTK's α does to it."""

import math

import torch
from torch import Tensor


def ntk_alpha(prompt_length: int, seq_length: int) -> int:
    """Dynamic NTK's α for a prompt, of a model that was trained on texts of seq_length tokens.

        α = 2^⌈log2(prompt_length / seq_length) + 1⌉ − 1, and at least 1

    ⌈ ⌉ rounds up to a whole number, so that α goes in steps: 1 up to the trained length, 3 up to twice that,
    7 up to four times that. 1 changes nothing.

    Source: the 1.8B, 7B and 14B of Qwen, as published; the 72B has no NTK. In Python: math.log2, math.ceil.

    >>> ntk_alpha(10000, 8192)  # log2(1.22) + 1 = 1.29, rounded up 2
    3
    """
    raise NotImplementedError  # your code in the place of this line


def frequencies(base: float, alpha: int, K: int) -> Tensor:
    """Radians per position, for each of the K/2 pairs of dimensions of a head: (K/2), float32.

        pair i, from 0 on, turns by B^(−2i/K) a position, where B = base · α^(K/(K−2))

    Pair 0 turns by 1 whatever B is; the last pair turns slowest, α times as slowly as it would with α = 1.

    Source: Su et al. 2021, section 3.2.2, for the formula with B = base. In torch: torch.arange(0, K, 2).

    >>> frequencies(base=10000.0, alpha=1, K=8)
    tensor([1.0000, 0.1000, 0.0100, 0.0010])
    """
    raise NotImplementedError  # your code in the place of this line
