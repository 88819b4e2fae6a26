"""The one rank of a command that runs alone; watch.py has several. Nothing here needs torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

TIMEOUT = 60.0  # seconds; torch's own is half an hour


class Ranks:
    """One process, rank 0 of 1. watch.WatchedRanks does what there is to do with several."""

    rank, size = 0, 1

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def share(self, text: str | None) -> str:
        """Rank 0's text, on every rank. The others wait for it, however long that takes; they give None."""
        return text or ""

    def meet(self, device: str) -> None:
        """Starts the default process group, in which the ranks meet."""

    def until_interrupted(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Passes steps on. Ctrl-C takes effect between steps: during one, the other ranks need this one."""
        yield from steps


def started_by_torchrun() -> bool:
    """Whether this process is one of several that share a model."""
    return "WORLD_SIZE" in os.environ or "RANK" in os.environ
