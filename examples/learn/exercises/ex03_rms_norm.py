"""Exercise 3: RMSNorm, and where it rounds."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last dimension: x (…, D), weight (D) → (…, D).

    Each row of x is divided by the root of the mean of its squares, so rows of any size become equally large.
    LayerNorm would also subtract the mean; RMSNorm does not. eps prevents a division by zero.

    The formula is the easy half. x is in the model's dtype, mostly bfloat16, which has 8 significant bits.
    The result has the same dtype. The published model rounds in this order:
    1. convert x to float32 and normalise it in float32;
    2. round the normalised x to the dtype that x had;
    3. only then multiply by weight, in that dtype.

    Source: Zhang and Sennrich 2019, equation 4; the order is that of the published code.
    In torch: x.to(dtype), x.dtype, torch.float32, x.mean(-1, keepdim=True), torch.sqrt.

    The mean of the squares of 3 and 4 is 12.5; its root is 3.5355:

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]), eps=1e-6)
    tensor([[ 0.8485, 11.3137]])
    """
    raise NotImplementedError  # replace this line by your code
