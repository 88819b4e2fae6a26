"""Exercise 8: the MLP. It has three matrices, and the SiLU acts on the output of one."""

import torch.nn.functional as F
from torch import Tensor


def mlp(x: Tensor, w1: Tensor, w2: Tensor, c_proj: Tensor) -> Tensor:
    """SwiGLU, down(up(x) · silu(gate(x))), with the weights under their published names: (…, D) → (…, D).

    w1 (F, D) and w2 (F, D) turn x into F channels each; c_proj (D, F) turns F channels back into D numbers.
    In Llama, w1 is the gate. In Qwen it is the other way round: w1 is up, w2 is the gate.
    silu(z) = z · sigmoid(z) acts on the gate only. up and silu(gate) are multiplied channel by channel.

    A weight of shape (out, in) is applied as x Wᵀ. Qwen's MLP has no bias.

    Source: Shazeer 2020, equation 6. In torch: F.linear(x, weight) is x Wᵀ; F.silu.

    One number, one channel: up is 2, gate is 1, silu(1) is 0.7311, down multiplies by 10.

    >>> import torch
    >>> one = torch.ones(1, 1)
    >>> mlp(x=one, w1=2 * one, w2=one, c_proj=10 * one)
    tensor([[14.6212]])
    """
    raise NotImplementedError  # replace this line by your code
