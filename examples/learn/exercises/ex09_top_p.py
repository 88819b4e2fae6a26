"""Exercise 9: top-p, before a token is drawn."""

import torch
from torch import Tensor


def top_p(probabilities: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of likeliest tokens whose sum reaches p, scaled to sum to 1: (V) → (V).

    Tokens keep their places. Tokens outside the set get 0. "Reach" means ≥ p: the token with which the sum
    reaches p belongs to the set. So at least one token always stays.

    Source: Holtzman et al. 2020, section 3.1 (nucleus sampling). The published folders set p = 0.8.
    In torch: x.sort(descending=True), which gives values and indices; x.cumsum(dim=-1); torch.zeros_like.

    The two likeliest tokens have 0.75 together, which reaches 0.7; the likeliest alone, 0.5, does not:

    >>> top_p(torch.tensor([0.0625, 0.5, 0.1875, 0.25]), p=0.7)
    tensor([0.0000, 0.6667, 0.0000, 0.3333])
    """
    raise NotImplementedError  # replace this line by your code
