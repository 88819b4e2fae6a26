"""Exercise 7, solved. qwen_ref/model.py, causal_mask, which knows padding as well."""

import torch
from torch import Tensor


def causal_mask(T: int, S: int) -> Tensor:
    queries = torch.arange(S - T, S)[:, None]
    keys = torch.arange(S)
    return keys <= queries
