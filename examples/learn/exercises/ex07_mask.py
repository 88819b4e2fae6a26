"""Exercise 7: the causal mask, when some of the keys were there before."""

import torch
from torch import Tensor


def causal_mask(T: int, S: int) -> Tensor:
    """(T, S), bool: row t is a query, column s a key, True where the query may see the key.

    There are S keys, those of positions 0 to S − 1. The last T of them are new; the S − T before them come
    out of the cache. There are queries for the T new positions only. A query sees its own key and all before.

    A whole prompt without a cache is T = S. One token behind a cache is T = 1. A prompt that is fed in chunks
    is everything between, and there one formula has to be right for all.

    Source: Vaswani et al. 2017, section 3.2.3. In torch: torch.arange, and comparing a column with a row, or
    torch.tril or torch.triu and its argument diagonal.

    Two tokens behind one that is cached: the first query stands at position 1, the second at position 2.

    >>> causal_mask(2, 3)
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    raise NotImplementedError  # your code in the place of this line
