"""Exercise 9: top-p, before a token is drawn."""

import torch
from torch import Tensor


def top_p(probabilities: Tensor, p: float) -> Tensor:
    """The smallest set of likeliest tokens that together reach p is kept, and made to sum to 1: (V) → (V).

    Tokens keep their places; those outside of the set get 0. "Reach" means ≥ p: the token with which the sum
    gets there belongs to the set. So at least one token always stays.

    Source: Holtzman et al. 2020, section 3.1 (nucleus sampling). The published folders set p = 0.8.
    In torch: x.sort(descending=True), which gives values and indices; x.cumsum(dim=-1); torch.zeros_like.

    The likeliest two have 0.75 together, which is enough for 0.7; 0.5 alone is not:

    >>> top_p(torch.tensor([0.0625, 0.5, 0.1875, 0.25]), p=0.7)
    tensor([0.0000, 0.6667, 0.0000, 0.3333])
    """
    raise NotImplementedError  # your code in the place of this line
