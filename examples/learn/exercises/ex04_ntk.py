"""Exercise 4: how fast each pair of dimensions turns, and what dynamic NTK's α does to it."""

import math

import torch
from torch import Tensor


def ntk_alpha(prompt_length: int, seq_length: int) -> int:
    """Dynamic NTK's α for a prompt, in a model that was trained on texts of seq_length tokens.

        α = 2^⌈log2(prompt_length / seq_length) + 1⌉ − 1, and at least 1

    ⌈ ⌉ rounds up to a whole number. So α changes in steps: it is 1 up to the trained length, 3 up to twice
    the trained length, 7 up to four times the trained length. α = 1 changes nothing.

    Source: the 1.8B, 7B and 14B of Qwen, as published; the 72B has no NTK. In Python: math.log2, math.ceil.

    >>> ntk_alpha(10000, 8192)  # log2(1.22) + 1 = 1.29, rounded up 2
    3
    """
    raise NotImplementedError  # replace this line by your code


def frequencies(base: float, alpha: int, K: int) -> Tensor:
    """Radians per position, for each of the K/2 pairs of dimensions of a head: (K/2), float32.

        pair i, counted from 0, turns by B^(−2i/K) per position, where B = base · α^(K/(K−2))

    Pair 0 turns by 1 for every B. The last pair turns slowest: α times more slowly than with α = 1.

    Source: Su et al. 2021, section 3.2.2, for the formula with B = base. In torch: torch.arange(0, K, 2).

    >>> frequencies(base=10000.0, alpha=1, K=8)
    tensor([1.0000, 0.1000, 0.0100, 0.0010])
    """
    raise NotImplementedError  # replace this line by your code
