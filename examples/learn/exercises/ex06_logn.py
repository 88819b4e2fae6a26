"""Exercise 6: LogN, the second correction of the smaller models beyond their trained length."""

import math

import torch
from torch import Tensor


def logn_scale(positions: Tensor, seq_length: int, dtype: torch.dtype) -> Tensor:
    """The factor for the query at each position, applied after the rotation: shape of positions, in dtype.

        log(n) / log(seq_length) if n > seq_length, else 1

    n is the number of tokens that the query sees, including its own. positions (int64) are counted from 0.
    With more tokens, attention spreads over more of them. A larger query concentrates it again.

    Compute in float32 or wider and round to dtype at the end: bfloat16 cannot represent most positions.

    Source: Chiang and Cholak 2022, for scores scaled by log n; the form is that of the 1.8B, 7B and 14B as
    published.

    >>> logn_scale(torch.tensor([0, 9, 10, 99]), seq_length=10, dtype=torch.float32)
    tensor([1.0000, 1.0000, 1.0414, 2.0000])
    """
    raise NotImplementedError  # replace this line by your code
