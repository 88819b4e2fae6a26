"""Scores of texts, and the windows that a long text is cut into."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ref.commands.files import LARGEST_TEXT, write_whole
from qwen_ref.config import (
    InputError,
    parse_json,
    read_bytes,
    shown,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_ref.model import Qwen
_STATE = "qwen_ref.perplexity 1"


def score(
    model: Qwen,
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    continuations: Sequence[Sequence[int]] | None = None,
    batch_size: int = 8,
) -> Tensor | list[Tensor]:
    """Log-probabilities of the tokens of a text, of several texts, or of continuations of one prompt.

    ids: a text of T tokens → (T − 1): of each token but the first, given all before it. Several texts, of any
    lengths → a list of such; a tensor (B, T) → (B, T − 1).
    continuations: of the prompt ids, which goes through the model once → a list, of each continuation's
    tokens, given the prompt and the tokens before them.
    batch_size: so many texts or continuations share a pass; the numbers change by rounding alone.
    float32, or float64 in a float64 model. Dynamic NTK's α is that of each whole text, prompt and
    continuation together. Several ranks call it alike, and all get the result.
    Raises ValueError for no text, ids outside the vocabulary, and logits that are not finite.

    >>> score(model, tokenizer.encode("冰岛的首都是雷克雅未克")).sum()  # log p, given the first token
    >>> yes, no = score(model, prompt, [tokenizer.encode(" yes"), tokenizer.encode(" no")])
    >>> yes.sum() > no.sum()
    """
    import torch

    from qwen_ref.perplexity.scoring import score_continuations, score_texts

    dimensions = 1 + any(map(_is_list, ids)) if isinstance(ids, Sequence) else getattr(ids, "ndim", 0)
    right = dimensions in (1, 2) and len(ids) > 0 and not isinstance(ids, str | bytes)
    if not right or (dimensions == 2 and not all(map(_is_list, ids))):
        raise InputError(f"ids must be the tokens of a text, or of several; they are {shown(ids)}")
    texts = [list(text) for text in ids] if dimensions == 2 else [list(ids)]
    if continuations is not None:
        if dimensions == 2:
            raise InputError("continuations are those of one prompt: ids must be a single list of token ids")
        several = isinstance(continuations, Iterable) and not isinstance(continuations, str | bytes)
        continuations = list(continuations) if several else [continuations]
        if not all(map(_is_list, continuations)):
            raise InputError(f"continuations must be lists of token ids; they are {shown(continuations)}")
        # A copy is what gradients can flow through; what was made in inference mode is not.
        scores = score_continuations(model, texts[0], continuations, batch_size)
        return [each.logprobs.clone() for each in scores]
    found = [each.logprobs.clone() for each in score_texts(model, texts, batch_size=batch_size)]
    if dimensions == 1:
        return found[0]
    return torch.stack(found) if isinstance(ids, torch.Tensor) else found


def _is_list(ids: object) -> bool:
    text = isinstance(ids, str | bytes)
    return (isinstance(ids, Sequence) and not text) or getattr(ids, "ndim", 0) > 0


# Windows


class Window(NamedTuple):
    """Tokens start to end of a text, of which those from scored on are scored, given the others."""

    text: int  # its number
    start: int
    end: int
    scored: int


def windows(lengths_of_texts: Sequence[int], length: int, stride: int | None = None) -> list[Window]:
    """The windows of so many tokens of each text; none crosses from one text to the next.

    Without stride they stand side by side: each scores all its tokens but the first, and what is left at a
    text's end, shorter than a window, is left out. With stride each begins that many tokens after the last
    and scores what that one did not: every token but the first is scored once, up to the text's end.

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
    """Where buckets of positions in a window begin, and the end: doubling, eight of them at most.

    >>> bucket_edges(8192)
    [1, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    """
    return [1, *(length >> n for n in range(7, -1, -1) if length >> n > 1)]


class Sums(NamedTuple):
    """−log p of the tokens of a window, summed by bucket, and how many they are."""

    losses: list[float]
    tokens: list[int]


def window_sums(logprobs: Tensor, window: Window, length: int) -> Sums:
    """Sorts a window's scores into the buckets of its length."""
    import torch

    edges = bucket_edges(length)
    positions = torch.arange(window.scored - window.start, window.end - window.start, device="cpu")
    bucket = torch.bucketize(positions, torch.tensor(edges[1:], device="cpu"), right=True)
    losses = torch.zeros(len(edges) - 1, dtype=torch.float64, device="cpu")
    losses.index_add_(0, bucket, -logprobs.double().cpu())
    return Sums(losses.tolist(), torch.bincount(bucket, minlength=len(edges) - 1).tolist())


# What is done stays done: a file of results, a line a window


class State:
    """The windows done so far, in a file if one is given: what is interrupted goes on where it was."""

    def __init__(self, path: Path | None, run: dict[str, Any]) -> None:
        """run: what the results depend on. Raises ValueError where the file is of another run or kind."""
        self.path = path
        self.done: dict[tuple[int, Window], Sums] = {}
        if path is None:
            return
        header = {"format": _STATE, **run}
        if not os.path.lexists(path):
            write_whole(path, json.dumps(header) + "\n")
            return
        whole = read_bytes(path, LARGEST_TEXT)
        end = whole.rfind(b"\n") + 1  # the last line may have been cut off
        try:
            first, *rest = map(parse_json, whole[:end].splitlines())
            differ = [key for key, value in header.items() if first.get(key) != value]
            if "format" in differ:
                raise ValueError
            for line in rest:
                length, window, sums = (
                    line["length"],
                    Window(*line["window"]),
                    Sums(line["losses"], line["tokens"]),
                )
                buckets = len(bucket_edges(length)) - 1
                finite = all(math.isfinite(each) for each in sums.losses)
                scored = window.end - window.scored
                if not (
                    finite and len(sums.losses) == len(sums.tokens) == buckets and sum(sums.tokens) == scored
                ):
                    raise ValueError
                self.done[length, window] = sums
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise InputError(f"{path} is no file of this command's --state; give another name") from None
        if differ:
            key = differ[0]
            raise InputError(
                f"{path} is of another run: there {key} is {shown(first.get(key))}, here "
                f"{shown(header[key])}; give another --state, or the options of that run"
            )
        os.truncate(path, end)

    def add(self, length: int, window: Window, sums: Sums) -> None:
        self.done[length, window] = sums
        if self.path is not None:
            line = {"length": length, "window": window, "losses": sums.losses, "tokens": sums.tokens}
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
