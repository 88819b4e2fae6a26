"""The ranks of a command: one process alone, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_ref.config import InputError

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


def ranks_of_command(timeout: float, folder: Path | None = None) -> Ranks:
    """Those of this command, by torchrun's variables. torch is imported only where there are several.

    Raises InputError where the folder's model cannot be cut for them.
    """
    if not 0 < timeout < 1e6:
        raise InputError(f"{timeout=} must be a number of seconds above 0 and below 1,000,000")
    if not started_by_torchrun():
        return Ranks()
    # torch, which reads this when it is imported, reports a lost connection with stacks of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from qwen_ref.commands.watch import WatchedRanks, launched

    launch = launched()
    if folder is not None and launch is not None:
        from qwen_ref.loading.loader import check_cut

        check_cut(folder, launch.size)
    return Ranks() if launch is None or launch.size == 1 else WatchedRanks(launch, timeout)
