"""Exercise 5: rotary positions. Which two dimensions are a pair?"""

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    """Every pair (a, b) of the last dimension becomes (−b, a), a turn by 90°: (…, K) → (…, K).

    In Qwen, dimensions i and i + K/2 are a pair: one from the first half of a head, one from the second half.
    The paper pairs neighbours: 0 with 1, 2 with 3. Weights trained with one pairing do not work with the
    other.

    In torch: x.chunk(2, dim=-1), torch.cat.

    >>> rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # the pairs are (1, 3) and (2, 4)
    tensor([-3., -4.,  1.,  2.])
    """
    raise NotImplementedError  # replace this line by your code


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every pair of x by its angle: x · cos + rotate_half(x) · sin.

    x: (B, T, H, K), queries or keys, in the model's dtype. cos, sin: (1, T, 1, K), in float32; they belong to
    the angle position · frequency (exercise 4) and are the same for both dimensions of a pair.
    Compute in the dtype of cos and sin, and round once, at the end, to the dtype of x.

    If query and key are each turned by their position, their dot product depends on how far apart they are,
    not on where they are. So attention knows distances. Qwen encodes positions in no other way.

    Source: Su et al. 2021, section 3.4.2, equation 34, there with neighbours as pairs.

    A quarter turn for the first pair, none for the second:

    >>> x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    >>> rotate(x, cos=torch.tensor([[[[0.0, 1.0, 0.0, 1.0]]]]), sin=torch.tensor([[[[1.0, 0.0, 1.0, 0.0]]]]))
    tensor([[[[-3.,  2.,  1.,  4.]]]])
    """
    raise NotImplementedError  # replace this line by your code
