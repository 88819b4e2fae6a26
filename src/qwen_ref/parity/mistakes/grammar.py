"""What ports of Qwen get wrong: a grammar of changes to the steps of the forward pass (forward.py).

People make the same few slips at every place: a step left out, done twice, done before its neighbour, with
another one's weight, transposed, with its sign turned, off by one, by half, with the wrong constant, or with
one of its relatives. A Slip is such a change to some steps. A slip may be made in all layers or in one, so
each becomes many mistakes. Mistakes are independent: two can be made in one run.

A choice is no mistake: a rounding that a port may decide to do, such as a KV cache in 8 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen_ref.parity.forward import Change, How

ALL = ("qkv", "out", "gate", "up", "down")  # a layer's matrices
_BEFORE = ("ids", "positions", "frequencies", "layers")
_AFTER = ("norm", "logits", "output")


@dataclass(frozen=True)
class Mistake:
    """One mistake, or one choice: what it is, in words, and the steps that it changes."""

    text: str
    changes: tuple[Change, ...] = ()
    # Ports that compute in half precision usually do this: there it is rounding and no mistake.
    usual_in_half: bool = False
    choice: bool = False  # a rounding that is nobody's mistake
    sized: bool = False  # nothing but the rounding of `dtype`: it is judged by the size of the error
    dtype: str | None = None  # the dtype to compute in, if it is another
    common: bool = False  # tried in all layers at once, and in pairs
    whole: bool = False  # what it does to a position depends on later ones
    longer_than: int = 0  # with no more positions than that it is the same as another mistake
    costly: bool = False  # it computes more than a layer does
    uncached: bool = False  # every decode step computes all positions again
    put_before: int | None = None  # a token before the ids; logits of the last T positions
    shown_first: bool = False  # with such a token: those of the first T

    @property
    def at_start(self) -> bool:
        """Whether it changes what comes before the layers, so that nothing can be taken from another run."""
        return any(change.step in _BEFORE for change in self.changes)

    def span(self, layers: int) -> tuple[int, int]:
        """The first and the last layer that it changes; -1 before them, `layers` after them."""
        first, last = layers, -1
        for step, _, where in self.changes:
            if step in _BEFORE:
                return 0, layers if any(change.step in _AFTER for change in self.changes) else layers - 1
            if step == "embed":
                first = -1
            elif step in _AFTER:
                last = layers
            elif where is None:
                first, last = min(first, 0), max(last, layers - 1)
            else:
                first, last = min(first, *where), max(last, *where)
        if self.dtype or self.uncached or self.put_before is not None:
            return 0, layers - 1
        return (first, max(first, last)) if self.changes else (0, layers - 1)


@dataclass(frozen=True)
class Slip:
    """A change that can be made in all layers or in one."""

    text: str
    hows: tuple[tuple[str, How], ...]
    common: bool = False
    usual_in_half: bool = False
    choice: bool = False
    whole: bool = False
    longer_than: int = 0
    alone: bool = True  # also tried in single layers
    costly: bool = False

    def in_all(self) -> Mistake:
        return self._in(None, self.text)

    def in_layer(self, layer: int) -> Mistake:
        return replace(self._in(frozenset((layer,)), f"{self.text}, in layer {layer} only"), common=False)

    def _in(self, layers: frozenset[int] | None, text: str) -> Mistake:
        hows = self.hows if layers is None else [each for each in self.hows if each[0] not in _AFTER]
        changes = tuple(Change(step, how, layers) for step, how in hows)
        options: dict[str, Any] = {"common": self.common, "whole": self.whole, "costly": self.costly}
        options["longer_than"] = self.longer_than
        return Mistake(text, changes, self.usual_in_half, self.choice, **options)


def slip(text: str, steps: str, how: How, **options: Any) -> Slip:
    """One change to several steps, separated by blanks."""
    return Slip(text, tuple((step, how) for step in steps.split()), **options)


known = functools.partial(slip, common=True)

NONE = Mistake("no mistake")


def made(*hows: tuple[tuple[str, How], ...]) -> tuple[Change, ...]:
    return tuple(Change(step, how) for each in hows for step, how in each)


def rounded_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)
