"""Exercise 3: RMSNorm, and where it rounds."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last dimension: x (…, D), weight (D) → (…, D).

    A row of x is divided by the root of the mean of its squares, so that rows of any size come out alike.
    Nothing is subtracted, as LayerNorm would. eps keeps a row of zeros from a division by zero.

    The formula is the easy half. x comes in the model's dtype, mostly bfloat16, which has 8 significant bits,
    and the result has that dtype, too. The published model rounds in this order:
    1. x becomes float32, and is normalised in float32;
    2. the normalised x is rounded to the dtype that x had;
    3. only then it is multiplied by weight, in that dtype.

    Source: Zhang and Sennrich 2019, equation 4; the order is that of the published code.
    In torch: x.to(dtype), x.dtype, torch.float32, x.mean(-1, keepdim=True), torch.sqrt.

    The squares of 3 and 4 have the mean 12.5, and its root is 3.5355:

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]), eps=1e-6)
    tensor([[ 0.8485, 11.3137]])
    """
    raise NotImplementedError  # your code in the place of this line
