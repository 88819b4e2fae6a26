"""Exercise 7: the causal mask, if some of the keys come from a cache."""

import torch
from torch import Tensor


def causal_mask(T: int, S: int) -> Tensor:
    """(T, S), bool: row t is a query, column s is a key; True if the query may see the key.

    There are S keys, at positions 0 to S − 1. The last T keys are new; the S − T keys before them come from
    the cache. Only the T new positions have queries. A query sees the key at its own position and all keys
    before it.

    A whole prompt without a cache gives T = S. A decode step, one token after a cache, gives T = 1. A prompt
    in chunks gives values of T between 1 and S. One formula must be right in all three cases.

    Source: Vaswani et al. 2017, section 3.2.3. In torch: torch.arange and a comparison of a column with a
    row; or torch.tril or torch.triu with the argument diagonal.

    Two new tokens after one cached token: the first query is at position 1, the second at position 2.

    >>> causal_mask(2, 3)
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    raise NotImplementedError  # replace this line by your code
