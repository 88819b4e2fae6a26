"""torchrun's variables in the environment, checked before any rank is waited for."""

from __future__ import annotations

import os
from typing import NamedTuple

from qwen_ref.config import InputError


class Launch(NamedTuple):
    """What torchrun tells a process: its rank of how many, its place on its machine, where the ranks meet."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def launched() -> Launch | None:
    """torchrun's variables; None where the process was started alone. ValueError where some are missing."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        there = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
        raise InputError(
            f"{there or 'RANK and WORLD_SIZE'} in the environment without {', '.join(missing)}: start the "
            "ranks with torchrun, which sets them all, or unset WORLD_SIZE and RANK to run alone"
        )
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    local_rank = _number("LOCAL_RANK") if os.environ.get("LOCAL_RANK") else rank
    if not (0 <= rank < size and local_rank >= 0 and 0 < port < 2**16):
        raise InputError(
            f"{rank=}, {size=}, {local_rank=} and {port=} in the environment cannot be: RANK and LOCAL_RANK "
            "count from 0 to WORLD_SIZE - 1, MASTER_PORT is at most 65535"
        )
    return Launch(rank, size, local_rank, os.environ["MASTER_ADDR"], port)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise InputError(f"{name}={os.environ[name]!r} in the environment must be a whole number") from None
