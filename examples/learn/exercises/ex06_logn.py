"""Exercise 6: LogN, the other half of what the smaller models do beyond the length they were trained on."""

import math

import torch
from torch import Tensor


def logn_scale(positions: Tensor, seq_length: int, dtype: torch.dtype) -> Tensor:
    """What the query at each position is multiplied by, after its rotation: the shape of positions, in dtype.

        log(n) / log(seq_length) where n > seq_length, else 1

    n counts the tokens that the query sees, itself among them; positions (int64) are counted from 0.
    The more tokens there are, the thinner attention is spread. Larger queries make it sharper again.

    Compute it in float32 or wider, and round to dtype last: bfloat16 cannot even hold most positions.

    Source: Chiang and Cholak 2022, for scores scaled by log n; the form is that of the 1.8B, 7B and 14B as
    published.

    >>> logn_scale(torch.tensor([0, 9, 10, 99]), seq_length=10, dtype=torch.float32)
    tensor([1.0000, 1.0000, 1.0414, 2.0000])
    """
    raise NotImplementedError  # your code in the place of this line
