"""The windows that a long text is cut into, and the sums of their scores by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qwen_ref.config import InputError

if TYPE_CHECKING:
    from torch import Tensor


class Window(NamedTuple):
    """Tokens start to end of a text. Those from `scored` on are scored, given the window before them."""

    text: int  # the text's number
    start: int
    end: int
    scored: int


def windows(lengths_of_texts: Sequence[int], length: int, stride: int | None = None) -> list[Window]:
    """The windows of `length` tokens of each text; none crosses from one text to the next.

    Without stride the windows stand side by side. Each scores all its tokens but the first. A rest at the end
    of a text that is shorter than a window is left out. With stride each window begins `stride` tokens after
    the last one and scores only what that one did not. Every token of a text but the first is then scored
    once, up to the text's end.

    >>> windows([10], 4)
    [Window(text=0, start=0, end=4, scored=1), Window(text=0, start=4, end=8, scored=5)]
    >>> [tuple(window) for window in windows([9], 4, stride=3)]
    [(0, 0, 4, 1), (0, 3, 7, 4), (0, 6, 9, 7)]
    """
    if stride is not None and not 1 <= stride < length:
        raise InputError(f"{stride=} must be from 1 to below the length of a window, {length}")
    found = []
    for text, tokens in enumerate(lengths_of_texts):
        if tokens < length:
            continue
        if stride is None:
            starts = range(0, tokens - length + 1, length)
            found += [Window(text, start, start + length, start + 1) for start in starts]
            continue
        start = scored = 0
        while scored < tokens:
            end = min(start + length, tokens)
            found.append(Window(text, start, end, max(scored, 1)))
            start, scored = start + stride, end
    return found


def bucket_edges(length: int) -> list[int]:
    """The first positions of the buckets of a window, and the window's end: at most eight buckets, doubling.

    >>> bucket_edges(8192)
    [1, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    """
    return [1, *(length >> n for n in range(7, -1, -1) if length >> n > 1)]


class Sums(NamedTuple):
    """The sum of −log p in each bucket of a window, and how many tokens it has."""

    losses: list[float]
    tokens: list[int]


def window_sums(logprobs: Tensor, window: Window, length: int) -> Sums:
    """The log-probabilities of a window, as sums in the buckets of its length."""
    import torch

    edges = bucket_edges(length)
    positions = torch.arange(window.scored - window.start, window.end - window.start, device="cpu")
    bucket = torch.bucketize(positions, torch.tensor(edges[1:], device="cpu"), right=True)
    losses = torch.zeros(len(edges) - 1, dtype=torch.float64, device="cpu")
    losses.index_add_(0, bucket, -logprobs.double().cpu())
    return Sums(losses.tolist(), torch.bincount(bucket, minlength=len(edges) - 1).tolist())
