"""Exercise 8: the MLP. Three matrices, and one of them is under the SiLU."""

import torch.nn.functional as F
from torch import Tensor


def mlp(x: Tensor, w1: Tensor, w2: Tensor, c_proj: Tensor) -> Tensor:
    """SwiGLU, down(up(x) · silu(gate(x))), with the weights under their published names: (…, D) → (…, D).

    w1 (F, D) and w2 (F, D) take x to the F channels in the middle, c_proj (D, F) takes them back.
    Which of the two is the gate? In Llama w1 is. In Qwen it is the other way round: w1 is up, w2 is gate.
    silu(z) = z · sigmoid(z) acts on the gate alone. The products in the middle are channel by channel.

    A weight of shape (out, in) is applied as x Wᵀ; nothing in Qwen's MLP has a bias.

    Source: Shazeer 2020, equation 6. In torch: F.linear(x, weight) is x Wᵀ; F.silu.

    One number, one channel: up is 2, gate is 1, silu(1) is 0.7311, down multiplies by 10.

    >>> import torch
    >>> one = torch.ones(1, 1)
    >>> mlp(x=one, w1=2 * one, w2=one, c_proj=10 * one)
    tensor([[14.6212]])
    """
    raise NotImplementedError  # your code in the place of this line
