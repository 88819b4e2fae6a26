"""The ranks of a command: one process alone, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

TIMEOUT = 60.0  # seconds; torch's own is half an hour


class Ranks:
    """A process that runs alone. watch.py has several: what they do together is nothing here."""

    rank, size = 0, 1

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def share(self, text: str | None) -> str:
        """Rank 0's text on every rank, however long rank 0 needs to have it."""
        return text or ""

    def meet(self, device: str) -> None:
        """The ranks' default process group."""

    def until_interrupted(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Passes steps on. Ctrl-C waits for the end of a step: within it, the other ranks need this one."""
        yield from steps


def started_by_torchrun() -> bool:
    """Whether this process is one of several that share a model."""
    return "WORLD_SIZE" in os.environ or "RANK" in os.environ
