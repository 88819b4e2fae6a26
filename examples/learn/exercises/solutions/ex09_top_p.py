"""Exercise 9, solved. qwen_ref/sampling.py, probabilities, does the same on logits, from the other end."""

import torch
from torch import Tensor


def top_p(probabilities: Tensor, p: float) -> Tensor:
    values, order = probabilities.sort(descending=True)
    before = values.cumsum(dim=-1) - values  # what the likelier ones have: short of p, this one is needed
    kept = torch.zeros_like(probabilities)
    kept[order] = values.where(before < p, 0.0)
    return kept / kept.sum()
