"""Exercise 10: one model on several devices. Which rows of q, k and v does a rank need?"""

import torch
from torch import Tensor


def qkv_part(qkv: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's part of the fused projection: (3D, D) → (3D / ranks, D), and of its bias (3D) → (3D / ranks).

    The ranks, 0 to ranks − 1, share the heads evenly and in order: with 4 heads and 2 ranks, rank 1 has heads
    2 and 3. To compute a head, a rank needs the head's rows of q, of k and of v.

    The rows of the published matrix are stacked [q; k; v], D rows each. In each of the three, the rows of
    head 0 come first, then the rows of head 1, and so on. Stack the part in the same way, so that the rank
    can use it like the matrix of a smaller model: [q of its heads; k of its heads; v of its heads].

    Source: Shoeybi et al. 2019, section 3. In torch: x.chunk(n, dim=0), torch.cat.

    D = 4, two ranks. q is rows 0 to 3, k is 4 to 7, v is 8 to 11:

    >>> qkv_part(torch.arange(12), rank=0, ranks=2)
    tensor([0, 1, 4, 5, 8, 9])
    """
    raise NotImplementedError  # replace this line by your code
